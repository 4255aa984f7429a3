"""LoRA (Hu et al. 2021): read in every dialect of the community, applied to a net from outside, written, and made anew.

    W' = W + strength * alpha/rank * up @ down

Live, a layer's forward gains the low-rank branch; fused, its weight is changed. Either way no parameter is renamed, added
or lost, so the net's state dict stays what it was. A layer whose weight fast.py has joined with others no longer
exists: add LoRAs first. They may be added, changed and removed after torch.compile.
"""

import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.checkpoint import load_tensors, save_tensors
from nanodiffusion.errors import UserError, lookup, nearest
from nanodiffusion.layouts import FAMILY_OF_CONTEXT, module_names, published

Layer = nn.Linear | nn.Conv2d
Targets = Mapping[str, nn.Module]  # "unet", "text" (the first or only text encoder), "text_2" -> the net

TARGETS = ("unet", "text", "text_2")


# -- what a LoRA is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """One layer's low-rank change: down (r i [k k]), up (o r [1 1]); alpha/rank scales it.

    With mid (r r k k) between them, and down of 1x1, it is LoCon's CP decomposition of a convolution.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of down."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes, (o i [k k])."""
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """down, up and, where there is one, mid."""
        return (self.down, self.up) if self.mid is None else (self.down, self.up, self.mid)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        """The same with every tensor changed."""
        return replace(self, **{n: change(t) for n, t in zip(("down", "up", "mid"), self.tensors)})

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """up @ down as a weight (o i [k k]), not yet scaled by alpha/rank."""
        wide = self.map(lambda t: t.detach().to(dtype)).without_mid()
        return (wide.up.flatten(1) @ wide.down.flatten(1)).unflatten(1, self.shape[1:])

    def without_mid(self) -> "Factors":
        """The same change as a pair: mid multiplied into down, (r i k k)."""
        if self.mid is None:
            return self
        return replace(self, down=torch.einsum("rskl,si->rikl", self.mid, self.down.flatten(1)), mid=None)

    def fit(self, shape: torch.Size) -> "Factors":
        """Those of a linear layer for a 1x1 convolution with a weight of that shape, and the reverse."""
        if len(shape) == 2 and self.shape[2:] == (1, 1):
            return self.map(lambda t: t.flatten(1))
        if len(self.shape) == 2 and shape[2:] == (1, 1):
            return self.map(lambda t: t[:, :, None, None])
        return self


Parts = dict[str, dict[str, Factors]]  # target -> layer -> its factors


@dataclass(frozen=True)
class Lora:
    """The factors of a LoRA: `parts["unet"][layer]`. As read, layers are named as in the file; `resolve` finds their names here.

    dialect: "kohya", "peft", "diffusers", "comfyui" or "original" as read, "" once resolved.
    """

    parts: Parts
    dialect: str = ""
    file: object = None

    def __iter__(self) -> Iterator[tuple[str, str, Factors]]:
        return ((target, name, f) for target, layers in self.parts.items() for name, f in layers.items())

    @property
    def context(self) -> int | None:
        """Features of the text that its U-Net looks at; None where it does not change how."""
        widths = (f.down.shape[1] for target, name, f in self if target != "text" and _ATTENDS.search(name))
        return next(widths, None)

    def __str__(self) -> str:
        ranks = sorted({f.rank for _, _, f in self})
        where = ", ".join(f"{len(layers)} of {target or 'one net'}" for target, layers in self.parts.items())
        made = f", for {_family(self.context)}" if self.context else ""
        return f"LoRA {self.dialect or 'resolved'}: layers {where}; rank {', '.join(map(str, ranks))}{made}"


_ATTENDS = re.compile(r"attn2[._](processor[._])?to_[kv]$")


def _family(context: int) -> str:
    return f"{FAMILY_OF_CONTEXT.get(context, 'an unknown family')} ({context} text features)"


# -- reading -----------------------------------------------------------------------------------------------------------

