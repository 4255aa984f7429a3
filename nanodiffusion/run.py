"""A run read back from nothing but its folder: the denoiser that was trained there, with its config, codec and pictures.

out/name/  config.json environment.json data.json metrics.jsonl samples/ samples.png trajectory.gif report.html
           finished.json (of a run that left all of these), pictures.safetensors (what its pictures are drawn from),
           codec/ (of an autoencoder: what `codec=` takes), unet/, lora.safetensors, ... (of one on a checkpoint)
           checkpoint/step-00001000/  model, ema-0, ..., optimizer (safetensors), state.json, manifest.json; checkpoint/best

`runner` writes it.
"""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.checkpoint import Checkpoint, latest, load_best, load_checkpoint
from nanodiffusion.config import Config, read_config
from nanodiffusion.data import load_data, split
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.fast import adapt
from nanodiffusion.noise import Schedule
from nanodiffusion.objective import (
    Fixed,
    conditions,
    decoded,
    make_schedule,
    make_task,
    make_trained,
    open_codec,
)
from nanodiffusion.show import grid, point_cloud
from nanodiffusion.tensors import load_tensors, load_weights

FIXED = "pictures.safetensors"  # what the run's pictures are drawn from


@dataclass(frozen=True)
class Run:
    """A trained denoiser with the config that made it."""

    denoiser: Denoiser
    config: Config
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    step: int
    folder: Path

    @property
    def schedule(self) -> Schedule:
        """The schedule the run was trained with."""
        return make_schedule(self.config)

    @property
    def root(self) -> Path:
        """The folder of the run, also where one of its checkpoints was read."""
        return _root(self.folder)

    @cached_property
    def codec(self) -> Any:
        """What decodes its samples; read when it is first used."""
        return open_codec(self.config.codec, self.shape, next(self.denoiser.parameters()).device)

    def images(self, x0: Tensor) -> Tensor:
        """Samples as images in [-1, 1]: latents (b c h w) decoded -> (b 3 H W), pixels and points (b d) as they are."""
        return decoded(self.codec, x0)

    @cached_property
    def _pictured(self) -> tuple[Fixed, list[str]]:
        path = self.root / FIXED
        tensors, meta = load_tensors(path) if path.is_file() else ({}, {})
        return tensors, meta.get("prompts", [])

    @property
    def fixed(self) -> Fixed:
        """What the run's own pictures are drawn from, each (k ...): pooled of its prompts; concat, mask and x0 of known parts."""
        return self._pictured[0]

    @property
    def prompts(self) -> list[str]:
        """The prompts (k) of the run's own pictures, for a net that takes text."""
        return self._pictured[1]

    def conditions(self, n: int) -> dict[str, Tensor]:
        """Conditions (n ...) of the run's own pictures: its prompts, known parts or classes, in turn; {} where there are none."""
        return conditions(self.denoiser.net, self.fixed, n)

    def columns(self, n: int) -> int:
        """Columns of a grid of n such pictures: one a prompt or a class; 0 = as square as n allows."""
        return make_task(self.config).columns(len(self.classes), self.fixed, n)


def _root(path: Path) -> Path:
    own = path.parent.name == "checkpoint" and (path / "manifest.json").is_file()
    return path.parents[1] if own else path


