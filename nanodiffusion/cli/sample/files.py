"""The samples as files for further use: a PNG each, an npz or a safetensors, batch by batch, resumable and in parallel."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanodiffusion import show
from nanodiffusion.cli.pictures import images
from nanodiffusion.cli.sample.job import Job
from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.metadata import read_settings
from nanodiffusion.resume import check_same, keep_settings, parse_settings
from nanodiffusion.tensors import load_meta, save_tensors

OTHERS = "samples with other settings are there"


class Sink(Protocol):
    """Where batches go. shown: whether it takes pictures, or else the samples themselves."""

    shown: bool

    def has(self, start: int, stop: int) -> bool:
        """Whether samples start..stop-1 are there already."""
        ...

    def add(self, start: int, stop: int, x: Tensor) -> None:
        """Samples start..stop-1, or their pictures: (b ...)."""
        ...

    def finish(self) -> None:
        """All batches are there; the first process calls it."""
        ...


def write(job: Job, options: Mapping[str, Any], w: World) -> Iterator[str]:
    """Write what out=, npz= and latents= ask for, each batch drawn once for all of them; yields a line about each."""
    sinks: dict[str, Sink] = {}
    if "out" in options:
        folder = Folder(job, Path(options["out"]))
        folder.open(w)
        sinks["out"] = folder
    for key in ("npz", "latents"):
        if key in options:
            array = Array(job, Path(options[key]), key)
            if array.there():
                yield f"{array.path}: all {job.n} samples were there already"
                continue
            array.open(w)
            sinks[key] = array
    w.barrier()
    for start, stop in spans(job.n, job.batch, w) if sinks else ():
        if missing := [sink for sink in sinks.values() if not sink.has(start, stop)]:
            x = job.last(start, stop)
            picture = images(job.run, x) if any(sink.shown for sink in missing) else x
            for sink in missing:
                sink.add(start, stop, picture if sink.shown else x)
    w.barrier()
    for key, sink in sinks.items():
        if w.first:
            sink.finish()
        yield f"{options[key]}: {job.n} {'images' if key == 'out' else 'samples'}"
    w.barrier()


def spans(n: int, batch: int, w: World) -> Iterator[tuple[int, int]]:
    """(start, stop) of this process's batches, with a bar where a person watches."""
    mine = range(w.rank * batch, n, batch * w.size)
    for start in tqdm(mine, unit="batch", disable=None if w.first and len(mine) > 1 else True):
        yield start, min(n, start + batch)


class Folder:
    """Every picture as a PNG; each carries its own seed, class and text. Files that are there are kept.

    n= may be another than before. UserError where the first picture there was made with other settings or weights.
    """

    shown = True

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.settings = job.settings | job.hashes

    def open(self, w: World) -> None:
        """Look at what is there, in the first process."""
        there = next((i for i in range(self.job.n) if self._path(i).exists()), None) if w.first else None
        if there is not None:
            old, new = read_settings(self._path(there)), self.settings | self._own(there)
            fix = f"another out=, or delete {self.folder}"
            check_same(old | {"n": self.job.n}, new, OTHERS, self._path(there), fix)

    def has(self, start: int, stop: int) -> bool:
        """Whether the files of samples start..stop-1 are there."""
        return all(self._path(i).exists() for i in range(start, stop))

    def add(self, start: int, stop: int, x: Tensor) -> None:
        """Pictures (b c h w) in [-1, 1]."""
        for i, image in enumerate(x, start):
            text = json.dumps(self.settings | self._own(i))
            show.save_png(show.grid(image[None], scale=1), self._path(i), {"nanodiffusion": text})

    def finish(self) -> None:
        """Nothing is left to do."""

    def _path(self, i: int) -> Path:
        return self.folder / f"{i:06d}.png"

    def _own(self, i: int) -> dict[str, Any]:
        labels, texts = self.job.labels, self.job.wanted.texts
        own = {"seed": self.job.seeds[i], "label": None if labels is None else int(labels[i])}
        return own | ({"text": texts[i]} if texts else {})


class Array:
    """All samples in one file, batch by batch beside it, then joined.

    npz: arr_0 (n h w c) uint8, or x (n d) float32 of points, for evaluation; latents: x (n c h w) float32, in an .npz or a
    .safetensors. With labels (n), where there are classes. UserError where the file, or the batches of an earlier call,
    were made with other settings.
    """

    def __init__(self, job: Job, path: Path, key: str) -> None:
        self.job, self.path, self.key = job, path, key
        self.shown = key == "npz"
        self.name = "x" if len(job.run.shape) == 1 or not self.shown else "arr_0"
        self.parts = path.with_name(f"{path.name}.parts")
        made = {k: v for k, v in job.hashes.items() if self.shown or k != "codec_sha256"}
        self.settings = job.settings | {"batch": job.batch} | made
        self.text = json.dumps(self.settings, sort_keys=True)

    def there(self) -> bool:
        """Whether the whole file is."""
        if self.path.exists():
            old = parse_settings(settings_of(self.path, self.key), self.settings, self.path, self._fix(self.path))
            check_same(old, self.settings, OTHERS, self.path, self._fix(self.path))
        return self.path.exists()

    def open(self, w: World) -> None:
        """Begin, or go on, in the folder of batches."""
        if w.first:
            keep_settings(self.parts / "settings.json", self.settings, OTHERS, self.parts, self._fix(self.parts))

    def has(self, start: int, stop: int) -> bool:
        """Whether the batch that starts there is."""
        return self._part(start).exists()

    def add(self, start: int, stop: int, x: Tensor) -> None:
        """Samples or pictures (b ...)."""
        with show.atomic(self._part(start)) as part, open(part, "wb") as f:
            np.save(f, (show.to_uint8(x) if self.name == "arr_0" else x.float()).numpy())

    def finish(self) -> None:
        """Join the batches and remove them."""
        files = sorted(self.parts.glob("*.npy"))
        small = {} if self.job.labels is None else {"labels": self.job.labels.numpy()}
        if self.path.suffix == ".safetensors":
            x = torch.cat([torch.from_numpy(np.load(file)) for file in files])
            tensors = {self.name: x, **{k: torch.from_numpy(v) for k, v in small.items()}}
            save_tensors(self.path, tensors, {"settings": self.text})
        else:
            join(self.path, self.name, files, self.job.n, {"settings": np.array(self.text), **small})
        shutil.rmtree(self.parts)

    def _fix(self, where: Path) -> str:
        return f"another {self.key}=, or delete {where}"

    def _part(self, start: int) -> Path:
        return self.parts / f"{start:09d}.npy"


def settings_of(path: Path, key: str) -> str:
    """The settings in a file of ours. UserError: it is none."""
    try:
        if path.suffix == ".safetensors":
            return str(load_meta(path)["settings"])
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays["settings"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        what = "this file is not ours to replace"
        raise UserError(what, file=path, key=key, found=str(e), fix="another name") from None


def join(path: Path, name: str, files: Sequence[Path], n: int, small: Mapping[str, np.ndarray]) -> None:
    """What np.savez would write, without holding more than one batch in memory."""
    first = np.load(files[0], mmap_mode="r")
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (n, *first.shape[1:]),
    }
    with show.atomic(path) as part:
        with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)  # type: ignore[arg-type]
                for file in files:
                    out.write(np.load(file).tobytes())
            for key, values in small.items():
                with archive.open(f"{key}.npy", "w") as out:
                    np.lib.format.write_array(out, values, allow_pickle=False)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
