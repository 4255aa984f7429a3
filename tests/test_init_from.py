"""`init_from`: a run that starts from another one's weights, fitted to its own net; never on resume."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IMAGES, POINTS, differences, make_runner, saved
from torch.testing import assert_close

from nanodiffusion.errors import UserError
from nanodiffusion.run import load_run
from nanodiffusion.runner import Runner
from nanodiffusion.tensors import load_tensors, save_tensors
from nanodiffusion.train import Step

DIT = {"name": "dit", "dim": 16, "depth": 1, "heads": 2, "patch": 2}


def pictures(folder: Path, classes: int = 3, size: int = 4) -> dict[str, Any]:
    random = np.random.default_rng(0)
    path = folder / f"{classes}-{size}.npz"
    x = random.integers(0, 256, (24, 1, size, size), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(24) % classes)
    return {"name": "array", "path": str(path), "key": "x", "label_key": "y"}


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in runner.trainer.denoiser.net.state_dict().items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A finished run of points, and its folder."""
    folder = tmp_path_factory.mktemp("first")
    make_runner(folder, POINTS, validate_every=10, validation=0.2).run()
    return folder / "run"


@pytest.mark.parametrize(("named", "file"), [("ema-0", "ema-0"), ("model", "model")])
def test_the_named_weights_of_a_run_are_those_it_starts_from(tmp_path, first, named, file):
    runner = make_runner(tmp_path, POINTS, init_from=str(first), init_weights=named)
    expected = {k.split("/")[1]: v for k, v in saved(first)[0].items() if k.startswith(f"{file}/")}
    assert runner.trainer.step == 0
    assert_close(weights(runner), expected, rtol=0, atol=0)
    assert_close(dict(runner.trainer.emas[0].tensors), expected, rtol=0, atol=0)  # the average starts there too


def test_a_checkpoint_and_a_file_will_do(tmp_path, first):
    best = first / "checkpoint/best"
    for where in (best, best / "ema-0.safetensors"):
        runner = make_runner(tmp_path / where.name, POINTS, init_from=str(where))
        assert_close(weights(runner), load_tensors(best / "ema-0.safetensors")[0], rtol=0, atol=0)


def test_a_run_without_averages_gives_its_weights(tmp_path):
    make_runner(tmp_path / "a", POINTS, ema=[]).run()
    runner = make_runner(tmp_path / "b", POINTS, init_from=str(tmp_path / "a/run"))
    assert_close(weights(runner), dict(load_run(tmp_path / "a/run", "model").denoiser.net.state_dict()), rtol=0, atol=0)


def test_a_stopped_run_goes_on_from_its_own_weights_though_the_others_are_gone(tmp_path, first):
    def stop(step: Step) -> None:
        if step.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    copy = tmp_path / "copy.safetensors"
    save_tensors(copy, load_tensors(first / "checkpoint/best/ema-0.safetensors")[0], {})
    options = {**POINTS, "init_from": str(copy)}
    make_runner(tmp_path / "whole", options).run()
    assert make_runner(tmp_path / "cut", options).run(stop) == "signal"
    copy.unlink()
    assert make_runner(tmp_path / "cut", options).run() == "done"
    assert differences(tmp_path / "whole/run", tmp_path / "cut/run") == []
    environment = json.loads((tmp_path / "cut/run/environment.json").read_text())
    assert environment["init"] == [f"weights of {copy}"]  # what was said at the start is still there


def test_overwrite_starts_from_them_again(tmp_path, first):
    make_runner(tmp_path, POINTS, steps=3).run()
    runner = make_runner(tmp_path, POINTS, init_from=str(first), overwrite=True)
    assert_close(weights(runner), dict(load_run(first).denoiser.net.state_dict()), rtol=0, atol=0)


def test_another_number_of_classes_keeps_the_old_ones_and_the_null_class_and_says_so(tmp_path):
    said: list[str] = []
    options = {**IMAGES, "net": DIT, "accumulate": 1, "steps": 2}
    make_runner(tmp_path / "a", {**options, "data": pictures(tmp_path)}).run()
    old = load_run(tmp_path / "a/run").denoiser.net.state_dict()["y_embedder.embedding_table.weight"]
    new = make_runner(tmp_path / "b", {**options, "data": pictures(tmp_path, 5)}, init_from=str(tmp_path / "a/run"))
    table = weights(new)["y_embedder.embedding_table.weight"]
    assert old.shape[0] == 4 and table.shape[0] == 6
    assert_close(table[:3], old[:3], rtol=0, atol=0)
    assert_close(table[-1], old[-1], rtol=0, atol=0)
    said = json.loads((tmp_path / "b/run/environment.json").read_text())["init"]
    assert len(said) == 2 and "class" in said[1]


