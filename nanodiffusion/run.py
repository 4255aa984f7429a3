"""A run: a recipe trained in a folder, resumable at any moment, and read back from nothing but that folder.

out/name/  config.json environment.json data.json metrics.jsonl samples/ samples.png trajectory.gif report.html
           checkpoint/step-00001000/  model, ema-0, ..., optimizer (safetensors), state.json, manifest.json; checkpoint/best
"""

import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.checkpoint import (
    Checkpoint,
    latest,
    load_best,
    load_checkpoint,
    load_weights,
    pack_state,
    save_best,
    save_checkpoint,
    save_tensors,
    unpack_state,
)
from nanodiffusion.codec import PixelCodec
from nanodiffusion.config import RESUMABLE, Config, make, read_config
from nanodiffusion.data import TensorData, load_data, split
from nanodiffusion.denoiser import Denoiser, edm
from nanodiffusion.distributed import World
from nanodiffusion.draw import check_sampling, cycled, draw
from nanodiffusion.ema import save_snapshot
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.fast import adapt
from nanodiffusion.nets import NETS, build_net, net_flops, net_size
from nanodiffusion.noise import DENSITIES, SCHEDULES, Density, Schedule
from nanodiffusion.show import grid, point_cloud, save_png
from nanodiffusion.tracking import TRACKERS, Metrics, open_trackers
from nanodiffusion.train import Draw, Step, Trainer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REASONS = ("", "patience", "time", "signal")  # why a run ends early; of several the last counts
VALIDATION_SEED, VALIDATION_SAMPLES, VALIDATION_LEVELS = 7, 512, 8

# -- from a config to objects --------------------------------------------------------------------------------------------


def make_schedule(config: Config) -> Schedule:
    """The schedule a config names."""
    return make(SCHEDULES, config.schedule, "schedule")()


def make_density(config: Config) -> Density:
    """The training density a config names."""
    return make(DENSITIES, config.density, "density", schedule=make_schedule(config))()


def fit_net(config: Config, shape: tuple[int, ...], classes: int) -> Config:
    """The config with what the data decides (channels, size, number of classes) filled into its net."""
    known = {"num_classes": classes}
    known |= {"dim": shape[0]} if len(shape) == 1 else {"channels_in": shape[0], "in_size": list(shape[1:])}
    name = config.net.get("name", "")
    taken = {f.name for f in fields(NETS[name][0])} if name in NETS else set()
    given = {
        k: v for k, v in known.items() if k in taken and k not in config.net and not (k == "dim" and name != "mlp")
    }
    return replace(config, net={**config.net, **given})


def check_net(net: nn.Module, shape: tuple[int, ...]) -> None:
    """UserError unless a net is made for samples of `shape`."""
    if tuple(net.sample_shape) != tuple(shape):  # type: ignore[arg-type]
        raise UserError(
            "the net does not fit the data",
            key="net",
            expected=f"samples of {tuple(shape)}",
            found=f"a net for {tuple(net.sample_shape)}",  # type: ignore[arg-type]
            fix="leave the net's own size out, the data sets it; points want net.name=mlp",
        )


def make_denoiser(config: Config) -> Denoiser:
    """The denoiser of a config whose net is complete, with fresh weights that depend on its seed alone."""
    torch.manual_seed(config.seed)
    prediction = edm(config.sigma_data) if config.prediction == "edm" else config.prediction
    net = build_net(**config.net)
    return Denoiser(net, prediction, config.clock, make_schedule(config), PRECISIONS[config.precision])


def open_codec(where: str, shape: tuple[int, ...], device: str | torch.device = "cpu") -> Any:
    """The codec at `where` (see `pretrained.load_codec`), or the one of plain pixels, checked against samples of `shape`."""
    if not where:
        return PixelCodec(shape[0])
    from nanodiffusion.pretrained import load_codec  # slow to import, and few runs need it

    codec = load_codec(where, device=device)
    if codec.latent_channels != shape[0]:
        expected = f"a codec with {shape[0]} latent channels"
        raise UserError(
            "this codec does not fit the samples", file=where, expected=expected, found=codec.latent_channels
        )
    return codec.eval()


def make_data(config: Config) -> tuple[TensorData, TensorData | None]:
    """Training set and validation set: the data's own test split, or a share of the training set, or None."""
    whole = load_data(**config.data)
    if config.validation:
        return split(whole, config.validation, config.seed)
    return whole, load_data(**config.data, split="test") if config.validate_every else None


