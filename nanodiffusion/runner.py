"""A recipe trained in a folder, resumable at any moment; `run` says what is in the folder, and reads it back.

Of several processes the first writes the folder. A lost one ends the others, whose next exchange with it fails; started
again (torchrun --max-restarts=1, a requeued job) all of them go on from the newest checkpoint, in whatever number. SIGTERM or
SIGINT to any of them saves and stops all, with exit code 128 + signal: 143 says that the same command goes on, so that a
scheduler may requeue it. SIGUSR1 to any of them saves and trains on.
"""

import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.checkpoint import Checkpoint, checkpoints, latest, save_best, save_checkpoint
from nanodiffusion.config import RESUMABLE, Config
from nanodiffusion.distributed import World
from nanodiffusion.ema import save_snapshot
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.fast import adapt
from nanodiffusion.nets import net_size
from nanodiffusion.objective import (
    Fixed,
    conditioning,
    conditions,
    decoded,
    fit_net,
    make_denoiser,
    make_density,
    make_schedule,
    make_task,
    open_codec,
)
from nanodiffusion.resume import check_same
from nanodiffusion.run import FIXED, find_checkpoint, make_data, picture, start_from
from nanodiffusion.show import save_png
from nanodiffusion.tensors import load_weights, save_tensors, unpack_state
from nanodiffusion.tracking import TRACKERS, Metrics, open_trackers
from nanodiffusion.train import Draw, Step, Trainer

REASONS = ("", "patience", "time", "signal")  # why a run ends early; of several the last counts


@contextmanager
def caught_signals() -> Iterator[set[int]]:
    """Collect SIGTERM and SIGINT (save and stop) and SIGUSR1 (save and go on) instead of dying of them."""
    caught: set[int] = set()
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    old = {s: signal.signal(s, lambda number, _: caught.add(number)) for s in wanted}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass
class Progress:
    """What a run remembers besides the trainer's state; saved with every checkpoint."""

    seconds: float = 0.0  # of training
    loss_sum: float | Tensor = 0.0  # of the metrics row being gathered; stays on the device until it is logged
    loss_count: int = 0
    skipped: int = 0
    best: float = float("inf")
    waited: int = 0  # validations since the best one

    def plain(self) -> dict[str, Any]:
        """As numbers; an fp32 sum is exact in JSON."""
        return asdict(replace(self, loss_sum=float(self.loss_sum)))


