"""Runs over several processes: a sharded net is the replicated one, in files, in pictures, and after whatever stops it."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_distributed import cases, follow, largest
from tiny import AVERAGES, IMAGES, POINTS, dies_at_batch, dies_at_sync, differences, images, make_runner, rows, saved
from torch import nn
from torch.testing import assert_close

from nanodiffusion.checkpoint import checkpoints
from nanodiffusion.distributed import World, launch, world
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.nets import build_net
from nanodiffusion.run import load_run
from nanodiffusion.shard import repeated, shard
from nanodiffusion.tensors import load_tensors
from nanodiffusion.train import Step

ONE = 1e-6  # between the same sums in another order
FSDP = {"parallel": "fsdp"}
NAMES = ["points, accumulate=2", "images, accumulate=2"]
POINTED = NAMES[0]
STEPS = 12
TURN = 5  # where runs are interrupted


def pictured(folder: Path) -> dict[str, Any]:
    """Labelled images with pictures of 5 on the way, which two processes cannot share evenly, and snapshots."""
    plain = {**IMAGES["net"], "dropout": 0.0}
    sgd = {"optimizer": {"name": "SGD"}, "lr": 0.02}  # see test_distributed.cases
    more = {"steps": 4, "sample_every": 2, "snapshot_every": 2, "sample": {"steps": 3, "n": 5, "guidance": 2.0}}
    return {**IMAGES, **more, **sgd, "net": plain, "data": images(folder), "ema": AVERAGES}


def coded(folder: Path) -> dict[str, Any]:
    """An autoencoder, whose net is called in other ways than by its forward."""
    net = {"name": "autoencoder", "widths": [8, 8], "latent_channels": 2, "groups": 4}
    options = {**IMAGES, "task": {"name": "autoencode"}, "net": net, "data": images(folder), "steps": 4}
    return {**options, "sample_every": 2, "validate_every": 2, "validation": 0.2, "optimizer": {"name": "SGD"}}


def short(folder: Path, name: str) -> dict[str, Any]:
    return {**cases(folder)[name], "steps": STEPS}


def tell(step: int, number: int) -> Any:
    """A callback that sends this process a signal after update `step`."""

    def each(found: Step) -> None:
        if found.step == step:
            os.kill(os.getpid(), number)

    return each


def full_disk(after: int) -> Any:
    """An fsync for which there is no room left after some calls."""
    calls, fsync = iter(range(10**6)), os.fsync

    def failing(fd: int) -> None:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    return failing


def work(out: Path) -> list[dict[str, Any]]:
    """Everything that the tests ask two processes for, in one go; what each of them saw."""
    found: dict[str, Any] = {}
    with world("cpu") as here:
        for name in NAMES:
            found[name] = follow(out / "fsdp" / name, {**short(out, name), **FSDP}, here)
        points = short(out, POINTED)
        follow(out / "fsdp-cut", {**points, **FSDP}, here, signal_at=TURN * here.rank)
        follow(out / "fsdp-cut", {**points, **FSDP}, here)
        for kind in ("ddp", "fsdp"):
            found[f"{kind} goes on"] = follow(out / f"one-{kind}", {**points, "parallel": kind, "accumulate": 1}, here)
            follow(out / f"{kind}-one", {**points, "parallel": kind}, here, signal_at=TURN * here.rank)
        for kind in ("ddp", "fsdp"):
            make_runner(out / kind / "pictured", pictured(out), parallel=kind, world=here).run()
            make_runner(out / kind / "coded", coded(out), parallel=kind, world=here).run()
            runner = make_runner(out / kind / "asked", POINTS, parallel=kind, world=here)
            runner.run(tell(4, signal.SIGUSR1) if here.rank else lambda step: None)
        found["disk"] = no_room(out, here)
        found["memory"] = here.memory
        return here.told(found)


def no_room(out: Path, here: World) -> str:
    """What each process says where one of them cannot write its part."""
    runner = make_runner(out / "full", POINTS, FSDP, steps=4, world=here)
    runner.run()
    fsync = os.fsync
    if here.rank:
        os.fsync = full_disk(after=1)
    try:
        runner.trainer.step += 1
        runner.save()
    except UserError as e:
        return str(e)
    finally:
        os.fsync = fsync
    return "saved"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Any]:
    """What two processes saw, and the folder of it all; a run of one, stopped, lies in it for them."""
    out = tmp_path_factory.mktemp("scale")
    for kind in ("ddp", "fsdp"):
        follow(out / f"one-{kind}", short(out, POINTED), World(), signal_at=TURN)
    return {"out": out, "ranks": launch(work, (out,))}  # not forked: this process may have had threads


@pytest.fixture(scope="module")
def one(two) -> dict[str, dict[str, Any]]:
    """The same by one process."""
    out = two["out"]
    for name, options in (("pictured", pictured(out)), ("coded", coded(out))):
        make_runner(out / "one" / name, options).run()
    return {name: follow(out / "one" / name, short(out, name), World()) for name in NAMES}


def apart(a: Path, b: Path) -> float:
    """The largest difference of weights and averages."""
    ours, theirs = saved(a / "run")[0], saved(b / "run")[0]
    assert ours.keys() == theirs.keys()
    assert all(v.shape == theirs[k].shape for k, v in ours.items())
    return max((v - theirs[k]).abs().max().item() for k, v in ours.items() if not k.startswith("optimizer"))


# -- a sharded net ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_net_is_trained_as_a_whole_one(one, two, name):
    ranks = two["ranks"]
    assert ranks[0][name]["losses"] == ranks[1][name]["losses"] and len(one[name]["losses"]) == STEPS
    assert largest(one[name]["losses"], ranks[0][name]["losses"]) <= ONE
    assert apart(two["out"] / "one" / name, two["out"] / "fsdp" / name) <= ONE
    ours, theirs = (rows(two["out"] / kind / name / "run") for kind in ("one", "fsdp"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-5, abs=ONE) for key in a)


def test_a_sharded_run_is_saved_in_parts_and_continues_bit_by_bit(two):
    out = two["out"]
    assert differences(out / "fsdp" / POINTED / "run", out / "fsdp-cut/run") == []
    folder = checkpoints(out / "fsdp-cut/run/checkpoint")[0]
    names = {f"{stem}.part-{rank}-of-2.safetensors" for stem in ("model", "optimizer", "ema-0") for rank in (0, 1)}
    assert {f.name for f in folder.iterdir()} == {*names, "state.json", "manifest.json"}


@pytest.mark.parametrize("stem", ["model", "ema-0", "ema-1", "optimizer"])
def test_parts_are_each_a_share_of_the_whole(two, stem):
    folder = checkpoints(two["out"] / "fsdp" / NAMES[1] / "run/checkpoint")[0]
    parts = [load_tensors(folder / f"{stem}.part-{rank}-of-2.safetensors")[0] for rank in (0, 1)]
    sizes = [sum(t.numel() for t in part.values()) for part in parts]
    assert 0 <= sizes[0] - sizes[1] < 0.2 * sum(sizes)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_other_numbers_of_processes_continue(one, two, kind):
    """One process with two micro-batches, then two processes with one; and the other way round."""
    out, losses = two["out"], one[POINTED]["losses"]
    assert largest(losses[TURN:], two["ranks"][0][f"{kind} goes on"]["losses"]) <= ONE
    assert apart(out / "one" / POINTED, out / f"one-{kind}") <= ONE
    alone = follow(out / f"{kind}-one", {**short(out, POINTED), "accumulate": 4}, World())
    assert largest(losses[TURN:], alone["losses"]) <= ONE
    assert apart(out / "one" / POINTED, out / f"{kind}-one") <= ONE


def test_a_sharded_run_is_read_back_whole(one, two):
    runs = [load_run(two["out"] / kind / "images, accumulate=2/run") for kind in ("one", "fsdp")]
    x, sigma, cond = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0]), {"label": torch.tensor([0, 3])}
    with torch.no_grad():
        a, b = (run.denoiser(x, sigma, cond) for run in runs)
    assert_close(a, b, rtol=0, atol=1e-5)


def test_snapshots_of_a_sharded_net_are_whole(one, two):
    for path in sorted((two["out"] / "one/pictured/run/ema").iterdir()):
        ours, theirs = (load_tensors(two["out"] / k / "pictured/run/ema" / path.name)[0] for k in ("one", "fsdp"))
        assert_close(ours, theirs, rtol=0, atol=ONE)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_net_called_beside_its_forward_is_sharded_and_published(one, two, kind):
    ours, theirs = (two["out"] / k / "coded/run" for k in ("one", kind))
    assert apart(ours.parent, theirs.parent) <= ONE
    codecs = [load_tensors(next((run / "codec").glob("*.safetensors")))[0] for run in (ours, theirs)]
    assert_close(*codecs, rtol=0, atol=ONE)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_validate_a_part_of_the_images_each_and_say_what_one_does(one, two, kind):
    ours, theirs = ([row for row in rows(two["out"] / k / "coded/run") if "val/psnr" in row] for k in ("one", kind))
    assert len(ours) == 2 and {"val/loss", "val/psnr"} <= ours[0].keys() == theirs[0].keys()
    for a, b in zip(ours, theirs):
        assert b == pytest.approx(a, rel=1e-5)


def test_a_full_disk_of_one_process_is_an_error_of_all_and_costs_nothing(two):
    assert all("No space left on device" in rank["disk"] for rank in two["ranks"])
    folder = two["out"] / "full/run/checkpoint"
    assert [f.name for f in folder.iterdir()] == ["step-00000004"]


# -- pictures, signals, numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("run", ["pictured", "coded"])
def test_pictures_drawn_by_all_processes_are_those_of_one(one, two, kind, run):
    ours, theirs = (two["out"] / k / run / "run/samples" for k in ("one", kind))
    names = sorted(path.name for path in ours.iterdir())
    assert len(names) == 4 and names == sorted(path.name for path in theirs.iterdir())
    for name in names:
        a, b = (torch.frombuffer(bytearray(Image.open(f / name).tobytes()), dtype=torch.uint8) for f in (ours, theirs))
        assert (a.int() - b.int()).abs().max() <= 1  # their weights differ by roundings


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_wish_to_one_process_is_granted_by_all(two, kind):
    folders = checkpoints(two["out"] / kind / "asked/run/checkpoint")
    assert [int(folder.name.split("-")[1]) for folder in folders] == [30, 4]


def test_rows_tell_the_memory_of_the_process_that_takes_most(two):
    row = json.loads((two["out"] / "ddp/pictured/run/metrics.jsonl").read_text().splitlines()[-1])
    most = max(rank["memory"] for rank in two["ranks"])
    assert 0.05 < row["memory_gb"] <= most / 2**30


# -- what cannot be sharded ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """What the loop has of a task: `net` is trained, the rest is frozen."""

    def __init__(self, net: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.net, self.beside = net, beside


def test_parameters_that_others_use_too_are_not_sharded():
    """As those of a LoRA, which the layers of a frozen net work with; nor is what is trained beside the net."""
    shared = nn.Linear(2, 2)
    loose = nn.ParameterDict({"a": shared.weight})
    for net, other in ((nn.Sequential(shared), shared), (loose, nn.Linear(2, 2)), (nn.Linear(3, 3), nn.Linear(2, 2))):
        with pytest.raises(UserError, match="nothing to shard") as e:
            shard(Model(net, Beside(other)), World(0, 2))
        assert e.value.details["fix"].startswith("parallel=ddp")


class Beside(nn.Module):
    """A module that owns the parameters of another."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.weight = other.weight


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": {"name": "Adafactor"}}, "optimizer"),
        ({"optimizer": {"name": "AdamW8bit"}}, "optimizer"),
        ({"compile": True}, "compile"),
    ],
    ids=str,
)
def test_what_cannot_work_on_parts_is_refused(tmp_path, change, key):
    with pytest.raises(UserError) as e:
        make_runner(tmp_path, POINTS, FSDP, change, world=World(0, 2))
    assert e.value.details["key"] == key


