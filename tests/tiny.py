"""Runs small enough to be tested whole, their comparison, and a process that kills them: `python tests/tiny.py JOB.json`."""

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanodiffusion.checkpoint import latest, load_best
from nanodiffusion.config import read_config
from nanodiffusion.distributed import World, world
from nanodiffusion.runner import Runner
from nanodiffusion.train import Step

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
    published_a, published_b = published(a), published(b)
    return found + [n for n in published_a.keys() | published_b.keys() if published_a.get(n) != published_b.get(n)]


def published(folder: Path) -> dict[str, bytes]:
    """The weights that a run left beside its checkpoints, and what its pictures are drawn from."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*.safetensors")}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith("checkpoint/")}


# -- the killer ------------------------------------------------------------------------------------------------------

KINDS = ("amid", "at_sync", "timed")  # what a SIGKILL strikes: an update, a file being written, anything


class Fate(NamedTuple):
    """How a process is interrupted: at its `moment`-th sync or micro-batch, or after so many updates, 0 = in setup.

    kind: one of KINDS, or "signal" for a SIGTERM at any moment. late: seconds beyond it in setup, updates else.
    """

    kind: str
    moment: int
    late: float


def forked(work: Callable[[], Any], limit: float = 600) -> int:
    """The id of a child that does `work` and exits with 0, or 3 if it says False; 1: an exception, or too late."""
    pid = os.fork()
    if pid:
        return pid
    faulthandler.dump_traceback_later(limit, exit=True)
    code = 1
    try:
        code = 3 if work() is False else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def dies_at_sync(number: int) -> None:
    """Arrange that this process kills itself at its `number`-th fsync: while a file is written."""
    fsync, calls = os.fsync, count(1)

    def counted(fd: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = counted


def dies_at_batch(trainer: Any, number: int) -> None:
    """Arrange that this process kills itself before its `number`-th micro-batch; of two an update, all even ones are amid."""
    losses, calls = trainer.losses, count(1)

    def counted(draw: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(draw)

    trainer.losses = counted


def fulfilled(out: Path, options: dict[str, Any], fate: Fate | None, here: World, say: Callable[[str], Any]) -> bool:
    """Train (on) until that fate, saying at which step it begins and what it has saved; whether it is done."""
    warnings.filterwarnings("error", "skipping damaged")
    kind, moment, late = fate or Fate("", 0, 0.0)
    number = signal.SIGTERM if kind == "signal" else signal.SIGKILL
    timer = lambda seconds: threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
    timed = kind in ("timed", "signal")
    if timed and moment == 0:
        timer(late)
    if kind == "at_sync":
        dies_at_sync(moment)
    runner: Any = make_runner(out, options, world=here)
    if kind == "amid":
        dies_at_batch(runner.trainer, moment)
    say(f"begins {runner.trainer.step}\n")
    save, first, start = runner.save, runner.trainer.step, time.perf_counter()

    def saved(best: bool = False) -> None:
        save(best)
        if not best:
            say(f"saved {runner.trainer.step}\n")

    def each(step: Step) -> None:
        if timed and step.step == first + moment:
            timer(late * (time.perf_counter() - start) / moment)

    runner.save = saved
    return runner.run(each) == "done"


def started(work: Callable[[World], Any], processes: int, store: Any, turn: int) -> list[int]:
    """The ids of processes that do `work`, started for the `turn`-th time as torchrun starts them."""
    if processes == 1:
        return [forked(lambda: work(World()))]
    place = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
    }
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": turn}

    def joined(rank: int) -> Any:
        os.environ.update({key: str(value) for key, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        with world("cpu") as here:
            return work(here)

    return [forked(lambda rank=rank: joined(rank)) for rank in range(processes)]


def harass(out: Path, options: dict[str, Any], kills: int, seed: int, processes: int = 1) -> dict[str, int]:
    """Run once undisturbed in out/whole, then in out/killed under about `kills` SIGKILLs or more, and count.

    Each of KINDS as often as the others, in one process of several; every fifth interruption is a SIGTERM instead, and a
    few come before training begins. Moments are counted, so that a slow machine sees as many. SystemExit where a start goes
    on from an older checkpoint than the last that was saved, or meets a damaged one.
    """
    dice, store, start = random.Random(seed), None, 0.0
    if processes > 1:
        import torch.distributed.fsdp  # here, and not in every child

        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for steps in (2, 2):
        start = time.perf_counter()
        make_runner(out / "warm", options, steps=steps).run()
    setup = time.perf_counter() - start
    whole = started(lambda here: fulfilled(out / "whole", options, None, here, str), processes, store, 0)
    if any(os.waitpid(pid, 0)[1] for pid in whole):
        raise SystemExit("the undisturbed run failed")
    counts = {**dict.fromkeys(KINDS, 0), "signal": 0, "inside_a_save": 0}
    root, reach = out / "killed/run/checkpoint", max(1, round(1.5 * options["steps"] / kills))
    newest, left = 0, set()  # the last checkpoint that was acknowledged; what killed saves left behind
    for turn in count(1):
        kind = "signal" if turn % 5 == 0 else KINDS[turn % 3]
        of_one = kind == "at_sync" and options.get("parallel") != "fsdp"  # which the first process alone saves
        victim = 0 if of_one else dice.randrange(processes)
        amid, at_sync = options.get("accumulate", 1) * dice.randint(1, reach), dice.randint(1, 8 * reach // processes)
        moment = {"amid": amid, "at_sync": at_sync}.get(kind, dice.randint(0, reach))
        fate = Fate(kind, moment, dice.random() * (1 if moment else 1.5 * setup))
        hears, says = os.pipe()

        def work(here: World, fate: Fate = fate, victim: int = victim, says: int = says) -> bool:
            say = lambda line: here.first and os.write(says, line.encode())
            return fulfilled(out / "killed", options, fate if here.rank == victim else None, here, say)

        pids = started(work, processes, store, turn)
        os.close(says)
        with os.fdopen(hears) as lines:
            for word, step in map(str.split, lines):
                if word == "begins" and int(step) < newest:
                    raise SystemExit(f"lost: began at {step}, but {newest} was saved, after {counts}")
                newest = int(step)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if codes == [0] * processes:
            return counts
        if codes != [3] * processes and codes[victim] not in (-signal.SIGKILL, -signal.SIGTERM):
            raise SystemExit(f"the run failed: {codes} after {counts}")
        counts[kind] += 1
        left, before = {(p.name, p.stat().st_ino) for p in root.glob(".*-*")}, left
        counts["inside_a_save"] += kind != "signal" and bool(left - before)
    raise AssertionError


def harassed(out: Path, runs: dict[str, list[Any]]) -> dict[str, dict[str, int]]:
    """What `harass(out / name, *arguments)` did to every run, by name, which then ended as the undisturbed one.

    In another process, which forks from one thread.
    """
    (out / "job.json").write_text(json.dumps({"out": str(out), "runs": runs}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(out / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-9000:]
    print(done.stdout)
    for name in runs:
        assert differences(out / name / "whole/run", out / name / "killed/run") == []
        assert len(rows(out / name / "whole/run")) >= 3
    return json.loads(done.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({name: harass(Path(job["out"]) / name, *args) for name, args in job["runs"].items()}))
