"""A LoRA on a net from outside: live, as a branch beside a layer, or fused into its weight.

Either way no parameter is renamed, added or lost, so the net's state dict stays what it was. A layer whose weight fast.py
has joined with others no longer exists: add LoRAs first. They may be added, changed and removed after torch.compile.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError, nearest
from nanodiffusion.lora.files import TARGETS, Factors, Lora, Parts
from nanodiffusion.lora.names import Layer, Targets, layers_of, resolve

# -- strength by block ---------------------------------------------------------------------------------------------------


def block_of(target: str, layer: str) -> str:
    """The block that a layer is in, as `blocks` names it: "down.1.0", "down.1.sampler", "mid", "up.2.1", "text.5", ...

    down and up count levels, then the resnets with their attention; "in", "out" and "embedding" are what is left of
    a U-Net, and of a text encoder whatever is in no layer is the encoder's own name.
    """
    if target != "unet":
        match = re.search(r"\blayers\.(\d+)\.", layer)
        return f"{target}.{match[1]}" if match else target
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)", layer):
        side, level, kind, index = match.groups()
        return f"{side}.{level}.{'sampler' if kind.endswith('samplers') else index}"
    ends = {"mid_block": "mid", "conv_in": "in", "conv_out": "out"}
    return ends.get(layer.split(".")[0], "embedding")


def _ways(target: str, block: str) -> list[str]:
    """The names in `blocks` that cover a block, the narrowest first: down.1.0, down.1, down, unet."""
    steps = block.split(".")
    return [".".join(steps[:n]) for n in range(len(steps), 0, -1)] + [target]


def lbw(text: str) -> dict[str, float]:
    """`blocks` from a row of numbers in the order of the web UI's LoRA block weights: "1,0,0,...", 12, 17, 20 or 26 of them.

    17 (those with attention) and 26 are for SD 1.x and 2.x, 12 and 20 for SDXL. The first is for the text encoders.
    """
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError as e:
        raise UserError("block weights are numbers between commas", key="blocks", found=text) from e
    rows = {
        12: (3, [4, 5, 7, 8], range(6)),
        17: (4, [1, 2, 4, 5, 7, 8], range(3, 12)),
        20: (3, range(9), range(9)),
        26: (4, range(12), range(12)),
    }
    if len(weights) not in rows:
        raise UserError(
            "no order has this many block weights", key="blocks", expected="12, 17, 20, 26", found=len(weights)
        )
    levels, downs, ups = rows[len(weights)]
    names = [["text", "text_2"], *map(_down, downs), ["mid"], *(_up(n, levels) for n in ups)]
    return {name: weight for group, weight in zip(names, weights) for name in group}


def _down(n: int) -> list[str]:
    """The n-th input block of the original net: the first is a convolution, then come levels of two resnets and a sampler."""
    level, index = divmod(n - 1, 3)
    return ["in"] if n == 0 else [f"down.{level}.{'sampler' if index == 2 else index}"]


def _up(n: int, levels: int) -> list[str]:
    """The n-th output block of the original net: levels of three resnets, the third with the sampler."""
    level, index = divmod(n, 3)
    return [f"up.{level}.{index}"] + ([f"up.{level}.sampler"] if index == 2 and level < levels - 1 else [])


# -- one layer, changed --------------------------------------------------------------------------------------------------


class _Branch:
    """The low-rank branch of one LoRA at one layer. What is not trained is kept in the weight's dtype, where the input is."""

    def __init__(self, factors: Factors, scale: float, weight: Tensor) -> None:
        dtype = weight.dtype if weight.dtype.itemsize > 1 else None  # float8 is for storage only
        self.factors = factors if _trained(factors) else factors.map(lambda t: t.to(weight.device, dtype))
        self.scale = scale

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """x as the layer takes it -> what to add to its output."""
        if self.factors.down.device != x.device and not _trained(self.factors):
            self.factors = self.factors.map(lambda t: t.to(x.device))  # the net has moved
        return branch(self.factors.map(lambda t: t.to(x)), layer, x) * self.scale


def branch(factors: Factors, layer: Layer, x: Tensor) -> Tensor:
    """up(down(x)), in the way of the layer: x (b [n] i) or (b i h w) -> (b [n] o) or (b o h' w')."""
    if factors.up.ndim == 2:
        return F.linear(F.linear(x, factors.down), factors.up)
    assert isinstance(layer, nn.Conv2d)
    wide = factors.down if factors.mid is None else factors.mid
    h = x if factors.mid is None else F.conv2d(x, factors.down)
    return F.conv2d(layer._conv_forward(h, wide, None), factors.up)


