"""What `info` says of weights: whole checkpoints and single networks in either layout, LoRAs, textual inversions."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanodiffusion.errors import UserError
from nanodiffusion.lora import read_lora
from nanodiffusion.lora.files import FILES as LORAS
from nanodiffusion.pretrained.layouts import rename
from nanodiffusion.pretrained.recognise import FAMILY_OF_CONTEXT, Guess, detect
from nanodiffusion.pretrained.scheduler_config import read_scheduler
from nanodiffusion.pretrained.weights import Entry, Source, has_plain, read_json, source_of, variants
from nanodiffusion.text.inversion import read_inversion

Facts = dict[str, Any]

FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
KINDS = {
    "checkpoint": "a checkpoint",
    "unet": "a U-Net",
    "vae": "a VAE",
    "text": "a CLIP text encoder",
    "text_2": "a CLIP text encoder",
    "controlnet": "a ControlNet",
    "adapter": "a T2I-Adapter",
    "tiny_vae": "a tiny VAE (TAESD)",
    "inpainting_tokens": "inpainting tokens, beside the U-Net that was trained with them",
    "lora": "a LoRA",
    "embedding": "a textual inversion",
    "control_lora": "a control LoRA, which is not read here",
    "unknown": "unknown",
}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet")  # folders of a checkpoint
MODEL = {"_class_name", "architectures", "model_type"}  # of which a network's config.json has one, and a run's none
SHOWN = 20  # tensors of an unknown file


def size_of(path: Path) -> str:
    """The bytes of a file, or of all files in a folder, in words."""
    files = path.rglob("*") if path.is_dir() else [path]
    return in_bytes(sum(f.stat().st_size for f in files if f.is_file()))


def in_bytes(size: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


# -- folders -----------------------------------------------------------------------------------------------------------


def of_folder(path: Path) -> Facts | None:
    """A folder as diffusers, transformers or peft write it: a whole checkpoint, a network or a LoRA; None: something else."""
    if (path / "model_index.json").is_file() or (path / "unet").is_dir():
        return of_checkpoint(path)
    if any((path / name).is_file() for name in LORAS):
        return of_lora(path)
    if (path / "config.json").is_file() and MODEL & read_json(path / "config.json").keys():
        source, names = found_in(path)
        return of_weights(source, path) | ({"variants": ", ".join(names)} if names else {})
    return None


def found_in(folder: Path) -> tuple[Source, list[str]]:
    """The weights in a network's folder, the plain ones if there are any, and the names of its variants."""
    names = variants(folder)
    return source_of(folder, None if not names or has_plain(folder) else names[0]), names


def of_checkpoint(folder: Path) -> Facts:
    """A diffusers folder: every component, or what is wrong with it."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    facts: Facts = {"checkpoint": folder, "class": index.get("_class_name", "not said"), "size": size_of(folder)}
    parts = {name: _part(folder / name) for name in PARTS if (folder / name).is_dir()}
    family = next((guess.family for guess, _ in parts.values() if guess and guess.family), None)
    notes = [note for guess, _ in parts.values() if guess and guess.kind != "text" for note in guess.notes]
    facts |= {"family": FAMILIES.get(family or "", "unknown")} | {name: words for name, (_, words) in parts.items()}
    return facts | _scheduler(folder / "scheduler" / "scheduler_config.json") | _numbered("note", notes)


def _part(folder: Path) -> tuple[Guess | None, str]:
    """What a component's folder holds, in words."""
    try:
        source, names = found_in(folder)
        words = _summary(source.entries.values())
    except UserError as e:
        return None, "DAMAGED: " + " ".join(str(e).split())
    shards = f", {len(source.files)} shards" if len(source.files) > 1 else ""
    return detect(source.shapes), words + shards + (f", variants {', '.join(names)}" if names else "")


def _scheduler(file: Path) -> Facts:
    if not file.is_file():
        return {"scheduler": "none"}
    raw = read_json(file)
    try:
        schedule, prediction = read_scheduler(raw, file)
    except UserError as e:
        return {"scheduler": "DAMAGED: " + " ".join(str(e).split())}
    lo, hi = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    return {
        "scheduler": f"{raw.get('_class_name')}, {len(schedule)} levels, sigma {lo:.3g} to {hi:.4g}",
        "predicts": prediction,
    }


