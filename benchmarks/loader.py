"""Batches of latents ready for a training step: ours beside webdataset, which reads the same latents from its shards.

`python -m benchmarks.bench loader`. What comes out is float32 on the CPU, shuffled; the file cache is warm. webdataset
reads in the process itself: worker processes would count as others' work, and at best multiply its rate by their number.
"""

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.worker import Case
from nanodiffusion.data import EncodedData, dequantise, order
from nanodiffusion.data.encoded import map_array
from nanodiffusion.errors import need
from nanodiffusion.fast import tune

LIMIT, SHAPE = 20.0, (4, 32, 32)
SAMPLES, BATCH, PER_SHARD = 20_000, 256, 10_000


def write_array(folder: Path, samples: int) -> Path:
    """Random levels as one .npy."""
    np.save(folder / "latents.npy", levels(samples))
    return folder / "latents.npy"


def write_shards(folder: Path, samples: int) -> list[str]:
    """The same levels as shards of .npy files, as webdataset's own writer has them."""
    webdataset = need("webdataset", "data")
    shards, rows = [], levels(samples)
    for first in range(0, samples, PER_SHARD):
        shards.append(str(folder / f"{first // PER_SHARD:05d}.tar"))
        with webdataset.TarWriter(shards[-1]) as out:
            for i in range(first, min(samples, first + PER_SHARD)):
                out.write({"__key__": f"{i:08d}", "npy": rows[i]})
    return shards


def levels(samples: int) -> np.ndarray:
    """(n 4 32 32) uint8, the same every time."""
    return np.random.default_rng(0).integers(0, 256, (samples, *SHAPE), np.uint8)


def ours(file: Path, batch: int, mapped: bool) -> Case:
    """Shuffled batches, every epoch another order; resident, or mapped from the file."""
    x = map_array(file)
    data = EncodedData(x if mapped else x.clone(), limit=LIMIT)
    steps = itertools.count()
    return Case(lambda: data.batch(order(len(data), batch, 0, next(steps))), batch)


def theirs(shards: list[str], batch: int) -> Case:
    """webdataset's pipeline: shards and a buffer of 1,000 shuffled, arrays decoded, batched."""
    webdataset = need("webdataset", "data")
    numbers = lambda raw: np.load(io.BytesIO(raw), allow_pickle=False)
    stack = lambda rows: torch.from_numpy(np.stack([row[0] for row in rows]))
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(shards, seed=0),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000),
        webdataset.to_tuple("npy"),
        webdataset.map_tuple(numbers),
        webdataset.batched(batch, collation_fn=stack),
    )
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=0)
    stream: Iterator[Tensor] = iter(loader)
    return Case(lambda: dequantise(next(stream), LIMIT), batch)


def in_folder(case: Callable[[Path], Case]) -> Callable[[str], Case]:
    """A case of `worker` on files of its own, tuned as the command line is; the folder goes when the process ends."""

    def build(device: str) -> Case:
        tune(torch.device(device))
        folder = tempfile.TemporaryDirectory()
        run, units = case(Path(folder.name))
        return Case(lambda folder=folder: run(), units)

    return build


CASES: dict[str, Callable[[str], Case]] = {
    "resident": in_folder(lambda folder: ours(write_array(folder, SAMPLES), BATCH, mapped=False)),
    "mapped": in_folder(lambda folder: ours(write_array(folder, SAMPLES), BATCH, mapped=True)),
    "webdataset": in_folder(lambda folder: theirs(write_shards(folder, SAMPLES), BATCH)),
}
