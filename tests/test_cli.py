"""The command line, called as a user calls it: what it leaves on the disk, what it prints, how it ends."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nanodiffusion.checkpoint import checkpoints
from nanodiffusion.cli import main
from nanodiffusion.cli import sample as sample_command
from nanodiffusion.cli import train as train_command
from nanodiffusion.cli.evaluate.task import read_task
from nanodiffusion.cli.recipes import CONFIGS, VARIABLE, component_keys, parse_overrides
from nanodiffusion.cli.sample import Options, read_words
from nanodiffusion.cli.train import plan
from nanodiffusion.cli.words import parse_value, take_first
from nanodiffusion.config import Config
from nanodiffusion.data import DATASETS
from nanodiffusion.denoiser import CLOCKS, DISTANCES, PREDICTIONS, WEIGHTS
from nanodiffusion.ema import PROFILES
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.nets import NETS
from nanodiffusion.noise import DENSITIES, LADDERS, SCHEDULES
from nanodiffusion.objective import TASKS, make_density, make_schedule, make_task
from nanodiffusion.runner import Runner
from nanodiffusion.sampler import STEPS
from nanodiffusion.tensors import load_tensors
from nanodiffusion.tracking import TRACKERS

pytest.importorskip("hydra")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
data: {name: array, path: DATA}
net: {name: dit, patch: 2, dim: 8, depth: 1, heads: 2, time_features: 8}
validation: 0.2
batch_size: 6
accumulate: 2
steps: 12
lr_schedule: {name: cosine, warmup: 2}
ema: [ramped]
log_every: 5
validate_every: 4
checkpoint_every: 6
sample: {sampler: euler, ladder: karras, steps: 3, guidance: 1.5, n: 6}
"""
TIMES = ("images_per_s", "seconds", "memory_gb")
MISSING = UserError("of what?")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains in a second: 60 images of 4 x 4 pixels in 3 classes."""
    place = tmp_path_factory.mktemp("tiny")
    g = np.random.default_rng(0)
    np.savez(place / "data.npz", x=g.integers(0, 256, (60, 1, 4, 4), np.uint8), label=np.arange(60) % 3)
    (place / "tiny.yaml").write_text(TINY.replace("DATA", str(place / "data.npz")))
    return place / "tiny.yaml"


@pytest.fixture(scope="module")
def trained(tiny: Path) -> Path:
    """A finished run of the tiny recipe."""
    assert main(["train", str(tiny), f"out={tiny.parent / 'runs'}"]) == 0
    return tiny.parent / "runs" / "tiny"


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "finish", lambda *_: None)


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    newest = checkpoints(run / "checkpoint")[0]
    return {f.name: load_tensors(f)[0] for f in newest.glob("*.safetensors")}


def rows(run: Path) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


# ---- help


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["generate", "--help"]])
def test_help_answers_within_200_ms_and_without_torch(words: list[str]):
    code = (
        "import sys\nfrom nanodiffusion.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        assert done.returncode == 0, done.stderr
        assert done.stdout
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) <= 0.2


def test_the_help_of_sample_names_every_key(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    told = capsys.readouterr().out
    keys = [*typing.get_type_hints(Options), "sampler", "ladder", "steps", "guidance", "rescale", "interval"]
    assert [k for k in keys if f" {k}=" not in told] == []


def test_python_dash_m_starts_it():
    done = subprocess.run([sys.executable, "-m", "nanodiffusion", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"nanodiffusion \d+\.\d+\.\d+\n", done.stdout)


# ---- recipes


RECIPES = sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def test_the_promised_recipes_are_there():
    promised = "swissroll digits fashion-mnist fashion-mnist-dit cifar10 debug full"
    assert set(promised.split()) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_denoiser(name: str):
    ((config, _),) = plan(name, [])
    assert config.name == ("run" if name == "full" else name)
    if config.task["name"] in TASKS:  # others have the net of a checkpoint, see test_recipes_finetune
        with torch.device("meta"):  # of a size, but of no memory
            make_task(config).net(config)
    assert len(make_schedule(config)) > 1
    assert make_density(config)(3, torch.Generator()).shape == (3,)


def test_full_sets_every_key_at_its_default_and_explains_it():
    ((config, _),) = plan("full", [])
    assert config == Config()
    text = (CONFIGS / "full.yaml").read_text()
    for key in (f.name for f in dataclasses.fields(Config)):
        assert re.search(rf"^{key}:", text, re.MULTILINE), key
    for key in (f.name for f in dataclasses.fields(type(config.sample))):
        assert re.search(rf"^  {key}:", text, re.MULTILINE), key
    unexplained = re.findall(r"^(\w+):(?!.*#).*$", text, re.MULTILINE)
    assert set(unexplained) <= {"out", "sample"}


TABLES = {
    "task": [*TASKS, *FINETUNES],
    "data": [*DATASETS],
    "net": [*NETS],
    "prediction": [*PREDICTIONS],
    "clock": [*CLOCKS],
    "schedule": [*SCHEDULES],
    "density": [*DENSITIES],
    "loss": [*DISTANCES],
    "weight": [*WEIGHTS],
    "optimizer": ["AdamW8bit"],
    "ema": [*PROFILES, "device"],
    "trackers": [*TRACKERS],
    "sampler": [*STEPS],
    "ladder": [*LADDERS],
}


@pytest.mark.parametrize("key", TABLES)
def test_full_names_every_row_of_a_table(key: str):
    (said,) = re.findall(rf"^ *{key}: .*\n(?: +#.*\n)*", (CONFIGS / "full.yaml").read_text(), re.MULTILINE)
    assert [row for row in TABLES[key] if row not in re.findall(r"[\w-]+", said)] == []


def one(recipe: str, *words: str) -> Config:
    ((config, _),) = plan(recipe, words)
    return config


def test_a_key_the_recipe_does_not_mention_can_be_set():
    config = one(
        "debug", "patience=3", "sample.sampler.name=heun", "sample.sampler.churn=0.1", "optimizer.weight_decay=0.2"
    )
    assert config.patience == 3
    assert config.sample.sampler == {"name": "heun", "churn": 0.1}
    assert config.optimizer == {"name": "AdamW", "weight_decay": 0.2}


@pytest.mark.parametrize(
    "words", [["net.name=mlp", "net.hidden=[8]"], ["net.hidden=[8]", "net=mlp"], ["net={name: mlp, hidden: [8]}"]]
)
def test_another_component_drops_the_recipes_options_of_the_old_one(words: list[str]):
    assert one("debug", *words).net == {"name": "mlp", "hidden": [8]}


@pytest.fixture
def tuned(tmp_path: Path) -> str:
    """A recipe that trains on a checkpoint, with options of everything."""
    data = "data: {name: pictures, path: p, size: 64, control: {name: canny, low: 1, high: 2}}"
    (tmp_path / "tuned.yaml").write_text(
        f"task: {{name: lcm, base: b, checkpointing: true, rank: 8, w_max: 9}}\n{data}\n"
    )
    return str(tmp_path / "tuned.yaml")


@pytest.mark.parametrize(
    "word",
    ["data.control={name: paired}", "data.control.name=paired", "data={name: pictures, control: {name: paired}}"],
)
def test_so_does_another_component_inside_one(tuned: str, word: str):
    assert one(tuned, word).data == {"name": "pictures", "path": "p", "size": 64, "control": {"name": "paired"}}
    same = one(tuned, "data.control={name: canny, low: 0}").data["control"]
    assert same == {"name": "canny", "low": 0, "high": 2}


def test_own_recipes_define_a_component_inside_one_wholly(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [sd-controlnet, _self_]\ndata: {control: {name: paired}, workers: 1}\n"
    )
    config = one(str(tmp_path / "mine.yaml"))
    assert (config.data["control"], config.data["workers"], config.data["size"]) == ({"name": "paired"}, 1, 512)


def test_a_recipe_in_the_middle_defines_a_component_wholly_too(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("defaults: [fashion-mnist-dit, _self_]\nnet: {depth: 2}\n")
    assert one(str(tmp_path / "mine.yaml")).net == {"name": "dit", "patch": 2, "dim": 192, "depth": 2, "heads": 6}


def test_options_alone_belong_to_the_component_that_is_named_below(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("defaults: [debug, _self_]\noptimizer: SGD\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\noptimizer: {momentum: 0.9}\n")
    assert one(str(tmp_path / "mine.yaml")).optimizer == {"name": "SGD", "momentum": 0.9}


def test_a_file_of_a_group_fills_its_key(tmp_path: Path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net/small.yaml").write_text("name: mlp\nhidden: [4]\n")
    (tmp_path / "mine.yaml").write_text("defaults: [debug, net: small, _self_]\n")
    assert one(str(tmp_path / "mine.yaml")).net == {"name": "mlp", "hidden": [4]}


@pytest.mark.parametrize("word", ["task.name=lora", "task=lora", "task={name: lora}"])
def test_another_task_keeps_what_both_take(tuned: str, word: str):
    assert one(tuned, word).task == {"name": "lora", "base": "b", "checkpointing": True, "rank": 8}
    assert one(tuned, "task=inpaint", "task.frozen=bf16").task == {
        "name": "inpaint",
        "base": "b",
        "checkpointing": True,
        "frozen": "bf16",
    }
    assert one(tuned, "task=denoise").task == {"name": "denoise"}


def test_the_same_component_keeps_the_recipes_options():
    assert one("debug", "net.name=unet", "net.channels=16").net["blocks"] == 1


def test_a_text_is_short_for_a_component_of_that_name():
    config = one("debug", "sample.ladder=trailing", "ema=[constant]", "optimizer=SGD")
    assert (config.sample.ladder, config.ema) == ({"name": "trailing"}, [{"name": "constant"}])
    assert config.optimizer == {"name": "SGD"}
    assert {"data", "net", "optimizer", "sample.sampler", "sample.ladder"} <= set(component_keys())


def test_a_key_can_be_given_back_to_its_default():
    assert one("debug", "~batch_size").batch_size == Config().batch_size


def test_a_name_may_look_like_a_number():
    assert one("debug", "name=7").name == "7"


def test_own_recipes_build_on_ours_and_on_groups(tmp_path: Path):
    (tmp_path / "size").mkdir()
    (tmp_path / "size/big.yaml").write_text("# @package _global_\nbatch_size: 1024\n")
    (tmp_path / "size/small.yaml").write_text("# @package _global_\nbatch_size: 8\n")
    own = "defaults: [debug, size: big, _self_]\nnet: {name: mlp, hidden: [4]}\nsteps: 7\nlog_every: ${steps}\n"
    (tmp_path / "mine.yaml").write_text(own)
    for config in (one(str(tmp_path / "mine.yaml")), plan("mine", [], str(tmp_path))[0].config):
        assert (config.name, config.steps, config.log_every, config.batch_size) == ("mine", 7, 7, 1024)
        assert config.net == {"name": "mlp", "hidden": [4]}
        assert config.data == {"name": "digits"}
    assert one(str(tmp_path / "mine.yaml"), "size=small").batch_size == 8


def test_a_sweep_is_the_product_and_names_each_run():
    plans = plan("debug", ["lr=1e-3,1e-4", "net.dropout=0,0.1", "steps=3"], multirun=True)
    assert [p.config.name for p in plans] == [
        f"debug,lr={lr},net.dropout={d}" for lr in ("0.001", "0.0001") for d in ("0", "0.1")
    ]
    assert [(p.config.lr, p.config.net["dropout"]) for p in plans] == [(1e-3, 0), (1e-3, 0.1), (1e-4, 0), (1e-4, 0.1)]
    for p in plans:
        assert plan("debug", p.words)[0].config == p.config


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "-1",
        "1e-3",
        ".5",
        "true",
        "False",
        "null",
        "a",
        "'3'",
        '"a b"',
        "[0,1,2]",
        "[0.1, 5]",
        "[a,'1']",
        "[]",
        "inf",
        "007",
        "1_000",
        "['a cat, red',a dog]",
        '[ "a, b" , c]',
    ],
)
def test_sample_reads_values_as_hydra_does(text: str):
    expected = parse_overrides([f"x={text}"])[0].value()
    assert parse_value(text) == expected
    assert type(parse_value(text)) is type(expected)


def test_a_text_stays_as_it_is_typed():
    for text in ("007", "1_000", "1e3", "true", "it's"):
        assert read_words([f"text={text}"])[0] == {"text": text}
    listed, _ = read_words(["text=[007, a dog's bone, a cat's toy, 'red, blue', null]"])
    assert listed == {"text": ["007", "a dog's bone", "a cat's toy", "red, blue", None]}


# ---- the first word


@pytest.mark.parametrize("reader", [lambda word: read_task([word]).where, lambda word: take_first([word], MISSING)[0]])
def test_a_path_with_an_equals_sign_is_a_path(reader: Callable[[str], str], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    for path in ("runs/digits,lr=0.001", "digits,lr=0.001", "./n=3", "lr=1", str(tmp_path / "lr=1")):
        assert reader(path) == path
    for word in ("n=3", "sampler.order=3", "text=a/b"):
        with pytest.raises(UserError, match="what"):
            reader(word)


def test_a_run_of_a_sweep_is_sampled(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = shutil.copytree(trained, tmp_path / "tiny,lr=0.001,seed=0")
    assert arrays(run, tmp_path / "x.npz", "n=1", "steps=1")["arr_0"].shape == (1, 4, 4, 1)
    assert main(["sample", f"{tmp_path}/tiny,lr=0.1"]) == 2
    assert "no such run" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("words", [["train", "my.yml"], ["train", "--config_path", "my.yml"], ["info", "my.yml"]])
def test_a_recipe_that_cannot_be_composed_for_its_ending_is_to_be_renamed(
    words: list[str], beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("my.yml").write_text("defaults: [debug, _self_]\n")
    if beside:
        Path("my.yaml").write_text("defaults: [debug, _self_]\n")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "file my.yml" in error and "rename it to my.yaml" in error


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/x", "x/"])
def test_a_runs_name_is_one_folders(name: str):
    with pytest.raises(UserError, match="key name"):
        plan("debug", [f"name='{name}'"])
    assert one("debug", "name='a, b=1'").name == "a, b=1"


# ---- train


def test_train_leaves_everything_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["steps=3", "validate_every=3", "sample_every=3", "sample.steps=2", "batch_size=256"]
    assert main(["train", "debug", *small, f"out={tmp_path}"]) == 0
    run = tmp_path / "debug"
    left = ["samples.png", "trajectory.gif", "strip.png", "schedule.png", "loss.png", "report.html", "metrics.jsonl"]
    assert [name for name in left if not (run / name).is_file()] == []
    assert (run / "checkpoint/step-00000003/manifest.json").is_file()
    assert (run / "checkpoint/best/manifest.json").is_file()
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert Image.open(run / "samples.png").width > 10 * 8  # a column a class
    assert Image.open(run / "trajectory.gif").n_frames == 2
    told = capsys.readouterr().out
    assert all(str(run / name) in told for name in ("samples.png", "trajectory.gif", "checkpoint", "report.html"))
    assert re.search(r"step 3/3  loss \d\.\d+  [\d,]+ images/s  .* left", told)
    assert "try next:" in told


def test_points_get_clouds_and_a_field(tmp_path: Path):
    pytest.importorskip("matplotlib")
    small = ["steps=2", "sample.steps=2", "sample.n=10", "net.hidden=[4]", f"out={tmp_path}"]
    assert main(["train", "swissroll", *small]) == 0
    assert Image.open(tmp_path / "swissroll/trajectory.gif").n_frames == 2
    npz = tmp_path / "x.npz"
    assert main(["sample", str(tmp_path / "swissroll"), "n=5", "steps=2", f"npz={npz}"]) == 0
    assert np.load(npz)["x"].shape == (5, 2)
    assert np.load(npz)["x"].dtype == np.float32


def test_a_stopped_run_resumes_to_what_an_undisturbed_one_is(
    tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None
):
    words = ["train", str(tiny), f"out={tmp_path}"]
    watch = train_command.Progress.__call__

    def interrupted(self, step):
        watch(self, step)
        if step.step in (3, 9):
            os.kill(os.getpid(), {3: signal.SIGTERM, 9: signal.SIGINT}[step.step])

    monkeypatch.setattr(train_command.Progress, "__call__", interrupted)
    assert main(words) == 143
    assert main(words) == 130
    assert main(words) == 0
    ours, theirs = weights(tmp_path / "tiny"), weights(trained)
    assert ours.keys() == theirs.keys() == {"model.safetensors", "ema-0.safetensors", "optimizer.safetensors"}
    for name, tensors in theirs.items():
        assert ours[name].keys() == tensors.keys()
        assert all(torch.equal(ours[name][k], v) for k, v in tensors.items()), name
    assert rows(tmp_path / "tiny") == rows(trained)


def test_sigterm_saves_and_ends_with_143(tiny: Path, tmp_path: Path):
    words = ["train", str(tiny), f"out={tmp_path}", "steps=1000000", "log_every=1", "validate_every=0"]
    process = subprocess.Popen([sys.executable, "-m", "nanodiffusion", *words], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "tiny/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    step = int(re.search(r"stopped at step (\d+), saved in", told)[1])
    assert (tmp_path / f"tiny/checkpoint/step-{step:08d}/manifest.json").is_file()


def test_a_finished_run_says_so_and_how_to_go_on(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_pictures: None
):
    words = ["train", str(tiny), f"out={tmp_path}", "steps=2"]
    assert main(words) == 0
    before = weights(tmp_path / "tiny")
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "finished: step 2 of 2" in told
    more = re.search(r"to go on: nanodiffusion (.*)", told)[1]
    assert more.endswith("steps=4")
    assert str(weights(tmp_path / "tiny")) == str(before)
    assert main(more.split()) == 0
    assert (tmp_path / "tiny/checkpoint/step-00000004").is_dir()


def test_what_a_run_did_not_leave_when_it_ended_the_same_command_leaves(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    published, report = [], tmp_path / "tiny/report.html"

    def publish(runner: Runner) -> None:
        published.append(runner.trainer.step)
        if len(published) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "publish", publish)
    monkeypatch.setitem(train_command.DRAWINGS, "denoise", lambda runner, say: None)
    words = ["train", str(tiny), f"out={tmp_path}"]
    assert main([*words, "steps=2"]) == 0
    before = report.read_bytes()
    assert main([*words, "steps=4"]) == 130
    assert report.read_bytes() == before
    assert main([*words, "steps=4"]) == 0
    assert report.read_bytes() != before
    assert main([*words, "steps=4"]) == 0
    assert published == [2, 4, 4]


def test_a_run_that_was_to_start_afresh_is_stopped_with_a_command_that_keeps_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Runner, "run", lambda runner, each: "signal")
    assert main(["train", str(tiny), f"out={tmp_path}", "overwrite=true"]) == 143
    assert "the same command without overwrite=true goes on" in capsys.readouterr().out


def test_to_go_on_goes_on_where_patience_ended_a_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_pictures: None
):
    (tmp_path / "still.yaml").write_text(
        tiny.read_text().replace("validate_every: 4", "validate_every: 1") + "lr: 0.0\npatience: 2\n"
    )
    words = ["train", str(tmp_path / "still.yaml"), f"out={tmp_path}"]
    assert main(words) == 0 == main(words)
    told = capsys.readouterr().out
    assert "finished: no better validation loss for 2 validations, step 3" in told
    more = re.search(r"to go on: nanodiffusion (.*)", told)[1]
    assert more.endswith("steps=24 patience=0") and main(more.split()) == 0
    assert (tmp_path / "still/checkpoint/step-00000024").is_dir()


def test_to_go_on_works_where_the_environment_names_the_recipe(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    without_pictures: None,
):
    monkeypatch.setenv(VARIABLE, str(tiny))
    words = ["train", f"out={tmp_path}", "steps=1"]
    assert main(words) == 0 == main(words)
    command = shlex.split(re.search(r"to go on: (.*)", capsys.readouterr().out)[1])
    assert command[:4] == ["env", "-u", VARIABLE, "nanodiffusion"]
    monkeypatch.delenv(VARIABLE)
    assert main(command[4:]) == 0
    assert (tmp_path / "tiny/checkpoint/step-00000002").is_dir()


def test_the_next_commands_of_an_autoencoder_of_a_sweep_train_one_run(tmp_path: Path):
    config = one("autoencoder", "name='ae,lr=0.1'")
    runner = SimpleNamespace(folder=tmp_path / config.name, config=config, data=SimpleNamespace(shape=(3, 8, 8)))
    encode, then = map(shlex.split, train_command.TRIES["autoencode"](runner))
    (out,) = (word.removeprefix("out=") for word in encode if word.startswith("out="))
    (override,) = parse_overrides(then[3:])
    assert (override.key_or_group, override.is_sweep_override(), override.value()) == ("data.path", False, out)


def test_a_sweep_trains_every_run_and_one_that_fails_stops_no_other(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_pictures: None
):
    words = ["train", "-m", str(tiny), f"out={tmp_path}", "steps=1", "net.heads=2,3,4"]
    assert main(words) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny,net.heads=2", "tiny,net.heads=4"]
    assert "a multiple of 3" in capsys.readouterr().err


def test_dry_run_prints_a_recipe_and_the_net(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(tiny), f"out={tmp_path}", "--dry-run", "lr=0.5"]) == 0
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    lines = told.splitlines()
    assert {"lr: 0.5", "samples: 48 of (1, 4, 4), 3 classes", "ema: [{name: ramped}]"} <= set(lines)
    assert re.search(r"^parameters: [\d,]+$", told, re.MULTILINE)
    (tmp_path / "again.yaml").write_text("\n".join(lines[:-3]))
    assert one(str(tmp_path / "again.yaml")) == one(str(tiny), f"out={tmp_path}", "lr=0.5")


@pytest.mark.parametrize("recipe", ["sd-lora", "textual-inversion", "distill"])
def test_a_recipe_on_a_base_that_is_not_here_is_printed_and_nothing_fetched(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanodiffusion.finetune.base.Finetune.loaded", lambda *_: pytest.fail("the base is loaded"))
    for words in (["info", recipe], ["train", recipe, "--dry-run"]):
        assert main(words) == 0
        told = capsys.readouterr().out
        assert re.search(r"^task:? .*base: ", told, re.MULTILINE) and re.search(
            r"^parameters:? +not counted", told, re.M
        )


def test_missing_matplotlib_costs_pictures_and_no_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", str(tiny), f"out={tmp_path}", "steps=2"]) == 0
    run = tmp_path / "tiny"
    assert (run / "samples.png").is_file() and (run / "report.html").is_file()
    assert not (run / "schedule.png").exists()
    assert "no schedule.png" in capsys.readouterr().out
    small = ["steps=2", "sample_every=1", "sample.steps=2", "sample.n=4", "net.hidden=[4]", f"out={tmp_path}"]
    assert main(["train", "swissroll", *small]) == 0
    assert (tmp_path / "swissroll/report.html").is_file()


def test_ctrl_c_outside_of_training_ends_with_130(monkeypatch: pytest.MonkeyPatch, trained: Path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_command, "open_job", interrupt)
    assert main(["sample", str(trained)]) == 130


def test_the_demo_is_the_digits_recipe_in_runs_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    small = ["net.channels=8", "net.blocks=1", "batch_size=8", "steps=2", "validate_every=0", "sample.steps=2"]
    assert main(["demo", *small, "sample.n=10"]) == 0
    left = ["samples.png", "trajectory.gif", "checkpoint", "metrics.jsonl", "report.html"]
    assert [name for name in left if not (tmp_path / "runs/demo" / name).exists()] == []
    assert json.loads((tmp_path / "runs/demo/config.json").read_text())["data"] == {"name": "digits"}


# ---- sample


def arrays(run: Path, path: Path, *words: str) -> dict[str, np.ndarray]:
    assert main(["sample", str(run), f"npz={path}", *words]) == 0
    with np.load(path) as found:
        return dict(found)


def test_sample_takes_classes_by_number_name_list_and_none(trained: Path, tmp_path: Path):
    for word, labels in (
        ("class=1", [1, 1, 1, 1, 1]),
        ("class='2'", [2, 2, 2, 2, 2]),  # by its name
        ("class=[2,0]", [2, 0, 2, 0, 2]),
        ("class=null", [3, 3, 3, 3, 3]),
        ("class=all", [0, 1, 2, 0, 1]),
        ("seed=0", [0, 1, 2, 0, 1]),
    ):
        found = arrays(trained, tmp_path / f"{word}.npz", "n=5", word)
        assert found["labels"].tolist() == labels
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, 4, 4, 1), np.uint8)


def test_image_i_depends_on_seed_plus_i_and_not_on_the_batch(trained: Path, tmp_path: Path):
    whole = arrays(trained, tmp_path / "whole.npz", "n=7", "class=1", "sampler=ddpm")["arr_0"]
    parts = arrays(trained, tmp_path / "parts.npz", "n=7", "class=1", "sampler=ddpm", "batch=2")["arr_0"]
    later = arrays(trained, tmp_path / "later.npz", "n=3", "class=1", "sampler=ddpm", "seed=4")["arr_0"]
    np.testing.assert_allclose(parts.astype(int), whole.astype(int), atol=1)
    np.testing.assert_allclose(later.astype(int), whole[4:].astype(int), atol=1)
    assert (whole[0] != whole[1]).any()


def test_an_interrupted_npz_continues_where_it_stopped(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["n=9", "batch=2", "steps=2"]
    whole = arrays(trained, tmp_path / "whole.npz", *words)
    draw, drawn = sample_command.Job.states, []

    def states(self, start=0, stop=None):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(start)
        return draw(self, start, stop)

    monkeypatch.setattr(sample_command.Job, "states", states)
    assert main(["sample", str(trained), f"npz={tmp_path / 'x.npz'}", *words]) == 130
    assert not (tmp_path / "x.npz").exists()
    drawn.clear()
    found = arrays(trained, tmp_path / "x.npz", *words)
    assert drawn == [6, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.npz", "x.npz"]
    for key in ("arr_0", "labels"):
        np.testing.assert_array_equal(found[key], whole[key])
    drawn.clear()
    arrays(trained, tmp_path / "x.npz", *words)
    assert drawn == []


def test_samples_of_other_settings_are_never_overwritten(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = arrays(trained, tmp_path / "x.npz", "n=3")
    assert main(["sample", str(trained), f"npz={tmp_path / 'x.npz'}", "n=3", "seed=9"]) == 2
    assert "key seed" in capsys.readouterr().err
    with np.load(tmp_path / "x.npz") as after:
        assert (after["arr_0"] == before["arr_0"]).all()


def test_a_setting_that_is_no_longer_given_makes_other_samples(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arrays(trained, tmp_path / "x.npz", "class=1", "frames=3", "noise=slerp")
    assert main(["sample", str(trained), f"npz={tmp_path / 'x.npz'}", "class=1", "n=3"]) == 2
    assert "key frames, noise" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1]", b"null", b"{}", b'{"sed": 0}'])
def test_damaged_settings_of_an_interrupted_npz_are_one_message(
    text: bytes, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    (parts / "settings.json").write_bytes(text)
    assert main(["sample", str(trained), f"npz={tmp_path / 'x.npz'}", "n=2", "steps=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: these settings are damaged") and f"file {parts / 'settings.json'}" in error
    assert "found: " in error and f"fix: another npz=, or delete {parts}" in error


def test_pictures_carry_the_settings_that_made_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["n=4", "class=2", "guidance=2", "sampler=heun", "sampler.churn=0.1", "ladder.rho=5", "interval=[0.1,5]"]
    files = [f"grid={tmp_path / 'g.png'}", f"strip={tmp_path / 's.png'}", f"gif={tmp_path / 'a.gif'}"]
    assert main(["sample", str(trained), *words, *files, f"out={tmp_path / 'each'}", "rescale=0.7"]) == 0
    for file in ("g.png", "s.png", "each/000003.png"):
        settings = json.loads(Image.open(tmp_path / file).text["nanodiffusion"])
        assert settings["sampler"] == {"name": "heun", "churn": 0.1}
        assert settings["ladder"] == {"name": "karras", "rho": 5}
        assert (settings["class"], settings["guidance"], settings["guidance_interval"]) == (2, 2, [0.1, 5])
        assert (settings["guidance_rescale"], settings["step"]) == (0.7, 12)
    assert settings["seed"] == 3
    assert Image.open(tmp_path / "each/000003.png").size == (4, 4)
    assert Image.open(tmp_path / "a.gif").n_frames == 3
    capsys.readouterr()
    assert main(["info", str(tmp_path / "g.png")]) == 0
    assert "{name: heun, churn: 0.1}" in capsys.readouterr().out


def test_a_grid_is_written_into_the_run_when_nothing_is_asked_for(trained: Path):
    (trained / "sample.png").unlink(missing_ok=True)
    assert main(["sample", str(trained / "checkpoint/best"), "weights=model", "steps=1"]) == 0
    assert (trained / "sample.png").is_file()


def test_image_to_image_starts_from_the_picture(trained: Path, tmp_path: Path):
    start = tmp_path / "start.png"
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(start)
    weak = ["ladder=exponential", "ladder.sigma_min=0.001", "ladder.sigma_max=0.002", "strength=0.5", "steps=2"]
    found = arrays(trained, tmp_path / "x.npz", "n=2", f"image={start}", "guidance=1", *weak)["arr_0"]
    assert np.abs(found.astype(int) - 200).max() <= 3


# ---- info, report


def test_info_knows_runs_checkpoints_files_and_recipes(trained: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    step = trained / "checkpoint/step-00000012"
    for target in (trained, step, step / "model.safetensors", tiny):
        assert main(["info", str(target)]) == 0
        told = capsys.readouterr().out
        assert re.search(r"^parameters +[\d,]+$", told, re.MULTILINE)
        assert "dit" in told and "FLOPs" in told
    assert main(["info", str(trained)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"step-00000012 +sound", told) and re.search(r"best +sound", told)
    assert "3: 0, 1, 2" in told


def test_info_says_that_an_autoencoder_is_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    net = "net={name:autoencoder,widths:[8,8],latent_channels:2,groups:4,blocks:1}"
    words = [f"data={{name:array,path:'{tiny.parent / 'data.npz'}'}}", net, "steps=1", "batch_size=4", "device=cpu"]
    words += ["validation=0.2", "validate_every=0", "sample_every=0", f"out={tmp_path}"]
    assert main(["train", "autoencoder", *words]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "autoencoder")]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["what"].startswith("an autoencoder") and told["task"].startswith("autoencode (kl")
    assert told["codec"] == str(tmp_path / "autoencoder/codec")
    assert not {"prediction", "schedule", "sampler", "ladder"} & told.keys()


@pytest.mark.parametrize("command", ["sample", "info", "evaluate", "report"])
def test_a_folder_of_runs_is_refused_with_their_names(
    command: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / name)
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "this folder holds runs" in error and "found: one, two" in error
    assert f"fix: nanodiffusion {command} {tmp_path / 'one'}" in error


def test_report_writes_the_page_again(trained: Path):
    page = trained / "report.html"
    before = page.read_text()
    page.write_text("")
    assert main(["report", str(trained)]) == 0
    assert page.read_text() == before


def test_report_writes_nothing_into_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("mine")
    assert main(["report", str(tmp_path)]) == 2
    assert "no such run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# ---- several processes


@pytest.mark.slow
def test_two_processes_train_and_sample_what_one_does(tiny: Path, trained: Path, tmp_path: Path):
    def torchrun(*words: str) -> str:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "nanodiffusion"]
        done = subprocess.run([*launch, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = torchrun("train", str(tiny), f"out={tmp_path}", "accumulate=1")
    assert told.count("trained 12 steps") == 1
    ours, theirs = weights(tmp_path / "tiny"), weights(trained)
    for name, tensors in theirs.items():
        for key, value in tensors.items():
            torch.testing.assert_close(ours[name][key], value, rtol=1e-4, atol=1e-6)
    torchrun("sample", str(trained), "n=9", "batch=2", f"npz={tmp_path / 'two.npz'}")
    assert main(["sample", str(trained), "n=9", "batch=2", f"npz={tmp_path / 'one.npz'}"]) == 0
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