def find_checkpoint(path: str | Path, best: bool = False) -> Checkpoint:
    """The newest sound checkpoint of a run folder (or its best one), or the one at `path` itself."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return load_checkpoint(path)
    if not path.is_dir():
        raise UserError(
            "no such run", file=path, expected="a run's folder or a checkpoint's", fix="nanodiffusion train ..."
        )
    found = (load_best if best else latest)(path / "checkpoint")
    if found is None:
        raise UserError(f"this folder has no {'best ' * best}checkpoint", file=path / "checkpoint")
    return found


def choose_weights(checkpoint: Checkpoint, weights: str) -> str:
    """`weights`, or "model" for the first average of a run that has none. UserError: there are no such weights."""
    weights = weights if weights in checkpoint.files or weights != "ema-0" else "model"
    if weights not in checkpoint.files:
        valid = ", ".join(n for n in checkpoint.files if n != "optimizer")
        raise UserError("no such weights in this checkpoint", file=checkpoint.folder, expected=valid, found=weights)
    return weights


def load_run(path: str | Path, weights: str = "ema-0", device: str | torch.device = "cpu", best: bool = False) -> Run:
    """Read a run's denoiser back: weights "model" (raw) or "ema-0", "ema-1", ... (averages)."""
    checkpoint = find_checkpoint(path, best)
    weights = choose_weights(checkpoint, weights)
    meta = checkpoint.meta["model"]
    try:
        config, shape, classes = read_config(meta["config"]), tuple(meta["shape"]), tuple(meta["classes"])
    except KeyError as e:
        raise UserError("this checkpoint carries no run configuration", file=checkpoint.folder, key=str(e)) from None
    if config.task["name"] == "autoencode":
        fix = f"codec={path}/codec, where latents are encoded or decoded"
        raise UserError("this run is an autoencoder, which draws nothing by itself", file=path, fix=fix)
    if config.net.get("name") == "checkpoint":
        fix = generation(config, _root(Path(path)))
        raise UserError("this run trained a part of a checkpoint, which draws in its place there", file=path, fix=fix)
    model = make_trained(config)
    load_weights(model.net, checkpoint.files[weights], checkpoint.folder)
    denoiser = getattr(model, "denoiser", model)
    adapt(denoiser.to(device).net)
    return Run(denoiser.eval(), config, shape, classes, checkpoint.step, Path(path))


def picture(x: Tensor, columns: int = 0) -> Any:
    """A grid of images (n c h w), as wide as 2 to 20 `columns` or as square as n allows, or a cloud of points (n 2)."""
    if x.ndim == 2:
        return point_cloud(x.cpu())
    return grid(x.cpu(), columns=columns if 1 < columns <= 20 else None)


def generation(config: Config, folder: Path) -> str:
    """The command that draws with what the run in `folder` made of a checkpoint."""
    task, control = config.task, config.data.get("control") or {}
    edges = control.get("name") == "canny"
    options = {
        "unet": "unet={}",
        "tokens.safetensors": "tokens={}",
        "controlnet": "control={}" if control.get("name") == "inpainting" else "control={}:PICTURE.png",
        "adapter": "adapter={}:EDGES.png" if edges else "adapter={}:PICTURE.png",
        "lora.safetensors": "lora={}",
        "learned_embeds.safetensors": "embedding={}",
    }
    words = [option.format(folder / name) for name, option in options.items() if (folder / name).exists()]
    if edges and task["name"] == "controlnet":
        words.append(f"canny=[{control.get('low', 100)},{control.get('high', 200)}]")
    words += ["image=PICTURE.png", "mask=MASK.png"] if "hole" in config.data else []
    words += ["sampler=lcm", "ladder=lcm", "steps=4", "guidance=1"] if task["name"] == "lcm" else []
    words += [f"variant={task['variant']}"] if task.get("variant") else []
    (prompt,) = config.sample.prompts[:1] or ["..."]
    return shlex.join(["nanodiffusion", "generate", prompt, f"model={task['base']}", *words])


# -- what a run begins with -----------------------------------------------------------------------------------------------


def make_data(config: Config) -> tuple[Any, Any]:
    """Training set and validation set: the data's own test split, or a share of the training set, or None."""
    whole = load_data(**config.data)
    if config.validation:
        return split(whole, config.validation, config.seed)
    return whole, load_data(**config.data, split="test") if config.validate_every else None


def start_from(net: nn.Module, where: str, weights: str = "ema-0") -> list[str]:
    """Give a net the weights of a run's folder, a checkpoint or a .safetensors, fitted to it; notes on what had to change.

    weights: of a run, an average or "model". UserError: nothing there, no such weights, of another network.
    """
    from nanodiffusion.nets.transfer import fit_state

    path = Path(where)
    if path.is_file():
        (tensors, meta), source = load_tensors(path), path
    else:
        checkpoint = find_checkpoint(path)
        name = choose_weights(checkpoint, weights)
        tensors, meta, source = checkpoint.files[name], checkpoint.meta[name], checkpoint.folder
    try:
        state, notes = fit_state(net, getattr(net, "renamed", dict)(tensors), _grid(meta))
    except UserError as e:
        raise UserError(e.what, **{**e.details, "file": source}) from None
    load_weights(net, state, source)
    return notes


def _grid(meta: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of tokens of the net that a file's header describes, where it has any."""
    if "config" not in meta:
        return None
    config = read_config(meta["config"])
    if config.net["name"] == "checkpoint":
        return None
    with torch.device("meta"):  # of a size, but of no memory
        return getattr(make_task(config).net(config).config, "grid", None)