def test_another_size_of_image_is_a_start_too(tmp_path):
    options = {**IMAGES, "net": DIT, "accumulate": 1, "steps": 2}
    make_runner(tmp_path / "a", {**options, "data": pictures(tmp_path)}).run()
    larger = {**options, "data": pictures(tmp_path, 3, 8), "init_from": str(tmp_path / "a/run")}
    assert make_runner(tmp_path / "b", larger).run() == "done"


def unreadable(folder: Path, first: Path) -> dict[str, str]:
    """What is no start, each with a word of the message."""
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("these are no weights")
    (folder / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    whole = (first / "checkpoint/best/model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_tensors(folder / "other.safetensors", {"a": torch.zeros(3)}, {})
    return {
        "nowhere": "no such run",
        "empty": "no checkpoint",
        "notes.txt": "cannot load tensors",
        "old.ckpt": "pickle",
        "cut.safetensors": "truncated",
        "other.safetensors": "another network",
    }


@pytest.mark.parametrize("name", ["nowhere", "empty", "notes.txt", "old.ckpt", "cut.safetensors", "other.safetensors"])
def test_what_is_no_start_is_one_message_that_names_the_file(tmp_path, first, name):
    said = unreadable(tmp_path, first)[name]
    with pytest.raises(UserError, match=said) as e:
        make_runner(tmp_path / "out", POINTS, init_from=str(tmp_path / name))
    assert name in str(e.value) and len(str(e.value).splitlines()) <= 6
    assert not (tmp_path / "out/run").exists()


def test_weights_that_the_run_does_not_have_are_refused(tmp_path, first):
    with pytest.raises(UserError, match="no such weights") as e:
        make_runner(tmp_path, POINTS, init_from=str(first), init_weights="ema-7")
    assert "ema-0, model" in str(e.value)


def test_a_net_of_another_width_is_refused_by_the_names_of_its_weights(tmp_path, first):
    with pytest.raises(UserError) as e:
        make_runner(tmp_path, POINTS, net={"name": "mlp", "hidden": [24, 16]}, init_from=str(first))
    assert "weight" in str(e.value) and str(first) in str(e.value)


def test_another_start_is_another_run(tmp_path, first):
    make_runner(tmp_path, POINTS, steps=2).run()
    with pytest.raises(UserError, match="key init_from"):
        make_runner(tmp_path, POINTS, steps=4, init_from=str(first))


def test_a_run_from_before_a_key_was_there_is_resumed(tmp_path):
    make_runner(tmp_path, POINTS, steps=2).run()
    file = tmp_path / "run/config.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in old.items() if k not in ("task", "init_from", "init_weights")}))
    assert make_runner(tmp_path, POINTS, steps=4).trainer.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lora", "controlnet"])
def test_a_run_on_a_checkpoint_starts_from_another_one_s_weights(tmp_path, task):
    from test_finetune import LDM, write_pictures

    from nanodiffusion.config import read_config
    from nanodiffusion.distributed import World
    from tests import sd_files

    data = {"name": "pictures", "path": str(write_pictures(tmp_path / "photos")), "size": 64}
    data |= {"control": {"name": "canny"}} if task == "controlnet" else {}

    def runner(name: str, **more: Any) -> Runner:
        spec = {"name": task, "base": str(sd_files.tree("sd1"))}
        options = {
            **LDM,
            "task": spec,
            "data": data,
            "batch_size": 2,
            "steps": 1,
            "lr": 1e-2,
            "device": "cpu",
            "ema": [],
        }
        return Runner(read_config({**options, "out": str(tmp_path), "name": name, **more}), World(), lambda _: None)

    first = runner("first")
    assert first.run() == "done"
    again = runner("again", init_from=str(tmp_path / "first"), seed=1)
    assert again.trainer.step == 0
    assert_close(weights(again), weights(first), rtol=0, atol=0)