# -- one file, or one network's ----------------------------------------------------------------------------------------


def of_weights(source: Source, path: Path) -> Facts:
    """Weights by their names and shapes: of a single file, or of the shards of one network."""
    entries, guess = source.entries, detect(source.shapes)
    if guess.kind == "lora":
        return of_lora(path)
    if guess.kind == "embedding":
        return of_embedding(path)
    size = in_bytes(sum(file.stat().st_size for file in source.files))
    family = {"family": FAMILIES[guess.family]} if guess.family else {}
    layout = {"layout": guess.layout} if guess.layout else {}
    predicts = {"predicts": guess.prediction} if guess.prediction else {}
    facts = {"file": path, "what": KINDS.get(guess.kind, guess.kind), **family, **layout, "size": size, **predicts}
    facts |= {"tensors": len(entries), **_components(source), "weights": _summary(entries.values())}
    unknown = {name: entry.shape for name, entry in list(entries.items())[:SHOWN]} if guess.kind == "unknown" else {}
    return facts | _numbered("note", guess.notes) | unknown


def _components(source: Source) -> Facts:
    """The size of each component of a whole checkpoint."""
    plan = rename(source.entries)
    if len(plan.components) < 2:
        return {}
    used = {name: {piece.source for piece in pieces.values()} for name, pieces in plan.components.items()}
    return {name: _summary(source.entries[tensor] for tensor in tensors) for name, tensors in used.items()}


def _summary(entries: Iterable[Entry]) -> str:
    """How many numbers of which types."""
    entries = list(entries)
    count = sum(math.prod(entry.shape) for entry in entries)
    return f"{count:,} parameters in {', '.join(sorted({entry.dtype for entry in entries}))}"


def _numbered(key: str, texts: Iterable[str]) -> Facts:
    return {f"{key} {i}" if i > 1 else key: text for i, text in enumerate(texts, 1)}


# -- what is put on a model --------------------------------------------------------------------------------------------


def of_lora(path: Path) -> Facts:
    """A LoRA: its dialect, layers, ranks, strengths and family; one of another kind by what it is."""
    try:
        lora = read_lora(path)
    except UserError as e:
        found = " ".join(str(e.details[k]) for k in ("key", "found") if e.details[k] is not None)
        return {"file": path, "what": KINDS["lora"], "size": size_of(path), "not usable": f"{e.what}: {found}"}
    told = FAMILY_OF_CONTEXT.get(lora.context or 0) or detect(source_of(Path(str(lora.file))).shapes).family
    family = FAMILIES.get(told or "", "not told by its layers")
    facts: Facts = {
        "file": path,
        "what": KINDS["lora"],
        "family": family,
        "size": size_of(path),
        "dialect": lora.dialect,
    }
    for target, layers in lora.parts.items():
        facts[target or "one net"] = (
            f"{len(layers)} layers, {sum(f.mid is not None for f in layers.values())} with a mid"
        )
    return facts | {"rank": _counted(f.rank for _, _, f in lora), "alpha": _counted(f.alpha for _, _, f in lora)}


def _counted(values: Iterable[float]) -> str:
    """The values, the most frequent first, with how often each is there unless it is the only one."""
    counts = Counter(f"{value:g}" for value in values).most_common(6)
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{value} ({count})" for value, count in counts)


def of_embedding(path: Path) -> Facts:
    """A textual inversion: its token and its vectors for each text encoder."""
    found = read_inversion(path)
    shapes: Mapping[str, Any] = {name: tuple(v.shape) for name, v in found.vectors.items()}
    family = FAMILIES.get(detect(source_of(path).shapes).family or "", "not told by its width")
    vectors = {name: f"{n} vectors of {d} features" for name, (n, d) in shapes.items()}
    return {"file": path, "what": KINDS["embedding"], "family": family, "token": found.token, **vectors}
