"""Weights of one net for another: of another sample size, with more input channels, or with other classes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError, few
from nanodiffusion.nets.layers import pair

Net = TypeVar("Net", bound=nn.Module)
Grid = tuple[int, int]

PLACES = ("denoiser_trans_block.pos_embed.weight",)  # learned tables, one row per token
INPUTS = (  # layers that read the sample, by channel first
    "x_embedder.proj.weight",
    "patch_embedding.lin_projection.weight",
    "denoiser_trans_block.patchify_and_embed.0.weight",
    "conv_in.weight",
)
CLASSES = ("y_embedder.embedding_table.weight", "context_embedding.weight")  # one row per class, the null class last


def fit_state(
    net: nn.Module, state: Mapping[str, Tensor], grid: Grid | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """A net's state dict made of another's weights, and in words what had to change; what fits is taken as it is.

    Learned positions are resized, fixed ones are the net's own, input channels that are new get zero weights, and classes
    keep their rows, the null class its last one. grid: rows and columns of tokens that `state` was made for; by default a
    square, or the net's own aspect. Raises UserError, which names the keys, where a weight can be fitted in no such way.
    """
    own, fixed = net.state_dict(), {key for key, _ in net.named_buffers()}
    missing, unknown = own.keys() - state.keys() - fixed, state.keys() - own.keys()
    if missing or unknown:
        raise UserError(
            "these weights are another network's",
            expected=f"all {len(own)} weights of the net, and no others",
            found=f"{len(missing)} missing ({few(sorted(missing))}), {len(unknown)} unknown ({few(sorted(unknown))})",
        )
    fitted, notes, wrong = {}, [], []
    for key, mine in own.items():
        theirs = state.get(key)
        value, note = (mine, "") if theirs is None else _fit(key, theirs, mine, key in fixed, net, grid)
        if value is None:
            wrong.append((key, tuple(mine.shape), tuple(cast(Tensor, theirs).shape)))
        else:
            fitted[key] = value
        notes += [note] * bool(note)
    if wrong:
        (_, expected, found), keys = wrong[0], few(key for key, *_ in wrong)
        raise UserError("weights of another shape", key=keys, expected=expected, found=found)
    return fitted, notes


def _fit(
    key: str, theirs: Tensor, mine: Tensor, fixed: bool, net: nn.Module, grid: Grid | None
) -> tuple[Tensor | None, str]:
    """(the weight of that key, what was done to it in words); None where nothing helps."""
    if key in PLACES:
        new = net.config.grid  # type: ignore[union-attr]
        if theirs.shape[1:] == mine.shape[1:]:
            return _fit_places(theirs, grid, cast(Grid, new))
    if fixed:
        return mine, "" if theirs.shape == mine.shape else f"{key}: made anew for {_spell(mine.shape)}"
    if theirs.shape == mine.shape:
        return theirs, ""
    if key in INPUTS and theirs.shape[:1] == mine.shape[:1] and theirs.shape[2:] == mine.shape[2:]:
        return _widen(key, theirs, mine)
    if key in CLASSES and theirs.shape[1:] == mine.shape[1:]:
        return _fit_classes(theirs, mine)
    return None, ""


def _spell(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# -- positions ---------------------------------------------------------------------------------------------------------


def _fit_places(table: Tensor, old: Grid | None, new: Grid) -> tuple[Tensor, str]:
    old = old or _guess_grid(len(table), new)
    if math.prod(old) != len(table):
        found = f"{len(table)} rows"
        raise UserError("a table of positions of another size", key=PLACES[0], expected=_spell(old), found=found)
    note = f"positions: {_spell(old)} -> {_spell(new)} tokens"
    return (table, "") if old == new else (resize_table(table, old, new), note)


def _guess_grid(tokens: int, new: Grid) -> Grid:
    """Rows and columns of so many tokens: the net's own, or else a square, or else of the net's aspect."""
    side, rows = math.isqrt(tokens), math.isqrt(tokens * new[0] // new[1])
    if tokens == math.prod(new):
        return new
    if side * side == tokens:
        return side, side
    if rows and rows * new[1] == tokens // rows * new[0] and tokens % rows == 0:
        return rows, tokens // rows
    fix = "pass the grid, rows and columns of tokens, that they were made for"
    raise UserError("a table of positions of an unknown shape", key=PLACES[0], found=f"{tokens} tokens", fix=fix)


def resize_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Rows (old d) of a table as a map of another size -> (new d): linear where it grows, means where it shrinks."""
    maps = table.detach().double().unflatten(0, old).permute(2, 0, 1)[None]  # (1 d rows columns)
    for size in ((new[0], old[1]), new):  # one axis at a time: one may grow and the other shrink
        if math.prod(size) > maps.shape[2] * maps.shape[3]:
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        else:
            maps = F.interpolate(maps, size, mode="area")
    return maps[0].permute(1, 2, 0).flatten(0, 1).to(table)


# -- input channels, classes -------------------------------------------------------------------------------------------


def _widen(key: str, theirs: Tensor, mine: Tensor) -> tuple[Tensor | None, str]:
    """Zeros for the channels that are new, which come last; None where there are fewer."""
    more = mine.shape[1] - theirs.shape[1]
    if more < 0:
        return None, ""
    zeros = theirs.new_zeros(len(theirs), more, *theirs.shape[2:])
    return torch.cat([theirs.detach(), zeros], 1), f"{key}: {theirs.shape[1]} -> {mine.shape[1]} inputs, the new ones 0"


def _fit_classes(theirs: Tensor, mine: Tensor) -> tuple[Tensor, str]:
    """The shared classes' rows, the net's own for new classes, and the null class's row last."""
    shared, new = min(len(theirs), len(mine)) - 1, len(mine) - 1
    rows = [theirs.detach()[:shared], mine.detach()[shared:new].to(theirs), theirs.detach()[-1:]]
    return torch.cat(rows), f"classes: {len(theirs) - 1} -> {new}, {shared} shared"


# -- sizes -------------------------------------------------------------------------------------------------------------


def resized(net: Net, size: int | tuple[int, int]) -> Net:
    """The same net for samples of another size (side, or height and width), its weights fitted; the given net stays as it is.

    For its own size that is the net itself.
    Raises UserError when the net has no size, or cannot have that one.
    """
    config: Any = getattr(net, "config", None)
    if not hasattr(config, "in_size"):
        raise UserError("a net without a size cannot have another", key="in_size", found=type(net).__name__)
    if pair(size) == pair(config.in_size):
        return net
    weight = next(net.parameters())
    new = cast(Any, type(net))(at_size(config, size)).to(weight.device, weight.dtype)
    new.load_state_dict(fit_state(new, net.state_dict(), getattr(config, "grid", None))[0])
    wanted = {key: p.requires_grad for key, p in net.named_parameters()}
    for key, p in new.named_parameters():
        p.requires_grad_(wanted[key])
    return new.train(net.training)


def at_size(config: Any, size: int | tuple[int, int]) -> Any:
    """A net's config for another sample size; a U-Net's attention stays at its levels, which are named by their size."""
    options: dict[str, Any] = {"in_size": size}
    if hasattr(config, "attends"):
        levels = range(len(config.multipliers))
        options["attention"] = tuple(max(pair(size)) // 2**level for level in levels if config.attends(level))
    return replace(config, **options)