@pytest.mark.parametrize(("name", "kind", "n"), [("dit", "DiTBlock", 3), ("pixart", "PixArtBlock", 3)])
def test_blocks_are_what_a_net_repeats(name, kind, n):
    net = build_net(name, depth=n)
    found = repeated(net)
    assert [type(block).__name__ for block in found] == [kind] * n
    inside = sum(p.numel() for block in found for p in block.parameters())
    assert inside > 0.8 * sum(p.numel() for p in net.parameters())


# -- tasks on checkpoints ------------------------------------------------------------------------------------------------

TUNED: dict[str, tuple[str, dict[str, Any]]] = {task: (task, {}) for task in FINETUNES}
TUNED["lcm"] = "lcm", {"huber": 1.0}  # its student starts near a kink of the loss, where roundings grow
TUNED |= {"lcm, whole": ("lcm", {"rank": 0, "huber": 1.0}), "distill, LoRA": ("distill", {"rank": 2})}
LITTLE = ("lora", "lcm", "textual_inversion", "distill, LoRA")  # what they train is no net of its own


def way(root: Path) -> float:
    """How far the weights came from the oldest checkpoint there to the newest."""
    newest, *_, oldest = (load_tensors(folder / "model.safetensors")[0] for folder in checkpoints(root))
    return max((v - oldest[k]).abs().max().item() for k, v in newest.items())


