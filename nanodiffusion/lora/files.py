"""What a LoRA is, read from the files of the community in every dialect, and written.

W' = W + strength * alpha/rank * up @ down                     (Hu et al. 2021)
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodiffusion.errors import UserError, few, lookup
from nanodiffusion.pretrained.layouts import module_names
from nanodiffusion.pretrained.recognise import FAMILY_OF_CONTEXT, published
from nanodiffusion.tensors import load_tensors, save_tensors

TARGETS = ("unet", "text", "text_2")


# -- what a LoRA is ------------------------------------------------------------------------------------------------------


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
        widths = (f.down.shape[1] for target, name, f in self if target != "text" and ATTENDS.search(name))
        return next(widths, None)

    def __str__(self) -> str:
        ranks = sorted({f.rank for _, _, f in self})
        where = ", ".join(f"{len(layers)} of {target or 'one net'}" for target, layers in self.parts.items())
        made = f", for {family_of_context(self.context)}" if self.context else ""
        return f"LoRA {self.dialect or 'resolved'}: layers {where}; rank {', '.join(map(str, ranks))}{made}"


ATTENDS = re.compile(r"attn2[._](processor[._])?to_[kv]$")


def family_of_context(context: int) -> str:
    """The family whose text has so many features, in words."""
    return f"{FAMILY_OF_CONTEXT.get(context, 'an unknown family')} ({context} text features)"


# -- reading -------------------------------------------------------------------------------------------------------------

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

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # by which a folder is known


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
    candidates = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
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
        expected, names = "names such as X.lora_down.weight", few(strange) or "no tensors"
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


# -- writing -------------------------------------------------------------------------------------------------------------


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
    write = lookup(LAYOUTS, layout, "layout")
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


LAYOUTS: dict[str, Callable[[Lora], Named]] = {"diffusers": _diffusers, "kohya": _kohya, "kohya-sdxl": _kohya_sdxl}
