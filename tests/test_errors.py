"""What a user can get wrong: one message of a few lines that names it, an exit code, no traceback, and nothing lost."""

import builtins
import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanodiffusion.cli import guarded, main
from nanodiffusion.cli import train as train_command

pytest.importorskip("hydra")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
data: {name: array, path: data.npz}
net: {name: dit, patch: 2, dim: 8, depth: 1, heads: 2, time_features: 8}
batch_size: 6
steps: 2
log_every: 1
sample: {sampler: euler, ladder: karras, steps: 2, n: 3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, good.yaml that made it, and everything that can be wrong with files."""
    place = tmp_path_factory.mktemp("errors")
    here = Path.cwd()
    os.chdir(place)
    try:
        _write_data(place)
        _write_recipes(place)
        assert main(["train", "good.yaml", "name=good"]) == 0
        assert main(["train", "good.yaml", "name=points", "data=swiss-roll", "net=mlp", "net.hidden=[4]"]) == 0
        _write_broken_checkpoints(place)
    finally:
        os.chdir(here)
    return place


def _write_data(place: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, 1, 4, 4), np.uint8)
    np.savez("data.npz", x=x, label=np.arange(12) % 3)
    np.savez("nan.npz", x=np.where(np.arange(12).reshape(12, 1, 1, 1) == 7, np.nan, x).astype(np.float32))
    np.savez("labels.npz", x=x, label=np.full(12, -1))
    np.savez("objects.npz", x=np.array([{}], dtype=object))
    (place / "nothing").mkdir()
    (place / "broken").mkdir()
    Image.fromarray(x[0, 0]).save("broken/a.png")
    (place / "broken/b.png").write_bytes((place / "broken/a.png").read_bytes()[:40])
    (place / "a file").write_text("text")
    (place / "plain.png").write_bytes((place / "broken/a.png").read_bytes())
    (place / "cache/fashion-mnist").mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (place / "cache/fashion-mnist" / name).write_bytes(b"\0\0\x0d\3 no bytes")


def _write_recipes(place: Path) -> None:
    (place / "good.yaml").write_text(TINY)
    for name, text in {
        "twice": "lr: 1\nlr: 2\n",
        "syntax": "net: {name: mlp\nlr: 1\n",
        "list": "- lr\n- net\n",
        "environment": "name: ${oc.env:HOME}\n",
        "dangling": "lr: ${learning_rate}\n",
        "unset": "lr: ???\n",
        "hydra": "hydra: {searchpath: [pkg://os]}\n",
        "parent": "defaults: [no-such-recipe]\n",
        "target": "net: {name: mlp, _target_: os.system}\n",
    }.items():
        (place / f"{name}.yaml").write_text(text)
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00lr: 1")


def _write_broken_checkpoints(place: Path) -> None:
    good = place / "runs/good"

    def broken(name: str, change: Callable[[Path], object]) -> None:
        shutil.copytree(good, place / "runs" / name)
        change(place / "runs" / name / "checkpoint/step-00000002/model.safetensors")

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    broken("flipped", flip)
    broken("cut", lambda file: file.write_bytes(file.read_bytes()[:100]))
    broken("empty", lambda file: file.write_bytes(b""))
    broken("gone", lambda file: file.unlink())
    broken("bare", lambda file: shutil.rmtree(file.parents[1]))
    (place / "pickle.safetensors").write_bytes(pickle.dumps({"weight": 1}))
    (place / "cut.safetensors").write_bytes((good / "checkpoint/step-00000002/model.safetensors").read_bytes()[:-8])


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder by its SHA-256; what a run writes about itself anew at each start is left out."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "environment.json")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


GOOD, NEW = "train good.yaml name=good", "train good.yaml name=new"
# what is typed -> what the message must say
TABLE = {
    # files that are not there, or not what they should be
    "sample runs/none": ["runs/none", "no such run"],
    "sample": ["which run"],
    "train": ["which recipe"],
    "info none.safetensors": ["none.safetensors", "nothing"],
    "info no-such-thing": ["no-such-thing"],
    "info plain.png": ["plain.png", "settings"],
    "info 'a file'": ["a file"],
    "report runs/none": ["runs/none"],
    "sample runs/bare": ["no checkpoint"],
    "sample nothing": ["no checkpoint"],
    "sample runs/flipped": ["damaged", "SHA-256"],
    "sample runs/cut": ["damaged", "100 bytes instead of"],
    "sample runs/empty": ["damaged", "0 bytes"],
    "sample runs/gone/checkpoint/step-00000002": ["model.safetensors: missing"],
    "info pickle.safetensors": ["pickle.safetensors", "never opened"],
    "info cut.safetensors": ["cut.safetensors", "truncated or damaged"],
    # keys and values
    "train good.yaml learningrate=1": ["unknown key learningrate"],
    "train good.yaml batch_sise=1": ["did you mean 'batch_size'?"],
    "train good.yaml net.dept=2": ["net.dept", "did you mean 'depth'?"],
    "train good.yaml data.pth=x": ["pth", "did you mean 'path'?"],
    "train good.yaml sample.guidence=2": ["sample.guidence", "did you mean 'guidance'?"],
    "train good.yaml optimizer.weight_decai=0": ["optimizer.weight_decai", "did you mean 'weight_decay'?"],
    "train good.yaml lr_schedule.warmup_steps=5": ["lr_schedule.warmup_steps", "did you mean 'warmup'?"],
    "train good.yaml ema=[{name: constant, decey: 0.9}]": ["decey", "did you mean 'decay'?"],
    "train good.yaml schedule.sigma_mim=1": ["did you mean 'sigma_min'?"],
    "train good.yaml lr=fast": ["key lr", "float", "'fast'"],
    "train good.yaml steps=2.5": ["key steps", "int", "2.5"],
    "train good.yaml compile=1": ["key compile", "bool"],
    "train good.yaml net=3": ["net", "3"],
    "train good.yaml net.depth=two": ["net.depth", "'two'"],
    "train good.yaml trackers=[1]": ["trackers"],
    "train good.yaml sample=5": ["key sample"],
    "train good.yaml lr=1 lr=2": ["twice", "key lr"],
    "train good.yaml lr=1,2": ["-m"],
    "train good.yaml lr": ["key=value"],
    "train good.yaml net.depth=[1": ["cannot read 'net.depth=[1'"],
    "train good.yaml ~patience": ["does not set", "patience"],
    "train good.yaml hydra.run.dir=x": ["hydra.run.dir"],
    "train good.yaml lr=${oc.env:HOME}": ["oc.env", "key lr"],
    "train good.yaml steps=0": ["key steps"],
    "train good.yaml steps=-5": ["key steps"],
    "train good.yaml batch_size=0": ["key batch_size"],
    "train good.yaml lr=-1": ["key lr"],
    "train good.yaml cond_dropout=1.5": ["key cond_dropout"],
    "train good.yaml precision=fp8": ["fp8", "bf16"],
    # names
    "train digit": ["did you mean 'digits'?"],
    "train none.yaml": ["none.yaml"],
    "train good --config-dir nothing": ["no recipe 'good'"],
    "train good --config-dir none": ["none", "--config-dir"],
    f"{NEW} sample.sampler=oiler": ["did you mean 'euler'?"],
    f"{NEW} sample.ladder=karas": ["did you mean 'karras'?"],
    f"{NEW} schedule=dppm": ["did you mean 'ddpm'?"],
    f"{NEW} density=lognormal": ["did you mean 'log_normal'?"],
    f"{NEW} net=unit": ["did you mean 'unet'?"],
    f"{NEW} data=mnits": ["did you mean 'mnist'?"],
    f"{NEW} optimizer=adamW": ["did you mean 'AdamW'?"],
    f"{NEW} lr_schedule=cosin": ["did you mean 'cosine'?"],
    f"{NEW} ema=[powr]": ["did you mean 'power'?"],
    f"{NEW} weight=minsnr": ["did you mean 'min_snr'?"],
    f"{NEW} loss=mae": ["mae", "mse"],
    f"{NEW} prediction=epsilon": ["epsilon", "eps"],
    f"{NEW} clock=linear": ["linear", "flow"],
    f"{NEW} trackers=[wandbb]": ["did you mean 'wandb'?"],
    f"{NEW} device=cuda:77": ["no device 'cuda:77'"],
    f"{NEW} device=gpu": ["no device 'gpu'"],
    # recipes
    "train twice.yaml": ["twice.yaml", "duplicate key lr"],
    "train syntax.yaml": ["syntax.yaml", "line 2"],
    "train list.yaml": ["list.yaml", "mapping"],
    "train environment.yaml": ["environment.yaml", "oc.env"],
    "train dangling.yaml": ["dangling.yaml", "learning_rate"],
    "train unset.yaml": ["unset.yaml", "lr"],
    "train hydra.yaml": ["hydra.yaml", "key hydra"],
    "train parent.yaml": ["parent.yaml", "no-such-recipe"],
    "train target.yaml": ["net._target_"],
    "train binary.yaml": ["binary.yaml"],
    # sizes that do not fit
    f"{NEW} net.in_size=8": ["does not fit the data", "(1, 8, 8)", "(1, 4, 4)"],
    f"{NEW} net.channels_in=3": ["does not fit the data"],
    f"{NEW} net.patch=3": ["in_size", "a multiple of 3"],
    f"{NEW} net.heads=3": ["a multiple of 3", "8"],
    f"{NEW} net.depth=-1": ["depth"],
    f"{NEW} batch_size=7 accumulate=2": ["key batch_size", "a multiple of", "7"],
    f"{NEW} data=swiss-roll": ["does not fit the data"],
    f"{NEW} sample.ladder=trailing sample.steps=201": ["steps", "1 to 200", "201"],
    f"{NEW} sample.steps=0": ["steps"],
    f"{NEW} net.num_classes=0 sample.guidance=2": ["guidance", "text-conditional"],
    f"{NEW} sample.guidance_interval=[1]": ["guidance_interval"],
    f"{NEW} schedule.sigma_min=20": ["increasing"],
    f"{NEW} data.flip=true data.crop_padding=9": ["crop_padding"],
    # data
    f"{NEW} data.path=none.npz": ["none.npz"],
    f"{NEW} data.path=nan.npz": ["nan.npz", "NaN", "number 7"],
    f"{NEW} data.path=labels.npz": ["labels.npz"],
    f"{NEW} data.path=objects.npz": ["objects.npz"],
    f"{NEW} data.key=images": ["images"],
    f"{NEW} data={{name: datasaurus}}": ["needs 'file'"],
    f"{NEW} data={{name: folder, path: nothing, size: 4}}": ["nothing", "no image"],
    f"{NEW} data={{name: folder, path: broken, size: 4}}": ["b.png", "skip_bad"],
    f"{NEW} data={{name: folder, path: none, size: 4}}": ["none"],
    f"{NEW} data=fashion-mnist": ["train-images-idx3-ubyte", "SHA-256"],
    # a run that is there already, places that cannot be written
    f"{GOOD} batch_size=3": ["another configuration", "batch_size", "overwrite=true"],
    f"{GOOD} net.depth=2": ["another configuration", "'depth': 2"],
    "train good.yaml out=. name=broken overwrite=true": ["broken", "no run"],
    "train good.yaml 'out=a file'": ["a file", "Not a directory"],
    "sample runs/good 'grid=a file/x.png'": ["a file/x.png", "cannot write"],
    "sample runs/good 'npz=a file/x.npz'": ["Not a directory"],
    "sample runs/good 'out=a file/x'": ["Not a directory"],
    "sample runs/good npz=data.npz": ["data.npz", "not ours to replace"],
    # sampling
    "sample runs/good clas=1": ["did you mean 'class'?"],
    "sample runs/good guidence=1": ["did you mean 'guidance'?"],
    "sample runs/good sampler.chrn=1": ["sampler.chrn"],
    "sample runs/good steps.x=1": ["steps.x"],
    "sample runs/good sampler=oiler": ["did you mean 'euler'?"],
    "sample runs/good n=many": ["n", "int", "'many'"],
    "sample runs/good n=0": ["key n"],
    "sample runs/good batch=0": ["key batch"],
    "sample runs/good seed=-1": ["key seed"],
    "sample runs/good steps=0": ["steps"],
    "sample runs/good steps=-3": ["steps", "-3"],
    "sample runs/good n=1 n=2": ["twice"],
    "sample runs/good n": ["key=value"],
    "sample runs/good class=3": ["class", "0 to 2", "3"],
    "sample runs/good class=cat": ["cat", "valid: 0, 1, 2"],
    "sample runs/good class=[]": ["class"],
    "sample runs/points class=0": ["knows no classes"],
    "sample runs/points guidance=2": ["guidance", "text-conditional"],
    "sample runs/points out=x": ["points"],
    "sample runs/points image=plain.png": ["image"],
    "sample runs/good weights=ema-7": ["ema-7", "ema-0, model"],
    "sample runs/good image=none.png": ["none.png"],
    "sample runs/good image=broken/b.png": ["b.png"],
    "sample runs/good image=plain.png strength=0": ["strength"],
    "sample runs/good strength=0.5": ["strength", "image"],
    "sample runs/good ladder.sigma_min=100": ["sigma_min"],
    "sample runs/good ladder=trailing steps=1000": ["1 to 200"],
}


def words_of(typed: str) -> list[str]:
    """Words by spaces, but not inside quotes, braces or brackets."""
    words, depth, quoted = [""], 0, False
    for c in typed:
        quoted ^= c == "'"
        depth += (c in "{[") - (c in "}]")
        if c == " " and not quoted and (depth <= 0 or words[-1].endswith("[1")):
            words.append("")
        elif c != "'":
            words[-1] += c
    return words


def fails(typed: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as every mistake does; its message."""
    capsys.readouterr()
    assert main(words_of(typed)) == 2
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(lines) <= 6 and lines[0].startswith("error: "), told.err
    assert "Traceback" not in told.out + told.err
    return "\n".join(lines)


@pytest.mark.parametrize("typed", TABLE)
def test_a_mistake_gets_one_message_and_costs_nothing(
    typed: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(place / "cache"))
    before = contents(place)
    message = fails(typed, capsys)
    assert [part for part in TABLE[typed] if part not in message] == [], message
    after = contents(place)
    assert {k: after.get(k) for k in before} == before
    assert not [k for k in after.keys() - before.keys() if k.startswith("runs")]


def test_the_table_is_long_enough():
    assert len(TABLE) >= 30


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_afresh(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    before = contents(place / "runs/flipped/checkpoint")
    assert "damaged" in fails("train good.yaml name=flipped steps=3", capsys)
    assert contents(place / "runs/flipped/checkpoint") == before


# ---- mistakes of the machine


@pytest.fixture
def new(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command for a run in a folder of its own, without pictures."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(train_command, "finish", lambda *_: None)
    return f"train good.yaml out={tmp_path}"


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_a_full_disk_keeps_the_checkpoints_that_are_there(
    new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(words_of(f"{new} steps=3 checkpoint_every=1")) == 0
    before = contents(tmp_path / "good/checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        message = fails(f"{new} steps=5", capsys)
    assert "No space left" in message and "intact" in message
    assert contents(tmp_path / "good/checkpoint") == before
    assert main(words_of(f"{new} steps=5")) == 0


def test_a_disk_that_fills_while_metrics_are_written_is_said_in_one_message(
    new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("nanodiffusion.tracking.Metrics.__call__", full_disk)
    assert "No space left" in fails(new, capsys)


REFUSALS = [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk refused", "free some space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk refused", "free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "a.png"), "the disk refused", "permissions"),
    (OSError(errno.EIO, "Input/output error", "a.png"), "the disk refused", "the disk"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "the connection failed", "the network"),
    (ConnectionRefusedError(), "the connection failed", "the network"),
    (TimeoutError("timed out"), "the connection failed", "the network"),
]


@pytest.mark.parametrize(("error", "said", "fix"), REFUSALS, ids=[type(row[0]).__name__ for row in REFUSALS])
def test_only_a_full_disk_is_to_be_emptied(error: OSError, said: str, fix: str, capsys: pytest.CaptureFixture[str]):
    def act() -> int:
        raise error

    assert guarded(act, "sample") == 2
    told = capsys.readouterr().err
    assert said in told and fix in told and (str(error.strerror or error) or type(error).__name__) in told
    assert ("free some space" in told) == (fix == "free some space")


def test_a_full_disk_keeps_the_batches_of_an_npz(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    typed = f"sample runs/good n=4 batch=2 npz={tmp_path / 'x.npz'}"
    opened = builtins.open

    def full(file, mode="r", *rest, **options):
        return full_disk() if "000000002" in str(file) and "w" in mode else opened(file, mode, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        assert "No space left" in fails(typed, capsys)
    kept = contents(tmp_path / "x.npz.parts")
    assert set(kept) == {"settings.json", "000000000.npy"}
    assert main(words_of(typed)) == 0
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 4


def test_weights_that_run_away_stop_the_run_and_leave_the_batch(
    new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    message = fails(f"{new} steps=100 lr=1e18 optimizer=SGD", capsys)
    assert "not finite" in message and "clip=1.0" in message
    assert (tmp_path / "good/bad-batch.safetensors").is_file()


@pytest.mark.parametrize(
    ("package", "typed", "extra"),
    [
        ("hydra", "train digits", "train"),
        ("sklearn.datasets", "train debug name=new", "data"),
        ("tensorboard", "train good.yaml name=new trackers=[tensorboard]", "tensorboard"),
        ("mlflow", "train good.yaml name=new trackers=[mlflow]", "mlflow"),
        ("wandb", "train good.yaml name=new trackers=[wandb]", "wandb"),
        ("av", "sample runs/good mp4=film.mp4", "viz"),
        ("matplotlib.figure", "sample runs/points grid=cloud.png", "viz"),
    ],
)
def test_a_missing_package_names_its_extra(
    package: str,
    typed: str,
    extra: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(typed, capsys)
    assert f"nanodiffusion[{extra}]" in message
    assert package.split(".")[0] in message


def test_a_memory_that_is_full_says_what_to_change(
    new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(train_command, "Runner", full)
    assert "batch_size" in fails(new, capsys)


def test_a_header_from_the_future_is_refused_by_the_name_of_its_key(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from nanodiffusion.tensors import load_tensors, save_tensors

    file = place / "runs/good/checkpoint/step-00000002/model.safetensors"
    tensors, meta = load_tensors(file)
    meta["config"]["quantum"] = True
    save_tensors(tmp_path / "new.safetensors", tensors, json.loads(json.dumps(meta)))
    assert "unknown key quantum" in fails(f"info {tmp_path / 'new.safetensors'}", capsys)
