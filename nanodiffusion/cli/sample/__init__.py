"""`nanodiffusion sample RUN key=value ...`: pictures, films and arrays from a trained run."""

import json
import typing
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nanodiffusion import show
from nanodiffusion.cli.pictures import film, film_pace, images, joined, sheet, strip, trajectories
from nanodiffusion.cli.runs import refuse_several
from nanodiffusion.cli.sample.conditions import Asked
from nanodiffusion.cli.sample.files import write
from nanodiffusion.cli.sample.job import FILES, PICTURES, Job, open_job
from nanodiffusion.cli.words import read_options, take_first
from nanodiffusion.distributed import world
from nanodiffusion.draw import begin
from nanodiffusion.errors import UserError
from nanodiffusion.fast import tune
from nanodiffusion.sampler import ImageNoise

PICTURED = 400  # samples in a picture, at most


class Options(Asked, total=False):
    """The keys of the command and their types; the keys of SampleConfig come on top."""

    n: int
    codec: str
    size: int | str | list
    seed: int
    batch: int
    weights: str
    best: bool
    device: str
    image: str
    strength: float
    frames: int
    noise: str
    panorama: int
    toward: str
    sharpness: float
    brightness: float
    grid: str
    strip: str
    trajectories: str
    gif: str
    mp4: str
    out: str
    npz: str
    latents: str


def main(args: Namespace) -> int:
    """Load the run and write what was asked for."""
    missing = UserError("which run?", expected="nanodiffusion sample RUN key=value ...", fix="a folder, e.g. runs/demo")
    path, words = take_first(args.words, missing)
    options, changes = read_words(words)
    refuse_several(path, "sample")
    with world(options.get("device", "auto")) as w:
        tune(w.device)
        say: Callable[[str], None] = print if w.first else lambda text: None
        job = open_job(path, options, changes, w)
        if w.first:
            for name in [p for p in PICTURES if p in options]:
                say(str(draw(job, name, Path(options[name]))))
            if not any(key in options for key in (*PICTURES, *FILES, "latents")):
                say(str(draw(job, "grid", job.run.root / "sample.png")))
        for line in write(job, options, w):
            say(line)
    return 0


def read_words(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """key=value words as (options of the command, changes of the SampleConfig by dotted key), checked."""
    return read_options(words, typing.get_type_hints(Options))


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(job: Job, kind: str, path: Path) -> Path:
    """A picture or a film of the first samples, the settings inside the PNG."""
    few = job.pick(job.rows()) if kind == "trajectories" else job.pick(slice(PICTURED))
    if kind in ("gif", "mp4"):
        frames = walked(few) if "frames" in job.settings else film(few.run, all_states(few), few.wanted.columns)
        return (show.save_gif if kind == "gif" else show.save_mp4)(frames, path, film_pace(frames))
    image = {"grid": grid, "strip": lambda job: strip(job.run, all_states(job)), "trajectories": paths}[kind](few)
    return show.save_png(image, path, {"nanodiffusion": json.dumps(job.settings)})


def all_states(job: Job) -> list[Any]:
    """The states (n ...) of all samples at every step."""
    return joined(list(job.states()))


def grid(job: Job) -> Image.Image:
    """The samples side by side."""
    x = torch.cat([job.last(i, min(job.n, i + job.batch)) for i in range(0, job.n, job.batch)])
    return sheet(job.run, x, job.labels, job.wanted.columns)


def paths(job: Job) -> Image.Image:
    """How each sample came about, from its noise on."""
    unit = ImageNoise(job.seeds).draw(*job.run.shape) if job.noise is None else job.noise
    x0 = None if job.x0 is None else job.x0.expand(unit.shape)
    x, _ = begin(job.run.denoiser, job.run.schedule, job.config, unit, x0, job.strength)
    return trajectories(job.run, x, all_states(job))


def walked(job: Job) -> list[Image.Image]:
    """Each sample as a frame of a film."""
    parts = (job.last(i, min(job.n, i + job.batch)) for i in range(0, job.n, job.batch))
    return [show.grid(image[None]) for x in parts for image in images(job.run, x)]
