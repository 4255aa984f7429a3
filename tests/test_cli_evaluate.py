"""`nanodiffusion evaluate`: what it measures and writes, the published weights from end to end, and what it refuses."""

import hashlib
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_runs import write_codec, write_run
from PIL import Image

from nanodiffusion.cli import EVALUATE, main
from nanodiffusion.cli.evaluate.result import write
from nanodiffusion.cli.evaluate.task import enough, read_task
from nanodiffusion.data.download import Published
from nanodiffusion.evaluate import Inception, frechet, kernel_subsets, moments, open_images
from nanodiffusion.evaluate.features import load_small
from nanodiffusion.evaluate.resize import RESIZES

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
data: {name: array, path: DATA}
net: {name: dit, patch: 2, dim: 8, depth: 1, heads: 2, time_features: 8}
batch_size: 6
steps: 6
ema: [ramped]
log_every: 5
checkpoint_every: 3
sample: {sampler: euler, steps: 2, guidance: 1.5, n: 6}
"""


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, a net that is trained in a moment, and no network."""
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nanodiffusion.evaluate.features.STEPS", 10)
    local = urllib.request.urlopen

    def offline(url: str, *args: Any, **kwargs: Any) -> Any:
        if not url.startswith("file:"):
            raise OSError("there is no network")
        return local(url, *args, **kwargs)

    monkeypatch.setattr(urllib.request, "urlopen", offline)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """a.npz and b.npz: 60 and 50 labelled images (8 8 1)."""
    for name, n, seed in (("a", 60, 0), ("b", 50, 1)):
        random = np.random.default_rng(seed)
        x = random.integers(0, 256, (n, 8, 8, 1), np.uint8) // (1 + np.arange(n) % 3)[:, None, None, None]
        np.savez(tmp_path / f"{name}.npz", arr_0=x.astype(np.uint8), labels=np.arange(n) % 3)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 60 images of 4 x 4 pixels in 3 classes, with checkpoints at steps 3 and 6."""
    place = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    np.savez(place / "data.npz", x=random.integers(0, 256, (60, 1, 4, 4), np.uint8), label=np.arange(60) % 3)
    (place / "tiny.yaml").write_text(TINY.replace("DATA", str(place / "data.npz")))
    assert main(["train", str(place / "tiny.yaml"), f"out={place / 'runs'}", "device=cpu"]) == 0
    return place / "runs" / "tiny"


def evaluate(*words: object) -> int:
    return main(["evaluate", *map(str, words), "force=true", "device=cpu"])


def result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def levels(path: Path) -> torch.Tensor:
    return torch.cat(list(open_images(str(path)).batches(100))).flatten(1).double()


# ---- what it measures


def test_the_helps_examples_measure_the_1438_images_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/digits/checkpoint").mkdir(parents=True)
    examples = [
        line.split()[2:] for line in EVALUATE.splitlines() if line.startswith("  nanodiffusion evaluate runs/digits")
    ]
    assert len(examples) >= 2
    for words in examples:
        enough(1438, "digits", read_task([*words, "device=cpu"]))


def test_of_the_folder_one_is_in_the_result_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    write(read_task([".", "device=cpu"]), {"metrics": {}})
    assert result(tmp_path / "photos.evaluation.json") == {"metrics": {}}


def test_pixel_distances_are_those_of_the_arrays(place: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate(place / "a.npz", f"reference={place / 'b.npz'}", "features=pixels") == 0
    found = result(place / "a.npz.evaluation.json")
    x, y = (levels(place / f"{name}.npz") / 127.5 - 1 for name in "ab")
    assert found["metrics"]["frechet_distance (features: pixels)"]["value"] == pytest.approx(
        frechet(moments(x), moments(y)), rel=1e-4
    )
    spread = kernel_subsets(x, y, 100, 25).std()
    value = found["metrics"]["kernel_distance (features: pixels)"]["value"]
    assert abs(value - float(kernel_subsets(x, y, 1))) < 4 * float(spread) / 10
    printed = capsys.readouterr().out
    assert all(name in printed for name in found["metrics"]) and "no FID" in printed and "not comparable" in printed


def test_the_result_says_all_that_makes_it_comparable(place: Path):
    out = place / "deep" / "result.json"
    assert evaluate(place / "a.npz", f"reference={place / 'b.npz'}", "features=small", "n=40", f"out={out}") == 0
    found = result(out)
    net = next((place / "cache" / "evaluate").glob("small-*.safetensors"))
    sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["features"] == {"name": "small", "sha256": sha256(net), "resize": "", "dim": 64}
    assert (found["samples"]["n"], found["reference"]["n"]) == (40, 50)
    assert found["reference"]["sha256"] == sha256(place / "b.npz")
    assert found["pairwise"] == {"samples": 40, "reference": 50, "seed": 0}
    assert {"nanodiffusion", "torch", "numpy", "pillow", "python"} == set(found["versions"])
    assert "accuracy (features: small)" in found["metrics"]
    for score in found["metrics"].values():
        assert score["low"] <= score["value"] <= score["high"] and score["interval"].startswith("95 %")


def test_the_same_command_gives_the_same_numbers(place: Path):
    words = (place / "a.npz", f"reference={place / 'b.npz'}", "features=small")
    found = []
    for name in ("first", "second"):
        assert evaluate(*words, f"out={place / name}") == 0
        found.append({k: v for k, v in result(place / name).items() if k != "seconds"})
    assert found[0] == found[1]


def test_kept_statistics_stand_for_their_images(place: Path):
    a, b, kept = place / "a.npz", place / "b.npz", place / "kept.npz"
    assert evaluate(a, f"reference={b}", "features=small", f"save={kept}", f"out={place / 'images'}") == 0
    assert evaluate(a, f"reference={kept}", "features=small", f"out={place / 'kept'}") == 0
    assert result(place / "kept")["metrics"] == result(place / "images")["metrics"]
    assert evaluate(b, "features=small", f"save={place / 'alone.npz'}") == 0
    assert evaluate(a, f"reference={place / 'alone.npz'}", "features=small", f"out={place / 'alone'}") == 0
    assert result(place / "alone")["metrics"] == result(place / "images")["metrics"]


def test_a_net_by_its_file_is_called_by_its_name(place: Path):
    a, b = place / "a.npz", place / "b.npz"
    assert evaluate(a, f"reference={b}", "features=small", f"out={place / 'small'}") == 0
    file = next((place / "cache" / "evaluate").glob("small-*.safetensors"))
    assert load_small(file).hidden.out_features == 64
    assert evaluate(a, f"reference={b}", f"features={file}", "metrics=frechet", f"out={place / 'file'}") == 0
    ((name, score),) = result(place / "file")["metrics"].items()
    assert name == f"frechet_distance (features: {file.name})"
    assert score == result(place / "small")["metrics"]["frechet_distance (features: small)"]


# ---- the published weights


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inception:
    """Random weights, pickled where the published ones are said to lie."""
    torch.manual_seed(0)
    net = Inception().eval()
    torch.save(net.state_dict(), tmp_path / "pt_inception-0.pth")
    address = (tmp_path / "pt_inception-0.pth").as_uri()
    file = Published(address, hashlib.sha256((tmp_path / "pt_inception-0.pth").read_bytes()).hexdigest())
    for module in ("nanodiffusion.evaluate.features", "nanodiffusion.cli.evaluate.reference"):
        monkeypatch.setattr(f"{module}.INCEPTION", file)
    return net


@torch.no_grad()
@pytest.mark.slow
def test_published_weights_are_fetched_verified_converted_and_called_fid(published: Inception, place: Path):
    for i in range(2):
        np.savez(place / f"{i}.npz", arr_0=np.random.default_rng(i).integers(0, 256, (4, 8, 8, 1), np.uint8))
    words = (place / "0.npz", f"reference={place / '1.npz'}", "metrics=[frechet]")
    assert evaluate(*words, "resize=tf1", f"out={place / 'tf1'}") == 0
    found = result(place / "tf1")
    pixels = [torch.cat(list(open_images(str(place / f"{i}.npz")).batches(4))).expand(-1, 3, -1, -1) for i in range(2)]
    expected = [moments(published.features(RESIZES["tf1"](x))) for x in pixels]
    assert found["metrics"]["FID"]["value"] == pytest.approx(frechet(*expected), rel=1e-4)
    assert (found["features"]["resize"], found["features"]["name"]) == ("tf1", "inception")
    assert found["features"]["sha256"] == hashlib.sha256((place / "pt_inception-0.pth").read_bytes()).hexdigest()


# ---- runs


def test_a_run_is_held_against_its_data(run: Path):
    assert evaluate(run, "features=pixels", "n=20", "guidance=2", "metrics=[frechet,accuracy]", "seed=5") == 0
    found = result(run / "evaluation.json")
    assert (
        found["samples"]["sample"]["guidance"] == 2 and found["samples"]["seed"] == 5 and found["samples"]["step"] == 6
    )
    assert found["reference"]["name"] == "array" and found["reference"]["n"] == 60


def test_a_runs_own_images_are_those_of_sample(run: Path, tmp_path: Path):
    npz, words = tmp_path / "s.npz", ("features=pixels", "metrics=[frechet]")
    assert main(["sample", str(run), "n=20", f"npz={npz}", "batch=20", "device=cpu"]) == 0
    assert evaluate(npz, f"reference={run.parents[1] / 'data.npz'}", *words, f"out={tmp_path / 'npz'}") == 0
    assert evaluate(run, "n=20", *words, f"out={tmp_path / 'run'}") == 0
    values = [next(iter(result(tmp_path / name)["metrics"].values()))["value"] for name in ("npz", "run")]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_classes_inside_pictures_of_sample_are_read(run: Path, tmp_path: Path):
    files, words = [f"npz={tmp_path / 's.npz'}", f"out={tmp_path / 'each'}"], ("features=pixels", "metrics=[accuracy]")
    assert main(["sample", str(run), "n=20", "class=[2,0]", *files, "device=cpu"]) == 0
    scores = []
    for name in ("s.npz", "each"):
        assert (
            evaluate(tmp_path / name, f"reference={run.parents[1] / 'data.npz'}", *words, f"out={tmp_path / 'r'}") == 0
        )
        scores.append(result(tmp_path / "r")["metrics"]["accuracy (features: pixels)"])
    assert scores[0] == scores[1]
    assert open_images(str(tmp_path / "each")).labels.tolist() == [2, 0] * 10  # type: ignore[union-attr]
    Image.new("L", (4, 4)).save(tmp_path / "each" / "other.png")
    assert open_images(str(tmp_path / "each")).labels is None


def test_a_run_is_asked_for_classes_as_sample_is(run: Path, tmp_path: Path):
    npz, words = tmp_path / "s.npz", ("features=pixels", "metrics=[frechet,accuracy]")
    assert main(["sample", str(run), "n=20", "class=[2,0]", f"npz={npz}", "batch=20", "device=cpu"]) == 0
    assert evaluate(npz, f"reference={run.parents[1] / 'data.npz'}", *words, f"out={tmp_path / 'npz'}") == 0
    assert evaluate(run, "n=20", "class=[2,0]", *words, f"out={tmp_path / 'run'}") == 0
    found = [result(tmp_path / name) for name in ("npz", "run")]
    for one, other in zip(*(r["metrics"].values() for r in found)):
        assert one["value"] == pytest.approx(other["value"], rel=1e-6)
    assert found[1]["samples"]["class"] == [2, 0]


def test_a_run_is_asked_for_texts_as_sample_is(place: Path):
    run = write_run(place / "run", pooled_dim=6, text="words:6", codec=str(write_codec(place / "vae")))
    texts = ("text=[a cat,a dog]", "negative=a bird", "guidance=3", "n=20")
    words = (f"reference={place / 'b.npz'}", "features=pixels", "metrics=[frechet]")
    assert main(["sample", str(run), *texts, f"npz={place / 's.npz'}", "device=cpu"]) == 0
    for where, more, name in ((place / "s.npz", (), "npz"), (run, texts, "own"), (run, (*texts[2:], "text=a"), "else")):
        assert evaluate(where, *more, *words, f"out={place / name}") == 0
    same, own, other = (next(iter(result(place / n)["metrics"].values()))["value"] for n in ("npz", "own", "else"))
    assert own == pytest.approx(same, rel=1e-6) and other != pytest.approx(same, rel=1e-3)
    told = result(place / "own")["samples"]
    assert told["text"] == ["a cat", "a dog"] and told["negative"] == "a bird" and len(told["encoder_sha256"]) == 64


CURVES = {"guidance": ("values=[1,2]", [1, 2]), "steps": ("values=[3,1]", [3, 1]), "training": ("batch=64", [3, 6])}


@pytest.mark.parametrize("kind", CURVES)
def test_curves_are_written_and_drawn(kind: str, run: Path):
    word, values = CURVES[kind]
    assert evaluate(run, f"curve={kind}", word, "n=20", "features=pixels", "metrics=[frechet,recall]") == 0
    found = result(run / f"evaluation-{kind}.json")
    assert [row["value"] for row in found["rows"]] == values
    assert len({row["samples"]["sha256"] for row in found["rows"]}) == len(values)
    with Image.open(run / f"evaluation-{kind}.png") as picture:
        assert picture.width > picture.height


# ---- what is refused: one message, one exit code


def mixed(place: Path) -> list[str]:
    (place / "mixed").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(place / "mixed" / f"{size}.png")
    return [f"{place / 'mixed'}", f"reference={place / 'b.npz'}", "force=true", "features=pixels"]


def damaged(place: Path) -> list[str]:
    (place / "a.npz").write_bytes((place / "a.npz").read_bytes()[:-40])
    return [f"{place / 'a.npz'}", f"reference={place / 'b.npz'}", "force=true", "features=pixels"]


def empty(place: Path) -> list[str]:
    (place / "empty").mkdir()
    return [f"{place / 'empty'}", f"reference={place / 'b.npz'}"]


def other_features(place: Path) -> list[str]:
    assert evaluate(place / "b.npz", "features=random", f"save={place / 'kept.npz'}") == 0
    return [f"{place / 'a.npz'}", f"reference={place / 'kept.npz'}", "features=pixels", "force=true"]


def not_a_number(place: Path) -> list[str]:
    np.savez(place / "nan.npz", arr_0=np.full((9, 8, 8, 1), np.nan, np.float32))
    return [f"{place / 'nan.npz'}", f"reference={place / 'b.npz'}", "features=pixels", "force=true"]


def moments_only(place: Path) -> list[str]:
    np.savez(place / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    return [
        f"{place / 'a.npz'}",
        f"reference={place / 'moments.npz'}",
        "features=pixels",
        "force=true",
        "metrics=[recall]",
    ]


def plain(*words: str) -> Callable[[Path], list[str]]:
    return lambda place: [f"{place / 'a.npz'}", f"reference={place / 'b.npz'}", "force=true", *words]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "too few": (lambda place: [f"{place / 'a.npz'}", f"reference={place / 'b.npz'}"], "too few images"),
    "too few even so": (plain("n=1"), "too few images"),
    "several sizes": (mixed, "several sizes"),
    "no weights": (plain(), "no weights of Inception"),
    "resize": (plain("resize=bilinear"), "unknown resize"),
    "damaged": (damaged, "cannot be read"),
    "other features": (other_features, "other features"),
    "NaN": (not_a_number, "NaN"),
    "empty folder": (empty, "no image here"),
    "metric": (plain("metrics=[fid]"), "unknown metrics"),
    "more than there are": (plain("n=61"), "not so many"),
    "moments only": (moments_only, "moments only"),
    "features": (plain("features=smal"), "unknown features"),
    "key": (plain("referense=x"), "unknown key"),
    "type": (plain("n=many"), "wrong type"),
    "curve of no run": (plain("curve=guidance"), "is for a run"),
    "class of no run": (plain("class=1"), "is for a run"),
    "nothing": (lambda place: [], "evaluate what"),
    "no reference": (lambda place: [f"{place / 'a.npz'}", "force=true"], "against what"),
    "no such images": (lambda place: ["fashion-mnits", "reference=digits"], "no images"),
    "shards": (lambda place: ["shards/{000..003}.tar", "reference=digits"], "shards are not read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_message(case: str, place: Path, capsys: pytest.CaptureFixture[str]):
    words, said = REFUSED[case]
    given = words(place)
    capsys.readouterr()
    assert main(["evaluate", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) <= 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["curve=guidance"], "which values"),
        (["curve=noise"], "unknown curve"),
        (["curve=training", "values=[5]"], "no such checkpoint"),
        (["curve=steps", "values=[1.5]"], "wrong type"),
    ],
)
def test_curves_that_cannot_be_are_refused(words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate(run, "n=4", "features=pixels", *words) == 2
    assert said in capsys.readouterr().err
