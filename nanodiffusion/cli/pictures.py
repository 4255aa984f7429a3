"""What the commands draw of a trained run: its samples, how they came about, its noise levels, its losses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nanodiffusion import show
from nanodiffusion.config import SampleConfig
from nanodiffusion.draw import draw, make_ladder
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import Bound
from nanodiffusion.report import load_metrics
from nanodiffusion.run import Run, make_data, picture
from nanodiffusion.sampler import State

BATCH = 256
FRAMES = 60  # of an animation
FILMED = 40  # images in an animation


def batches(
    run: Run,
    config: SampleConfig,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    x0: Tensor | None = None,
    strength: float = 1.0,
    batch: int = BATCH,
) -> Iterator[list[State]]:
    """The states (b ...) of every step, batch after batch, on the CPU; x0 (1 ...) is where image to image starts."""
    for i in range(0, len(seeds), batch):
        part = slice(i, i + batch)
        start = None if x0 is None else x0.expand(len(seeds[part]), *x0.shape[1:])
        own = None if labels is None else {"label": labels[part]}
        states = draw(run.denoiser, run.shape, run.schedule, config, seeds[part], own, start, strength)
        yield [s._replace(x=s.x.cpu(), x0=s.x0.cpu()) for s in states]


def joined(parts: list[list[State]]) -> list[State]:
    """Batches of states as one."""
    return [
        steps[0]._replace(x=torch.cat([s.x for s in steps]), x0=torch.cat([s.x0 for s in steps]))
        for steps in zip(*parts)
    ]


def sheet(run: Run, states: list[State], labels: Tensor | None, columns: int = 0) -> Image.Image:
    """The samples: a grid of images, `columns` wide if given, or points over the data they were learnt from."""
    x = states[-1].x
    return show.point_cloud(x, labels, points(run)) if len(run.shape) == 1 else picture(x, columns)


def film(run: Run, states: list[State], columns: int = 0) -> list[Image.Image]:
    """x and x0 beside each other, one frame a step; of points with the score field."""
    states = show.evenly(states, FRAMES)
    if len(run.shape) == 1:
        return show.point_frames(states, points(run), unconditional(run))
    few = [s._replace(x=s.x[:FILMED], x0=s.x0[:FILMED]) for s in states]
    return show.trajectory_frames(few, columns=columns if 1 < columns <= 20 else None)


def points(run: Run) -> Tensor:
    """The training set of a run on points (n d)."""
    data = make_data(replace(run.config, validate_every=0))[0]
    return data.batch(torch.arange(len(data)))[0].cpu()


def unconditional(run: Run) -> Bound:
    """The run's denoiser as a function of x and sigma alone, of no class where it knows classes."""
    null = getattr(run.denoiser.net, "null_label", None)
    label = lambda x: {} if null is None else {"label": torch.full((len(x),), null, device=x.device)}
    return lambda x, sigma: run.denoiser(x, sigma, label(x))


def film_pace(frames: list[Image.Image]) -> float:
    """Frames a second for an animation of about three seconds, between 4 and 20."""
    return min(20.0, max(4.0, len(frames) / 3))


def draw_run(run: Run, labels: Tensor | None, say: Callable[[str], None]) -> None:
    """samples.png, trajectory.gif, strip.png, schedule.png and loss.png into the run's folder.

    A picture that cannot be drawn (without matplotlib, of data of another form) costs a line, not the run.
    """
    config, columns = run.config.sample, len(run.classes)
    states = joined(list(batches(run, config, range(config.n), labels)))
    images = len(run.shape) > 1

    def animate(path: Path) -> Path:
        frames = film(run, states, columns)
        return show.save_gif(frames, path, film_pace(frames))

    def levels(path: Path) -> Path:
        ladder = make_ladder(config, run.schedule)
        return show.save_png(show.schedule_plot(run.schedule.sigmas, ladder), path)

    drawings: dict[str, Callable[[Path], object]] = {
        "samples.png": lambda path: show.save_png(sheet(run, states, labels, columns), path),
        "trajectory.gif": animate,
        **({"strip.png": lambda path: show.save_png(show.strip(states), path)} if images else {}),
        "schedule.png": levels,
        "loss.png": lambda path: show.save_png(show.loss_plot(load_metrics(run.folder / "metrics.jsonl")), path),
    }
    for name, drawing in drawings.items():
        try:
            drawing(run.folder / name)
        except UserError as e:
            say(f"no {name}: {' '.join(str(e).split())}")
