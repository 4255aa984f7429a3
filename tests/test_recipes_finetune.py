"""The recipes that train on Stable Diffusion's checkpoints: what they promise, and each on a tiny one with photos."""

import shlex
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sd_files
import skimage.data
import torch
from PIL import Image
from tiny import rows
from tuning import prepare, recipe

from nanodiffusion.checkpoint import save_checkpoint
from nanodiffusion.cli.asked import Asked, Helper, LoraFile, Named, TokenFile, asked_of, config_of, read_words
from nanodiffusion.cli.parts import check_pictures
from nanodiffusion.cli.recipes import CONFIGS
from nanodiffusion.cli.train import plan
from nanodiffusion.config import Config, option_types, read_config
from nanodiffusion.data import pictures
from nanodiffusion.data.controls import CONTROLS
from nanodiffusion.data.pictures import Pictures
from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.run import generation, load_run
from nanodiffusion.runner import Runner

pytest.importorskip("hydra")
pytestmark = pytest.mark.usefixtures("one_thread")

MAKES = {  # recipe: the task, what it leaves behind
    "sd-text-to-image": ("text_to_image", "unet/config.json"),
    "sdxl-text-to-image": ("text_to_image", "unet/config.json"),
    "sd-controlnet": ("controlnet", "controlnet/config.json"),
    "sdxl-controlnet": ("controlnet", "controlnet/config.json"),
    "sd-adapter": ("adapter", "adapter/config.json"),
    "sdxl-adapter": ("adapter", "adapter/config.json"),
    "sd-inpaint": ("inpaint", "unet/config.json"),
    "sdxl-inpaint": ("inpaint", "unet/config.json"),
    "sd-lora": ("lora", "lora.safetensors"),
    "sdxl-lora": ("lora", "lora.safetensors"),
    "textual-inversion": ("textual_inversion", "learned_embeds.safetensors"),
}


@cache
def one(recipe: str, *words: str) -> Config:
    ((config, _),) = plan(recipe, words)
    return config


@pytest.mark.parametrize("recipe", MAKES)
def test_a_recipe_names_a_task_a_base_and_captioned_pictures(recipe):
    config = one(recipe)
    assert config.task["name"] == MAKES[recipe][0] and config.name == recipe
    assert config.task.keys() - {"name"} <= option_types(FINETUNES[config.task["name"]]).keys()
    assert config.data["name"] == "pictures" and config.data.keys() - {"name"} <= option_types(pictures).keys()
    xl = recipe.startswith("sdxl")
    assert config.data["size"] == (1024 if xl else 512) and ("xl" in config.task["base"]) == xl
    assert config.task.get("checkpointing", False) == xl
    assert (config.prediction, config.clock, config.schedule["name"]) == ("eps", "table", "ldm")
    assert config.density == {"name": "table"} and config.batch_size % config.accumulate == 0
    assert config.data["workers"] == 4  # pictures are decoded while the net works
    assert "control" not in config.data or config.data["control"]["name"] in CONTROLS
    assert ("hole" in config.data) == (config.task["name"] == "inpaint")


@pytest.mark.parametrize("recipe", MAKES)
def test_a_recipe_says_how_it_is_called(recipe):
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    assert f"#   nanodiffusion train {recipe}" in text and len(text.splitlines()) <= 30


def test_settings_are_those_of_the_published_trainings():
    controlnet = one("sd-controlnet")
    assert (controlnet.lr, controlnet.cond_dropout) == (1e-5, 0.5)  # Zhang et al. 2023, section 3.3
    adapter = one("sd-adapter")
    assert (adapter.lr, adapter.batch_size) == (1e-5, 8)  # Mou et al. 2023, section 4.1
    xl = one("sdxl-adapter")
    assert (xl.lr, xl.batch_size, xl.steps) == (1e-5, 128, 20000)
    assert adapter.lr_schedule == xl.lr_schedule == {"name": "constant"}
    assert one("sdxl-text-to-image").cond_dropout == 0.1 and one("sdxl-inpaint").cond_dropout == 0.05
    assert one("sd-inpaint").ema == [{"name": "ramped", "decay": 0.9999}]


def test_the_grid_shows_the_word_that_is_trained():
    assert one("textual-inversion").sample.prompts == ["a photo of <new>"]
    assert one("textual-inversion", "task.token='<mine>'").sample.prompts == ["a photo of <mine>"]


def test_pictures_are_asked_for_where_the_net_is(tmp_path, monkeypatch):
    asked, batch = [], Pictures.batch

    def told(data, index, u=None):
        asked.append(data.device)
        return batch(data, index, u)

    monkeypatch.setattr(Pictures, "batch", told)
    there = World(device=torch.device("cpu", 0))  # another name of the CPU, as the data's own is "cpu"
    options = recipe("lora", prepare(tmp_path), out=str(tmp_path), validation=0.5, validate_every=1, sample_every=1)
    options |= {"sample": {"steps": 1, "n": 1}, "steps": 1}
    Runner(read_config(options), there, lambda text: None).run()
    assert set(asked) == {there.device}


@pytest.mark.gpu
@pytest.mark.parametrize("task", FINETUNES)
def test_every_task_trains_on_a_gpu(tmp_path, task):
    here = World(device=torch.device("cuda"))
    runner = Runner(read_config(recipe(task, prepare(tmp_path), out=str(tmp_path), steps=2)), here, lambda text: None)
    assert runner.run() == "done"
    assert next(runner.trainer.denoiser.net.parameters()).is_cuda


# -- what is said of a run that is over --------------------------------------------------------------------------------

