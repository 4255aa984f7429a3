"""Where pictures go: names that are free, the text in them, grids, films and latents."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from nanodiffusion import show
from nanodiffusion.cli.asked import Output
from nanodiffusion.cli.film import VIEWS, Film, Latents, sheet
from nanodiffusion.cli.parts import Loaded, dtype_of
from nanodiffusion.cli.pictures import film_pace
from nanodiffusion.errors import UserError, lookup, need
from nanodiffusion.metadata import COMMON, chunks, parameters
from nanodiffusion.pretrained import load_tiny
from nanodiffusion.tasks.conditions import to_image

FOLDER = "pictures"
PICTURES = "pictures"  # a film of the pictures themselves, on the way from prompt to prompt
SUFFIXES = {"grid": ".png", "gif": ".gif", "mp4": ".mp4", "latents": ".safetensors"}


class Names:
    """File names: numbers that are free in a folder, with the seed; or FILE.png, of several FILE-0.png, FILE-1.png, ..."""

    def __init__(self, out: str, count: int) -> None:
        self.out, self.count, self.made = Path(out), count, 0
        self.first = 0
        if self.out.suffix != ".png" and self.out.is_dir():
            taken = (re.match(r"(\d{5,})-.*\.png", name) for name in os.listdir(self.out))
            self.first = max((int(m[1]) + 1 for m in taken if m), default=0)

    def next(self, seed: int) -> Path:
        """The next picture's."""
        i, self.made = self.made, self.made + 1
        if self.out.suffix != ".png":
            path = self.out / f"{self.first + i:05d}-{seed}.png"
            return self.next(seed) if path.exists() else path  # another process is at it too
        return self.out if self.count == 1 else self.out.with_name(f"{self.out.stem}-{i}.png")


def check_output(output: Output) -> None:
    """UserError, before anything is loaded, for files that could not be written."""
    for key, suffix in SUFFIXES.items():
        path = Path(output.get(key, suffix))
        if key in output and path.suffix != suffix:
            raise UserError("a file of another kind", key=key, expected=f"a name that ends in {suffix}", found=path)
    out = Path(output.get("out", FOLDER))
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"):
        raise UserError("pictures are written as PNG", key="out", expected="FILE.png or a folder", found=out)
    for key, needs in (("film", ("gif", "mp4")), ("preview", ("gif", "mp4")), ("intermediate", ("latents",))):
        if output.get(key) and not any(n in output for n in needs):
            raise UserError(f"{key} is for {' and '.join(needs)}", key=key, fix=f"{needs[0]}=FILE{SUFFIXES[needs[0]]}")
    lookup(dict.fromkeys((*VIEWS, PICTURES)), output.get("film", PICTURES), "film")
    if "mp4" in output:
        need("av", "viz")
    for key in ("out", *SUFFIXES):
        _check_writable(Path(output.get(key, FOLDER)), key)


def _check_writable(path: Path, key: str) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    wrong = there.is_dir() == (path.suffix in SUFFIXES.values()) if there == path else not there.is_dir()
    if wrong or not os.access(there, os.W_OK):
        found = "no permission" if not wrong else "a folder" if there.is_dir() else "a file"
        raise UserError("this cannot be written", file=there, key=key, found=found, fix="choose another place")


def text_of(settings: dict[str, Any]) -> dict[str, str]:
    """The text of a PNG: our JSON, and what others read, where a model has its file's name and several prompts are one."""
    shown = {k: "\n".join(v) if isinstance(v, list) else v for k, v in settings.items() if k in ("prompt", "negative")}
    model = Path(settings["model"]).name.removesuffix(".safetensors")
    return chunks(settings) | {COMMON: parameters({**settings, **shown, "model": model})}


def recorders_of(loaded: Loaded, output: Output, count: int, between_prompts: bool) -> dict[str, Any]:
    """What watches the steps: a Film, Latents, both or none."""
    found: dict[str, Any] = {}
    if "latents" in output:
        found["latents"] = Latents(output.get("intermediate", False))
    kind = output.get("film", PICTURES if between_prompts else "x0")
    if ("gif" in output or "mp4" in output) and kind != PICTURES:
        found["film"] = Film(kind, decoder(loaded, output.get("preview")), count)
    return found


def decoder(loaded: Loaded, preview: str | None) -> Callable[[Tensor], Tensor]:
    """Latents to pictures: by the model's codec, or by a TAESD."""
    if preview is None:
        return lambda x: to_image(loaded.bundle, x)
    codec = loaded.bundle.codec
    tiny = load_tiny(preview, dtype_of(codec), loaded.bundle.device)
    if (tiny.latent_channels, tiny.factor) != (codec.latent_channels, codec.factor):
        expected, found = (f"{c.latent_channels} channels, factor {c.factor}" for c in (codec, tiny))
        raise UserError("a preview of other latents", file=preview, key="preview", expected=expected, found=found)
    return lambda x: tiny.decode(x.to(loaded.bundle.device))


def write_rest(
    recorders: dict[str, Any], images: list[Image.Image], output: Output, first: dict[str, Any], count: int
) -> Iterator[Path]:
    """The grid, the films and the latents of `count` pictures that are asked for; first: the settings of the first."""
    if "grid" in output:
        yield show.save_png(sheet(images), output["grid"], text_of(first | {"grid": len(images)}))
    if "gif" in output or "mp4" in output:
        frames = recorders["film"].frames() if "film" in recorders else images
        for key, save in (("gif", show.save_gif), ("mp4", show.save_mp4)):
            if key in output:
                yield save(frames, output[key], film_pace(frames))
    if "latents" in output:
        yield recorders["latents"].save(output["latents"], {"generate": first | {"pictures": count}})
