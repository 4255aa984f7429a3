"""`nanodiffusion sample RUN key=value ...`: pictures, films and arrays from a trained run."""

import hashlib
import json
import os
import shutil
import typing
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanodiffusion import __version__, show
from nanodiffusion.cli.pictures import batches, film, film_pace, joined, sheet
from nanodiffusion.cli.words import changed, parse_value, read_pairs
from nanodiffusion.config import SampleConfig, check_options
from nanodiffusion.data.files import MODES, load_image
from nanodiffusion.distributed import World, world
from nanodiffusion.draw import check_sampling, cycled
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.fast import tune
from nanodiffusion.run import Run, load_run

PICTURED = 400  # samples in a picture, at most

# The keys of the command and their types; the keys of SampleConfig come on top. `class` is no name for a field.
Options = TypedDict(
    "Options",
    {
        "n": int,
        "class": int | str | list | None,
        "seed": int,
        "batch": int,
        "weights": str,
        "best": bool,
        "device": str,
        "image": str,
        "strength": float,
        "grid": str,
        "strip": str,
        "gif": str,
        "mp4": str,
        "out": str,
        "npz": str,
    },
    total=False,
)
PICTURES = ("grid", "strip", "gif", "mp4")


def main(args: Namespace) -> int:
    """Load the run and write what was asked for."""
    if not args.words or "=" in args.words[0]:
        raise UserError("which run?", expected="nanodiffusion sample RUN key=value ...", fix="a folder, e.g. runs/demo")
    path, *words = args.words
    options, changes = read_words(words)
    with world(options.get("device", "auto")) as w:
        tune(w.device)
        say: Callable[[str], None] = print if w.first else lambda text: None
        job = prepare(path, options, changes, w)
        if w.first:
            for name in [p for p in PICTURES if p in options]:
                say(str(draw(job, name, Path(options[name]))))
            if not any(key in options for key in (*PICTURES, "out", "npz")):
                say(str(draw(job, "grid", run_folder(job.run) / "sample.png")))
        if "out" in options:
            write_images(job, Path(options["out"]), w)
            say(f"{options['out']}: {job.n} images")
        if "npz" in options:
            say(write_npz(job, Path(options["npz"]), w))
    return 0


# -- words -------------------------------------------------------------------------------------------------------------


