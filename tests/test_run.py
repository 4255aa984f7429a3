"""A run in its folder: killed, signalled, damaged and resumed it must end bit by bit as if nothing had happened."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import AVERAGES, IMAGES, KINDS, POINTS, differences, harassed, images, make_runner, rows, saved
from torch.testing import assert_close

from nanodiffusion.checkpoint import checkpoints
from nanodiffusion.errors import UserError
from nanodiffusion.run import load_run
from nanodiffusion.tensors import load_tensors
from nanodiffusion.train import Step, Trainer

BUSY = {  # everything that a checkpoint has to carry
    "validate_every": 5,
    "validation": 0.2,
    "lr_schedule": {"name": "cosine", "warmup": 5},
    "ema": AVERAGES,
}


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    """A callback that sends this process a signal after update `step`."""

    def each(found: Step) -> None:
        if found.step == step:
            os.kill(os.getpid(), number)

    return each


class Killed(BaseException):
    """What a kill looks like from inside: nothing that the run could catch."""


def die_at(step: int) -> Any:
    def each(found: Step) -> None:
        if found.step == step:
            raise Killed

    return each


def kill(runner: Any, step: int) -> None:
    with pytest.raises(Killed):
        runner.run(die_at(step))


@pytest.fixture(params=["points", "images"])
def options(request, tmp_path) -> dict[str, Any]:
    """A small run with all that a checkpoint has to carry: points, and labelled images with dropout and accumulation."""
    if request.param == "points":
        return {**POINTS, **BUSY}
    return {**IMAGES, **BUSY, "data": images(tmp_path), "steps": 20}


QUICKLY = pytest.mark.parametrize("options", ["points", pytest.param("images", marks=pytest.mark.slow)], indirect=True)


# -- SIGKILL ---------------------------------------------------------------------------------------------------------


def check_kills(folder: Path, kills: int, steps: int, least: int) -> None:
    """At least that many SIGKILLs of a run of points and one of images, a quarter inside a save, or equality says little."""
    points = {**POINTS, **BUSY, "checkpoint_every": 1, "steps": 2 * steps}
    pictures = {**IMAGES, **BUSY, "checkpoint_every": 1, "steps": steps, "data": images(folder)}
    counts = harassed(folder, {"points": [points, kills, 1], "images": [pictures, kills, 2]}).values()
    each = [sum(c[k] for k in KINDS) for c in counts]
    inside, terms = (sum(c[key] for c in counts) for key in ("inside_a_save", "signal"))
    assert sum(each) >= least and inside >= least // 4 and terms > 0 and min(each) >= least // 4


def test_a_run_killed_again_and_again_ends_bit_by_bit_as_undisturbed(tmp_path):
    check_kills(tmp_path, 8, 14, 12)


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_ends_bit_by_bit_as_undisturbed(tmp_path):
    check_kills(tmp_path, 80, 160, 100)


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_stopped_anywhere_continues_bit_by_bit(tmp_path, options):
    """At steps that are no multiple of anything: in mid-epoch, between two rows and two checkpoints."""
    make_runner(tmp_path / "whole", options).run()
    for at in (1, 4, 11):
        runner = make_runner(tmp_path / "cut", options)
        assert runner.run(stop_at(at)) == "signal"
        assert runner.trainer.step == at and runner.signal == signal.SIGTERM
    assert make_runner(tmp_path / "cut", options).run() == "done"
    assert differences(tmp_path / "whole/run", tmp_path / "cut/run") == []


@QUICKLY
def test_other_random_numbers_in_between_do_not_matter(tmp_path, options):
    """Dropout draws from the global generator, pictures and whoever looks on may use it too."""
    make_runner(tmp_path / "whole", options).run()
    make_runner(tmp_path / "busy", options, sample_every=3).run(lambda step: torch.manual_seed(step.step))
    assert differences(tmp_path / "whole/run", tmp_path / "busy/run") == []


def test_dropout_is_at_work_in_the_run_of_images(tmp_path):
    options = {**IMAGES, "data": images(tmp_path), "steps": 3, "log_every": 3}
    plain = {**options, "net": {**options["net"], "dropout": 0.0}}
    make_runner(tmp_path / "a", options).run()
    make_runner(tmp_path / "b", plain).run()
    assert rows(tmp_path / "a/run") != rows(tmp_path / "b/run")


def test_sigusr1_saves_and_goes_on(tmp_path):
    runner = make_runner(tmp_path, POINTS)
    assert runner.run(stop_at(9, signal.SIGUSR1)) == "done"
    steps = [int(folder.name.split("-")[1]) for folder in checkpoints(tmp_path / "run/checkpoint")]
    assert steps == [30, 9]


def test_handlers_are_restored_after_a_run(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    make_runner(tmp_path, POINTS, steps=2).run()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_rows_beyond_the_checkpoint_are_dropped_and_written_again(tmp_path):
    options = {**POINTS, "checkpoint_every": 10, "log_every": 2}
    kill(make_runner(tmp_path, options), 17)
    assert [row["step"] for row in rows(tmp_path / "run")][-1] == 16
    with (tmp_path / "run/metrics.jsonl").open("a") as f:
        f.write('{"step": 1')  # a row cut off
    runner = make_runner(tmp_path, options)
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 6, 8, 10]
    runner.run()
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(2, 31, 2))


@QUICKLY
def test_a_damaged_newest_checkpoint_falls_back_and_the_result_is_the_same(tmp_path, options):
    options = {**options, "checkpoint_every": 4}
    make_runner(tmp_path / "whole", options).run()
    kill(make_runner(tmp_path / "hurt", options), 14)
    newest = checkpoints(tmp_path / "hurt/run/checkpoint")[0] / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="skipping damaged checkpoint .*step-00000012.*model.safetensors"):
        runner = make_runner(tmp_path / "hurt", options)
    assert runner.trainer.step == 8
    runner.run()
    assert differences(tmp_path / "whole/run", tmp_path / "hurt/run") == []


def test_a_finished_run_stays_as_it_is_and_more_steps_extend_it(tmp_path):
    make_runner(tmp_path / "a", POINTS).run()
    before = (tmp_path / "a/run/metrics.jsonl").read_bytes()
    assert make_runner(tmp_path / "a", POINTS).run() == "done"
    assert (tmp_path / "a/run/metrics.jsonl").read_bytes() == before
    make_runner(tmp_path / "a", POINTS, steps=42).run()
    make_runner(tmp_path / "b", POINTS, steps=42).run()
    tensors, other = saved(tmp_path / "a/run")[0], saved(tmp_path / "b/run")[0]
    assert tensors.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in tensors.items())


def test_a_changed_config_is_refused_by_the_names_of_its_keys(tmp_path):
    make_runner(tmp_path, POINTS, steps=4).run()
    with pytest.raises(UserError) as e:
        make_runner(tmp_path, POINTS, lr=0.5, batch_size=4, steps=8)
    assert "key batch_size, lr" in str(e.value) and "overwrite=true" in str(e.value) and "steps" not in str(e.value)
    assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == POINTS["lr"]  # the folder is untouched


def test_overwrite_starts_afresh(tmp_path):
    make_runner(tmp_path, POINTS, steps=4).run()
    runner = make_runner(tmp_path, POINTS, steps=2, lr=0.5, overwrite=True)
    assert runner.trainer.step == 0
    runner.run()
    assert [row["step"] for row in rows(tmp_path / "run")] == [2]
    assert [f.name for f in checkpoints(tmp_path / "run/checkpoint")] == ["step-00000002"]


@pytest.mark.parametrize("starter", ["TORCHELASTIC", "SLURM"])
def test_what_starts_a_run_again_does_not_start_it_afresh(tmp_path, monkeypatch, starter):
    make_runner(tmp_path, POINTS, steps=4, overwrite=True).run()
    monkeypatch.setenv(f"{starter}_RESTART_COUNT", "1")
    assert make_runner(tmp_path, POINTS, steps=6, overwrite=True).trainer.step == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_damaged_config_file_is_one_message(tmp_path, content):
    make_runner(tmp_path, POINTS, steps=2).run()
    (tmp_path / "run/config.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        make_runner(tmp_path, POINTS, steps=4)


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run's folder"):
        make_runner(tmp_path / "file", POINTS)


# -- what is not finite ----------------------------------------------------------------------------------------------


def poison(monkeypatch, *steps: int) -> None:
    """NaN noise in the micro-batches of those updates (0 is the first)."""
    draw = Trainer.draw

    def spoilt(self: Trainer) -> list[Any]:
        nan = math.nan if self.step in steps else 0.0
        return [d._replace(eps=d.eps + nan) for d in draw(self)]

    monkeypatch.setattr(Trainer, "draw", spoilt)


def test_skipped_updates_are_counted_and_leave_the_rows_finite(tmp_path, monkeypatch):
    poison(monkeypatch, 3, 14, 15, 16, 17, 18, 19, 20)
    make_runner(tmp_path, POINTS, log_every=7).run()
    found = {row["step"]: row for row in rows(tmp_path / "run")}
    assert [found[k]["skipped"] for k in (7, 14, 21, 28)] == [1, 1, 8, 8]
    assert found[21]["loss"] is None and found[21]["grad_norm"] is None  # no update was made: null, not 0 and not NaN
    assert all(isinstance(found[k]["loss"], float) for k in (7, 14, 28))
    assert all(v.isfinite().all() for v in saved(tmp_path / "run")[0].values())


def test_a_run_that_stays_non_finite_stops_and_dumps_its_batch(tmp_path, monkeypatch):
    poison(monkeypatch, *range(12, 40))
    runner = make_runner(tmp_path, POINTS, checkpoint_every=10, max_bad_steps=5, accumulate=2)
    with pytest.raises(UserError, match="5 updates in a row"):
        runner.run()
    dumped, meta = load_tensors(tmp_path / "run/bad-batch.safetensors")
    assert meta["step"] == 16 and dumped["eps"].isnan().all()
    assert dumped["x0"].shape == (16, 2)  # all of it, not one micro-batch
    assert_close(dumped["x0"], runner.data.x[dumped["index"]], rtol=0, atol=0)
    assert saved(tmp_path / "run")[1]["step"] == 10  # what was saved before is there


# -- company of the loop ---------------------------------------------------------------------------------------------


def test_validation_rows_equal_a_loss_computed_by_hand(tmp_path):
    options = {
        **POINTS,
        "steps": 10,
        "validate_every": 10,
        "validation": 0.25,
        "ema": [{"name": "constant", "decay": 0.8}],
    }
    runner = make_runner(tmp_path, options)
    ((x0, eps, _, counts),) = runner.validator.batches()
    runner.run()
    row = next(r for r in rows(tmp_path / "run") if "val/loss" in r)
    assert len(x0) == 15 and counts.all() and len(row["val/sigma"]) == 8
    train = {tuple(p) for p in runner.data.x.tolist()}
    assert not train & {tuple(p) for p in x0.tolist()}  # held out
    for weights, key in (("model", "val/"), ("ema-0", "val/ema_")):
        net = load_run(tmp_path / "run", weights).denoiser.net
        by_hand = []
        for sigma in row["val/sigma"]:
            s = torch.full((15,), sigma)
            x = (x0 + sigma * eps) / math.sqrt(1 + sigma**2)
            with torch.no_grad():
                by_hand.append(((net(x, s.log() / 4) - eps) ** 2).mean().item())
        assert row[f"{key}loss_per_sigma"] == pytest.approx(by_hand, rel=1e-5)
        assert row[f"{key}loss"] == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    assert row["val/loss"] != row["val/ema_loss"]


def test_validation_levels_are_the_middles_of_equally_likely_parts(tmp_path):
    density = {"name": "log_normal", "mean": -1.0, "std": 0.7}
    runner = make_runner(tmp_path, POINTS, density=density, validate_every=5, validation=0.2)
    middles = torch.distributions.Normal(-1.0, 0.7).icdf((torch.arange(8) + 0.5) / 8).exp()
    assert_close(runner.validator.levels, middles, rtol=0.05, atol=0)  # of 16,384 draws


def scripted(runner: Any, losses: list[float]) -> None:
    """Let a runner's validations find those losses."""
    found = iter(losses)
    runner.validator.row = lambda: {"val/loss": next(found)}


