"""The run report: one file, no requests, nothing trusted, small, and written whatever is missing."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from nanodiffusion import report
from nanodiffusion.errors import UserError

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags, checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """A folder with everything that a run can leave."""
    folder = tmp_path / "digits"
    (folder / "samples").mkdir(parents=True)
    written = {
        "config": {"seed": 3, "net": {"name": "unet", HOSTILE: HOSTILE}, "data": {"name": "digits"}},
        "environment": {
            "command": ["nanodiffusion", "train", "a b", HOSTILE],
            "versions": {"torch": "2.13"},
            "parameters": 1234567,
            "timings": {"training": 12.5},
        },
        "data": {"name": "digits", "n": 1797, "shape": [1, 8, 8], "classes": {"zero": 178, HOSTILE: 182}},
    }
    for name, content in written.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    rows = [{"step": s, "loss": 1 / s, "images_per_s": 100.0, HOSTILE: 1.0} for s in range(1, 300)]
    rows.append({"step": 300, "val/loss": 0.5, "val/sigma": [0.1, 1, 10], "val/loss_per_sigma": [0.1, 0.2]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    frames = [Image.new("L", (16, 16), 9 * i) for i in range(5)]
    frames[0].save(folder / "samples.png")
    frames[0].save(folder / "trajectory.gif", save_all=True, append_images=frames[1:], duration=50)
    for step in (100, 200, 1000):
        frames[1].save(folder / "samples" / f"step-{step:06d}.png")
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def requests(page: Page) -> list[str]:
    """Every address in the page that is not a part of it."""
    found = [
        v or "" for k, v in page.attributes if k.split(":")[-1] in ("src", "href", "srcset", "data", "action", "poster")
    ]
    return [v for v in found if not v.startswith(("data:image/", "#"))]


def test_report_holds_everything_and_asks_for_nothing(run):
    path = report.write_report(run)
    text = path.read_text()
    page = Page(text)
    assert path == run / "report.html"
    assert "http://" not in text and "https://" not in text and "url(" not in text.replace("url(#", "")
    assert requests(page) == []
    assert page.tags.count("img") == 5
    titles = ("Samples", "Training", "Samples during training", "Data", "Timings", "Configuration", "Environment")
    assert re.findall("<h2>(.*?)</h2>", text) == list(titles)
    for said in ("nanodiffusion train 'a b'", "1.23 M", "1,797", "step 1,000", "net", "unet", "2.13", "12.5"):
        assert said in page.text


def test_report_trusts_no_text(run):
    text = report.write_report(run).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 4  # config, command, class and metric
    assert HOSTILE not in text


def test_report_has_curves_without_matplotlib(run, monkeypatch):
    pytest.importorskip("matplotlib")
    assert "<polyline" not in report.write_report(run).read_text()
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    text = report.write_report(run).read_text()
    assert "<polyline" in text
    assert requests(Page(text)) == []


@pytest.mark.slow
def test_report_stays_below_five_megabytes(run):
    large = noise(700, 700)
    for i in range(40):
        large.save(run / "samples" / f"step-{i:03d}.png", compress_level=0)
    noise(900, 700).save(run / "samples.png", compress_level=0)
    frames = [noise(140, 130, i).convert("L") for i in range(50)]
    frames[0].save(run / "trajectory.gif", save_all=True, append_images=frames[1:], duration=50)
    big = {f"key{i}": {"'" * 500 + str(j): "'" * 1000 for j in range(40)} for i in range(400)}
    for name in ("config", "environment", "data"):
        (run / f"{name}.json").write_text(json.dumps({**big, "timings": big, "command": "'" * 100_000}))
    path = report.write_report(run)
    assert path.stat().st_size <= 5_000_000
    assert Page(path.read_text()).tags.count("img") == 2 + report.GRIDS


def test_a_shrunk_gif_keeps_its_length(tmp_path):
    frames = [noise(120, 60, i).convert("L") for i in range(60)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[50] * 59 + [1500])
    kind, content = report._fitted(tmp_path / "a.gif", 150_000)
    (tmp_path / "b.gif").write_bytes(content)
    with Image.open(tmp_path / "b.gif") as gif:
        times = []
        for i in range(gif.n_frames):
            gif.seek(i)
            times.append(gif.info["duration"])
    assert (kind, len(times), sum(times)) == ("gif", 40, 59 * 50 + 1500)
    assert len(content) <= 150_000


def test_report_leaves_out_what_is_missing(tmp_path):
    text = report.write_report(tmp_path).read_text()
    assert "<h2>" not in text
    Page(text)


def test_report_is_the_same_when_written_again(run):
    first = report.write_report(run).read_bytes()
    assert report.write_report(run).read_bytes() == first


def test_report_without_a_run_or_a_place_to_write_is_a_user_error(tmp_path, run):
    with pytest.raises(UserError, match="no such run"):
        report.write_report(tmp_path / "nothing")
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        report.write_report(run)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_bad_config_names_its_file(run, content):
    (run / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json"):
        report.write_report(run)


def test_a_large_broken_picture_names_its_file(run):
    (run / "samples.png").write_bytes(b"x" * 1_000_000)
    with pytest.raises(UserError, match=r"samples\.png is not a picture"):
        report.write_report(run)


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"step": 3, "name": "\udcc3', "\0\0\0"])
def test_metrics_cut_off_by_a_kill_lose_only_the_last_line(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n' + cut.encode("utf-8", "surrogateescape"))
    assert report.load_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_complete_last_line_needs_no_newline(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}')
    assert report.load_metrics(tmp_path / "m") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("bad", ['{"step": 2, "lo', "[2]", "3"])
def test_any_other_bad_metrics_line_is_named(tmp_path, bad):
    (tmp_path / "m").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="line 2"):
        report.load_metrics(tmp_path / "m")
    with pytest.raises(UserError, match="cannot read"):
        report.load_metrics(tmp_path / "missing")