_PREFIXES = {  # of a key -> whose layer it names ("": the name itself must tell), and who writes so
    "lora_unet_": ("unet", "kohya"),
    "lora_te_": ("text", "kohya"),
    "lora_te1_": ("text", "kohya"),
    "lora_te2_": ("text_2", "kohya"),
    "lycoris_": ("unet", "kohya"),
    "unet.": ("unet", "diffusers"),
    "text_encoder.": ("text", "diffusers"),
    "text_encoder_2.": ("text_2", "diffusers"),
    "base_model.model.": ("", "peft"),
    "diffusion_model.": ("unet", "comfyui"),
    **{
        f"{p}clip_{c}.{t}": (target, "comfyui")
        for c, target in zip("lhg", ("text", "text", "text_2"))
        for p in ("text_encoders.", "")
        for t in ("transformer.", "")
    },
    "model.diffusion_model.": ("unet", "original"),
    "cond_stage_model.transformer.": ("text", "original"),
    "cond_stage_model.model.": ("text", "original"),
    "conditioner.embedders.0.transformer.": ("text", "original"),
    "conditioner.embedders.1.model.": ("text_2", "original"),
    "": ("", "diffusers"),
}

_FACTOR = re.compile(
    r"(?P<name>.+?)"
    r"(?:\.lora_(?P<direct>down|up|mid|A|B)(?:\.(?!weight$)[^.]+)?|(?:[._]lora|\.lora_linear_layer)\.(?P<nested>down|up))"
    r"\.weight"
)
_ALPHA = re.compile(
    r"(?P<name>.+?)(?:\.lora_down|\.lora_A|[._]lora|\.lora_linear_layer)?(?:\.down)?(?:\.weight)?\.(?:network_)?alphas?"
)
_ROLES = {"A": "down", "B": "up"}

_OTHER_KINDS = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.diff(_b)?$|\.[wb]_norm$": "full difference of weights",
    r"\.oft_|\.boft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"lora_(B|up)(\.[^.]+)?\.bias$": "LoRA with biases",
    r"^bundle_emb\.": "textual inversion inside a LoRA",
    r"^lora_controlnet$": "control LoRA",
}

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # by which a folder is known


def read_lora(path: str | Path) -> Lora:
    """The LoRA of a .safetensors file, or of a folder as diffusers and peft write it, in whichever dialect.

    UserError: no LoRA, one of another kind (DoRA, LoHa, LoKr, ...), or a damaged one, each naming the key.
    """
    path = _file_of(Path(path))
    tensors, _ = load_tensors(path)
    _refuse_other_kinds(tensors, path)
    found, alphas = _sorted_out(tensors, path)
    if lost := alphas.keys() - found.keys():
        raise UserError("an alpha without factors", file=path, key=min(lost)[1], fix="download it again")
    dialects = sorted({_owner(key)[2] for key in tensors})
    configs = _configs(path, needed="peft" in dialects and not alphas)
    parts: Parts = {}
    for (target, name), pieces in found.items():
        pair = _factors(pieces, name, path)
        alpha = alphas.get((target, name))
        alpha = _alpha(configs.get(target), name, pair.rank, path) if alpha is None else alpha
        parts.setdefault(target, {})[name] = replace(pair, alpha=alpha)
    return Lora(parts, "+".join(dialects), path)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    candidates = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(candidates) != 1:
        found = ", ".join(c.name for c in candidates) or "none"
        raise UserError("cannot tell the LoRA of this folder", file=path, expected="one .safetensors file", found=found)
    return candidates[0]


def _refuse_other_kinds(keys: Iterable[str], path: Path) -> None:
    for key in keys:
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, key):
                raise UserError(
                    f"this is no plain LoRA: {kind}",
                    file=path,
                    key=key,
                    expected="low-rank factors alone: down, up, alpha and, for convolutions, mid",
                    fix="ask for it as a plain LoRA or LoCon, or merge it into a checkpoint with the tool it was made for",
                )


Key = tuple[str, str]  # target, layer as in the file


def _sorted_out(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[Key, dict[str, Tensor]], dict[Key, float]]:
    """Each layer's tensors by role, and its alpha."""
    found: dict[Key, dict[str, Tensor]] = {}
    alphas: dict[Key, float] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        target, rest, _ = _owner(key)
        if match := _FACTOR.fullmatch(rest):
            role = match["direct"] or match["nested"]
            pieces, role = found.setdefault((target, match["name"]), {}), _ROLES.get(role, role)
            if role in pieces:
                raise UserError("this LoRA changes a layer twice", file=path, key=key, fix="split it into two files")
            pieces[role] = tensor
        elif match := _ALPHA.fullmatch(rest):
            alphas[target, match["name"]] = _number(tensor, key, path)
        else:
            strange.append(key)
    if strange or not found:
        what = "some of its tensors belong to no LoRA" if found else "this is no LoRA"
        expected, names = "names such as X.lora_down.weight", _few(strange) or "no tensors"
        raise UserError(what, file=path, expected=expected, found=names)
    return found, alphas