def test_patience_ends_a_run_and_the_best_checkpoint_is_the_best(tmp_path):
    runner = make_runner(tmp_path, POINTS, validate_every=3, validation=0.2, patience=2)
    scripted(runner, [3.0, 1.0, 2.0, 0.5, 0.7, math.nan, 0.1])
    assert runner.run() == "patience"
    assert runner.trainer.step == 18  # two validations after the best one, at step 12
    assert saved(tmp_path / "run", best=True)[1]["step"] == 12
    assert load_run(tmp_path / "run", best=True).step == 12 and load_run(tmp_path / "run").step == 18


@pytest.mark.parametrize("ended", ["done", "time"])
def test_the_last_weights_of_a_run_are_validated_wherever_it_ends(tmp_path, ended):
    limit = {"time_limit": 1e-6} if ended == "time" else {"steps": 4}
    runner = make_runner(tmp_path, POINTS, validate_every=3, validation=0.2, **limit)
    scripted(runner, [1.0, 0.5])
    assert runner.run() == ended
    measured = [row["step"] for row in rows(tmp_path / "run") if "val/loss" in row]
    assert measured == ([1] if ended == "time" else [3, 4])
    assert saved(tmp_path / "run", best=True)[1]["step"] == measured[-1]


def test_a_signal_ends_a_run_without_a_validation(tmp_path):
    runner = make_runner(tmp_path, POINTS, validate_every=3, validation=0.2)
    runner.run(stop_at(4))
    assert [row["step"] for row in rows(tmp_path / "run") if "val/loss" in row] == [3]