def read_words(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """key=value words as (options of the command, changes of the SampleConfig by dotted key), checked."""
    kinds = typing.get_type_hints(Options)
    ours = {k: v for k, v in typing.get_type_hints(SampleConfig).items() if k not in kinds}
    pairs = read_pairs(words, {**kinds, **ours})
    given = {key: text if kinds.get(key) is str else parse_value(text) for key, text in pairs.items()}
    options = {k: v for k, v in given.items() if k in kinds}
    check_options(options, kinds, "")
    return options, {k: v for k, v in given.items() if k not in options}


# -- a job -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything that decides the samples, and the settings that are written into what is made of them."""

    run: Run
    config: SampleConfig
    n: int
    seed: int
    labels: Tensor | None  # (n)
    x0: Tensor | None  # (1 *shape)
    strength: float
    batch: int
    columns: int  # of a grid; 0 = as square as n allows
    settings: dict[str, Any]

    def first(self, n: int) -> "Job":
        """The same for the first n samples."""
        return replace(self, n=min(n, self.n), labels=None if self.labels is None else self.labels[:n])

    def states(self, start: int = 0, stop: int | None = None) -> Iterator[list[Any]]:
        """The states of samples start..stop-1, batch after batch."""
        labels = None if self.labels is None else self.labels[start:stop]
        seeds = range(self.seed + start, self.seed + (self.n if stop is None else stop))
        return batches(self.run, self.config, seeds, labels, self.x0, self.strength, self.batch)


def prepare(path: str, options: dict[str, Any], changes: dict[str, Any], w: World) -> Job:
    """The job that checked words describe; UserError for everything that cannot be, before anything is drawn."""
    run = load_run(path, options.get("weights", "ema-0"), w.device, options.get("best", False))
    config = changed(run.config.sample, changes)
    check_sampling(run.denoiser, config, run.schedule)
    n, batch, strength = options.get("n", config.n), options.get("batch", 64), options.get("strength", 1.0)
    for key, value in (("n", n), ("batch", batch)):
        if value < 1:
            raise UserError("must be at least 1", key=key, found=value)
    if options.get("seed", 0) < 0:
        raise UserError("must not be negative", key="seed", found=options["seed"])
    if "strength" in options and "image" not in options:
        raise UserError("strength needs a picture to start from", key="strength", fix="image=FILE strength=0.6")
    labels, columns = choose_labels(run, options.get("class", "all"), n, "class" in options)
    x0 = read_start(options["image"], run.shape) if "image" in options else None
    settings = {
        "nanodiffusion": __version__,
        "run": str(path),
        "step": run.step,
        **{"weights": options.get("weights", "ema-0"), "best": options.get("best", False)},
        **{"n": n, "seed": options.get("seed", 0), "class": options.get("class", "all" if columns else None)},
        **{
            "image": options.get("image"),
            "strength": strength,
            **{k: v for k, v in asdict(config).items() if k != "n"},
        },
    }
    return Job(run, config, n, settings["seed"], labels, x0, strength, batch, columns, settings)


def choose_labels(run: Run, wanted: Any, n: int, given: bool) -> tuple[Tensor | None, int]:
    """Labels (n) that `class=` asks for, and how many columns show them best; None for a model without classes."""
    null = getattr(run.denoiser.net, "null_label", None)
    if null is None:
        if given:
            raise UserError("this model knows no classes", key="class", found=wanted, fix="leave class out")
        return None, 0
    if wanted == "all":
        return cycled(n, null), null if null <= 20 else 0
    numbers = [_label(run, w, null) for w in (wanted if isinstance(wanted, list) else [wanted])]
    if not numbers:
        raise UserError("an empty list of classes", key="class", expected="class=[0,1]")
    return torch.tensor(numbers)[cycled(n, len(numbers))], len(numbers) if 1 < len(numbers) <= 20 else 0


def _label(run: Run, wanted: Any, null: int) -> int:
    if wanted is None:
        return null
    if isinstance(wanted, str):
        return lookup({name: i for i, name in enumerate(run.classes)}, wanted, "class")
    if not isinstance(wanted, int) or not 0 <= wanted < null:
        names = ", ".join(f"{i} {name}" if str(i) != name else name for i, name in enumerate(run.classes[:20]))
        raise UserError("no such class", key="class", expected=f"0 to {null - 1} ({names}), or null", found=wanted)
    return wanted


def read_start(file: str, shape: tuple[int, ...]) -> Tensor:
    """The picture that image to image starts from, cut and resized to the model's: (1 c h w) in [-1, 1]."""
    if len(shape) != 3 or shape[1] != shape[2] or shape[0] not in MODES:
        raise UserError("image to image needs a model of square images", key="image", found=shape)
    try:
        pixels = load_image(file, shape[1], MODES[shape[0]])
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError("the picture cannot be read", file=file, key="image", found=str(e)) from None
    return torch.from_numpy(np.array(pixels)).float()[None] / 127.5 - 1


def run_folder(run: Run) -> Path:
    """The folder of a run, also when one of its checkpoints was named."""
    return run.folder.parents[1] if run.folder.parent.name == "checkpoint" else run.folder


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(job: Job, kind: str, path: Path) -> Path:
    """A grid, strip, gif or mp4 of the first samples, the settings inside the PNG."""
    few = job.first(PICTURED)
    states = joined(list(few.states()))
    text = {"nanodiffusion": json.dumps(job.settings)}
    if kind == "grid":
        return show.save_png(sheet(job.run, states, few.labels, job.columns), path, text)
    if kind == "strip":
        return show.save_png(show.strip(states), path, text)
    frames = film(job.run, states, job.columns)
    return (show.save_gif if kind == "gif" else show.save_mp4)(frames, path, film_pace(frames))


def write_images(job: Job, folder: Path, w: World) -> None:
    """Every image as a PNG, batch by batch; each carries its own seed and class. Files that are there are kept."""
    if len(job.run.shape) == 1:
        raise UserError("points are no images", key="out", fix="npz=FILE.npz, or grid=FILE.png")
    for start, stop in spans(job.n, job.batch, w):
        paths = [folder / f"{i:06d}.png" for i in range(start, stop)]
        if all(p.exists() for p in paths):
            continue
        x = next(job.states(start, stop))[-1].x
        for i, (path, image) in enumerate(zip(paths, x), start):
            own = {"seed": job.seed + i, "label": None if job.labels is None else int(job.labels[i])}
            text = json.dumps(job.settings | own)
            show.save_png(show.grid(image[None], scale=1), path, {"nanodiffusion": text})


# -- arrays for evaluation ---------------------------------------------------------------------------------------------


def spans(n: int, batch: int, w: World) -> Iterator[tuple[int, int]]:
    """(start, stop) of this process's batches, with a bar where a person watches."""
    mine = range(w.rank * batch, n, batch * w.size)
    for start in tqdm(mine, unit="batch", disable=None if w.first and len(mine) > 1 else True):
        yield start, min(n, start + batch)


def write_npz(job: Job, path: Path, w: World) -> str:
    """arr_0 (n h w c) uint8, or x (n d) float32, with labels (n); batch by batch beside it, then joined.

    UserError where the file, or the batches of an earlier call, were made with other settings.
    """
    settings = json.dumps(job.settings | {"batch": job.batch, "weights_sha256": fingerprint(job.run)}, sort_keys=True)
    if path.exists():
        _check_settings(_settings_of(path), settings, path)
        return f"{path}: all {job.n} samples were there already"
    parts = path.with_name(f"{path.name}.parts")
    known = parts / "settings.json"
    if w.first:
        if known.exists():
            _check_settings(known.read_text(), settings, parts)
        else:
            with show.atomic(known) as part:
                part.write_text(settings)
    w.barrier()
    for start, stop in spans(job.n, job.batch, w):
        target = parts / f"{start:09d}.npy"
        if not target.exists():
            x = next(job.states(start, stop))[-1].x
            with show.atomic(target) as part, open(part, "wb") as f:
                np.save(f, (x if x.ndim == 2 else show.to_uint8(x)).numpy())
    w.barrier()
    if w.first:
        _join(job, sorted(parts.glob("*.npy")), path, settings)
        shutil.rmtree(parts)
    w.barrier()
    return f"{path}: {job.n} samples"


def fingerprint(run: Run) -> str:
    """SHA-256 of the weights a run holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(run.denoiser.net.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _settings_of(path: Path) -> str:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays["settings"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(
            "this file is not ours to replace", file=path, key="npz", found=str(e), fix="another name"
        ) from None


def _check_settings(old: str, new: str, path: Path) -> None:
    before, now = json.loads(old), json.loads(new)
    keys = [k for k in now if before.get(k) != now[k]]
    if keys:
        raise UserError(
            "samples with other settings are there",
            file=path,
            key=", ".join(keys),
            expected={k: before.get(k) for k in keys},
            found={k: now[k] for k in keys},
            fix="another npz=, or delete it",
        )


def _join(job: Job, files: list[Path], path: Path, settings: str) -> None:
    """What np.savez would write, without holding more than one batch in memory."""
    first = np.load(files[0], mmap_mode="r")
    name = "x" if first.ndim == 2 else "arr_0"
    shape = (job.n, *first.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
    with show.atomic(path) as part:
        with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)  # type: ignore[arg-type]
                for file in files:
                    out.write(np.load(file).tobytes())
            small = {"settings": np.array(settings)}
            small |= {} if job.labels is None else {"labels": job.labels.numpy()}
            for key, values in small.items():
                with archive.open(f"{key}.npy", "w") as out:
                    np.lib.format.write_array(out, values, allow_pickle=False)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
