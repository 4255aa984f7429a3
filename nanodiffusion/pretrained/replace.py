"""Another network in a checkpoint's place: a trained U-Net, VAE or text encoder, from wherever its loader reads it."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.noise import Schedule
from nanodiffusion.pretrained.hub import at_hand, locate, needed, split_name
from nanodiffusion.pretrained.load import (
    TEXTS,
    Bundle,
    family_of,
    file_reading,
    load_codec,
    load_text,
    load_unet,
    usually_v,
)
from nanodiffusion.pretrained.recognise import detect
from nanodiffusion.pretrained.scheduler_config import read_scheduler
from nanodiffusion.pretrained.weights import read_json, source_of
from nanodiffusion.text.prompts import TextEncoder


def replace_part(bundle: Bundle, name: str, where: str | Path, dtype: str | torch.dtype = "keep") -> Bundle:
    """The bundle with the network at `where` as its "unet", "vae", "text_encoder" or "text_encoder_2"; the one given stays.

    where: a folder, a file, a whole checkpoint of which the part is taken, or a name on the hub. dtype: "keep" is the file's.
    A U-Net beside whose `unet/` lies a `scheduler/`, as in a run's folder, brings its prediction and its noise levels, and so
    does one in a whole file, or in one with a mark of them; a prediction that the bundle was loaded with stays.
    UserError: no such part, one of another kind or family, or as its loader.
    """
    changed = lookup(PARTS, name, "part")(bundle, where, dtype)
    return dataclasses.replace(changed, source={**bundle.source, name: str(where)})


def _unet(bundle: Bundle, where: str | Path, dtype: str | torch.dtype) -> Bundle:
    path, old = _downloaded(where), bundle.config
    net = load_unet(path, dtype, _device(bundle.denoiser))
    new = net.config
    found = (family_of(new).name, new.context_dim, new.pooled_dim, new.added_dim, new.channels_out)
    wanted = (bundle.family.name, old.context_dim, old.pooled_dim, old.added_dim, old.channels_out)
    words = ("family", "features of the text", "of the pooled text", "added", "channels of the latents")
    _check(where, "unet", dict(zip(words, zip(wanted, found))))
    schedule, prediction = _reading(bundle, path)
    denoiser = Denoiser(net, prediction, "table", schedule).eval()
    return dataclasses.replace(bundle, denoiser=denoiser, schedule=schedule)


def _downloaded(where: str | Path) -> Path:
    """A U-Net's place on this disk; what is on the hub comes with the `scheduler/` beside it."""
    if Path(where).exists():
        return Path(where)
    name, inside = split_name(where)
    *above, last = inside.split("/")
    whole, rest = ("/".join([name, *above]), last) if last == "unet" else (where, "")
    return locate(whole, partial(needed, variant=None, folders=("unet", "scheduler"))).path / rest


def _reading(bundle: Bundle, path: Path) -> tuple[Schedule, str]:
    """How the U-Net at a path is to be read: as is said beside it or in its file, else as the bundle's own.

    A prediction that was asked for when the bundle was loaded holds for this U-Net too.
    """
    if said := scheduler_beside(path):
        schedule, prediction = read_scheduler(read_json(said), said)
        return schedule, bundle.asked or prediction
    own = bundle.denoiser.prediction.name
    if path.is_file():
        source = source_of(path)
        guess = detect(source.shapes)
        if len(guess.components) > 1 or {"v_pred", "ztsnr"} & source.entries.keys():
            unsaid = own if usually_v(bundle.family, guess.channels_in) else None
            return file_reading(path, source, guess, bundle.asked or guess.prediction or unsaid)
    return bundle.schedule, own


def scheduler_beside(where: str | Path) -> Path | None:
    """The `scheduler_config.json` that says how a U-Net is to be read, where `scheduler/` lies beside its folder `unet/`."""
    path = at_hand(where).absolute()
    inside = path.parent if path.is_file() else path
    folder = inside.parent if inside.name == "unet" else path
    file = folder / "scheduler" / "scheduler_config.json"
    return file if file.is_file() else None


def _vae(bundle: Bundle, where: str | Path, dtype: str | torch.dtype) -> Bundle:
    codec, old = load_codec(where, dtype, _device(bundle.codec), family=bundle.family.name), bundle.codec
    checks: dict[str, tuple[Any, Any]] = {
        key: (getattr(old.config, key), getattr(codec.config, key)) for key in ("latent_channels", "scale", "shift")
    }
    _check(where, "vae", {**checks, "factor": (old.factor, codec.factor)})
    return dataclasses.replace(bundle, codec=codec)


def _text(i: int, bundle: Bundle, where: str | Path, dtype: str | torch.dtype) -> Bundle:
    name, parts = TEXTS[i][0], list(bundle.text.parts)
    if i >= len(parts):
        what = f"a checkpoint of {bundle.family.name} has one text encoder"
        raise UserError(what, key=name, fix=f"{TEXTS[0][0]}=..., or a checkpoint of sdxl")
    old = parts[i].net
    net = load_text(where, dtype, _device(old), name=name, activation=old.config.activation)
    new = dataclasses.asdict(net.config)
    _check(where, name, {key: (value, new[key]) for key, value in dataclasses.asdict(old.config).items()})
    parts[i] = dataclasses.replace(parts[i], net=net)
    return dataclasses.replace(bundle, text=TextEncoder(parts, bundle.text.check_added))


PARTS: dict[str, Callable[[Bundle, str | Path, str | torch.dtype], Bundle]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": partial(_text, 0),
    "text_encoder_2": partial(_text, 1),
}


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _check(where: str | Path, name: str, checks: Mapping[str, tuple[Any, Any]]) -> None:
    """UserError unless all pairs, of the checkpoint and of the part, are equal."""
    if wrong := {key: pair for key, pair in checks.items() if pair[0] != pair[1]}:
        wanted, found = (", ".join(f"{key} {pair[i]}" for key, pair in wrong.items()) for i in (0, 1))
        what = "this part does not belong into this checkpoint"
        fix = "take one that was trained from a checkpoint of this family"
        raise UserError(what, file=where, key=name, expected=wanted, found=found, fix=fix)