def test_patience_is_remembered_across_a_stop(tmp_path):
    runner = make_runner(tmp_path, POINTS, validate_every=3, validation=0.2, patience=2)
    scripted(runner, [1.0, 2.0])
    runner.run(stop_at(7))
    runner = make_runner(tmp_path, POINTS, validate_every=3, validation=0.2, patience=2)
    scripted(runner, [1.5])
    assert runner.run() == "patience" and runner.trainer.step == 9


def test_best_weights_are_those_with_the_smallest_validation_loss(tmp_path):
    runner = make_runner(tmp_path, POINTS, validate_every=3, validation=0.2, lr=0.05)
    runner.run()
    found = {r["step"]: r["val/ema_loss"] for r in rows(tmp_path / "run") if "val/ema_loss" in r}
    assert saved(tmp_path / "run", best=True)[1]["step"] == min(found, key=found.__getitem__)


def test_validation_and_pictures_leave_the_raw_weights_bit_identical(tmp_path):
    runner = make_runner(tmp_path, POINTS, validate_every=10, validation=0.2)
    runner.run(stop_at(10))
    net = runner.trainer.denoiser.net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    average = {k: v.clone() for k, v in runner.trainer.emas[0].tensors.items()}
    runner.validator.row()
    runner.pictures(4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in runner.trainer.emas[0].tensors.items())
    assert any(not torch.equal(v, before[k]) for k, v in average.items())


