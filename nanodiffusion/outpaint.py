"""Panoramas: an outpainting model, asked again and again to go on where its last tile ends.

Such a net takes cond["concat"] (b c h w): the known part of the sample, zeros where there is none.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanodiffusion.config import SampleConfig
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.draw import begin, guided, make_step
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.guidance import keep
from nanodiffusion.noise import Schedule
from nanodiffusion.sampler import ImageNoise, sample

# where a panorama grows: its axis, and whether what is new comes first on it
SIDES: dict[str, tuple[int, bool]] = {"right": (-1, False), "left": (-1, True), "down": (-2, False), "up": (-2, True)}


def panorama(
    denoiser: Denoiser,
    shape: Sequence[int],
    schedule: Schedule,
    config: SampleConfig,
    seeds: Sequence[int],
    tiles: int,
    toward: str = "right",
    cond: Mapping[str, Tensor] | None = None,
    negative: Mapping[str, Tensor] | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """So many tiles of `shape` (c h w), each over half of the last: (b c h w') or (b c h' w), w' = w + (tiles - 1) w // 2.

    first (b c h w): the first tile, instead of one that is drawn. Tile k's noise is the k-th of the image's own seed, so
    that image i is the same alone and in a batch, and a longer panorama begins with the shorter one.
    UserError: the model does not outpaint, an unknown side, or no tile.
    """
    axis, before = lookup(SIDES, toward, "toward")
    if "concat" not in getattr(denoiser.net, "takes", ()):
        fix = "a run trained with data.outpaint"
        raise UserError("a panorama needs a model that outpaints", key="panorama", found=tiles, fix=fix)
    if tiles < 1:
        raise UserError("must be at least 1", key="panorama", found=tiles)
    noise, new = ImageNoise(seeds), shape[axis] // 2
    draw = lambda known, mask: tile(denoiser, schedule, config, noise, known, mask, cond, negative)
    blank = torch.zeros(len(seeds), *shape)
    whole = draw(blank, torch.ones_like(blank[:, :1])) if first is None else first.cpu().float()
    for _ in range(tiles - 1):
        known, mask = next_tile(whole, shape[axis], new, axis, before)
        made = part(draw(known, mask), new, axis, before)
        whole = torch.cat([made, whole] if before else [whole, made], axis)
    return whole


def part(x: Tensor, size: int, axis: int, first: bool) -> Tensor:
    """The first or the last `size` rows or columns."""
    return x.narrow(axis, 0 if first else x.shape[axis] - size, size)


def next_tile(whole: Tensor, side: int, new: int, axis: int, before: bool) -> tuple[Tensor, Tensor]:
    """The tile (b c h w) that goes on from the end of `whole` by `new` empty columns, and its mask (b 1 h w), 1 there."""
    known = part(whole, side - new, axis, before)
    empty = torch.zeros_like(part(whole, new, axis, before))
    parts = [(empty, torch.ones_like(empty)), (known, torch.zeros_like(known))]
    x, mask = (torch.cat(pair, axis) for pair in zip(*(parts if before else parts[::-1])))
    return x, mask[:, :1]


def tile(
    denoiser: Denoiser,
    schedule: Schedule,
    config: SampleConfig,
    noise: ImageNoise,
    known: Tensor,
    mask: Tensor,
    cond: Mapping[str, Tensor] | None = None,
    negative: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One tile (b c h w) where mask (b 1 h w) is 1, and `known`, bit for bit, where it is 0; on the CPU.

    Held twice. In every step the denoiser's estimate is `known` there (`guidance.keep`): the net learnt nothing about
    the known part but saw it, under its noise, beside what it makes. At the end it is pasted, since samplers that go
    through means of several estimates may round it.
    """
    device = next(denoiser.parameters()).device
    known = known * (1 - mask)
    x, ladder = begin(denoiser, schedule, config, noise.draw(*known.shape[1:]), known)
    there = lambda given: {name: value.to(device) for name, value in given.items()}
    denoiser.eval()
    D = guided(denoiser, there({**(cond or {}), "concat": known}), config, there(negative or {}))
    D = keep(D, known.to(device), mask.to(device))
    *_, last = sample(D, x.to(device), ladder, make_step(config), noise)
    return torch.where(mask > 0, last.x.cpu(), known)
