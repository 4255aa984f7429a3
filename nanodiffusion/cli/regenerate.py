"""`nanodiffusion regenerate FILE.png key=value ...`: the picture again, from the settings in it."""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanodiffusion.cli import inert
from nanodiffusion.cli.asked import Asked, Words, asked_of, beside, config_of, read_back, read_words
from nanodiffusion.cli.generate import Session, check_config, make, shots_of
from nanodiffusion.cli.outputs import Names, check_output
from nanodiffusion.cli.parts import load_parts
from nanodiffusion.errors import UserError
from nanodiffusion.metadata import read_settings
from nanodiffusion.tasks import GenerateConfig

MOST = {
    "steps": 10_000,
    "frames": 10_000,
    "batch": 1_000,
    "width": 1 << 16,
    "height": 1 << 16,
}  # that a file may ask for
NETS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")  # in other programs' prompts: a file that we do not have


def main(args: Namespace) -> int:
    """Read the picture's settings, check that everything is as it was, and make it again."""
    if not args.words:
        raise UserError("which picture?", expected="nanodiffusion regenerate FILE.png key=value ...")
    file, words = Path(args.words[0]), read_words(args.words[1:])
    check_words(words)
    check_output(words.output)
    config, asked = recalled(file, words)
    check_config(config)
    with Session(asked.device) as session:
        loaded = load_parts(asked, config, session.device)
        shots = shots_of(loaded, config)
        shot = shots[max(asked.frame, 0)]
        session.told(loaded, [shot])
        out = words.output.get("out") or str(again(file))
        make(loaded, [[shot] * asked.batch], words.output, Names(out, 1), asked.place)
    return 0


def check_words(words: Words) -> None:
    """UserError for what would make other than one picture."""
    for key in ("n", "seeds", "frames"):
        if key in words.config:
            raise UserError("this makes one picture again", key=key, fix="seed=..., or generate for more of them")
    if len(words.prompts) > 1 or "batch" in words.asked:
        key = "prompt" if len(words.prompts) > 1 else "batch"
        raise UserError("this makes one picture again", key=key, fix="leave it out; generate makes several")


def recalled(file: Path, words: Words) -> tuple[GenerateConfig, Asked]:
    """The settings in a picture, with the changes that the words ask for."""
    settings = read_settings(file)
    for key, made in (("run", "nanodiffusion sample"), ("grid", "generate, as a grid of several")):
        if "nanodiffusion" in settings and key in settings:
            raise UserError(f"this picture was made by {made}", file=file, expected="one picture of generate")
    try:
        config, asked = _ours(settings) if "nanodiffusion" in settings else _foreign(settings, words)
    except UserError as e:
        details = {**e.details, "file": e.details["file"] or file}
        raise UserError(e.what, **details) from None  # type: ignore[arg-type]
    _check_sane(file, config, asked)
    if words.config or words.prompts or words.asked:  # the batch it was in matters to the last bit only
        asked = replace(asked, batch=1, place=0)
    return config_of(words, config), available(asked_of(words, beside(asked, file.parent)), words)


def _ours(settings: Mapping[str, Any]) -> tuple[GenerateConfig, Asked]:
    config, asked, left = read_back(settings)
    if left:
        raise UserError("the settings in this picture are of a newer version, or damaged", key=str(next(iter(left))))
    return config, asked


def _foreign(settings: Mapping[str, Any], words: Words) -> tuple[GenerateConfig, Asked]:
    """Of another program's picture: what is understood, with a line about what is not."""
    if "model" not in words.asked:
        named = " ".join(str(settings[k]) for k in ("model", "model_hash") if k in settings)
        fix = "model=FOLDER, FILE.safetensors or OWNER/NAME"
        raise UserError("which model? Another program made this", key="model", found=named or "none named", fix=fix)
    understood = {k: v for k, v in settings.items() if k != "model"}
    if "image" not in words.asked:
        understood.pop("strength", None)
    prompt = understood.get("prompt")
    nets = NETS.findall(prompt) if isinstance(prompt, str) else []
    if nets:
        understood["prompt"] = NETS.sub("", str(prompt)).strip()
    config, asked, left = read_back(understood)
    if lost := [*left, *nets, *(["strength"] if "strength" in settings and "strength" not in understood else [])]:
        print(inert("left out, as not understood: " + ", ".join(lost)[:400]))
    return config, asked


def _check_sane(file: Path, config: GenerateConfig, asked: Asked) -> None:
    """UserError for settings that no run of ours writes."""
    values = {**{k: getattr(config, k) for k in MOST if k != "batch"}, "batch": asked.batch}
    for key, value in values.items():
        if value > MOST[key]:
            raise UserError("these settings are not sound", file=file, key=key, expected=f"<= {MOST[key]}", found=value)
    if any("\0" in name for name in (asked.model, *asked.files())):
        raise UserError("these settings are not sound", file=file, found="a file name with a null character")
    if not 0 <= asked.place < asked.batch or not -1 <= asked.frame < max(config.frames, 1) or config.n != 1:
        found = f"place {asked.place} of {asked.batch}, frame {asked.frame} of {config.frames}, n {config.n}"
        raise UserError("these settings are not sound", file=file, found=found)


def available(asked: Asked, words: Words) -> Asked:
    """The same on a device that is there, if the picture's is not."""
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if "device" not in words.asked and not there.get(asked.device, lambda: True)():
        print(inert(f"made on {asked.device}, which is not here: the same picture but for rounding"))
        return replace(asked, device="auto")
    return asked


def again(file: Path) -> Path:
    """FILE-again.png beside FILE.png, with a number if there is one already."""
    names = [f"{file.stem}-again.png", *(f"{file.stem}-again-{i}.png" for i in range(2, 10_000))]
    return next(file.with_name(name) for name in names if not file.with_name(name).exists())
