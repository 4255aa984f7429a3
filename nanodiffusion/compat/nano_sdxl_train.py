"""nano-diffusion's train.py for SDXL on this core: its YAML, translated into a recipe and trained as `nanodiffusion train` does.

    torchrun --standalone --nproc_per_node=1 -m nanodiffusion.compat.nano_sdxl_train --config_path FILE.yaml
    NANO_DIFFUSION_TRAINING_CONFIG=FILE.yaml torchrun ... -m nanodiffusion.compat.nano_sdxl_train

Keys of ours may follow, which count more (steps=10 data.flip=true); --dry-run prints the translation. The run lies in
output_dir, and the same command goes on with it.

Where that system has a defect, this follows the core: a dropped caption is the zeros that guidance uses, sizes are height and
width for every kind, the value of `controlnet` counts, adapters are trained too, the loss is that of all processes, and a run
that is stopped goes on with its data, optimiser, averages and scaler where it was.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodiffusion.cli import guarded, leave, share_the_cpu
from nanodiffusion.config import from_dict, read_config
from nanodiffusion.errors import UserError, lookup, need

BASE = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class Settings:
    """The keys of its YAML with their defaults, and of ours base, size, pipes and seed. batch_size is each process's."""

    output_dir: str = ""
    train_shards: str = ""
    dataloader: str | None = None
    adapter: str | None = None
    controlnet: str | None = None
    train_type: str | None = None
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-5
    gradient_accumulation_steps: int = 1
    mixed_precision: str | None = "no"
    max_train_steps: int = 30000
    use_8bit_adam: bool = False
    ema_decay: float | None = None
    ema_power: float | None = None
    shuffle_buffer_size: int = 1000
    proportion_empty_prompts: float = 0.1
    batch_size: int = 8
    sdxl_synthetic_dataset: bool = False
    validation_image_conditioning: str | None = None
    validation_steps: int = 500
    num_validation_images: int = 2
    num_validation_timesteps: int = 50
    validation_prompts: str | list[str] | None = None
    validation_images: str | list[str] | None = None
    with_tqdm: bool = True
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int | None = 5
    unet_resume_from: str | None = None
    ema_unet_resume_from: str | None = None
    controlnet_resume_from: str | None = None
    adapter_resume_from: str | None = None
    optimizer_resume_from: str | None = None
    start_step: int = 0
    project_name: str | None = None
    training_run_name: str | None = None
    log_to_wandb: bool = False
    base: str = BASE
    size: int = 1024
    pipes: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """What is trained: a row of our tasks, and what it needs of the data."""

    task: str
    hole: bool = False
    averaged: bool = False


TRAIN_TYPES = {
    "unet_text_to_image": Kind("text_to_image"),
    "unet_inpainting": Kind("inpaint", hole=True),
    "ema_unet_inpainting": Kind("inpaint", hole=True, averaged=True),
    "unet_inpainting_cross_attention_conditioning": Kind("inpaint_by_tokens", hole=True),
}
CONTROLS = {"canny": False, "inpainting": True}  # whether it needs a hole
DATALOADERS = {  # what they give: plain pictures, pictures with a hole, or a control image with a hole in it
    "wds_dataloader_unet_text_to_image_hq_dataset": "picture",
    "wds_dataloader_unet_inpainting_hq_dataset": "hole",
    "wds_dataloader_controlnet_inpainting": "control",
    "wds_dataloader_controlnet_inpainting_sdxl_synthetic_dataset": "control",
}
CONDITIONINGS = {  # what they make of a picture: the control image, or the picture with a hole
    "get_controlnet_canny_conditioning_image": "canny",
    "get_controlnet_inpainting_conditioning_image": "inpainting",
    "get_unet_inpainting_conditioning_image": "hole",
}
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
UNUSED = {  # accepted, and why they change nothing
    "shuffle_buffer_size": "the order is a function of seed and step",
    "sdxl_synthetic_dataset": "the best of several pictures is taken where there is clip_scores.txt",
    "with_tqdm": "a bar on a terminal, else lines",
    "project_name": "the tracker's project is nanodiffusion",
    "training_run_name": "the run is named as output_dir is",
}
NOT_READ = ("optimizer_resume_from", "ema_unet_resume_from", "start_step")  # its own state of a run
OURS = {  # keys of a recipe that a mistake may be found in only after translation
    "steps": "max_train_steps",
    "accumulate": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "keep": "checkpoints_total_limit",
    "cond_dropout": "proportion_empty_prompts",
    "checkpoint_every": "checkpointing_steps",
    "sample_every": "validation_steps",
    "sample.prompts": "validation_prompts",
    "sample.images": "validation_images",
}


# -- from its keys to ours ---------------------------------------------------------------------------------------------


