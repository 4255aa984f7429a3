"""Runs small enough to be tested whole, their comparison, and a process that kills them: `python tests/tiny.py JOB.json`."""

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanodiffusion.checkpoint import latest, load_best
from nanodiffusion.config import read_config
from nanodiffusion.distributed import World
from nanodiffusion.run import Runner

TIMINGS = {"seconds", "images_per_s", "memory_gb"}
AVERAGES = [{"name": "ramped", "decay": 0.99}, {"name": "power", "sigma_rel": 0.1}]
POINTS = {
    "data": {"name": "swiss-roll", "n": 60},
    "net": {"name": "mlp", "hidden": [16, 16]},
    "batch_size": 16,
    "steps": 30,
    "lr": 1e-2,
    "ema": [{"name": "constant", "decay": 0.9}],
    "log_every": 7,
    "checkpoint_every": 0,
    "sample": {"steps": 2, "n": 4},
}
IMAGES = {
    **POINTS,
    "net": {
        "name": "unet",
        "channels": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": [],
        "time_features": 16,
        "dropout": 0.2,
    },
    "accumulate": 2,
    "batch_size": 8,
    "lr": 1e-3,
    "ema": AVERAGES,
}


def images(folder: Path, n: int = 24) -> dict[str, Any]:
    """A recipe's `data`: n labelled images (1 4 4) of noise in an npz file in `folder`."""
    random = np.random.default_rng(0)
    path, beside = folder / "images.npz", folder / f"images-{os.getpid()}.npz"
    np.savez(beside, x=random.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8), y=np.arange(n) % 3)
    os.replace(beside, path)  # in one move, as another process may be reading it
    return {"name": "array", "path": str(path), "key": "x", "label_key": "y"}


def make_runner(out: Path, *options: dict[str, Any], world: World | None = None, **more: Any) -> Runner:
    """A Runner in out/run that says nothing."""
    config = {"out": str(out), "name": "run", "device": "cpu"}
    for part in (*options, more):
        config |= part
    return Runner(read_config(config), world or World(), lambda text: None)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def saved(folder: Path, best: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a run's newest checkpoint (or its best), by file and name, and its state without times."""
    checkpoint = (load_best if best else latest)(folder / "checkpoint")
    assert checkpoint is not None
    tensors = {f"{file}/{name}": t for file in checkpoint.files for name, t in checkpoint.files[file].items()}
    state = json.loads(json.dumps(checkpoint.state))
    state["progress"].pop("seconds")
    return tensors, {"step": checkpoint.step, **state}


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs differ in, bit by bit; [] if they are the same."""
    found = [] if rows(a) == rows(b) else ["rows"]
    for best in (False, True) if (a / "checkpoint/best").exists() else (False,):
        (tensors_a, state_a), (tensors_b, state_b) = saved(a, best), saved(b, best)
        found += [] if state_a == state_b else [f"state, best={best}"]
        found += sorted(tensors_a.keys() ^ tensors_b.keys())
        found += [n for n in tensors_a.keys() & tensors_b.keys() if not torch.equal(tensors_a[n], tensors_b[n])]
    return found


# -- the killer ------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], bool], limit: float) -> int:
    """The id of a child that does `work` and exits with 0 if it says True, else with 3; 1: an exception, or too late."""
    pid = os.fork()
    if pid:
        return pid
    faulthandler.dump_traceback_later(limit, exit=True)
    code = 1
    try:
        code = 0 if work() else 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def dies_at_sync(number: int) -> None:
    """Arrange that this process kills itself at its `number`-th fsync, which only a save calls."""
    fsync, calls = os.fsync, iter(range(1, sys.maxsize))

    def counted(fd: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = counted


def harass(out: Path, options: dict[str, Any], kills: int, seed: int) -> dict[str, Any]:
    """Run once undisturbed in out/whole, then in out/killed under about `kills` SIGKILLs or more, and count.

    A third of them strike at a random fsync, inside a save, a few before training begins, the rest at a random moment
    some steps later, counted so that a slow machine sees as many; every fifth interruption is a SIGTERM instead.
    """
    dice = random.Random(seed)
    make_runner(out / "warm", options, steps=2).run()
    start = time.perf_counter()
    runner = make_runner(out / "whole", options)
    setup = time.perf_counter() - start
    runner.run()
    whole = time.perf_counter() - start - setup
    counts = {"timed": 0, "at_sync": 0, "terms": 0, "inside_a_save": 0, "setup": setup, "whole": whole}
    root = out / "killed/run/checkpoint"
    syncs = 9 * options["steps"] // kills
    turn, left = 0, set()  # what killed saves left behind
    while True:
        turn += 1
        kind = "terms" if turn % 5 == 0 else "at_sync" if turn % 3 == 0 else "timed"

        hears, says = os.pipe()

        def work(at: int = dice.randint(1, syncs) if kind == "at_sync" else 0, ready: int = says) -> bool:
            if at:
                dies_at_sync(at)
            runner = make_runner(out / "killed", options)
            os.write(ready, b"!")
            return runner.run(lambda step: os.write(ready, b".")) == "done"

        pid = forked(work, 300 + 5 * whole)
        os.close(says)
        if kind != "at_sync":
            heard = dice.randint(0, 2 * options["steps"] // kills) if turn % 8 else -1
            pace = setup
            for _ in range(heard + 1):
                start = time.perf_counter()
                os.read(hears, 1)
                pace = time.perf_counter() - start
            time.sleep(dice.random() * pace)
            os.kill(pid, signal.SIGTERM if kind == "terms" else signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(hears)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return counts
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 3:
            raise SystemExit(f"the run failed after {counts}")
        counts[kind] += 1
        if os.WIFSIGNALED(status):
            left, before = {(p.name, p.stat().st_ino) for p in root.glob(".*-*")}, left
            counts["inside_a_save"] += bool(left - before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {name: harass(Path(job["out"]) / name, *args) for name, args in job["runs"].items()}
    print(json.dumps(results))