def _owner(key: str) -> tuple[str, str, str]:
    """Whose layer a key names, the rest of the key, and the dialect."""
    prefix = max(filter(key.startswith, _PREFIXES), key=len)
    return _PREFIXES[prefix][0], key.removeprefix(prefix), _PREFIXES[prefix][1]


def _number(tensor: Tensor, key: str, path: Path) -> float:
    if tensor.numel() != 1 or not math.isfinite(float(tensor)):
        raise UserError("alpha must be one finite number", file=path, key=key, found=tuple(tensor.shape))
    return float(tensor)


def _factors(pieces: Mapping[str, Tensor], name: str, path: Path) -> Factors:
    if missing := {"down", "up"} - pieces.keys():
        expected = f"also {missing.pop()}"
        raise UserError(
            "half of this layer is missing", file=path, key=name, expected=expected, fix="download it again"
        )
    factors = Factors(pieces["down"], pieces["up"], 0.0, pieces.get("mid"))
    if not _consistent(factors):
        found = ", ".join(f"{role} {tuple(t.shape)}" for role, t in pieces.items())
        raise UserError("these factors do not belong together", file=path, key=name, expected="one rank", found=found)
    return factors


def _consistent(factors: Factors) -> bool:
    down, up, mid = factors.down.shape, factors.up.shape, () if factors.mid is None else factors.mid.shape
    if len(down) not in (2, 4) or len(up) != len(down) or set(up[2:]) - {1} or 0 in down:
        return False
    return up[1] == down[0] and (not mid or (len(mid) == 4 and set(mid[:2]) == {down[0]} and set(down[2:]) == {1}))


def _alpha(config: Mapping[str, Any] | None, name: str, rank: int, path: Path) -> float:
    """The alpha that a peft configuration gives a layer; without one it is the rank: no scaling (diffusers' convention)."""
    if config is None:
        return float(rank)
    try:
        patterns = {_checked(p): a for p, a in (config.get("alpha_pattern") or {}).items()}
        matches = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
        alpha = float(next(matches, config.get("lora_alpha", rank)))
    except (TypeError, ValueError, AttributeError, re.error) as e:
        raise UserError("the configuration of this LoRA is damaged", file=path, key="alpha_pattern", found=e) from e
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # rslora: alpha/sqrt(rank)


def _checked(pattern: str) -> str:
    """A regular expression from a file; one that repeats a repetition could take forever."""
    if re.search(r"[*+}]\)[*+{]", pattern):
        raise ValueError(f"pattern {pattern!r}")
    return pattern


def _configs(path: Path, needed: bool) -> dict[str, dict[str, Any]]:
    """Target -> its peft configuration: from the file's header (diffusers), or from the file beside it (peft)."""
    header, beside = _header(path).get("lora_adapter_metadata"), path.with_name("adapter_config.json")
    if not header and needed and not beside.is_file():
        fix = f"put {beside.name} beside it: alpha is there"
        raise UserError("a file of peft does not say how strong it is", file=path, expected=beside.name, fix=fix)
    try:
        if header:
            return _by_target(json.loads(header))
        return {"": dict(json.loads(beside.read_text()))} if needed else {}
    except (ValueError, TypeError, AttributeError, OSError) as e:
        raise UserError("the configuration of this LoRA is damaged", file=path, key="lora_alpha", found=e) from e