def test_grids_at_fixed_noise_are_the_same_drawn_twice_and_show_the_average(tmp_path):
    options = {
        **IMAGES,
        "data": images(tmp_path),
        "steps": 6,
        "sample_every": 3,
        "ema": [{"name": "constant", "decay": 0.5}],
    }
    runner = make_runner(tmp_path / "a", options)
    runner.run()
    make_runner(tmp_path / "b", options).run()
    names = sorted(p.name for p in (tmp_path / "a/run/samples").iterdir())
    assert names == [f"step-0000000{k}-{kind}.png" for k in (3, 6) for kind in ("ema", "raw")]
    for name in names:
        assert (tmp_path / "a/run/samples" / name).read_bytes() == (tmp_path / "b/run/samples" / name).read_bytes()
    assert torch.equal(runner.pictures(4), runner.pictures(6)[:4])
    assert not torch.equal(runner.pictures(4, None), runner.pictures(4, 0))


def test_time_limit_stops_and_counts_what_went_before(tmp_path):
    options = {**POINTS, "steps": 10**6, "time_limit": 0.3}
    start = time.perf_counter()
    runner = make_runner(tmp_path, options)
    assert runner.run() == "time"
    assert 0.3 <= runner.progress.seconds <= time.perf_counter() - start
    assert saved(tmp_path / "run")[1]["step"] == runner.trainer.step > 1
    again = make_runner(tmp_path, options)
    assert again.run() == "time" and again.trainer.step == runner.trainer.step + 1  # the limit is the whole run's