class _Saved(Mapping[str, Mapping[str, Any]]):
    """What `Trainer.load_state` asks for, read when it does."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        found = self.checkpoint.files[name]
        return unpack_state(found, self.checkpoint.state["optimizer"]) if name == "optimizer" else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.files)

    def __len__(self) -> int:
        return len(self.checkpoint.files)


class Runner:
    """Trains a config in its folder. `run()` returns why it ended: "done", "patience", "time" or "signal"."""

    def __init__(self, config: Config, world: World, say: Callable[[str], None] = print) -> None:
        for name in config.trackers:
            lookup(TRACKERS, name, "trackers")
        self.world, self.say, self.memory = world, say, 0.0
        self.folder = Path(config.out) / config.name
        data, held_out = make_data(config)
        if world.first and hasattr(data, "census"):
            self.say(str(data.census))
        told = {key: getattr(config, key) or getattr(data, key, "") for key in ("codec", "text")}
        self.config = config = fit_net(replace(config, **told), data.shape, len(data.classes), data)
        self.schedule, self.density = make_schedule(config), make_density(config)
        self.task = make_task(config)
        denoiser = make_denoiser(config)
        data, held_out = (d and self.task.prepared(d, denoiser) for d in (data, held_out))
        self.task.check(denoiser, config, data.shape)
        self.notes = self._start_from(denoiser.net)
        self.flops = self.task.flops(denoiser)
        adapt(denoiser.to(world.device))
        data, held_out = (d and d.to(world.device) for d in (data, held_out))
        self.data = data
        self.trainer = Trainer(denoiser, data, self.density, config, world)
        self.trainer.emas += getattr(denoiser, "averages", list)()
        given = data.batch(torch.zeros(1, dtype=torch.int64))[1]
        self.trainer.conditions(given)
        if line := conditioning(denoiser.net, self.trainer.takes, given, len(data.classes)):
            self.say(line)
        self.validator = None
        if held_out and config.validate_every:
            most = config.validation_samples
            self.validator = self.task.validator(self.trainer, held_out, self.density, most)
        self.fixed: Fixed = self.task.fixed(config, denoiser, held_out or data)
        self.prompts = self._prompts(held_out or data)
        self._codec: Any = getattr(denoiser, "codec", None)  # or why there is none
        self.progress = Progress()
        self.signal = int(signal.SIGTERM)  # what ended a run that ended by "signal"
        self.asked: int = False  # whether a checkpoint is wanted now
        self.header = {"config": asdict(config), "shape": list(data.shape), "classes": list(data.classes)}
        self._prepare_folder()
        self._resume()
        self.metrics = Metrics(self.folder / "metrics.jsonl", self.trainer.step) if world.first else lambda row: None
        own = (self.folder, asdict(config), self.trainer.step)
        self.trackers = open_trackers(config.trackers, *own) if world.first else []

    # beginnings

    def _start_from(self, net: nn.Module) -> list[str]:
        """Weights of `init_from`, unless the run goes on from its own."""
        config = self.config
        if not config.init_from or (checkpoints(self.folder / "checkpoint") and not self.afresh):
            return []
        notes = [f"weights of {config.init_from}", *start_from(net, config.init_from, config.init_weights)]
        self.say("\n".join(notes))
        return notes

    def _prompts(self, data: Any) -> list[str]:
        """The words behind what is fixed, where they are known."""
        given = self.config.sample
        if not {"pooled", "ids", "context"} & self.fixed.keys() or (given.images and not given.prompts):
            return []
        captions = [] if getattr(data, "prompts", None) is not None else getattr(data, "captions", [])
        return list(given.prompts or captions[: len(next(iter(self.fixed.values())))])

    # folder and resume

    @property
    def afresh(self) -> bool:
        """Whether what lies in the folder is to go; not when torchrun or Slurm starts again what ended early."""
        again = any(os.environ.get(f"{starter}_RESTART_COUNT", "0") != "0" for starter in ("TORCHELASTIC", "SLURM"))
        return self.config.overwrite and not again

    def _prepare_folder(self) -> None:
        if not self.world.first:
            return
        try:
            if self.afresh and self.folder.exists():
                if not (self.folder / "config.json").is_file():
                    raise UserError("this folder is no run, so it is not removed", file=self.folder, fix="name=ANOTHER")
                shutil.rmtree(self.folder)
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            self._describe()
            if self.fixed:
                save_tensors(self.folder / FIXED, self.fixed, {"prompts": self.prompts})
        except OSError as e:
            raise UserError("cannot write the run's folder", file=self.folder, found=str(e), fix="out=FOLDER") from None

    def _describe(self) -> None:
        net = self.trainer.denoiser.net
        facts = {
            "config.json": asdict(self.config),
            "environment.json": {
                "command": " ".join(sys.argv),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "machine": platform.machine(),
                "device": str(self.world.device),
                "processes": self.world.size,
                "threads": torch.get_num_threads(),
                "parameters": net_size(net),
                "flops": self.flops,
                "init": self.notes or self._noted(),
            },
            "data.json": {
                "name": self.config.data["name"],
                "n": len(self.data),
                "shape": list(self.data.shape),
                "classes": class_counts(self.data),
            },
        }
        known = self.folder / "config.json"
        if known.exists() and (self.folder / "checkpoint").exists():
            kept = lambda found: {k: found[k] for k in facts["config.json"] if k not in RESUMABLE}
            old = asdict(Config()) | read_json(known)  # a key that is younger than the run had its default
            what, fix = (
                "this folder holds a run with another configuration",
                "name=ANOTHER, or overwrite=true to start afresh",
            )
            check_same(kept(old), kept(facts["config.json"]), what, self.folder, fix)
        for name, content in facts.items():
            temporary = self.folder / f".{name}.tmp"
            temporary.write_text(json.dumps(content, indent=1))
            os.replace(temporary, self.folder / name)

    def _noted(self) -> list[str]:
        """What environment.json said of the weights that the run started from, before it was stopped."""
        known = self.folder / "environment.json"
        return read_json(known).get("init", []) if known.exists() else []

    def _resume(self) -> None:
        self.world.barrier()
        checkpoint = latest(self.folder / "checkpoint")
        if checkpoint is None:
            return
        state = checkpoint.state
        self.trainer.load_state(_Saved(checkpoint), unpack_state({}, state["trainer"]))
        self.progress = Progress(**state["progress"])
        self.say(f"resuming {self.folder} at step {self.trainer.step}")

    def save(self, best: bool = False) -> None:
        """Write a checkpoint; when it returns the checkpoint is on the disk. The first process does it, of a sharded net all."""
        if not (self.world.first or self.trainer.sharded):
            return
        tensors, small = self.trainer.save_state()
        files = {name: (values, {} if name == "optimizer" else self.header) for name, values in tensors.items()}
        state = {**small, "progress": self.progress.plain()}
        root, step, world = self.folder / "checkpoint", self.trainer.step, self.world if self.trainer.sharded else None
        if best:
            save_best(root, step, files, state, world)
        else:
            save_checkpoint(root, step, files, state, self.config.keep, world)

    # the loop's company

    def run(self, each: Callable[[Step], None] = lambda step: None) -> str:
        """Train to the end, or until time, patience or a signal ends it; `each` sees every step."""
        cfg, trainer = self.config, self.trainer
        reason = "done"
        with caught_signals() as signals:
            self.clock = time.perf_counter()
            self.pace = (self.clock, trainer.step)
            try:
                for step in trainer:
                    each(step)
                    self._gather(step)
                    reason = self._after(step, signals)
                    ends = bool(reason) or trainer.step == cfg.steps
                    if ends and reason != "signal" and not self._due(cfg.validate_every) and self.validator:
                        self._validate()
                    if ends or self._due(cfg.checkpoint_every) or self.asked:
                        self._tick()
                        self.save()
                    if reason:
                        break
            except UserError:
                self._dump_bad_batch()
                raise
        if self.world.max(not (self.folder / "checkpoint").exists()):  # of a run of no step
            self.save()
        self.publish()
        return reason or "done"

    def _due(self, every: int) -> bool:
        return bool(every) and self.trainer.step % every == 0

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _after(self, step: Step, signals: set[int]) -> str:
        """Everything that happens every so many steps; why to stop, or ''."""
        cfg = self.config
        reason = ""
        if self._due(cfg.validate_every) and self.validator:
            reason = self._validate()
        if self._due(cfg.log_every) or self.trainer.step == cfg.steps:
            self._log(step)
        if self._due(cfg.sample_every):
            self._tick()
            self._sample()
            self.clock = time.perf_counter()
        if self._due(cfg.snapshot_every):
            self._snapshot()
        self._tick()
        if cfg.time_limit and self.progress.seconds >= cfg.time_limit:
            reason = "time"
        return self._agree(reason, signals)

    def _agree(self, reason: str, signals: set[int]) -> str:
        """Why all processes stop, or ''; a signal may have reached one of them only."""
        asked, stop = signal.SIGUSR1 in signals, max(signals - {signal.SIGUSR1}, default=0)
        if asked:
            signals.discard(signal.SIGUSR1)
        mine = REASONS.index("signal" if stop else reason)
        why, stop, self.asked = self.world.largest(mine, int(stop), int(asked))
        self.signal = stop or self.signal
        return REASONS[why]

    def _gather(self, step: Step) -> None:
        p = self.progress
        p.skipped += step.skipped
        if not step.skipped:
            p.loss_sum, p.loss_count = p.loss_sum + step.loss, p.loss_count + 1

    def _log(self, step: Step) -> None:
        p, now = self.progress, time.perf_counter()
        self.memory = self.world.max(self.world.memory) / 2**30  # the most that any process held so far
        seconds, steps = now - self.pace[0], self.trainer.step - self.pace[1]
        row = {
            "step": self.trainer.step,
            "loss": float(p.loss_sum) / p.loss_count if p.loss_count else math.nan,
            "lr": step.lr,
            "grad_norm": float(step.grad_norm),
            "skipped": p.skipped,
            "images_per_s": steps * self.config.batch_size / max(seconds, 1e-9),  # of all processes
            "memory_gb": self.memory,
            "seconds": p.seconds,
        }
        p.loss_sum, p.loss_count, self.pace = 0.0, 0, (now, self.trainer.step)
        self.record(row)

    def record(self, row: dict[str, Any]) -> None:
        """A row to metrics.jsonl and to every tracker."""
        if self.world.first:
            self.metrics(row)
            for tracker in self.trackers:
                tracker.log(row)

    def _validate(self) -> str:
        assert self.validator is not None
        p, row = self.progress, self.validator.row()
        self.record({"step": self.trainer.step, **row})
        loss = self.world.told(row.get("val/ema_loss", row["val/loss"]))[0]  # all act on the same number
        p.waited = 0 if loss < p.best else p.waited + 1
        if loss < p.best:
            p.best = loss
            self.save(best=True)
        return "patience" if self.config.patience and p.waited >= self.config.patience else ""

    def pictures(self, n: int, weights: int | None = 0) -> Tensor:
        """n samples (n *shape) at seeds 0, 1, ..., conditions in turn; of the average `weights`, None = raw.

        Drawn by this process alone; of a sharded net by the weights that were saved last.
        """
        with self._model(weights, alone=True) as model:
            return self.task.pictures(model, self.config, self.data.shape, self.fixed, range(n))

    def _share(self, n: int, weights: int | None) -> Tensor:
        """This process's part of n pictures, as many as every other one's; those beyond n are too many."""
        size, world = tuple(self.data.shape), self.world
        each = -(-n // world.size)
        start = world.rank * each
        with self._model(weights) as model:
            fixed = self.fixed or conditions(model.net, {}, start + each)
            mine = {name: v[(start + torch.arange(each)) % len(v)] for name, v in fixed.items()}
            return self.task.pictures(model, self.config, size, mine, range(start, start + each))

    @contextmanager
    def _model(self, weights: int | None, alone: bool = False) -> Iterator[Any]:
        """The model with an average's weights, None = raw. alone: for the use of one process, which has the whole net."""
        model, emas = self.trainer.denoiser, self.trainer.emas
        if self.trainer.sharded and alone:
            checkpoint = find_checkpoint(self.folder)
            model = make_denoiser(self.config)
            load_weights(model.net, checkpoint.files["model" if weights is None or not emas else f"ema-{weights}"])
            adapt(model.to(self.world.device))
            yield model
        elif weights is None or not emas:
            yield model
        else:
            with emas[weights].swap(model.net):
                yield model

    def images(self, x0: Tensor) -> Tensor:
        """Samples as images in [-1, 1], latents decoded by the run's codec; see `Run.images`."""
        if self._codec is None:
            try:
                self._codec = open_codec(self.config.codec, self.data.shape, self.world.device)
            except UserError as e:
                self._codec = e
                self.say(f"no pictures, as their codec cannot be read: {' '.join(str(e).split())}")
        if isinstance(self._codec, UserError):
            raise self._codec
        return decoded(self._codec, x0)

    def _sample(self) -> None:
        """Grids of the raw weights and of the first average; a picture that cannot be drawn is never worth a run."""
        for name, weights in (("raw", None), ("ema", 0))[: 1 + bool(self.trainer.emas)]:
            self.draw(self.folder / f"samples/step-{self.trainer.step:08d}-{name}.png", weights, together=True)

    def draw(self, path: Path, weights: int | None = 0, together: bool = False) -> None:
        """The run's grid into a PNG and to the trackers, or a line why not; `together`: all processes draw it, a part each."""
        n, spread = self.config.sample.n, together and self.world.size > 1 and self.task.spread
        images, problem = self._attempt(n, weights, path.name, together, spread)
        problems = self.world.told(problem) if together else [problem]
        if failed := [p for p in problems if p is not None]:
            return self.say(failed[0]) if failed[0] else None
        assert images is not None
        if spread:
            images = self.world.gather(images)[:n]
        if self.world.first:
            try:
                save_png(picture(images, self.task.columns(len(self.data.classes), self.fixed, n)), path)
            except UserError as e:
                return self.say(_no_picture(path.name, e))
            self.show(path)

    def _attempt(
        self, n: int, weights: int | None, name: str, together: bool, spread: bool
    ) -> tuple[Tensor | None, str | None]:
        """Pictures, or why there are none: "" where that was said before."""
        try:
            if isinstance(self._codec, UserError):
                return None, ""
            if spread:
                x0 = self._share(n, weights)
            elif together:
                with self._model(weights) as model:
                    x0 = self.task.pictures(model, self.config, self.data.shape, self.fixed, range(n))
            else:
                x0 = self.pictures(n, weights)
            return self.images(x0), None
        except UserError as e:
            return None, "" if e is self._codec else _no_picture(name, e)
        except torch.OutOfMemoryError as e:
            fix = "a smaller sample.n, or sample_every=0"
            return None, _no_picture(
                name, UserError("there is not enough memory", found=str(e).split(". ")[0], fix=fix)
            )

    def show(self, path: Path) -> None:
        """A picture of the run to every tracker."""
        for tracker in self.trackers:
            tracker.image(path, self.trainer.step)

    def publish(self) -> None:
        """What comes of a run besides checkpoints, by the first average."""
        if not self.world.first:
            return
        with self._model(0, alone=True) as model:
            self.task.publish(model, self.trainer.data, self.config.seed, self.folder)

    def close(self, reason: str = "done") -> None:
        """Tell the trackers that no more will come."""
        for tracker in self.trackers:
            tracker.close(reason)

    def _snapshot(self) -> None:
        for spec, ema in zip(self.config.ema, self.trainer.emas):
            if spec["name"] == "power":
                tensors = ema.whole()
                if self.world.first:
                    save_snapshot(self.folder / "ema", self.trainer.step, spec.get("sigma_rel", 0.05), tensors)

    def _dump_bad_batch(self) -> None:
        if self.trainer.bad_steps and self.world.first:
            self.trainer.step -= 1
            draw = Draw(*(torch.cat(parts).cpu() for parts in zip(*self.trainer.draw())))
            x0, cond = self.data.batch(draw.index, draw.u)
            tensors = {**draw._asdict(), "x0": x0, **cond}
            save_tensors(self.folder / "bad-batch.safetensors", tensors, {"step": self.trainer.step})


def _no_picture(name: str, why: UserError) -> str:
    return f"no {name}: {' '.join(str(why).split())}"


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. UserError: it holds something else."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError("this file of the run is damaged", file=path, found=str(e), fix="name=ANOTHER") from None


def class_counts(data: Any) -> dict[str, int]:
    """How many samples each class has."""
    if data.labels is None:
        return {}
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.classes)).tolist()
    return dict(zip(data.classes, counts))