def read_settings(options: Mapping[str, Any]) -> Settings:
    """Its keys, checked. UserError: an unknown one, a wrong type, keys that contradict each other or ask for nothing."""
    settings = from_dict(Settings, options)
    for key in ("output_dir", "train_shards"):
        if not getattr(settings, key):
            raise UserError("this key is needed", key=key, fix=f"{key}: ...")
    for key in ("batch_size", "gradient_accumulation_steps", "num_validation_images", "num_validation_timesteps"):
        if getattr(settings, key) < 1:
            raise UserError("must be at least 1", key=key, found=getattr(settings, key))
    for key in NOT_READ:
        if getattr(settings, key):
            fix = "leave it out: the same command goes on with the run in output_dir"
            raise UserError("the state of its runs cannot be read", key=key, found=getattr(settings, key), fix=fix)
    lookup(PRECISIONS, settings.mixed_precision or "no", "mixed_precision")
    kind = kind_of(settings)
    _check_resume(settings, kind)
    given = [key for key in ("ema_decay", "ema_power") if getattr(settings, key) is not None]
    if given and not kind.averaged:
        fix = "train_type: ema_unet_inpainting, or leave it out"
        raise UserError("nothing is averaged here", key=given[0], found=getattr(settings, given[0]), fix=fix)
    return settings


def kind_of(settings: Settings) -> Kind:
    """What is trained. UserError: nothing, several things, or a name that there is not."""
    given = [key for key in ("train_type", "controlnet", "adapter") if getattr(settings, key)]
    if len(given) != 1:
        expected, fix = "one of train_type, controlnet, adapter", "train_type: unet_text_to_image"
        raise UserError("what is to be trained?", expected=expected, found=" and ".join(given) or "none", fix=fix)
    (key,) = given
    if key == "train_type":
        return lookup(TRAIN_TYPES, settings.train_type or "", key)
    return Kind(key, hole=lookup(CONTROLS, getattr(settings, key), key))


def _check_resume(settings: Settings, kind: Kind) -> None:
    mine = {"controlnet": "controlnet_resume_from", "adapter": "adapter_resume_from"}.get(kind.task, "unet_resume_from")
    for key in (f"{part}_resume_from" for part in ("unet", "controlnet", "adapter")):
        if key != mine and getattr(settings, key):
            found = f"{getattr(settings, key)}, of a run that trains another thing"
            raise UserError("these weights are not trained here", key=key, found=found, fix=f"{mine}: ...")


def data_of(settings: Settings, kind: Kind) -> dict[str, Any]:
    """Our `data`. UserError: a dataloader of the user's own, or one that does not give what is trained on."""
    data: dict[str, Any] = {"name": "pictures", "path": settings.train_shards, "size": settings.size}
    data |= {"pipes": True} if settings.pipes else {}
    data |= {"hole": {"name": "random"}} if kind.hole else {}
    if kind.task in ("controlnet", "adapter"):
        data["control"] = {"name": settings.controlnet or settings.adapter}
    wants = ("control" if "control" in data else "hole") if kind.hole else "picture"
    _check_function(settings, "dataloader", DATALOADERS, wants)
    return data


def _check_function(settings: Settings, key: str, known: Mapping[str, str], wants: str) -> None:
    """A function that it would call: UserError for one of the user's own, and for one that gives another thing."""
    given = getattr(settings, key) or ""
    name = given.rpartition(".")[2]
    if given and name not in known:
        expected, fix = f"one of {', '.join(known)}", "a recipe of your own, data: {name: ..., path: ...}"
        raise UserError("code is not read", key=key, expected=expected, found=given, fix=fix)
    if given and known[name] != wants:
        fitting = next((n for n, what in known.items() if what == wants), "none")
        what = f"the {key} does not give what is trained on"
        raise UserError(what, key=key, found=name, expected=fitting, fix="or leave it out")


def images_of(settings: Settings, kind: Kind) -> list[str]:
    """Our `sample.images`, conditioned as the data is. UserError: a kind that reads none, a function that does otherwise."""
    images = several(settings.validation_images)
    if images and kind.task == "text_to_image":
        fix = "leave it out"
        raise UserError("this kind reads no picture", key="validation_images", found=settings.train_type, fix=fix)
    wants = settings.controlnet or settings.adapter or ("hole" if kind.hole else "picture")
    _check_function(settings, "validation_image_conditioning", CONDITIONINGS, wants)
    return images


def several(given: str | list[str] | None) -> list[str]:
    """One text or a list of them as a list."""
    return [given] if isinstance(given, str) else given or []