def _trained(factors: Factors) -> bool:
    return factors.down.requires_grad


class _Live:
    """The forward of a layer with LoRAs, which stands before its own until the last of them is gone.

    torch.compile watches a forward, and does not watch hooks. torch.add(alpha=) is avoided: inductor keeps its first value.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer, self.own = layer, vars(layer).get("forward")
        self.branches: dict[int, _Branch] = {}

    def forward(self, input: Tensor) -> Tensor:
        out = self.own(input) if self.own else cast(Any, type(self.layer)).forward(self.layer, input)
        for add in self.branches.values():
            out = out + add(self.layer, input)
        return out


def _live(layer: Layer) -> _Live | None:
    owner = getattr(vars(layer).get("forward"), "__self__", None)
    return owner if isinstance(owner, _Live) else None


def _connect(layer: Layer, number: int, factors: Factors, scale: float) -> None:
    live = _live(layer) or _Live(layer)
    if number in live.branches:
        live.branches[number].scale = scale  # its factors are cast already
    else:
        live.branches[number] = _Branch(factors, scale, layer.weight)
    vars(layer)["forward"] = live.forward


def _disconnect(layer: Layer, number: int) -> None:
    live = _live(layer)
    if live is None or live.branches.pop(number, None) is None:
        return
    if not live.branches:
        del vars(layer)["forward"]
        vars(layer).update({"forward": live.own} if live.own else {})


@dataclass
class _Fused:
    """The weight a layer had, the very tensor, and what is fused over it."""

    base: Tensor
    parts: dict[int, tuple[Factors, float]]


_FUSED: WeakKeyDictionary[nn.Module, _Fused] = WeakKeyDictionary()


def _fuse(layer: Layer, number: int, factors: Factors, scale: float) -> None:
    record = _FUSED.setdefault(layer, _Fused(layer.weight.data, {}))
    record.parts[number] = (factors, scale)
    _rebuild(layer, record)


def _unfuse(layer: Layer, number: int) -> None:
    record = _FUSED.get(layer)
    if record is None or record.parts.pop(number, None) is None:
        return
    _rebuild(layer, record)
    if not record.parts:
        del _FUSED[layer]


def _rebuild(layer: Layer, record: _Fused) -> None:
    """weight = base + sum of scale * delta, from the base each time and in one order: history leaves no trace."""
    base = record.base.to(layer.weight.device, layer.weight.dtype)  # the net may have moved since
    wide = base.to(torch.promote_types(base.dtype, torch.float32)) if base.dtype.itemsize > 1 else base.float()
    changes = [(f.map(lambda t: t.to(wide.device)), scale) for _, (f, scale) in sorted(record.parts.items()) if scale]
    for factors, scale in changes:
        wide = wide.add(factors.delta(wide.dtype), alpha=scale)
    layer.weight.data = torch.empty_like(base).copy_(wide) if changes else base


# -- a LoRA on a net -----------------------------------------------------------------------------------------------------

_numbers = itertools.count()


@dataclass(frozen=True)
class _Place:
    """One layer that a LoRA changes."""

    target: str
    block: str
    layer: Layer
    factors: Factors


class Applied:
    """A LoRA on its nets: set its strength, fuse it, remove it. Any number may be on the same nets, live or fused.

    `lora` has the factors by layer, for `save_lora`; of one from `new_lora` they are trainable.
    """

    def __init__(self, lora: Lora, targets: Targets, strength: float, blocks: Mapping[str, float]) -> None:
        named = {target: layers_of(net) for target, net in targets.items()}
        self.lora, self.number = lora, next(_numbers)
        self.places = [_Place(t, block_of(t, name), named[t][name], f) for t, name, f in lora]
        self.known = {way for t, names in named.items() for name in names for way in _ways(t, block_of(t, name))}
        self.strength, self.blocks, self.fused = strength, dict(blocks), False
        self.set(strength, blocks)

    def set(self, strength: float | None = None, blocks: Mapping[str, float] | None = None) -> Self:
        """Change its strength, or that of blocks; what is not given stays. Puts a removed one back.

        blocks: name -> factor on strength, the narrowest name counts: "down.1.0", "down.1", "mid", "up", "text", "unet".
        UserError: an unknown block or a strength that is no finite number.
        """
        strength = self.strength if strength is None else strength
        blocks = self.blocks if blocks is None else dict(blocks)
        _check_strengths({"strength": strength, **blocks}, self.known)
        self.strength, self.blocks = strength, blocks
        for place in self.places:
            self._put(place)
        return self

    def fuse(self) -> Self:
        """Change the weights themselves, as fast as without a LoRA; the original ones are kept beside them."""
        return self._turn(True)

    def unfuse(self) -> Self:
        """Live again: the weights are those before, to the bit, or those with the other LoRAs fused alone."""
        return self._turn(False)

    def remove(self) -> None:
        """Leave the nets as they were without it."""
        for place in self.places:
            _disconnect(place.layer, self.number)
            _unfuse(place.layer, self.number)

    def parameters(self) -> list[nn.Parameter]:
        """The factors that are trained: none, unless it is from `new_lora`."""
        return [t for place in self.places for t in place.factors.tensors if isinstance(t, nn.Parameter)]

    def _turn(self, fused: bool) -> Self:
        if self.fused is not fused:
            self.remove()
            self.fused = fused
        return self.set()

    def _put(self, place: _Place) -> None:
        ways = (way for way in _ways(place.target, place.block) if way in self.blocks)
        scale = self.strength * self.blocks.get(next(ways, ""), 1.0) * place.factors.scale
        put = _fuse if self.fused else _connect
        put(place.layer, self.number, place.factors, scale)


def _check_strengths(strengths: Mapping[str, float], known: set[str]) -> None:
    for name, value in strengths.items():
        if not math.isfinite(value):
            raise UserError("a strength must be a finite number", key=name, found=value)
        if name not in known and name not in ("strength", *TARGETS):
            raise UserError("no such block", key=name, fix=nearest(name, (k for k in known if k.count(".") < 2)))


def add_lora(targets: Targets, lora: Lora, strength: float = 1.0, blocks: Mapping[str, float] | None = None) -> Applied:
    """Put a LoRA on its nets, live: every layer's output gains strength * alpha/rank * up(down(x)).

    targets: "unet", "text", "text_2" -> net; blocks: see `Applied.set`. A net whose block is 0 need not be given.
    UserError: see `resolve` and `Applied.set`; the nets are then untouched.
    """
    blocks = blocks or {}
    silent = {target for target in TARGETS if blocks.get(target) == 0 and target not in targets}
    wanted = {target: named for target, named in lora.parts.items() if target not in silent}
    return Applied(resolve(replace(lora, parts=wanted), targets), targets, strength, blocks)


# the projections of a U-Net's attention, and of CLIP's
PROJECTIONS = tuple("to_q to_k to_v to_out.0 q_proj k_proj v_proj out_proj".split())


def new_lora(
    targets: Targets,
    rank: int = 4,
    alpha: float | None = None,
    match: tuple[str, ...] = PROJECTIONS,
    generator: torch.Generator | None = None,
) -> Applied:
    """A LoRA to train, live on every layer whose name ends in one of `match`: it changes nothing until it is trained.

    down starts uniform (Kaiming, as peft and kohya do), up at zero, both float32 whatever the net is. alpha: the rank,
    unless given. The draw depends on the generator (on the CPU) alone. UserError: nothing matches, or rank < 1.
    """
    if rank < 1:
        raise UserError("a LoRA needs a rank", key="rank", expected="1 or more", found=rank)
    parts: Parts = {}
    for target, net in targets.items():
        for name, layer in layers_of(net).items():
            if f".{name}".endswith(tuple(f".{m}" for m in match)):
                parts.setdefault(target, {})[name] = _new(layer, rank, rank if alpha is None else alpha, generator)
    if not parts:
        ends = {name.rpartition(".")[2] for net in targets.values() for name in layers_of(net)}
        raise UserError("no layer matches", key="match", found=", ".join(match), fix=nearest(match[0], ends))
    return Applied(Lora(parts), targets, 1.0, {})


def _new(layer: Layer, rank: int, alpha: float, generator: torch.Generator | None) -> Factors:
    out, width, *kernel = layer.weight.shape
    down = nn.init.kaiming_uniform_(torch.empty(rank, width, *kernel), math.sqrt(5), generator=generator)
    up = torch.zeros(out, rank, *(1 for _ in kernel))
    return Factors(down, up, float(alpha)).map(lambda t: nn.Parameter(t.to(layer.weight.device)))
