"""Batches of latents ready for a training step: ours beside webdataset, which reads the same latents from its shards.

`python -m benchmarks.loader [--samples N] [--batch B] [--out FILE.json]` prints JSON in the form of `bench`: both sides in
turn, A B B A, each at the best of its ways, the file cache warm. One unit is a sample; what comes out is float32 on the CPU.
"""

import argparse
import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench import Windows, compare, device_name, show, versions
from benchmarks.worker import Case, peak_memory, window
from nanodiffusion.data import EncodedData, dequantise, order
from nanodiffusion.data.encoded import map_array
from nanodiffusion.fast import tune

LIMIT, SHAPE = 20.0, (4, 32, 32)
PER_SHARD = 10_000


def write(folder: Path, samples: int) -> tuple[Path, list[str]]:
    """The same random levels as one .npy and as shards of .npy files, as webdataset's own writer has them."""
    import webdataset

    levels = np.random.default_rng(0).integers(0, 256, (samples, *SHAPE), np.uint8)
    np.save(folder / "latents.npy", levels)
    shards = []
    for first in range(0, samples, PER_SHARD):
        shards.append(str(folder / f"{first // PER_SHARD:05d}.tar"))
        with webdataset.TarWriter(shards[-1]) as out:
            for i in range(first, min(samples, first + PER_SHARD)):
                out.write({"__key__": f"{i:08d}", "npy": levels[i]})
    return folder / "latents.npy", shards


def ours(file: Path, batch: int, mapped: bool) -> Case:
    """Shuffled batches, every epoch another order; resident, or mapped from the file."""
    x = map_array(file)
    data = EncodedData(x if mapped else x.clone(), limit=LIMIT)
    steps = itertools.count()
    return Case(lambda: data.batch(order(len(data), batch, 0, next(steps))), batch)


def theirs(shards: list[str], batch: int, workers: int) -> Case:
    """webdataset's pipeline: shards and a buffer of 1,000 shuffled, arrays decoded, batched."""
    import webdataset

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
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers)
    stream: Iterator[Tensor] = iter(loader)
    return Case(lambda: dequantise(next(stream), LIMIT), batch)


def measure(cases: dict[str, Case], rounds: int, seconds: float) -> Windows:
    """Windows of every side in turn and back again."""
    calls = {side: _calls(case, seconds) for side, case in cases.items()}
    windows: Windows = {side: [] for side in cases}
    for i in range(rounds):
        for side in list(cases) if i % 2 == 0 else list(cases)[::-1]:
            windows[side].append({**window(cases[side], calls[side], "cpu"), "peak_mb": peak_memory()})
    return windows


def _calls(case: Case, seconds: float) -> int:
    window(case, 2, "cpu")
    return max(2, round(4 * seconds / window(case, 4, "cpu")["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that webdataset reads with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune(torch.device("cpu"))  # as the command line does; the memory it keeps serves both sides
    with tempfile.TemporaryDirectory() as folder:
        file, shards = write(Path(folder), args.samples)
        cases = {f"ours, {way}": ours(file, args.batch, way == "mapped") for way in ("resident", "mapped")}
        cases["webdataset"] = theirs(shards, args.batch, args.workers)
        windows = measure(cases, args.rounds, args.seconds)
    head: dict[str, Any] = {"name": "loader", "device": device_name(False), "versions": versions(), **vars(args)}
    note = f"{args.samples} latents of 4 x 32 x 32 bytes, shuffled, to float32"
    result = {**head, "out": str(args.out), "unit": "samples", "note": note, **compare({"webdataset": windows})}
    show("loader", result)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
