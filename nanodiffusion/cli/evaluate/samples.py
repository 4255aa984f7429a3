"""The images that a run draws, to be evaluated: of the classes and texts that are asked for, or of its own pictures."""

import hashlib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodiffusion import show
from nanodiffusion.cli.evaluate.task import LEAST, Task
from nanodiffusion.cli.pictures import images
from nanodiffusion.cli.sample.conditions import Asked, Wanted, choose
from nanodiffusion.cli.words import changed
from nanodiffusion.config import SampleConfig
from nanodiffusion.draw import check_sampling, draw
from nanodiffusion.errors import UserError
from nanodiffusion.evaluate.images import Images
from nanodiffusion.run import Run, load_run
from nanodiffusion.tensors import content_hash


def open_run(task: Task, where: str | Path | None = None) -> Run:
    """The run, or one of its checkpoints. UserError: it draws points."""
    run = load_run(where or task.where, task.get("weights", "ema-0"), task.device)
    if len(run.shape) != 3:
        raise UserError("this run draws no images", file=task.where, found=f"samples of {run.shape}")
    return run


def wanted(task: Task, run: Run, guidance: float) -> Wanted:
    """The conditions of class=, text= and negative=, or else of the run's own pictures, in turn."""
    if not any(key in task.options for key in typing.get_type_hints(Asked)):
        n = task.get("n", LEAST)
        return Wanted(n, run.conditions(n))
    asked = choose(run, {**task.options, "guidance": guidance}, LEAST)
    return replace(asked, cond=run.conditions(asked.n) | asked.cond)


def drawn(task: Task, run: Run, changes: Mapping[str, Any] | None = None) -> Images:
    """Images (n) that a run draws with its settings, image i from seed + i."""
    config = changed(run.config.sample, {**task.changes, **(changes or {})})
    check_sampling(run.denoiser, config, run.schedule)
    asked, seed = wanted(task, run, config.guidance), task.get("seed", 0)
    device = next(run.denoiser.parameters()).device
    shape = tuple(run.images(torch.zeros(1, *run.shape, device=device)).shape[1:])

    def read(size: int) -> Iterator[Tensor]:
        for start in range(0, asked.n, size):
            part = slice(start, min(asked.n, start + size))
            cond, negative = ({k: v[part] for k, v in given.items()} for given in (asked.cond, asked.negative))
            yield _decoded(run, config, range(seed + part.start, seed + part.stop), cond, negative)

    about = {"step": run.step, "seed": seed, "weights_sha256": content_hash(run.denoiser.net.state_dict())}
    about |= {"sample": asdict(config), **asked.told}
    digest = lambda: hashlib.sha256(json.dumps([about, asked.n], sort_keys=True).encode()).hexdigest()
    known = typing.cast(Any, shape)
    return Images(str(run.folder), asked.n, known, read, digest, asked.cond.get("label"), tuple(run.classes), about)


def _decoded(
    run: Run, config: SampleConfig, seeds: Sequence[int], cond: Mapping[str, Tensor], negative: Mapping[str, Tensor]
) -> Tensor:
    """uint8 (b c h w) at these seeds. UserError: NaN."""
    *_, last = draw(run.denoiser, run.shape, run.schedule, config, seeds, cond, negative=negative)
    x = images(run, last.x)
    if not bool(torch.isfinite(x).all()):
        raise UserError("images hold NaN or infinity", file=run.folder, expected="finite numbers")
    return show.to_uint8(x).permute(0, 3, 1, 2).cpu()
