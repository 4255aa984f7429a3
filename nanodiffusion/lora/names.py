"""Whose layer a name in a LoRA's file means: every dialect's spelling of every layer of a net."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from nanodiffusion.errors import UserError, few, lookup
from nanodiffusion.lora.files import ATTENDS, TARGETS, Factors, Lora, Parts, family_of_context
from nanodiffusion.pretrained.layouts import module_names

Layer = nn.Linear | nn.Conv2d
Targets = Mapping[str, nn.Module]  # "unet", "text" (the first or only text encoder), "text_2" -> the net


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
        found=f"{len(lost)} of {total}: {few(lost)}",
        fix="is it for another model? nearest: " + ", ".join(f"{n} -> {c[0]}" for n, c in near if c),
    )


def _check_family(lora: Lora, nets: Mapping[str, _Net]) -> None:
    unet = nets["unet"].layers if "unet" in nets else {}
    has = next((layer.weight.shape[1] for name, layer in unet.items() if ATTENDS.search(name)), None)
    if lora.context and has and lora.context != has:
        raise UserError(
            "this LoRA was made for another family of models",
            file=lora.file,
            expected=family_of_context(has),
            found=family_of_context(lora.context),
            fix="take a LoRA for this model, or the model for this LoRA",
        )
