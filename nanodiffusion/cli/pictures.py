"""What the commands draw of a trained run: its samples, how they came about, its noise levels, its losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

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
LARGE = 128  # side, in latent pixels, above which decoding goes by tiles


def drawn(
    run: Run,
    config: SampleConfig,
    seeds: Sequence[int],
    cond: Mapping[str, Tensor] | None = None,
    x0: Tensor | None = None,
    strength: float = 1.0,
    **options: Any,
) -> list[State]:
    """The states (b ...) of every step, on the CPU; options as `draw` has them."""
    states = draw(run.denoiser, run.shape, run.schedule, config, seeds, cond, x0, strength, **options)
    return [s._replace(x=s.x.cpu(), x0=s.x0.cpu()) for s in states]


def joined(parts: list[list[State]]) -> list[State]:
    """Batches of states as one."""
    return [
        steps[0]._replace(x=torch.cat([s.x for s in steps]), x0=torch.cat([s.x0 for s in steps]))
        for steps in zip(*parts)
    ]


def images(run: Run, x0: Tensor) -> Tensor:
    """Samples as pictures on the CPU: latents (b c h w) decoded, large ones by tiles; all else as it is."""
    if run.config.codec:
        run.codec.tile = LARGE if max(x0.shape[2:]) > LARGE else None
    return run.images(x0).cpu()


def decoded(run: Run, state: State) -> State:
    """A state whose x0, and whose x / sqrt(1 + sigma^2), as it is shown, are pictures."""
    if not run.config.codec:
        return state
    scale = sqrt(1 + state.sigma_next**2)
    return state._replace(x=images(run, state.x / scale) * scale, x0=images(run, state.x0))


def few(state: State, n: int) -> State:
    """The state of the first n samples."""
    return state._replace(x=state.x[:n], x0=state.x0[:n])


def sheet(run: Run, x: Tensor, labels: Tensor | None, columns: int = 0) -> Image.Image:
    """The samples: a grid of images, `columns` wide if given, or points over the data they were learnt from."""
    return show.point_cloud(x, labels, points(run)) if len(run.shape) == 1 else picture(images(run, x), columns)


def film(run: Run, states: list[State], columns: int = 0) -> list[Image.Image]:
    """x and x0 beside each other, one frame a step; of points with the score field."""
    states = show.evenly(states, FRAMES)
    if len(run.shape) == 1:
        return show.point_frames(states, points(run), unconditional(run))
    shown = [decoded(run, few(s, FILMED)) for s in states]
    return show.trajectory_frames(shown, columns=columns if 1 < columns <= 20 else None)


def strip(run: Run, states: list[State], columns: int = 8, rows: int = 4) -> Image.Image:
    """x above its x0 estimates, a row per sample, at evenly spaced steps; see `show.strip`."""
    return show.strip([decoded(run, few(s, rows)) for s in show.evenly(states, columns)], columns, rows)


def trajectories(run: Run, start: Tensor, states: list[State], levels: int = 11) -> Image.Image:
    """From noise to image, a row per sample: x at evenly spaced levels, from `start` (b ...), above as many x0 estimates."""
    first = states[0]._replace(x=start, sigma_next=states[0].sigma)
    columns = min(levels, len(states))
    path, estimates = show.evenly([first, *states], columns), show.evenly(states, columns)
    both = [a._replace(x0=b.x0, sigma=b.sigma) for a, b in zip(path, estimates)]
    return show.strip([decoded(run, s) for s in both], columns, len(start))


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


def draw_run(run: Run, cond: Mapping[str, Tensor], say: Callable[[str], None]) -> None:
    """samples.png, trajectory.gif, strip.png, schedule.png and loss.png into the run's folder.

    cond: of the pictures, each (n ...). A picture that cannot be drawn (without matplotlib, of data of another form)
    costs a line, not the run.
    """
    config, columns = run.config.sample, run.columns(run.config.sample.n)
    labels = cond.get("label")
    part = lambda i: {name: value[i : i + BATCH] for name, value in cond.items()}
    seeds = range(config.n)
    states = joined([drawn(run, config, seeds[i : i + BATCH], part(i)) for i in range(0, config.n, BATCH)])
    pictured = len(run.shape) > 1

    def animate(path: Path) -> Path:
        frames = film(run, states, columns)
        return show.save_gif(frames, path, film_pace(frames))

    def levels(path: Path) -> Path:
        ladder = make_ladder(config, run.schedule)
        return show.save_png(show.schedule_plot(run.schedule.sigmas, ladder), path)

    drawings: dict[str, Callable[[Path], object]] = {
        "samples.png": lambda path: show.save_png(sheet(run, states[-1].x, labels, columns), path),
        "trajectory.gif": animate,
        **({"strip.png": lambda path: show.save_png(strip(run, states), path)} if pictured else {}),
        "schedule.png": levels,
        "loss.png": lambda path: show.save_png(show.loss_plot(load_metrics(run.folder / "metrics.jsonl")), path),
    }
    for name, drawing in drawings.items():
        try:
            drawing(run.folder / name)
        except UserError as e:
            say(f"no {name}: {' '.join(str(e).split())}")