# -- a trained run, read back --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A trained denoiser with the config that made it."""

    denoiser: Denoiser
    config: Config
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    step: int
    folder: Path

    @property
    def schedule(self) -> Schedule:
        """The schedule the run was trained with."""
        return make_schedule(self.config)

    @cached_property
    def codec(self) -> Any:
        """What decodes its samples; read when it is first used."""
        return open_codec(self.config.codec, self.shape, next(self.denoiser.parameters()).device)


def find_checkpoint(path: str | Path, best: bool = False) -> Checkpoint:
    """The newest sound checkpoint of a run folder (or its best one), or the one at `path` itself."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return load_checkpoint(path)
    if not path.is_dir():
        raise UserError(
            "no such run", file=path, expected="a run's folder or a checkpoint's", fix="nanodiffusion train ..."
        )
    found = (load_best if best else latest)(path / "checkpoint")
    if found is None:
        raise UserError(f"this folder has no {'best ' * best}checkpoint", file=path / "checkpoint")
    return found


def load_run(path: str | Path, weights: str = "ema-0", device: str | torch.device = "cpu", best: bool = False) -> Run:
    """Read a run's denoiser back: weights "model" (raw) or "ema-0", "ema-1", ... (averages)."""
    checkpoint = find_checkpoint(path, best)
    weights = weights if weights in checkpoint.files or weights != "ema-0" else "model"
    if weights not in checkpoint.files:
        valid = ", ".join(n for n in checkpoint.files if n != "optimizer")
        raise UserError("no such weights in this checkpoint", file=checkpoint.folder, expected=valid, found=weights)
    meta = checkpoint.meta["model"]
    try:
        config, shape, classes = read_config(meta["config"]), tuple(meta["shape"]), tuple(meta["classes"])
    except KeyError as e:
        raise UserError("this checkpoint carries no run configuration", file=checkpoint.folder, key=str(e)) from None
    denoiser = make_denoiser(config)
    load_weights(denoiser.net, checkpoint.files[weights], checkpoint.folder)
    adapt(denoiser.to(device).net)
    return Run(denoiser.eval(), config, shape, classes, checkpoint.step, Path(path))


# -- validation ----------------------------------------------------------------------------------------------------------


