"""`nanodiffusion encode SOURCE out=DIR codec=... text=...`: pictures and captions to latents and vectors, once and for all."""

import typing
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from nanodiffusion.cli.words import parse_value, read_pairs, take_first
from nanodiffusion.config import check_options
from nanodiffusion.distributed import world
from nanodiffusion.encode import EncodeConfig, Encoder
from nanodiffusion.errors import UserError
from nanodiffusion.fast import tune

NONE = ("", "none", "null")


def main(args: Namespace) -> int:
    """Encode what was asked for, and say what there is."""
    expected = "nanodiffusion encode SOURCE out=DIR codec=PATH|none [key=value ...]"
    source, words = take_first(args.words, UserError("encode what?", expected=expected))
    out, device, config = read_words(source, *words)
    with world(device) as w:
        tune(w.device)
        say: Callable[[str], None] = print if w.first else lambda text: None
        manifest = Encoder(config, out, w, say).run()
        if w.first:
            say(f"{out}: {describe(manifest)}")
    return 0


def read_words(source: str, *words: str) -> tuple[str, str, EncodeConfig]:
    """The words of the command as (out, device, config). UserError: an unknown key, a value of another kind, no out."""
    kinds = {f.name: typing.get_type_hints(EncodeConfig)[f.name] for f in fields(EncodeConfig) if f.name != "source"}
    kinds |= {"out": str, "device": str}
    pairs = read_pairs(words, kinds)
    given: dict[str, Any] = {k: v if kinds[k] is str else parse_value(v) for k, v in pairs.items()}
    check_options(given, kinds, "")
    for key, fix in (("out", "out=FOLDER"), ("codec", "codec=FOLDER of an autoencoder, or codec=none for pixels")):
        if key not in given:
            raise UserError(f"encode needs {key}", key=key, fix=fix)
    for key in ("codec", "text"):
        given[key] = "" if given.get(key, "").lower() in NONE else given[key]
    if "dtype" in given and given.get("quantise") is not False and not given["text"]:
        raise UserError("only what is not quantised has a dtype", key="dtype", fix="quantise=false")
    return given.pop("out"), given.pop("device", "auto"), EncodeConfig(source, **given)


def describe(manifest: dict[str, Any]) -> str:
    """One line: how many, of what, and how to train on it."""
    latents, shape = manifest["latents"], " x ".join(map(str, manifest["shape"]))
    text = f"{manifest['count']} samples of {shape}, {latents['dtype']}"
    if latents["limit"]:
        text += f" in ±{latents['limit']:.4g}" + f", {latents['clipped']} values beyond it" * bool(latents["clipped"])
    more = [name for name in ("flipped", "pooled", "context", "sizes", "labels", "captions") if manifest.get(name)]
    return text + f" ({', '.join(more)})" * bool(more)
