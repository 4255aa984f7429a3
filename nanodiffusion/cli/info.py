"""`nanodiffusion info X`: what is in a run, a checkpoint of whichever kind, a LoRA, an embedding, a picture or a recipe."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from nanodiffusion.checkpoint import Checkpoint, checkpoints, verify
from nanodiffusion.cli import inert, one_target
from nanodiffusion.cli.describe import of_folder, of_weights, size_of
from nanodiffusion.cli.recipes import CONFIGS, flow
from nanodiffusion.cli.runs import refuse_several
from nanodiffusion.cli.train import facts, plan, size_and_cost
from nanodiffusion.config import Config, read_config
from nanodiffusion.data.files import SUFFIXES
from nanodiffusion.errors import UserError, nearest
from nanodiffusion.metadata import read_settings
from nanodiffusion.pretrained.weights import PICKLES, pickled, source_of
from nanodiffusion.run import find_checkpoint
from nanodiffusion.tensors import load_meta

Facts = dict[str, Any]


def main(args: Namespace) -> int:
    """Print the facts, one a line; 2 when a checkpoint of the run is damaged."""
    target = one_target(args.words, "RUN, FILE or RECIPE")
    facts = look(target)
    width = max(map(len, facts))
    for key, value in facts.items():
        print(inert(f"{key:<{width}}  {value if isinstance(value, Path) else flow(value)}"))
    return 2 if any(str(v).startswith("DAMAGED") for v in facts.values()) else 0


def look(target: str) -> Facts:
    """The facts about whatever a path or a recipe's name is."""
    path = Path(target)
    readers: dict[str, Callable[[Path], Facts]] = {
        **dict.fromkeys(SUFFIXES, of_picture),
        ".safetensors": of_tensors,
        ".yaml": of_recipe,
        ".json": lambda path: of_weights(source_of(path), path),
    }
    if path.is_dir():
        if (found := of_folder(path)) is not None:
            return found
        refuse_several(path, "info")
        return of_run(path)
    if path.suffix in PICKLES and path.exists():
        raise pickled(path)
    if path.suffix == ".yml":
        return of_recipe(path)
    if path.suffix in readers:
        return readers[path.suffix](path)
    if path.exists():
        expected = "a folder of a run or a checkpoint, " + ", ".join(readers)
        raise UserError("nothing is known of this kind of file", file=path, expected=expected)
    recipes = [p.stem for p in CONFIGS.glob("*.yaml")]
    if target not in recipes:
        raise UserError(f"there is no file, run or recipe {target!r}", fix="recipes: " + nearest(target, recipes))
    return of_recipe(path)


def of_run(path: Path) -> Facts:
    """A run's folder or a checkpoint's: the newest sound checkpoint, and whether each is what its manifest says."""
    checkpoint = find_checkpoint(path)
    root = path / "checkpoint"
    every = [path] if checkpoint.folder == path else [*checkpoints(root), *[f for f in [root / "best"] if f.is_dir()]]
    facts = {"run" if root.is_dir() else "checkpoint": path, "step": checkpoint.step, **of_checkpoint(checkpoint)}
    if (path / "codec").is_dir():
        facts["codec"] = path / "codec"
    for folder in every:
        problems = verify(folder)
        facts[folder.name] = f"DAMAGED: {'; '.join(problems)}" if problems else f"sound, {size_of(folder)}"
    return facts


def of_checkpoint(checkpoint: Checkpoint) -> Facts:
    """What the header of the weights says about their model."""
    meta = checkpoint.meta.get("model", {})
    averages = [name for name in checkpoint.files if name not in ("model", "optimizer")]
    return {"weights": ", ".join(["model", *averages])} | (of_model(meta) if "config" in meta else {})


def of_model(meta: Facts) -> Facts:
    """A model by the configuration, shape and classes in its header."""
    config = read_config(meta["config"])
    classes = meta.get("classes", [])
    return {
        **of_config(config),
        "sample": " x ".join(map(str, meta.get("shape", []))),
        "classes": f"{len(classes)}: {', '.join(classes[:20])}" if classes else "none",
    }


def of_config(config: Config) -> Facts:
    """The parts of a configuration, and the size and cost of its net."""
    own = {
        "task": _component(config.task),
        "net": _component(config.net),
        **size_and_cost(config),
    }
    if config.task["name"] == "autoencode":
        what = "an autoencoder: pictures to latents and back"
        return {"what": what, **own, "precision": config.precision, "data": _component(config.data)}
    return {
        "what": "a denoiser",
        **own,
        "prediction": f"{config.prediction}, clock {config.clock}, {config.precision}",
        "schedule": _component(config.schedule),
        "density": _component(config.density),
        "data": _component(config.data),
        "sampler": _component(config.sample.sampler),
        "ladder": f"{_component(config.sample.ladder)}, {config.sample.steps} steps",
    }


def of_tensors(path: Path) -> Facts:
    """A safetensors file: its tensors, and the model it says, or shows, it is of."""
    meta = load_meta(path)
    if "config" not in meta:
        latents = {"what": "latents of the pictures of a `generate`"} if "generate" in meta else {}
        return of_weights(source_of(path), path) | latents | {k: json.dumps(v)[:2000] for k, v in meta.items()}
    entries = source_of(path).entries.values()
    numbers = sum(math.prod(entry.shape) for entry in entries)
    types = ", ".join(sorted({entry.dtype for entry in entries}))
    facts = {"file": path, "size": size_of(path), "tensors": len(entries), "numbers": f"{numbers:,}", "types": types}
    return facts | of_model(meta)


def of_picture(path: Path) -> Facts:
    """A picture by the settings that made it: of `sample` and `generate`, or A1111's `parameters`."""
    settings = read_settings(path)
    with Image.open(path) as image:
        pixels = f"{image.width} x {image.height}"
    by = "nanodiffusion" if "nanodiffusion" in settings else "another program, with A1111's parameters"
    return {"picture": path, "pixels": pixels, "made by": by, **settings}


def of_recipe(path: Path) -> Facts:
    """A recipe: the same lines as `train --dry-run`."""

    ((config, _),) = plan(str(path), [])
    return facts(config)


def _component(spec: Facts) -> str:
    options = ", ".join(f"{k} {flow(v)}" for k, v in spec.items() if k != "name")
    return f"{spec['name']} ({options})" if options else str(spec["name"])