class Validator:
    """Loss on held-out samples at fixed noise and fixed levels: the middles of equally likely parts of the density."""

    def __init__(self, trainer: Trainer, data: TensorData, density: Density) -> None:
        device = trainer.world.device
        g = torch.Generator(device).manual_seed(VALIDATION_SEED)
        n = min(len(data), VALIDATION_SAMPLES)
        self.trainer = trainer
        self.x0, self.cond = data.to(device).batch(torch.randperm(len(data), generator=g, device=device)[:n])
        self.cond = trainer.conditions(self.cond)
        self.eps = torch.randn(n, *data.shape, generator=g, device=device)
        q = (torch.arange(VALIDATION_LEVELS, device=device) + 0.5) / VALIDATION_LEVELS
        self.levels = torch.quantile(density(2**14, g), q)

    @torch.no_grad()
    def _per_level(self) -> list[float]:
        self.trainer.denoiser.eval()
        objective = self.trainer.plain_objective
        size = max(1, self.trainer.config.batch_size // self.trainer.parts)
        totals = []
        for sigma in self.levels:
            losses = [
                objective(
                    x0, sigma.expand(len(x0)), eps, {k: v[i * size : (i + 1) * size] for k, v in self.cond.items()}
                )
                for i, (x0, eps) in enumerate(zip(self.x0.split(size), self.eps.split(size)))
            ]
            totals.append(torch.cat(losses).mean().item())
        return totals

    def row(self) -> dict[str, Any]:
        """val/loss and val/loss_per_sigma of the raw weights, and the same of the first average."""
        raw = self._per_level()
        row = {"val/loss": sum(raw) / len(raw), "val/sigma": self.levels.tolist(), "val/loss_per_sigma": raw}
        if self.trainer.emas:
            with self.trainer.emas[0].swap(self.trainer.denoiser.net):
                ema = self._per_level()
            row |= {"val/ema_loss": sum(ema) / len(ema), "val/ema_loss_per_sigma": ema}
        return row


# -- the run itself ------------------------------------------------------------------------------------------------------


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


class Runner:
    """Trains a config in its folder. `run()` returns why it ended: "done", "patience", "time" or "signal"."""

    def __init__(self, config: Config, world: World, say: Callable[[str], None] = print) -> None:
        for name in config.trackers:
            lookup(TRACKERS, name, "trackers")
        self.world, self.say = world, say
        self.folder = Path(config.out) / config.name
        data, held_out = make_data(config)
        told = {key: getattr(config, key) or getattr(data, key, "") for key in ("codec", "text")}
        self.config = config = fit_net(replace(config, **told), data.shape, len(data.classes))
        self.data = data
        self.schedule, self.density = make_schedule(config), make_density(config)
        denoiser = make_denoiser(config)
        check_net(denoiser.net, data.shape)
        check_sampling(denoiser, config.sample, self.schedule)
        adapt(denoiser.to(world.device).net)
        self.trainer = Trainer(denoiser, data, self.density, config, world)
        self.validator = Validator(self.trainer, held_out, self.density) if held_out and config.validate_every else None
        self.progress = Progress()
        self.signal = int(signal.SIGTERM)  # what ended a run that ended by "signal"
        self.header = {"config": asdict(config), "shape": list(data.shape), "classes": list(data.classes)}
        self._prepare_folder()
        self._resume()
        self.metrics = Metrics(self.folder / "metrics.jsonl", self.trainer.step) if world.first else lambda row: None
        self.trackers = open_trackers(config.trackers, self.folder, asdict(config)) if world.first else []

    # folder and resume

    def _prepare_folder(self) -> None:
        if not self.world.first:
            return
        try:
            if self.config.overwrite and self.folder.exists():
                if not (self.folder / "config.json").is_file():
                    raise UserError("this folder is no run, so it is not removed", file=self.folder, fix="name=ANOTHER")
                shutil.rmtree(self.folder)
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            self._describe()
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
                "flops": net_flops(net),
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
            self._check_same(read_json(known))
        for name, content in facts.items():
            temporary = self.folder / f".{name}.tmp"
            temporary.write_text(json.dumps(content, indent=1))
            os.replace(temporary, self.folder / name)

    def _check_same(self, old: dict[str, Any]) -> None:
        new = json.loads(json.dumps(asdict(self.config)))
        changed = [k for k in new if k not in RESUMABLE and old.get(k) != new[k]]
        if changed:
            raise UserError(
                "this folder holds a run with another configuration",
                file=self.folder,
                key=", ".join(changed),
                expected={k: old.get(k) for k in changed},
                found={k: new[k] for k in changed},
                fix="name=ANOTHER, or overwrite=true to start afresh",
            )

    def _resume(self) -> None:
        self.world.barrier()
        checkpoint = latest(self.folder / "checkpoint")
        if checkpoint is None:
            return
        state = checkpoint.state
        big = {name: dict(checkpoint.files[name]) for name in checkpoint.files if name != "optimizer"}
        big["optimizer"] = unpack_state(checkpoint.files["optimizer"], state["optimizer"])
        small = unpack_state({}, state["trainer"])
        self.trainer.load_state(big, small)
        self.progress = Progress(**state["progress"])
        self.say(f"resuming {self.folder} at step {self.trainer.step}")

    def save(self, best: bool = False) -> None:
        """Write a checkpoint; when it returns the checkpoint is on the disk."""
        if not self.world.first:
            return
        big, small = self.trainer.state()
        tensors, optimizer = pack_state(big.pop("optimizer"))
        files = {name: (values, self.header) for name, values in big.items()} | {"optimizer": (tensors, {})}
        state = {"optimizer": optimizer, "trainer": pack_state(small)[1], "progress": self.progress.plain()}
        root, step = self.folder / "checkpoint", self.trainer.step
        if best:
            save_best(root, step, files, state)
        else:
            save_checkpoint(root, step, files, state, self.config.keep)

    # the loop's company

    def run(self, each: Callable[[Step], None] = lambda step: None) -> str:
        """Train to the end, or until time, patience or a signal ends it; `each` sees every step."""
        cfg, trainer = self.config, self.trainer
        reason, saved = "done", trainer.step
        with caught_signals() as signals:
            self.clock = time.perf_counter()
            self.pace = (self.clock, trainer.step)
            try:
                for step in trainer:
                    each(step)
                    self._gather(step)
                    reason = self._after(step, signals)
                    if reason or self._due(cfg.checkpoint_every) or signal.SIGUSR1 in signals:
                        signals.discard(signal.SIGUSR1)
                        self._tick()
                        self.save()
                        saved = trainer.step
                    if reason:
                        break
            except UserError:
                self._dump_bad_batch()
                raise
        if saved != trainer.step or not (self.folder / "checkpoint").exists():
            self._tick()
            self.save()
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
        if self._due(cfg.sample_every) and self.world.first:
            self._tick()
            self._sample()
            self.clock = time.perf_counter()
        if self._due(cfg.snapshot_every) and self.world.first:
            self._snapshot()
        self._tick()
        if cfg.time_limit and self.progress.seconds >= cfg.time_limit:
            reason = "time"
        if stop := signals & {signal.SIGTERM, signal.SIGINT}:
            reason, self.signal = "signal", int(max(stop))
        return REASONS[self.world.max(REASONS.index(reason))]

    def _gather(self, step: Step) -> None:
        p = self.progress
        p.skipped += step.skipped
        if not step.skipped:
            p.loss_sum, p.loss_count = p.loss_sum + step.loss, p.loss_count + 1

    def _log(self, step: Step) -> None:
        p, now = self.progress, time.perf_counter()
        seconds, steps = now - self.pace[0], self.trainer.step - self.pace[1]
        row = {
            "step": self.trainer.step,
            "loss": float(p.loss_sum) / p.loss_count if p.loss_count else math.nan,
            "lr": step.lr,
            "grad_norm": float(step.grad_norm),
            "skipped": p.skipped,
            "images_per_s": steps * self.config.batch_size / max(seconds, 1e-9),
            "seconds": p.seconds,
        }
        p.loss_sum, p.loss_count, self.pace = 0.0, 0, (now, self.trainer.step)
        self.record(row)

    def record(self, row: dict[str, Any]) -> None:
        """A row to metrics.jsonl and to every tracker."""
        if self.world.first:
            for log in (self.metrics, *self.trackers):
                log(row)

    def _validate(self) -> str:
        assert self.validator is not None
        p, row = self.progress, self.validator.row()
        self.record({"step": self.trainer.step, **row})
        loss = row.get("val/ema_loss", row["val/loss"])
        p.waited = 0 if loss < p.best else p.waited + 1
        if loss < p.best:
            p.best = loss
            self.save(best=True)
        return "patience" if self.config.patience and p.waited >= self.config.patience else ""

    def pictures(self, n: int, weights: int | None = 0, first: int = 0) -> Tensor:
        """n samples (n *shape) at seeds first, first + 1, ..., classes in turn; of the average `weights`, None = raw."""
        net = self.trainer.denoiser.net
        cond = {"label": cycled(n, len(self.data.classes))} if self.trainer.takes else {}
        states = lambda: draw(
            self.trainer.denoiser, self.data.shape, self.schedule, self.config.sample, range(first, first + n), cond
        )
        if weights is None or not self.trainer.emas:
            *_, last = states()
        else:
            with self.trainer.emas[weights].swap(net):
                *_, last = states()
        return last.x

    def _sample(self) -> None:
        """Grids of the raw weights and of the first average; a picture that cannot be drawn is never worth a run."""
        for name, weights in (("raw", None), ("ema", 0))[: 1 + bool(self.trainer.emas)]:
            path = self.folder / f"samples/step-{self.trainer.step:08d}-{name}.png"
            try:
                save_png(picture(self.pictures(self.config.sample.n, weights), len(self.data.classes)), path)
            except UserError as e:
                self.say(f"no {path.name}: {' '.join(str(e).split())}")

    def _snapshot(self) -> None:
        for spec, ema in zip(self.config.ema, self.trainer.emas):
            if spec["name"] == "power":
                save_snapshot(self.folder / "ema", self.trainer.step, spec.get("sigma_rel", 0.05), ema.tensors)

    def _dump_bad_batch(self) -> None:
        if self.trainer.bad_steps and self.world.first:
            self.trainer.step -= 1
            draw = Draw(*(torch.cat(parts).cpu() for parts in zip(*self.trainer.draw())))
            x0, cond = self.data.batch(draw.index, draw.u)
            tensors = {**draw._asdict(), "x0": x0, **cond}
            save_tensors(self.folder / "bad-batch.safetensors", tensors, {"step": self.trainer.step})


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. UserError: it holds something else."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError("this file of the run is damaged", file=path, found=str(e), fix="name=ANOTHER") from None


def class_counts(data: TensorData) -> dict[str, int]:
    """How many samples each class has."""
    if data.labels is None:
        return {}
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.classes)).tolist()
    return dict(zip(data.classes, counts))


def picture(x: Tensor, classes: int = 0) -> Any:
    """A grid of images (n c h w), one column a class where there are any, or a cloud of points (n 2)."""
    if x.ndim == 2:
        return point_cloud(x.cpu())
    return grid(x.cpu(), columns=classes if 1 < classes <= 20 else None)