def _header(path: Path) -> dict[str, str]:
    """What a sound safetensors file says of itself."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__", {})


def _by_target(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        target, rest, _ = _owner(key)
        out.setdefault(target, {})[rest] = value
    return out


# -- whose layer is meant ----------------------------------------------------------------------------------------------


def layers_of(target: nn.Module) -> dict[str, Layer]:
    """The linear layers and convolutions of a net, by name; of a compiled one too."""
    kinds = (nn.Linear, nn.Conv2d)
    return {n.replace("_orig_mod.", ""): m for n, m in target.named_modules() if isinstance(m, kinds)}


def resolve(lora: Lora, targets: Targets) -> Lora:
    """The LoRA with its layers named as in the nets it is for, and its factors shaped as their weights.

    UserError: a net that was not given, a LoRA for another family, or layers that are not there, with the nearest names.
    """
    for target in targets:
        lookup(dict.fromkeys(TARGETS), target, "target")
    nets = {target: _Net(layers_of(net), spellings(target, net)) for target, net in targets.items()}
    _check_family(lora, nets)
    parts: Parts = {}
    for target, named in lora.parts.items():
        target = target or max(nets, key=lambda t: _fitting(named, nets[t]))
        if target not in nets:
            raise UserError(
                f"this LoRA changes {target}, which was not given",
                file=lora.file,
                found=f"{len(named)} layers",
                fix=f"give it, or leave it out: blocks={{{target!r}: 0}}",
            )
        parts.setdefault(target, {}).update(_resolved(target, named, nets[target], lora.file))
    return Lora(parts, "", lora.file)


@dataclass(frozen=True)
class _Net:
    """A net's layers by name, and the names by what dialects call them."""

    layers: dict[str, Layer]
    spellings: dict[str, str]