def test_rows_hold_the_mean_loss_since_the_row_before(tmp_path):
    seen: list[Step] = []
    make_runner(tmp_path, POINTS, steps=10, log_every=4).run(seen.append)
    losses = torch.stack([s.loss for s in seen])
    found = rows(tmp_path / "run")
    assert [r["step"] for r in found] == [4, 8, 10]
    assert [r["loss"] for r in found] == pytest.approx(
        [losses[a:b].mean().item() for a, b in ((0, 4), (4, 8), (8, 10))]
    )
    assert [r["grad_norm"] for r in found] == [seen[k].grad_norm.item() for k in (3, 7, 9)]


def test_snapshots_are_written_for_power_averages_only(tmp_path):
    runner = make_runner(tmp_path, POINTS, ema=AVERAGES, snapshot_every=10)
    runner.run()
    names = sorted(p.name for p in (tmp_path / "run/ema").iterdir())
    assert names == [f"sigma-0.1-step-000000{k}.safetensors" for k in (10, 20, 30)]
    last, _ = load_tensors(tmp_path / "run/ema" / names[-1])
    assert all(torch.equal(v, runner.trainer.emas[1].tensors[k]) for k, v in last.items())


def test_a_folder_of_runs_may_be_called_checkpoint(tmp_path):
    make_runner(tmp_path / "checkpoint", POINTS, steps=2).run()
    assert load_run(tmp_path / "checkpoint/run").root == tmp_path / "checkpoint/run"
    newest = tmp_path / "checkpoint/run/checkpoint/step-00000002"
    assert load_run(newest).root == tmp_path / "checkpoint/run"


def test_a_run_reads_back_from_its_folder_alone(tmp_path):
    runner = make_runner(tmp_path, {**IMAGES, "data": images(tmp_path), "steps": 3})
    runner.run()
    (tmp_path / "images.npz").unlink()
    run = load_run(tmp_path / "run", "model")
    assert run.shape == (1, 4, 4) and run.classes == ("0", "1", "2") and run.step == 3
    x, sigma, cond = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0]), {"label": torch.tensor([0, 3])}
    runner.trainer.denoiser.eval()
    with torch.no_grad():
        assert torch.equal(run.denoiser(x, sigma, cond), runner.trainer.denoiser(x, sigma, cond))


@pytest.mark.parametrize(
    "change",
    [
        {"net": {"name": "unet"}},
        {"net": {"name": "mlp", "dim": 3}},
        {"sample": {"guidance": 3.0}},
        {"sample": {"sampler": {"name": "hoin"}}},
        {"sample": {"n": 0}},
        {"trackers": ["tensorbord"]},
        {"data": {"name": "swis-roll"}},
        {"data": {"n": 10}},
        {"data": {"name": "digits", "split": "test"}},
        {"density": {"name": "log_normal", "men": 1.0}},
        {"schedule": {"name": "nothing"}},
        {"ema": [{"name": "power", "sigma_rel": 3.0}]},
        {"optimizer": {"name": "Adamm"}},
        {"sample": {"sampler": {"name": "gradient_estimation", "mu": 1.0}}},
        {"sample": {"sampler": {"name": "unipc", "order": 0}}},
        {"sample": {"sampler": {"name": "lms", "order": 0}}},
        {"sample": {"sampler": {"name": "heun", "churn": -0.5}}},
        {"sample": {"sampler": {"name": "dpmpp_2m_sde", "eta": -1.0}}},
        {"sample": {"ladder": {"name": "karras", "rho": 0.0}}},
        {"schedule": {"name": "log_linear", "sigma_min": 0.0}},
        {"density": {"name": "log_uniform", "sigma_min": 0.0}},
        {"density": {"name": "beta", "a": 0.0}},
        {"lr_schedule": {"name": "rsqrt", "hold": 0}},
        {"lr_schedule": {"name": "constant", "warmup": -5}},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_training(tmp_path, change):
    with pytest.raises(UserError):
        make_runner(tmp_path, POINTS, change)
    assert not (tmp_path / "run/checkpoint").exists()