def task_of(settings: Settings, kind: Kind) -> dict[str, Any]:
    """Our `task`."""
    task = {"name": kind.task, "base": settings.base, "checkpointing": settings.gradient_checkpointing}
    start = settings.controlnet_resume_from or settings.adapter_resume_from
    return task | ({"start": start} if start else {})


def averages_of(settings: Settings, kind: Kind) -> list[dict[str, Any]]:
    """Our `ema`: decay min(.9999, (1 + k) / (10 + k)), or 1 - (1 + k)^-power with ema_power."""
    if not kind.averaged:
        return []
    decay = 0.9999 if settings.ema_decay is None else settings.ema_decay
    if settings.ema_power is None:
        return [{"name": "ramped", "decay": decay}]
    return [{"name": "warmup", "decay": decay, "gamma": 1.0, "power": settings.ema_power}]


def translate(options: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
    """A recipe, complete but for defaults, of the keys of its YAML. UserError: as `read_settings`, or a number out of range."""
    settings = read_settings(options)
    kind, folder = kind_of(settings), Path(settings.output_dir)
    prompts, images = several(settings.validation_prompts), images_of(settings, kind)
    recipe = {
        "name": folder.name or "run",
        "out": str(folder.parent),
        "task": task_of(settings, kind),
        "data": data_of(settings, kind),
        "init_from": settings.unet_resume_from or "",
        "prediction": "eps",
        "clock": "table",
        "schedule": {"name": "ldm"},
        "density": {"name": "table"},
        "precision": PRECISIONS[settings.mixed_precision or "no"],
        "steps": settings.max_train_steps,
        "batch_size": settings.batch_size * processes * settings.gradient_accumulation_steps,
        "accumulate": settings.gradient_accumulation_steps,
        "seed": settings.seed,
        "lr": settings.learning_rate,
        "optimizer": {"name": "AdamW8bit" if settings.use_8bit_adam else "AdamW"},
        "lr_schedule": {"name": "constant"},
        "clip": 1.0,
        "cond_dropout": settings.proportion_empty_prompts,
        "ema": averages_of(settings, kind),
        "trackers": ["wandb"] if settings.log_to_wandb else [],
        "sample_every": settings.validation_steps,
        "checkpoint_every": settings.checkpointing_steps,
        "keep": 5 if settings.checkpoints_total_limit is None else settings.checkpoints_total_limit,
        "sample": {
            "sampler": {"name": "euler"},
            "ladder": {"name": "linspace"},
            "steps": settings.num_validation_timesteps,
            "guidance": 5.0,
            "n": settings.num_validation_images * max(1, len(prompts), len(images)),
            "prompts": prompts,
            "images": images,
        },
    }
    try:
        read_config(recipe)
    except UserError as e:
        key = OURS.get(e.details["key"] or "", e.details["key"])
        raise UserError(e.what, **{**e.details, "key": key}) from None
    return recipe


def unused(options: Mapping[str, Any]) -> str:
    """In a line: which of the given keys change nothing here, and why; "" of none."""
    said = [f"{key} ({why})" for key, why in UNUSED.items() if options.get(key) is not None]
    return f"not used here: {', '.join(said)}" if said else ""


# -- the command -------------------------------------------------------------------------------------------------------


def run(config_path: str | None, words: Sequence[str] = (), dry_run: bool = False) -> int:
    """Train by the YAML that the flag or the environment names, as `nanodiffusion train` does. An exit code."""
    from nanodiffusion.cli.recipes import config_file, flow, read_yaml
    from nanodiffusion.cli.train import plan, train

    yaml = need("yaml", "train")
    file = config_file(config_path)
    options, first = read_yaml(file), os.environ.get("RANK", "0") == "0"
    try:
        recipe = translate(options, int(os.environ.get("WORLD_SIZE", 1)))
    except UserError as e:
        raise UserError(e.what, **{**e.details, "file": e.details["file"] or file}) from None
    if first and (line := unused(options)):
        print(line)
    if dry_run:
        print("\n".join(f"{key}: {flow(value)}" for key, value in recipe.items()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "recipe.yaml"
        ours.write_text(yaml.safe_dump(recipe, sort_keys=False))
        ((config, own),) = plan(str(ours), words)
    command = ["python", "-m", "nanodiffusion.compat.nano_sdxl_train", "--config_path", file]
    return train(config, [*command, *own])


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; exit codes as of `nanodiffusion`."""
    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config_path", "--config-path", metavar="FILE", help="nano-diffusion's YAML")
    parser.add_argument("--dry-run", action="store_true", help="print our recipe of it, and stop")
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys of our recipes, which count more")
    args = parser.parse_intermixed_args(argv)
    share_the_cpu()
    return guarded(lambda: run(args.config_path, args.words, args.dry_run), "train")


if __name__ == "__main__":
    leave(main())