def spellings(target: str, net: nn.Module) -> dict[str, str]:
    """Every name that a dialect gives a layer of a net -> the layer's name; in kohya's, "_" stands for "." as well."""
    table = {name: name for name in layers_of(net)}
    table |= {theirs: ours for theirs, ours in _originals(target, net) if ours in table}
    if target != "unet":  # transformers has dropped "text_model." from the names of one of its two classes
        table |= {n.removeprefix("text_model."): n for n in layers_of(net)}
        table |= {f"text_model.{n}": n for n in layers_of(net) if not n.startswith("text_")}
    for alias, name in list(table.items()):
        table[alias.removesuffix(".0") if alias.endswith(".to_out.0") else alias] = name
        # diffusers once called CLIP's projections as it calls the U-Net's
        table[re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", alias)] = name
    return table | {alias.replace(".", "_"): name for alias, name in table.items()}


_ORIGINAL = {  # names that the original layout has a counterpart of
    "unet": r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\.",
    "text": r"text_model\.",
    "text_2": r"text_model\.",
}


def _originals(target: str, net: nn.Module) -> Iterator[tuple[str, str]]:
    """(original name, our name) of every module that has one."""
    names = (name.replace("_orig_mod.", "") for name, _ in net.named_parameters())
    known = [name for name in names if re.match(_ORIGINAL[target], name)]
    family = "sd2" if target == "text" else "sdxl"  # of the text encoders, these two have names of their own
    yield from module_names(target, known, family).items()


def _fitting(named: Mapping[str, Factors], net: _Net) -> tuple[int, int]:
    """How many of these layers the net has, and of how many the shape fits."""
    hits = [(net.layers[net.spellings[p]], f) for n, f in named.items() if (p := _plain(n)) in net.spellings]
    return len(hits), sum(f.fit(layer.weight.shape).shape == layer.weight.shape for layer, f in hits)


def _plain(name: str) -> str:
    return name.replace(".processor.", ".")


def _resolved(target: str, named: Mapping[str, Factors], net: _Net, file: object) -> dict[str, Factors]:
    if lost := [name for name in named if _plain(name) not in net.spellings]:
        raise _unmatched(target, lost, len(named), net.spellings, file)
    out: dict[str, Factors] = {}
    for name, factors in named.items():
        layer = net.spellings[_plain(name)]
        shape = net.layers[layer].weight.shape
        if layer in out:
            raise UserError("this LoRA changes a layer twice, under two names", file=file, key=name, found=layer)
        out[layer] = factors.fit(shape)
        if out[layer].shape != shape:
            raise UserError(
                "this LoRA was made for a layer of another shape",
                file=file,
                key=name,
                expected=tuple(shape),
                found=out[layer].shape,
                fix="take one made for this family of models",
            )
    return out


def _unmatched(target: str, lost: list[str], total: int, table: Mapping[str, str], file: object) -> UserError:
    near = [(name, difflib.get_close_matches(_plain(name), table, n=1)) for name in lost[:3]]
    return UserError(
        f"this LoRA has parts that match no layer of {target}",
        file=file,
        found=f"{len(lost)} of {total}: {_few(lost)}",
        fix="is it for another model? nearest: " + ", ".join(f"{n} -> {c[0]}" for n, c in near if c),
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_family(lora: Lora, nets: Mapping[str, _Net]) -> None:
    unet = nets["unet"].layers if "unet" in nets else {}
    has = next((layer.weight.shape[1] for name, layer in unet.items() if _ATTENDS.search(name)), None)
    if lora.context and has and lora.context != has:
        raise UserError(
            "this LoRA was made for another family of models",
            file=lora.file,
            expected=_family(has),
            found=_family(lora.context),
            fix="take a LoRA for this model, or the model for this LoRA",
        )


# -- strength by block -------------------------------------------------------------------------------------------------


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


# -- one layer, changed ------------------------------------------------------------------------------------------------


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


# -- a LoRA on a net ---------------------------------------------------------------------------------------------------

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


# -- writing -----------------------------------------------------------------------------------------------------------


def save_lora(lora: Lora, path: str | Path, layout: str = "diffusers") -> None:
    """Write a resolved LoRA, such as `Applied.lora`, as one .safetensors file that others read.

    layout: "diffusers" (diffusers, ComfyUI), "kohya" (every web UI) or "kohya-sdxl" (the same with the original names of
    the U-Net's layers, as its trainer has them for SDXL). UserError: an unknown layout, or layers not yet resolved.
    """
    save_tensors(path, lora_tensors(lora, layout), {"lora": {"layout": layout}})


def lora_tensors(lora: Lora, layout: str = "diffusers") -> dict[str, Tensor]:
    """What `save_lora` writes: name -> tensor."""
    if lora.dialect:
        raise UserError("the layers have the names of a file", file=lora.file, fix="resolve(lora, targets) first")
    write = lookup(_LAYOUTS, layout, "layout")
    return {name: tensor.detach().contiguous() for name, tensor in write(lora)}


Named = Iterator[tuple[str, Tensor]]


def _diffusers(lora: Lora) -> Named:
    for target, layer, factors in lora:
        prefix = {"unet": "unet", "text": "text_encoder", "text_2": "text_encoder_2"}[target]
        pair = factors.map(torch.Tensor.detach).without_mid()
        yield f"{prefix}.{layer}.lora_A.weight", pair.down
        yield f"{prefix}.{layer}.lora_B.weight", _scaled(pair)


def _scaled(factors: Factors) -> Tensor:
    """up with alpha/rank in it: readers of this layout take alpha for the rank. float32 where its own dtype would round it."""
    wide = factors.up.to(torch.promote_types(factors.up.dtype, torch.float32)) * factors.scale
    same = wide.to(factors.up.dtype)
    return same if torch.equal(same.to(wide.dtype), wide) else wide


def _kohya(lora: Lora) -> Named:
    text = "lora_te1" if "text_2" in lora.parts else "lora_te"
    return _flat(lora, {"unet": "lora_unet", "text": text, "text_2": "lora_te2"}, {})


def _kohya_sdxl(lora: Lora) -> Named:
    original = {ours: theirs for theirs, ours in module_names("unet", published("sdxl-unet")).items()}
    if strange := [layer for layer in lora.parts.get("unet", {}) if layer not in original]:
        raise UserError("SDXL has no such layer", key=strange[0], fix="save with layout='kohya'")
    return _flat(lora, {"unet": "lora_unet", "text": "lora_te1", "text_2": "lora_te2"}, original)


def _flat(lora: Lora, prefixes: Mapping[str, str], spelled: Mapping[str, str]) -> Named:
    for target, layer, factors in lora:
        name = f"{prefixes[target]}_{spelled.get(layer, layer).replace('.', '_')}"
        yield f"{name}.alpha", torch.tensor(factors.alpha)
        for role, tensor in zip(("down", "up", "mid"), factors.tensors):
            yield f"{name}.lora_{role}.weight", tensor


_LAYOUTS: dict[str, Callable[[Lora], Named]] = {"diffusers": _diffusers, "kohya": _kohya, "kohya-sdxl": _kohya_sdxl}
