"""Two gloo processes against one: the same losses, the same weights, one writer, one decision to stop."""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGES, POINTS, images, make_runner, rows, saved
from torch.testing import assert_close

from nanodiffusion import distributed
from nanodiffusion.checkpoint import latest
from nanodiffusion.distributed import World, launch, pick_device, world
from nanodiffusion.errors import UserError
from nanodiffusion.train import Step

ONE = 1e-6  # between the same sums in another order
STEPS = 20


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Recipes by name; without dropout, whose masks depend on how a batch is cut.

    Some of the U-Net's gradients are little more than rounding errors (a bias before a group norm of one channel a
    group), which Adam divides by their own size, cut in one process or over two: it is trained with SGD.
    """
    points = {**POINTS, "batch_size": 32, "steps": STEPS, "validate_every": 12, "validation": 0.25, "lr": 1e-3}
    plain = {**IMAGES["net"], "dropout": 0.0}
    pictures = {**IMAGES, "net": plain, "data": images(folder), "steps": STEPS, "clip": 1.0}
    pictures |= {"optimizer": {"name": "SGD", "momentum": 0.9}, "lr": 0.02}
    return {
        "points": points,
        "points, accumulate=2": {**points, "accumulate": 2},
        "images": {**pictures, "accumulate": 1},
        "images, accumulate=2": pictures,
    }


# -- the workers -----------------------------------------------------------------------------------------------------


def follow(out: Path, options: dict[str, Any], here: World, signal_at: int = 0, seconds: float = 0.0) -> dict[str, Any]:
    """Train (on), and tell what this rank saw."""
    losses: list[float] = []
    runner = make_runner(out, options, world=here)
    runner.progress.seconds += seconds

    def each(step: Step) -> None:
        losses.append(step.loss.item())
        if signal_at == step.step:
            os.kill(os.getpid(), 15)

    reason = runner.run(each)
    net = runner.trainer.denoiser.net
    return {
        "reason": reason,
        "losses": losses,
        "step": runner.trainer.step,
        "weight": sum(p.double().sum().item() for p in net.parameters()),
    }


def work(out: Path) -> list[dict[str, Any]]:
    """Everything that the tests ask two processes for, in one go: starting them costs more than all of it."""
    with world("cpu") as here:
        found: dict[str, Any] = {"size": here.size, "rank": here.rank, "largest": here.max(here.rank + 5)}
        found["mean"] = here.mean(torch.tensor([1.0, 10.0]) * (here.rank + 1)).tolist()
        for name, options in cases(out).items():
            found[name] = follow(out / "two" / name, options, here)
        found["resumed"] = follow(out / "cut", cases(out)["points"], here)
        options = {**POINTS, "steps": 200}
        found["signalled"] = follow(out / "signalled", options, here, signal_at=7 * here.rank)
        # one clock is ahead: its process alone finds that the time is over
        found["late"] = follow(out / "late", {**options, "time_limit": 1000.0}, here, seconds=999.99 * here.rank)
        with_dropout = {**IMAGES, "data": images(out), "steps": 12}
        found["dropout"] = follow(out / "dropout-whole", with_dropout, here)
        follow(out / "dropout-cut", with_dropout, here, signal_at=5 * (1 - here.rank))
        found["dropout, cut"] = follow(out / "dropout-cut", with_dropout, here)
        return here.told(found)


@pytest.fixture(scope="module")
def two(tmp_path_factory, one_thread) -> dict[str, Any]:
    """What both ranks saw, and the folder of it all; a run of one process stopped half way lies in it for them."""
    out = tmp_path_factory.mktemp("two")
    follow(out / "cut", cases(out)["points"], World(), signal_at=STEPS // 2)
    return {"out": out, "ranks": launch(work, (out,))}  # not forked: this process may have had threads


@pytest.fixture(scope="module")
def one(two) -> dict[str, dict[str, Any]]:
    """The same cases by one process."""
    out = two["out"]
    return {name: follow(out / "one" / name, options, World()) for name, options in cases(out).items()}


NAMES = ["points", "points, accumulate=2", "images", "images, accumulate=2"]


def largest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_loss_curve_of_one(one, two, name):
    deviation = largest(one[name]["losses"], two["ranks"][0][name]["losses"])
    print(f"{name}: largest deviation of {STEPS} losses {deviation:.2e}")
    assert len(one[name]["losses"]) == STEPS and deviation <= ONE
    assert two["ranks"][0][name]["losses"] == two["ranks"][1][name]["losses"]  # each knows the global loss


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_with_the_weights_of_one(one, two, name):
    ours, theirs = saved(two["out"] / "one" / name / "run")[0], saved(two["out"] / "two" / name / "run")[0]
    assert ours.keys() == theirs.keys()
    deviation = max((v - theirs[k]).abs().max().item() for k, v in ours.items() if not k.startswith("optimizer"))
    print(f"{name}: largest deviation of weights and averages {deviation:.2e}")
    assert deviation <= ONE
    assert two["ranks"][0][name]["weight"] == two["ranks"][1][name]["weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points", "images"])
def test_four_processes_end_with_the_weights_of_two_and_of_one(name, tmp_path, one_thread):
    """Of a batch in four micro-batches: 1 process x 4, 2 x 2, 4 x 1."""
    options = cases(tmp_path)[name]

    def train(processes: int) -> None:
        with world("cpu") as here:
            follow(tmp_path / str(processes), {**options, "accumulate": 4 // processes}, here)

    for processes in (1, 2, 4):
        launch(train, (processes,), processes)
    ours, *others = (saved(tmp_path / f"{n}/run")[0] for n in (1, 2, 4))
    weights = [name for name in ours if not name.startswith("optimizer")]
    for theirs in others:
        assert_close({k: theirs[k] for k in weights}, {k: ours[k] for k in weights}, rtol=0, atol=ONE)


def test_rows_of_two_processes_are_those_of_one(one, two):
    ours, theirs = (rows(two["out"] / kind / "points/run") for kind in ("one", "two"))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]  # once each: one rank writes
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=ONE), key


def validated(out: Path, here: World) -> dict[str, Any]:
    """Validations of 7 samples, by a net that is whole and one in parts, and of 2."""
    found = {}
    for kind, share in (("ddp", 0.12), ("fsdp", 0.12), ("fsdp", 0.03)):
        more = {"batch_size": 6, "validate_every": 1, "validation": share, "parallel": kind}
        runner = make_runner(out / f"{kind}-{share}", POINTS, more, world=here)
        found[f"{kind}, {runner.validator.n}"] = runner.validator.row()
    return found


@pytest.mark.slow
def test_three_processes_share_a_validation_that_does_not_divide(tmp_path):
    """Batches of 2 and 1 on the first two, one on the third; and of two samples none that counts on the third."""

    def work() -> dict[str, Any]:
        with world("cpu") as here:
            return validated(tmp_path / "three", here)

    ours, theirs = validated(tmp_path / "one", World()), launch(work, (), 3)
    assert ours.keys() == theirs.keys() == {"ddp, 7", "fsdp, 7", "fsdp, 2"}
    for name, row in ours.items():
        assert row.keys() == theirs[name].keys()
        assert all(theirs[name][key] == pytest.approx(row[key], rel=0, abs=ONE) for key in row), name


def test_a_checkpoint_of_one_process_continues_in_two(one, two):
    resumed = two["ranks"][0]["resumed"]["losses"]
    assert largest(one["points"]["losses"][STEPS // 2 :], resumed) <= ONE
    assert latest(two["out"] / "cut/run/checkpoint").step == STEPS


def test_a_signal_to_one_rank_stops_and_saves_both(two):
    assert [rank["signalled"]["reason"] for rank in two["ranks"]] == ["signal", "signal"]
    assert [rank["signalled"]["step"] for rank in two["ranks"]] == [7, 7]
    assert latest(two["out"] / "signalled/run/checkpoint").step == 7


def test_ranks_agree_why_they_stop(two):
    """Or one of them would report a signal that never came, and its launcher would call the run failed."""
    assert [rank["late"]["reason"] for rank in two["ranks"]] == ["time", "time"]
    assert two["ranks"][0]["late"]["step"] == two["ranks"][1]["late"]["step"]


def test_two_processes_with_dropout_resume_bit_by_bit(two):
    for rank in two["ranks"]:
        assert rank["dropout, cut"]["losses"] == rank["dropout"]["losses"][5:]
    ours, theirs = saved(two["out"] / "dropout-whole/run")[0], saved(two["out"] / "dropout-cut/run")[0]
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_means_and_maxima_go_over_all_processes(two):
    assert [rank["mean"] for rank in two["ranks"]] == [[1.5, 15.0]] * 2
    assert [rank["largest"] for rank in two["ranks"]] == [6, 6]
    alone = World()
    assert alone.first and alone.max(3) == 3 and alone.mean(torch.tensor(2.0)) == 2
    alone.barrier()


def test_one_process_joins_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world("cpu") as here:
        assert (here.rank, here.size, here.device.type) == (0, 1, "cpu")
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_one_message(name):
    with pytest.raises(UserError, match="no device"):
        pick_device(name)


# -- from Python -----------------------------------------------------------------------------------------------------


def meet(*numbers: float) -> dict[str, Any]:
    """What a rank knows of itself, and a mean over all of them."""
    with world("cpu") as here:
        mine = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        return {"mean": here.mean(torch.tensor(numbers) * (here.rank + 1)).tolist(), "first": here.first, **mine}


def fall() -> None:
    """The last of them fails while the others wait for it."""
    with world("cpu") as here:
        if here.rank == here.size - 1:
            raise ValueError("no luck")
        here.barrier()


def test_launch_starts_processes_that_meet_and_returns_what_the_first_says():
    before = dict(os.environ)
    expected = {"mean": [1.5, 15.0], "first": True, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    assert launch(meet, (1.0, 10.0), 2) == expected
    assert dict(os.environ) == before and not torch.distributed.is_initialized()


def test_launch_takes_functions_that_no_other_process_could_import():
    """As those of a notebook; what JSON cannot say is not returned."""
    assert launch(lambda *numbers: meet(*numbers)["mean"], (1.0, 10.0), 3) == [2.0, 20.0]
    assert launch(lambda: torch.zeros(1)) is None


def test_launch_of_one_process_is_a_call():
    answer = object()
    assert launch(lambda given: given, (answer,), 1) is answer


def test_an_error_of_a_launched_rank_reaches_the_caller():
    with pytest.raises(RuntimeError, match="rank 1 of 2: ValueError: no luck") as e:
        launch(lambda: fall())
    assert "in fall" in str(e.value)  # the traceback of the other process


def test_a_users_error_of_a_launched_rank_stays_one():
    def wrong() -> None:
        raise UserError("this is odd", key="lr", found=os.environ["RANK"], fix="lr=1")

    with pytest.raises(UserError, match=r"rank [01]: this is odd") as e:
        launch(wrong)
    assert e.value.details["key"] == "lr" and e.value.details["fix"] == "lr=1"


def leaves_behind(folder: Path) -> None:
    """A process that still has something to do, and to say, when it ends."""
    rank = os.environ["RANK"]
    atexit.register(lambda: (folder / f"handler-{rank}").touch())
    threading.Thread(target=lambda: (time.sleep(0.3), (folder / f"thread-{rank}").touch())).start()
    print(f"the last words of {rank}")
    with world("cpu"):
        pass


def test_what_a_launched_process_leaves_behind_is_done_before_it_ends(tmp_path, capfd):
    launch(leaves_behind, (tmp_path,))
    expected = [f"{what}-{rank}" for what in ("handler", "thread") for rank in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert sorted(capfd.readouterr().out.splitlines()) == ["the last words of 0", "the last words of 1"]


def saves_for_long(folder: Path) -> None:
    """A process that takes longer to save, once its caller is interrupted, than one may that is of no use any more."""
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1)
    (folder / f"saved-{os.environ['RANK']}").touch()


@pytest.mark.slow
def test_processes_save_before_an_interrupted_launch_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS", 0.2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(saves_for_long, (tmp_path,))
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved-0", "saved-1"]


KEPT = []


def keeps_its_group() -> bool:
    """A process whose group, and so the threads of it, outlive its work."""
    with world("cpu") as here:
        KEPT.append(torch.distributed.group.WORLD)
        return len(here.told(["x"] * 1000)) == here.size


@pytest.mark.slow
def test_processes_whose_threads_are_still_at_work_end_well():
    for _ in range(15):  # without care, of six processes one aborted in every eighth start
        assert launch(keeps_its_group, (), 6)


def test_a_launched_rank_that_dies_is_named():
    def die() -> None:
        if os.environ["RANK"] == "1":
            os._exit(3)

    with pytest.raises(RuntimeError, match=r"rank 1 of 2.*exit code 3"):
        launch(die)


@pytest.mark.parametrize(
    ("function", "processes"), [(meet, 0), (meet, -1), ("meet", 2), (None, 1)], ids=["0", "-1", "text", "None"]
)
def test_nothing_to_launch_is_one_message(function, processes):
    with pytest.raises(UserError, match="nothing to launch"):
        launch(function, (), processes)


def test_arguments_that_cannot_be_sent_are_one_message():
    with pytest.raises(UserError, match="cannot be sent to another process"):
        launch(meet, (lambda: 1.0,))


def test_a_launched_process_launches_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="one of several processes already"):
        launch(meet)


def test_functions_of_a_notebook_are_refused_once_a_gpu_is_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="cannot see this function"):
        launch(lambda: None)


@pytest.mark.slow
def test_torchrun_starts_the_command_line(tmp_path):
    """The way a user does it; then once more with one process, which finds it finished."""
    words = ["-m", "nanodiffusion", "train", "swissroll", f"out={tmp_path}", "steps=20", "device=cpu", "batch_size=64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for launcher in (torchrun, [sys.executable]):
        done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    assert latest(tmp_path / "swissroll/checkpoint").step == 20