CANNY, OWN = ("data.control={name: canny, low: 50, high: 90}",), ("data.control={name: paired}",)
BLANKS = ("data.control={name: inpainting}", "data.hole={name: random}")
SAID: dict[
    str, tuple[tuple[str, ...], set[str], dict[str, Any]]
] = {  # words of train, files it made, what `generate` reads
    "sd-text-to-image": ((), {"unet"}, {"unet": Named("RUN/unet")}),
    "sd-inpaint": (
        ("task.name=inpaint_by_tokens",),
        {"unet", "tokens.safetensors"},
        {
            "unet": Named("RUN/unet"),
            "tokens": Named("RUN/tokens.safetensors"),
            "image": Named("PICTURE.png"),
            "mask": Named("MASK.png"),
        },
    ),
    "sd-controlnet": (
        CANNY,
        {"controlnet"},
        {"controls": [Helper("RUN/controlnet", file="PICTURE.png")], "canny": [50, 90]},
    ),
    "sdxl-controlnet": (OWN, {"controlnet"}, {"controls": [Helper("RUN/controlnet", file="PICTURE.png")]}),
    "blanks": (
        BLANKS,
        {"controlnet"},
        {"controls": [Helper("RUN/controlnet")], "image": Named("PICTURE.png"), "mask": Named("MASK.png")},
    ),
    "sd-adapter": ((), {"adapter"}, {"adapters": [Helper("RUN/adapter", file="EDGES.png")]}),
    "sdxl-adapter": (OWN, {"adapter"}, {"adapters": [Helper("RUN/adapter", file="PICTURE.png")]}),
    "sd-lora": (
        ("task.variant=fp16",),
        {"lora.safetensors"},
        {"loras": [LoraFile("RUN/lora.safetensors")], "variant": "fp16"},
    ),
    "textual-inversion": (
        (),
        {"learned_embeds.safetensors"},
        {"embeddings": [TokenFile("RUN/learned_embeds.safetensors")]},
    ),
    "sd-lcm-lora": (("task.rank=0",), {"unet"}, {"unet": Named("RUN/unet")}),
}


@pytest.mark.parametrize("recipe", SAID)
def test_generate_reads_the_command_that_is_suggested(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    words, made, wanted = SAID[recipe]
    config = one("sd-controlnet" if recipe == "blanks" else recipe, *words)
    for name in made:
        (tmp_path / "RUN" / name).mkdir(parents=True)
    program, command, *rest = shlex.split(generation(config, Path("RUN")))
    read = read_words(rest)
    assert (program, command) == ("nanodiffusion", "generate")
    assert asked_of(read) == replace(Asked(model=config.task["base"]), **wanted)
    check_pictures(asked_of(read))
    drawn = config_of(read)
    assert drawn.prompt == (["a photo of <new>"] if recipe == "textual-inversion" else ["..."])
    if recipe == "sd-lcm-lora":
        assert (drawn.sampler["name"], drawn.ladder["name"], drawn.steps, drawn.guidance) == ("lcm", "lcm", 4, 1)


@pytest.mark.parametrize("place", ["", "checkpoint/step-00000001"])
def test_a_run_that_trained_a_part_of_a_checkpoint_is_not_read_but_its_command_is_said(tmp_path, place):
    config = replace(one("sd-lora", "task.base=nowhere/at-all"), net={"name": "checkpoint"})
    meta = {"config": asdict(config), "shape": [4, 8, 8], "classes": []}
    save_checkpoint(tmp_path / "checkpoint", 1, {"model": ({"x": torch.zeros(1)}, meta)}, {"step": 1})
    (tmp_path / "lora.safetensors").touch()
    with pytest.raises(UserError, match="part of a checkpoint") as refused:
        load_run(tmp_path / place)
    assert f"model=nowhere/at-all lora={tmp_path}/lora.safetensors" in str(refused.value)


# -- each on a tiny checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos, small, with captions."""
    place = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        pixels = np.asarray(getattr(skimage.data, name)())[..., :3]
        Image.fromarray(pixels).resize((96, 80)).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text("a photo of the sea")
    return place


def shrunk(recipe: str, out: Path, photos: Path) -> Runner:
    """The Runner of a recipe on a tiny checkpoint, with everything else as it says."""
    config = one(recipe)
    base = sd_files.tree("sdxl" if "xl" in config.task["base"] else "sd1")
    small: dict[str, Any] = {"batch_size": 4, "accumulate": 2, "steps": 2, "log_every": 1, "sample_every": 2}
    small |= {"out": str(out), "device": "cpu", "precision": "fp32", "checkpoint_every": 0}
    small |= {"task": {**config.task, "base": str(base)}, "data": {**config.data, "path": str(photos), "size": 64}}
    small["sample"] = {**asdict(config.sample), "n": 2, "steps": 2}
    return Runner(read_config({**asdict(config), **small}), World(), lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MAKES)
def test_two_steps_of_each_leave_what_it_makes_and_pictures(tmp_path, photos, recipe):
    runner = shrunk(recipe, tmp_path, photos)
    assert runner.run() == "done"
    found = [row for row in rows(runner.folder) if "loss" in row]
    assert [row["step"] for row in found] == [1, 2] and all(np.isfinite(row["loss"]) for row in found)
    assert (runner.folder / MAKES[recipe][1]).is_file()
    averaged = bool(runner.config.ema)
    names = {path.name for path in (runner.folder / "samples").iterdir()}
    assert names == {"step-00000002-raw.png", *(["step-00000002-ema.png"] if averaged else [])}
