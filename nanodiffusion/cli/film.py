"""How pictures came about: every step's x, x0 or eps decoded for a film, and the latents themselves."""

from collections.abc import Callable
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanodiffusion import show
from nanodiffusion.errors import lookup
from nanodiffusion.sampler import State
from nanodiffusion.tasks import eps_of
from nanodiffusion.tensors import save_tensors

FRAMES = 60  # steps in a film, at most
FILMED = 16  # pictures in it, at most
SIDE = 1024  # pixels of a frame, about

Decode = Callable[[Tensor], Tensor]  # latents (b c h w) -> pictures (b 3 H W) in [-1, 1]
View = Callable[[Tensor, State], Tensor]

VIEWS: dict[str, View] = {
    "x": lambda before, s: s.x / sqrt(1 + s.sigma_next**2),  # of about unit variance at every level
    "x0": lambda before, s: s.x0,
    "eps": eps_of,
}


def sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side."""
    x = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return show.grid(x.permute(0, 3, 1, 2).float() / 127.5 - 1, columns, 1)


class Film:
    """The frames of a film: one per step, or of at most 60 evenly spaced ones, of the first pictures."""

    def __init__(self, kind: str, decode: Decode, pictures: int) -> None:
        self.view, self.decode, self.most = lookup(VIEWS, kind, "film"), decode, min(pictures, FILMED)
        self.steps: dict[int, list[Image.Image]] = {}

    def add(self, before: Tensor, state: State, steps: int) -> None:
        """See one of so many states, and `before`, the x (b c h w) that its step began from."""
        cells = self.steps.setdefault(state.step, [])
        if state.step in show.evenly(range(steps), FRAMES) and len(cells) < self.most:
            latents = self.view(before, state)[: self.most - len(cells)]
            cells += [self._small(Image.fromarray(p)) for p in show.to_uint8(self.decode(latents)).cpu().numpy()]

    def _small(self, image: Image.Image) -> Image.Image:
        side = SIDE // ceil(sqrt(self.most))
        image.thumbnail((side, side))
        return image

    def frames(self) -> list[Image.Image]:
        """One picture per step."""
        return [sheet(cells) for _, cells in sorted(self.steps.items()) if cells]


class Latents:
    """The latents of all pictures: the last ones, or those of every step."""

    def __init__(self, every: bool) -> None:
        self.every = every
        self.batches: list[tuple[list[Tensor], list[Tensor]]] = []  # x and x0, step by step
        self.sigmas: dict[int, float] = {}

    def add(self, before: Tensor, state: State, steps: int) -> None:
        """See one of so many states, and `before`, the x (b c h w) that its step began from."""
        if state.step == 0:
            self.batches.append(([before.cpu()] if self.every else [], []))
        if self.every or state.step == steps - 1:
            for kept, new in zip(self.batches[-1], (state.x, state.x0)):
                kept.append(new.cpu())
            self.sigmas |= {state.step: state.sigma, state.step + 1: state.sigma_next}

    def save(self, path: str | Path, meta: dict[str, Any]) -> Path:
        """x (n c h w); or of every step x (n k+1 c h w), the start included, x0 (n k c h w) and sigmas (k+1) float64."""
        x, x0 = (torch.cat([torch.stack(batch[i], 1) for batch in self.batches]) for i in (0, 1))
        levels = torch.tensor([s for _, s in sorted(self.sigmas.items())], dtype=torch.float64)
        save_tensors(path, {"x": x, "x0": x0, "sigmas": levels} if self.every else {"x": x[:, -1]}, meta)
        return Path(path)