def tune(out: Path, place: Path, here: World, kind: str) -> None:
    """Train every task a little, of those that cannot be sharded none."""
    from tuning import recipe

    sgd = {"optimizer": {"name": "SGD"}, "lr": 0.01, "clip": 1.0, "steps": 4}
    for name, (task, options) in TUNED.items():
        again = {} if task == "distill" else {"checkpointing": here.size > 1}
        more = {"accumulate": 4 // here.size, "parallel": kind}
        options = recipe(task, place, options | again, **sgd, **more)
        if kind != "fsdp" or name not in LITTLE:
            make_runner(out / name, options, world=here).run()
            continue
        with pytest.raises(UserError, match="nothing to shard") as e:
            make_runner(out / name, options, world=here)
        assert str(e.value.details["fix"]).startswith("parallel=ddp")


@pytest.mark.slow
def test_tasks_on_checkpoints_are_trained_the_same_by_two_processes(tmp_path, one_thread):
    """Where what is trained is a net of its own; else parts of it are refused, before anything is trained."""
    from tuning import prepare

    place = prepare(tmp_path)

    def work() -> None:
        with world("cpu") as here:
            for kind in ("ddp", "fsdp"):
                tune(tmp_path / kind, place, here, kind)

    tune(tmp_path / "one", place, World(), "ddp")  # which writes the checkpoint, too
    launch(work)
    pairs = [(name, kind) for name in TUNED for kind in ("ddp", "fsdp") if kind == "ddp" or name not in LITTLE]
    found = {f"{name}, {kind}": apart(tmp_path / "one" / name, tmp_path / kind / name) for name, kind in pairs}
    print(found)
    moved = {name: way(tmp_path / "one" / name / "run/checkpoint") for name in TUNED}
    print(moved)
    assert max(found.values()) <= ONE and min(moved.values()) > 20 * ONE


# -- lost processes --------------------------------------------------------------------------------------------------

KILLS = 8  # of a run


def long(out: Path, kind: str) -> dict[str, Any]:
    """A run with a checkpoint every other step, so that kills also hit what is not saved yet."""
    return {**short(out, POINTED), "parallel": kind, "steps": 5 * KILLS, "checkpoint_every": 2}


def killed_at_random(here: World, runner: Any) -> None:
    """Arrange that one process of each start kills itself: inside a save, in mid-accumulation, or between two steps."""
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dice = random.Random(start)
    victim, moment = dice.randrange(2), dice.randint(1, 16)
    if start >= KILLS or (here.rank != victim and (start % 2 or runner.trainer.sharded)):
        return
    if start % 2 == 0:  # of replicated nets only the first process saves
        return dies_at_sync(moment) if here.first or runner.trainer.sharded else None
    dies_at_batch(runner.trainer, moment)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_whose_processes_are_killed_ends_bit_by_bit_as_undisturbed(tmp_path, kind):
    """As torchrun starts them again: the one that is left ends by itself, and both go on from the newest checkpoint."""
    launch(follow_alone, (str(tmp_path), kind), 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={KILLS + 3}"]
    command = [sys.executable, *torchrun, __file__, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert differences(tmp_path / "whole/run", tmp_path / "killed/run") == []
    found = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(found) > KILLS - 3  # torchrun itself may fail to bring them together
    print(json.dumps(found))


def follow_alone(folder: str, kind: str) -> None:
    with world("cpu") as here:
        make_runner(Path(folder) / "whole", long(Path(folder), kind), world=here).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, how = Path(sys.argv[1]), sys.argv[2]
    with world("cpu") as both:
        one_of_two = make_runner(place / "killed", long(place, how), world=both)
        if both.first:
            row = {"start": int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "step": one_of_two.trainer.step}
            with (place / "starts.jsonl").open("a") as file:
                file.write(json.dumps({**row, "at": time.time()}) + "\n")
        killed_at_random(both, one_of_two)
        one_of_two.run()
