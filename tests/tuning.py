"""Recipes of every fine-tuning task on a tiny checkpoint and a few photos, for what is to be tried on all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image
from sd_files import tree
from test_finetune import LDM
from tiny import AVERAGES, IMAGES, make_runner

OPTIONS: dict[str, dict[str, Any]] = {  # of a task, where it is to be smaller than usual or to do more
    "lora": {"rank": 4, "targets": ["unet", "text"]},
    "lcm": {"rank": 4, "levels": 10},
    "distill": {"levels": 10, "w_max": 2.0},
    "textual_inversion": {"start": "cat", "templates": "style"},
}
READ = {  # what a task reads of the pictures beside their captions
    "controlnet": {"control": {"name": "canny"}},
    "adapter": {"control": {"name": "canny"}},
    "inpaint": {"hole": {"name": "random"}},
    "inpaint_by_tokens": {"hole": {"name": "random"}},
}


def prepare(folder: Path) -> Path:
    """Four photos of 72 x 88 with captions, and a run of digits to distil."""
    (folder / "photos").mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        pixels = np.asarray(getattr(skimage.data, name)())[..., :3]
        Image.fromarray(pixels).resize((88, 72)).save(folder / "photos" / f"{name}.png")
        (folder / "photos" / f"{name}.txt").write_text(f"a photo of the {name}")
    make_runner(folder, {**IMAGES, "data": {"name": "digits"}}, name="base", steps=2).run()
    return folder


def recipe(name: str, place: Path, task: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A recipe of a task on what `prepare` made in `place`; task: options of its own."""
    distilled = name == "distill"
    pictures = {"name": "pictures", "path": str(place / "photos"), "size": 64, "flip": True, **READ.get(name, {})}
    return {
        **({} if distilled else LDM),
        "task": {
            "name": name,
            "base": str(place / "base" if distilled else tree("sd1")),
            **OPTIONS.get(name, {}),
            **(task or {}),
        },
        "data": {"name": "digits"} if distilled else pictures,
        "batch_size": 4,
        "accumulate": 2,
        "lr": 1e-3,
        "lr_schedule": {"name": "cosine", "warmup": 3},
        "cond_dropout": 0.2,
        "ema": AVERAGES[:1],
        "log_every": 2,
        "checkpoint_every": 1,
        **more,
    }
