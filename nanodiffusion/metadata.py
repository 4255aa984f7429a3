"""What made a picture, inside its PNG: our own JSON, exact, and the `parameters` text that other interfaces read.

`parameters` is the format of AUTOMATIC1111's web interface: the prompt, a line "Negative prompt: ...", then one line of
"Name: value" pairs separated by commas, values with a comma or a colon in JSON's quotes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from nanodiffusion.errors import UserError

Settings = dict[str, Any]

OWN, COMMON = "nanodiffusion", "parameters"  # keywords of the PNG text chunks

SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
LADDERS = {
    "trailing": "SGM Uniform",
    "linspace": "Uniform",
    "leading": "DDIM",
    "karras": "Karras",
    "exponential": "Exponential",
}
# their name -> our key; what is not here is kept under its own name and not understood
NUMBERS = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Denoising strength": "strength"}
TEXTS = {"Model": "model", "Model hash": "model_hash"}
PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
LAST_LINE = re.compile(r"^\s*Steps: \d+")


def chunks(settings: Mapping[str, Any]) -> dict[str, str]:
    """The PNG text chunks that carry settings: keyword -> text, as show.save_png takes them."""
    return {COMMON: parameters(settings), OWN: json.dumps(dict(settings))}


def parameters(settings: Mapping[str, Any]) -> str:
    """Settings as one text in the common format; only `prompt` is needed."""
    pairs = {name: settings.get(key) for name, key in NUMBERS.items()}
    pairs["Clip skip"] = settings.get("clip_skip", 0) + 1 if settings.get("clip_skip") else None
    pairs["Sampler"] = _theirs(SAMPLERS, settings.get("sampler"))
    pairs["Schedule type"] = _theirs(LADDERS, settings.get("ladder"))
    if settings.get("width") and settings.get("height"):
        pairs["Size"] = f"{settings['width']}x{settings['height']}"
    pairs |= {name: settings.get(key) for name, key in TEXTS.items()}
    pairs["Version"] = f"nanodiffusion {settings['nanodiffusion']}" if "nanodiffusion" in settings else None
    lines = [str(settings.get("prompt") or "")]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines).encode("utf-8", "replace").decode()


def _theirs(names: Mapping[str, str], component: Any) -> str | None:
    ours = component.get("name") if isinstance(component, Mapping) else component
    return None if ours is None else names.get(ours, ours)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def parse_parameters(text: str) -> Settings:
    """Settings from a text in the common format; pairs that mean nothing to us stay under their own names."""
    lines = text.strip().split("\n")
    pairs = _pairs(lines.pop()) if LAST_LINE.match(lines[-1]) else {}
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    settings: Settings = {"prompt": "\n".join(lines[:start])}
    if start < len(lines):
        settings["negative"] = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return settings | _ours(pairs)


def _pairs(line: str) -> dict[str, str]:
    return {m[1]: _unquoted(m[2].strip()) for m in PAIR.finditer(line)}


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _ours(pairs: dict[str, str]) -> Settings:
    out: Settings = {}
    samplers, ladders = ({v: k for k, v in names.items()} for names in (SAMPLERS, LADDERS))
    for name, value in pairs.items():
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if name in NUMBERS and re.fullmatch(r"-?\d+(\.\d+)?", value):
            out[NUMBERS[name]] = float(value) if "." in value else int(value)
        elif name in TEXTS:
            out[TEXTS[name]] = value
        elif name == "Size" and size:
            out |= {"width": int(size[1]), "height": int(size[2])}
        elif name == "Clip skip" and value.isdigit():
            out["clip_skip"] = max(0, int(value) - 1)  # theirs counts the last layer as 1
        elif name == "Schedule type" and value in ladders:
            out["ladder"] = {"name": ladders[value]}
        elif name == "Sampler" and value.removesuffix(" Karras") in samplers:  # older files name both in one
            out["sampler"] = {"name": samplers[value.removesuffix(" Karras")]}
            out |= {"ladder": {"name": "karras"}} if value.endswith(" Karras") else {}
        else:
            out[name] = value
    return out


def read_settings(path: str | Path) -> Settings:
    """The settings in a picture: our JSON, else the common text. UserError: no picture, or none in it."""
    try:
        with Image.open(path) as image:
            text = {k: v for k, v in image.info.items() if isinstance(v, str)}
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise UserError("the picture cannot be read", file=path, found=str(e)) from None
    if OWN in text:
        try:
            return dict(json.loads(text[OWN]))
        except (ValueError, TypeError, RecursionError) as e:
            raise UserError("the settings in this picture are damaged", file=path, key=OWN, found=str(e)) from None
    if COMMON in text:
        return parse_parameters(text[COMMON])
    raise UserError("this picture carries no settings", file=path, expected="a PNG of ours, or one with `parameters`")
