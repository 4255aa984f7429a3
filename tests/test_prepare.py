"""`nanodiffusion prepare`: shards that are a function of the source, whatever interrupts it; a count of what is in them."""

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from nanodiffusion import cli
from nanodiffusion.data import load_data
from nanodiffusion.data.captions import read_captioned
from nanodiffusion.data.kept import alone
from nanodiffusion.data.shards import expand_shards, read_shards
from nanodiffusion.data.urls import read_table

ROOT = Path(__file__).parents[1]


def run(*words: object) -> int:
    return cli.main(["prepare", *map(str, words)])


def pixels(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def photos(home: Path, n: int = 7, height: int = 12) -> Path:
    """Pictures in two class folders, some with a caption of their own, and two that are none."""
    for i in range(n):
        file = home / ("cat" if i % 3 else "red_fox") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, height)).save(file)
        if i % 2:
            file.with_suffix(".txt").write_text(f"number {i}")
    (home / "cat" / "broken.png").write_bytes(b"nothing")
    (home / "cat" / "empty.jpg").write_bytes(b"")
    return home


def sums(home: Path) -> dict[str, str]:
    """The SHA-256 of all files that a preparation leaves."""
    files = [file for file in sorted(home.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {file.relative_to(home).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def census(home: Path) -> dict:
    return json.loads((home / "census.json").read_text())


# ---- pictures that are here


def test_a_captioned_folder_becomes_shards_in_sorted_order_to_the_byte(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    assert run(source, f"out={tmp_path / 'a'}", "per_shard=4") == 0
    assert run(source, f"out={tmp_path / 'b'}", "per_shard=4", "threads=3") == 0
    assert sums(tmp_path / "a") == sums(tmp_path / "b")
    faults: list[str] = []
    samples = list(read_shards(expand_shards(tmp_path / "a"), faults))
    expected = [*(("cat", i) for i in (1, 2, 4, 5)), *(("red_fox", i) for i in (0, 3, 6))]
    assert not faults and [s.meta["file"] for s in samples] == [f"{name}/{i:02d}.png" for name, i in expected]
    assert [s.label for s in samples] == [0] * 4 + [1] * 3
    for sample, (name, i) in zip(samples, expected):
        np.testing.assert_array_equal(np.asarray(sample.image), pixels(i))
        assert sample.caption == (f"number {i}" if i % 2 else f"a photo of a {name.replace('_', ' ')}")


def test_the_census_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(photos(tmp_path / "photos"), f"out={tmp_path / 'a'}", "per_shard=4") == 0
    found = census(tmp_path / "a")
    assert found["samples"] == 7 and found["sizes"] == {"16x12": 7} and found["short_side"] == {"0-63": 7}
    assert found["classes"] == {"cat": 4, "red_fox": 3}
    texts = ["number 1", "number 3", "number 5", *["a photo of a cat"] * 2, *["a photo of a red fox"] * 2]
    counts = [len(text.split()) for text in texts]
    mean = round(sum(counts) / 7, 2)
    assert found["captions"] == {
        "missing": 0,
        "letters": {"min": 8, "median": 16, "mean": round(sum(map(len, texts)) / 7, 2), "max": 20},
        "words": {"min": 2, "median": sorted(counts)[3], "mean": mean, "max": max(counts)},
    }
    faults = ["cat/broken.png: not a PNG, JPEG or WEBP", "cat/empty.jpg: the file is empty"]
    assert found["faults"]["list"] == faults and found["faults"]["count"] == 2
    said = capsys.readouterr().out
    assert "7 pictures, 2 faults" in said and faults[0] in said


@pytest.mark.parametrize(("resize", "size"), [("center_crop", (8, 8)), ("keep_ratio", (11, 8))])
def test_pictures_are_fitted(resize: str, size: tuple[int, int], tmp_path: Path) -> None:
    source = tmp_path / "photos"
    photos(source, 2)
    assert run(source, f"out={tmp_path / 'a'}", "size=8", f"resize={resize}") == 0
    first = next(iter(read_shards(expand_shards(tmp_path / "a"), [])))
    original = Image.fromarray(pixels(1))
    if resize == "center_crop":
        expected = ImageOps.fit(original, (8, 8), Image.Resampling.BICUBIC)
    else:
        expected = original.resize((11, 8), Image.Resampling.BICUBIC)
    assert first.image.size == size
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(expected))


@pytest.mark.parametrize(
    ("ending", "words", "stored"), [("jpg", (), "jpg"), ("jpeg", (), "jpeg"), ("jpeg", ("encode=jpg",), "jpg")]
)
def test_pictures_that_do_not_change_keep_their_bytes(
    ending: str, words: tuple[str, ...], stored: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    out = io.BytesIO()
    Image.fromarray(pixels(0)).save(out, "JPEG")
    (tmp_path / "photos" / f"a.{ending}").write_bytes(out.getvalue())
    (tmp_path / "photos" / "a.txt").write_text("a")
    assert run(tmp_path / "photos", f"out={tmp_path / 'o'}", *words) == 0
    with tarfile.open(tmp_path / "o" / "00000.tar") as archive:
        assert archive.extractfile(f"000000000.{stored}").read() == out.getvalue()  # type: ignore[union-attr]
        assert archive.getnames() == [f"000000000.{name}" for name in (stored, "json", "txt")]


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_the_size_before_any_preparation_is_told_after_it(form: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    source = photos(tmp_path / "photos", 3)  # 12 x 16
    (source / "cat" / "01.json").write_text('{"original_height": 120, "original_width": 160}')
    out = tmp_path / "out"
    assert run(source, f"out={out}", "size=8", f"format={form}") == 0
    data = load_data("pictures", path=str(out), size=8)
    expected = {"number 1": [120, 160], "a photo of a cat": [12, 16], "a photo of a red fox": [12, 16]}
    sizes = data.batch(torch.arange(3))[1]["sizes"][:, :2].tolist()
    assert dict(zip(data.captions, sizes)) == expected
    assert run(source, f"out={tmp_path / 'same'}", f"format={form}") == 0  # as they were: 12 x 16
    again = load_data("pictures", path=str(tmp_path / "same"), size=8)
    sizes = again.batch(torch.arange(3))[1]["sizes"][:, :2].tolist()
    assert dict(zip(again.captions, sizes)) == expected


def test_a_published_set_becomes_shards_with_the_class_in_the_caption(tmp_path: Path) -> None:
    assert run("digits", f"out={tmp_path}", "split=test", "n=30", "per_shard=20", "template=the digit {}") == 0
    data = load_data("digits", "test")
    samples = list(read_shards(expand_shards(tmp_path), []))
    assert len(samples) == 30 and data.labels is not None
    assert {tuple(np.asarray(s.image)[..., 0].reshape(-1)) for s in samples} <= {
        tuple(np.round(image * 255 / 16).astype(np.uint8).reshape(-1)) for image in load_digits().images
    }
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(np.asarray(sample.image)[..., 0], data.x[i, 0].numpy())
        label = int(data.labels[i])
        assert (sample.label, sample.caption) == (label, f"the digit {label}")
    assert census(tmp_path)["samples"] == 30


def test_a_set_as_a_captioned_folder_is_read_as_one(tmp_path: Path) -> None:
    assert run("digits", f"out={tmp_path}", "n=40", "format=folder") == 0
    data = load_data("digits")
    rows = sorted(read_captioned(tmp_path), key=lambda row: row.file.stem)
    assert len(rows) == 40 and data.labels is not None
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(Image.open(row.file)), data.x[i, 0].numpy())
        assert (row.label, row.caption) == (int(data.labels[i]), f"a photo of a {int(data.labels[i])}")
    before = sums(tmp_path)
    next(tmp_path.rglob("*.png")).unlink()
    assert run("digits", f"out={tmp_path}", "n=40", "format=folder") == 0 and sums(tmp_path) == before


def test_the_census_alone_of_shards_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(photos(tmp_path / "photos"), f"out={tmp_path / 'a'}", "per_shard=4") == 0
    shard = tmp_path / "a" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    capsys.readouterr()
    assert run(tmp_path / "a", "census=true", f"out={tmp_path / 'c'}") == 0
    found = census(tmp_path / "c")
    assert found["samples"] == 5 and found["faults"]["list"][-1] == "00001.tar:000000006: no picture"
    assert found["faults"]["count"] == 2 and found["faults"]["list"][0].startswith("00001.tar: the archive is damaged")
    assert run(str(tmp_path / "a" / "{00000..00000}.tar"), "census=true") == 0
    assert "4 pictures, 0 faults" in capsys.readouterr().out
    assert run(tmp_path / "photos", "census=true") == 0
    assert "7 pictures, 2 faults" in capsys.readouterr().out


# kill -9 in the middle, again and again: a fork of a process that has everything imported is killed after ever longer
KILLED = """
import os, signal, sys, time
import webdataset
from nanodiffusion import cli
from nanodiffusion.cli import prepare
source, out = sys.argv[1:]
kills = 0
for attempt in range(100):
    child = os.fork()
    if not child:
        os.close(1)
        os._exit(cli.main(["prepare", source, "out=" + out, "per_shard=5", "size=64"]))
    time.sleep(0.02 * 1.2**attempt)
    if os.waitpid(child, os.WNOHANG)[0]:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 24, 300)
    assert run(source, f"out={tmp_path / 'whole'}", "per_shard=5", "size=64") == 0
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert int(done.stdout.split()[-1]) >= 3, done.stderr
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")


# ---- pictures from addresses

# What img2dataset 1.47 does, without a network: the same options, files and stats; 404, broken and slow by the address's name.
FAKE = """
    #!{python}
    import csv, io, json, os, sys, tarfile
    import pyarrow, pyarrow.parquet
    options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
    out, per = options["output_folder"], int(options["number_sample_per_shard"])
    done = [int(name.split("_")[0]) for name in os.listdir(out) if name.endswith(".json")]
    with open(options["url_list"], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(os.path.join(os.path.dirname(__file__), "log"), "a") as log:
        log.write(json.dumps(options | {{"done": sorted(done)}}) + "\\n")
    behave = os.environ.get("FAKE", "")
    for shard in range(-(-len(rows) // per)):
        if shard in done:
            continue
        name = os.path.join(out, f"{{shard:05d}}")
        part, status, table = rows[shard * per : (shard + 1) * per], {{}}, []
        with tarfile.open(name + ".tar", "w") as archive:
            for i, row in enumerate(part):
                url, key = row[options["url_col"]], f"{{shard:05d}}{{i}}"
                why = "HTTP Error 404: Not Found" if "404" in url else "timed out" if "slow" in url else None
                why = why or ("Image decoding error" if "broken" in url else None)
                why = "<urlopen error [Errno 111] Connection refused>" if behave == "offline" else why
                status[why or "success"] = status.get(why or "success", 0) + 1
                table.append({{"url": url, "key": key, "error_message": why}})
                if why is None:
                    with open(os.path.join(os.path.dirname(__file__), "picture.jpg"), "rb") as picture:
                        raw = picture.read()
                    text = row[options["caption_col"]]
                    meta = json.dumps({{"caption": text, "url": url, "key": key, "status": "success"}}).encode()
                    for ending, data in (("jpg", raw), ("json", meta), ("txt", text.encode())):
                        info = tarfile.TarInfo(f"{{key}}.{{ending}}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        if behave == "killed" and shard == 1:
            os.truncate(name + ".tar", 700)
            sys.exit(0)  # what it says after Ctrl-C
        if behave == "fails":
            sys.exit(3)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), name + ".parquet")
        came = status.get("success", 0)
        failed = {{"failed_to_download": len(part) - came, "failed_to_resize": 0}}
        with open(name + "_stats.json", "w") as file:
            json.dump({{"count": len(part), "successes": came, **failed, "status_dict": status}}, file)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text(textwrap.dedent(FAKE.format(python=sys.executable)).lstrip())
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    Image.fromarray(pixels(0)).save(program.parent / "picture.jpg")
    return program


def table(home: Path, bad: dict[int, str] | None = None, head: str = "URL,TEXT", n: int = 10) -> Path:
    lines = [f"http://127.0.0.1:1/{(bad or {}).get(i, 'fine')}-{i}.jpg,caption {i}" for i in range(n)]
    (home / "table.csv").write_text("\n".join([head, *lines]) + "\n")
    return home / "table.csv"


def asked(fake: Path) -> list[dict]:
    return [json.loads(line) for line in (fake.parent / "log").read_text().splitlines()]


def fetch(fake: Path, home: Path, *more: str, source: Path | None = None) -> int:
    return run(source or home / "table.csv", f"out={home / 'out'}", f"img2dataset={fake}", "per_shard=4", *more)


def test_a_table_of_addresses_is_fetched_validated_and_counted(
    fake: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    table(tmp_path, {1: "404", 5: "404", 6: "broken", 9: "slow"})
    assert fetch(fake, tmp_path, "size=32", "threads=8", "timeout=3") == 0
    said = capfd.readouterr().out
    assert "6 of 10 pictures came, 4 did not" in said and "2 x HTTP Error 404: Not Found" in said
    options = asked(fake)[0]
    expected = {"url_col": "URL", "caption_col": "TEXT", "input_format": "csv", "output_format": "webdataset"}
    expected |= {"image_size": "32", "resize_mode": "center_crop", "thread_count": "8", "timeout": "3"}
    expected |= {"number_sample_per_shard": "4", "distributor": "multiprocessing", "incremental_mode": "incremental"}
    assert {key: options[key] for key in expected} == expected
    found = census(tmp_path / "out")
    failed = {"HTTP Error 404: Not Found": 2, "Image decoding error": 1, "timed out": 1}
    assert found["download"] == {"asked": 10, "came": 6, "failed": failed} and found["samples"] == 6
    captions = [s.caption for s in read_shards(expand_shards(tmp_path / "out"), [])]
    assert captions == [f"caption {i}" for i in (0, 2, 3, 4, 7, 8)]
    assert fetch(fake, tmp_path, "size=32", "threads=2", "timeout=3") == 0
    assert len(asked(fake)) == 1  # all is there: nothing is fetched again


def test_an_interrupted_fetch_names_its_shards_and_goes_on(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    monkeypatch.setenv("FAKE", "killed")
    assert fetch(fake, tmp_path) == 2
    said = capsys.readouterr().err
    assert "2 of 3 shards are not whole" in said
    assert "00001.tar (begun, not done), 00002.tar (not there)" in said
    monkeypatch.delenv("FAKE")
    assert fetch(fake, tmp_path) == 0
    assert [options["done"] for options in asked(fake)] == [[], [0]]
    assert census(tmp_path / "out")["samples"] == 10


@pytest.mark.parametrize(
    ("harm", "said"),
    [("cut_tar", "00001.tar (the archive"), ("no_tar", "00001.tar (not there)"), ("bad_stats", "its stats cannot be")],
)
def test_a_shard_that_was_harmed_is_fetched_again(
    harm: str, said: str, fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table(tmp_path)
    assert fetch(fake, tmp_path) == 0
    shard, stats = tmp_path / "out" / "00001.tar", tmp_path / "out" / "00001_stats.json"
    if harm == "cut_tar":
        os.truncate(shard, 1000)
    elif harm == "no_tar":
        shard.unlink()
    else:
        stats.write_text("{")
    capsys.readouterr()
    assert fetch(fake, tmp_path) == 0
    assert said in capsys.readouterr().err and asked(fake)[-1]["done"] == [0, 2]
    assert census(tmp_path / "out")["samples"] == 10


def test_what_could_not_be_had_without_a_network_is_tried_again(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    monkeypatch.setenv("FAKE", "offline")
    assert fetch(fake, tmp_path) == 0
    assert "nothing came for 00000.tar, 00001.tar, 00002.tar: the same command tries again" in capsys.readouterr().out
    monkeypatch.delenv("FAKE")
    assert fetch(fake, tmp_path) == 0 and census(tmp_path / "out")["samples"] == 10


def test_a_program_that_fails_is_said(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    table(tmp_path)
    monkeypatch.setenv("FAKE", "fails")
    assert fetch(fake, tmp_path) == 2 and "img2dataset ended with 3" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_table_shows_its_columns_and_rows(kind: str, tmp_path: Path, capsys) -> None:
    rows = [{"Image_URL": f"https://host.example/{i}", "alt_text": f"text {i}", "n": i} for i in range(9)]
    file = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        lines = ["\t".join(map(str, row)) for row in (list(rows[0]), *(row.values() for row in rows))]
        texts = {"tsv": "\n".join(lines), "json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
        file.write_text(texts[kind])
    assert run(file, f"out={tmp_path / 'o'}", "per_shard=4", "dry=true", "resize=border") == 0
    said = capsys.readouterr().out
    assert "--url_col=Image_URL --caption_col=alt_text" in said and f"--input_format={kind}" in said
    assert "9 rows, 3 shards" in said and "pip install img2dataset" in said and "--resize_mode=border" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_large_table_is_counted_in_little_memory(kind: str, tmp_path: Path) -> None:
    row = {"csv": "https://host.example/{},a text\n", "jsonl": '{{"url": "https://host.example/{}", "text": "a"}}\n'}
    lines = [row[kind].format(i) for i in range(20_000)]
    file = tmp_path / f"t.{kind}"
    file.write_text("url,text\n" * (kind == "csv") + "".join(lines))
    del lines
    tracemalloc.start()
    found = read_table(file)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.rows == 20_000 and most < file.stat().st_size / 2


def test_the_program_that_is_not_there_is_said_with_its_installation(tmp_path: Path, capsys) -> None:
    assert run(table(tmp_path), f"out={tmp_path / 'o'}", f"img2dataset={tmp_path / 'none'}") == 2
    said = capsys.readouterr().err
    assert "img2dataset is not here" in said and "python3 -m venv" in said and len(said.splitlines()) <= 6


def test_names_that_steer_a_terminal_or_are_no_text_are_spelt_out(tmp_path: Path, capsys) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for name in (b"a\x1b[31m.png", b"b\xff.png"):
        with open(os.fsencode(source) + b"/" + name, "wb") as file:
            file.write(b"nothing")
        with open(os.fsencode(source) + b"/" + name[:-4] + b".txt", "wb") as file:
            file.write(b"a caption")
    Image.fromarray(pixels(0)).save(os.fsencode(source) + b"/c\xff.png", "PNG")
    with open(os.fsencode(source) + b"/c\xff.txt", "wb") as file:
        file.write(b"a caption")
    assert run(source, f"out={tmp_path / 'o'}") == 0
    assert "a\\x1b[31m.png: not a PNG" in capsys.readouterr().out
    assert census(tmp_path / "o")["samples"] == 1 and census(tmp_path / "o")["faults"]["count"] == 2


# ---- bad inputs


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "no_source": ([], "prepare what?"),
        "nothing_there": (["{home}/none", "out={home}/o"], "there is nothing to prepare"),
        "set_misspelt": (["fashion_mnist", "out={home}/o"], "did you mean 'fashion-mnist'"),
        "no_out": (["digits"], "where to?"),
        "out_is_a_file": (["digits", "out={home}/table.csv"], "out is a file"),
        "out_is_full": (["digits", "n=3", "out={home}/full"], "the output folder is not empty"),
        "key_of_another_kind": (["digits", "out={home}/o", "distributor=ray"], "says nothing of a set"),
        "key_misspelt": (["digits", "out={home}/o", "tempalte=x"], "did you mean 'template'"),
        "no_number": (["digits", "out={home}/o", "per_shard=many"], "not a value of per_shard"),
        "too_small": (["digits", "out={home}/o", "per_shard=0"], "not a value of per_shard"),
        "no_template": (["digits", "out={home}/o", "template=a digit"], "this is no template"),
        "resize_misspelt": (["digits", "out={home}/o", "resize=centre_crop"], "did you mean 'center_crop'"),
        "split_misspelt": (["digits", "out={home}/o", "split=validation"], "unknown split"),
        "shards_already": (["{home}/{{0..3}}.tar", "out={home}/o"], "these are shards already"),
        "shards_missing": (["{home}/{{0..3}}.tar", "census=true"], "4 of 4 are missing"),
        "column_misspelt": (["{home}/table.csv", "out={home}/o", "url=ULR"], "did you mean 'URL'"),
        "column_unknown": (["{home}/odd.csv", "out={home}/o"], "which column is the url?"),
        "no_addresses": (["{home}/table.csv", "out={home}/o", "url=TEXT", "caption=URL"], "these are no addresses"),
        "one_column": (["{home}/table.csv", "out={home}/o", "url=URL", "caption=URL"], "are one column"),
        "name_twice": (["{home}/two.csv", "out={home}/o", "caption=TEXT"], "two columns would have one name"),
        "table_missing": (["{home}/none.csv", "out={home}/o"], "there is no such table"),
        "table_empty": (["{home}/empty.csv", "out={home}/o"], "the table has no rows"),
        "table_not_parquet": (["{home}/bad.parquet", "out={home}/o"], "the table cannot be read"),
        "table_not_json": (["{home}/bad.json", "out={home}/o"], "the table cannot be read"),
        "distributor": (["{home}/table.csv", "out={home}/o", "distributor=slurm"], "unknown distributor"),
        "only_rubbish": (["{home}/rubbish", "out={home}/o"], "not one picture could be used"),
    }.values(),
    ids=lambda value: None if isinstance(value, list) else value.replace(" ", "_").replace("'", "")[:30],
)
def test_a_mistake_is_one_message(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table(tmp_path)
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "two.csv").write_text("URL,TEXT,caption\nhttp://host.example/,a,b\n")
    (tmp_path / "empty.csv").write_text("url,caption\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "bad.json").write_text('{"url": [1]}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "a.png").write_bytes(b"nothing")
    (tmp_path / "rubbish" / "a.txt").write_text("a caption")
    assert run(*(word.format(home=tmp_path) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 7 and "Traceback" not in error
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_another_preparation_is_not_mixed_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = photos(tmp_path / "photos")
    assert run(source, f"out={tmp_path / 'a'}", "per_shard=4") == 0
    assert run(source, f"out={tmp_path / 'a'}", "per_shard=5") == 2
    assert "key per_shard\n  expected: {'per_shard': 4}\n  found: {'per_shard': 5}" in capsys.readouterr().err
    (source / "cat" / "01.txt").write_text("another caption")
    before = sums(tmp_path / "a")
    assert run(source, f"out={tmp_path / 'a'}", "per_shard=4") == 2
    assert "this folder holds another preparation" in capsys.readouterr().err and sums(tmp_path / "a") == before


def test_two_at_once_in_one_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fcntl = pytest.importorskip("fcntl")
    assert run("digits", f"out={tmp_path}", "n=5") == 0
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("digits", f"out={tmp_path}", "n=5") == 2
    assert "another preparation is at work here" in capsys.readouterr().err


def test_a_file_system_without_locks_is_worked_on_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run("digits", f"out={tmp_path / 'a'}", "n=5") == 0 and census(tmp_path / "a")["samples"] == 5
    with alone(tmp_path / "b" / "kept.json"):
        (tmp_path / "b" / "kept.json").write_text("{}")


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_sigterm_ends_the_program_too(fake: Path, tmp_path: Path) -> None:
    fake.write_text(f"#!{sys.executable}\nimport os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    words = [str(table(tmp_path)), f"out={tmp_path / 'out'}", f"img2dataset={fake}"]
    command = [sys.executable, "-m", "nanodiffusion", "prepare", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as mine:
        assert mine.stdout is not None
        child = int(mine.stdout.readline())
        mine.send_signal(signal.SIGTERM)
        assert mine.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
