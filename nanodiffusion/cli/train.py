"""`nanodiffusion train RECIPE key=value ...`: compose, check, train or resume, then pictures and the report."""

import json
import os
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from nanodiffusion import show
from nanodiffusion.cli.pictures import draw_run
from nanodiffusion.cli.recipes import VARIABLE, compose, config_file, expand, find_recipe, flow, parse_overrides
from nanodiffusion.config import Config, read_config
from nanodiffusion.data.files import SPLITS
from nanodiffusion.distributed import world
from nanodiffusion.errors import UserError
from nanodiffusion.fast import tune
from nanodiffusion.nets import net_size
from nanodiffusion.objective import fit_net, make_denoiser, make_task
from nanodiffusion.report import load_metrics, write_report
from nanodiffusion.run import generation, load_run, make_data
from nanodiffusion.runner import Runner, read_json
from nanodiffusion.train import Step

Say = Callable[[str], None]
FINISHED = "finished.json"  # the step at which everything that comes of a run was left in its folder


def main(args: Namespace) -> int:
    """Train every run that the words ask for; the exit code of the last that failed, or 0."""
    words = list(args.words)
    named = args.config_name or (words.pop(0) if words and "=" not in words[0] else None)
    return run_command(config_file(args.config_path, named), words, args)


def run_command(recipe: str, words: Sequence[str], args: Namespace, given: Mapping[str, Any] | None = None) -> int:
    """`main` with the recipe apart, and `given` keys that lie between it and the words."""
    if odd := [w for w in words if "=" not in w and not w.startswith("~")]:
        raise UserError(f"what is {odd[0]!r}?", expected="key=value", fix="one recipe, then key=value ...")
    plans = plan(recipe, words, args.config_dir, args.multirun, given)
    command = ["nanodiffusion", args.command, *([] if args.command == "demo" else [recipe])]
    command += [f"--config-dir={args.config_dir}"] if args.config_dir else []
    code = 0
    for config, own in plans:
        if len(plans) > 1:
            print(f"-- {config.name}")
        if args.dry_run:
            print("\n".join(f"{key}: {flow(value)}" for key, value in facts(config).items()))
        elif len(plans) == 1:
            return train(config, [*command, *own])
        else:
            code = _one_of_many(config, [*command, *own]) or code
            if code > 128:  # a signal means all of them
                return code
    return code


class Plan(NamedTuple):
    """A run to come, and the words that ask for it alone."""

    config: Config
    words: list[str]


def plan(
    recipe: str,
    words: Sequence[str],
    folder: str | None = None,
    multirun: bool = False,
    given: Mapping[str, Any] | None = None,
) -> list[Plan]:
    """All runs, their configs checked before any of them starts."""
    file, plans = find_recipe(recipe, folder), []
    for overrides, suffix in expand(parse_overrides(words), multirun):
        options, own = compose(file, overrides, given), [o.input_line for o in overrides]
        if suffix:
            options["name"] = f"{options['name']},{suffix}".replace("/", "-")
            own = [*(w for w in own if not w.startswith("name=")), f"name='{options['name']}'"]
        plans.append(Plan(read_config(options), own))
        _check_name(plans[-1].config)
    return plans


def _check_name(config: Config) -> None:
    """UserError for a name that would make out=, or a folder elsewhere, the run's."""
    if config.name in ("", "..") or Path(config.name).name != config.name:
        fix = "a name without /; out=FOLDER is where the runs are"
        raise UserError("a run's name is that of a folder in out=", key="name", found=repr(config.name), fix=fix)


def _one_of_many(config: Config, command: Sequence[str]) -> int:
    try:
        return train(config, command)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


# -- one run -----------------------------------------------------------------------------------------------------------


def train(config: Config, command: Sequence[str] = ("nanodiffusion", "train", "RECIPE")) -> int:
    """Train a config in its folder, or go on with it, and leave pictures and a report there. An exit code."""
    with world(config.device) as w:
        tune(w.device, config.matmul)
        say: Say = print if w.first else lambda text: None
        runner = Runner(config, w, say)
        if ended := finished(runner):
            say(f"{runner.folder} is finished: {ended}\nto go on: {_longer(runner, command)}\nafresh: overwrite=true")
            if delivered(runner):
                return 0
            runner.publish()
        else:
            code = fit(runner, say)
            if code:
                runner.close("signal")
                return code
        if w.first:
            finish(runner, command, say)
        runner.close()
        w.barrier()
    return 0


def fit(runner: Runner, say: Say) -> int:
    """Train until the run ends; 0, or 128 + the signal that stopped it."""
    say(opening(runner))
    with Progress(runner) as progress:
        reason = runner.run(progress)
    step, seconds = runner.trainer.step, runner.progress.seconds
    if reason == "signal":
        again = "the same command" + " without overwrite=true" * runner.config.overwrite
        say(f"stopped at step {step}, saved in {runner.folder / 'checkpoint'}; {again} goes on from there")
        return 128 + runner.signal
    why = {"time": " (time_limit)", "patience": " (no better validation loss for a while)"}.get(reason, "")
    say(f"trained {step} steps in {_clock(seconds)}{why}")
    return 0


def finish(runner: Runner, command: Sequence[str], say: Say) -> None:
    """Pictures and the report, drawn from the saved run alone; then where everything is."""
    started = time.perf_counter()
    DRAWINGS.get(runner.config.task["name"], draw_grid)(runner, say)
    write_report(runner.folder)
    with show.atomic(runner.folder / FINISHED) as part:
        part.write_text(json.dumps({"step": runner.trainer.step}))
    say(f"drew and reported in {_clock(time.perf_counter() - started)}")
    say(closing(runner, command))


def delivered(runner: Runner) -> bool:
    """Whether everything that comes of the run was left in its folder when it was at this step."""
    known = runner.folder / FINISHED
    return known.exists() and read_json(known).get("step") == runner.trainer.step


def draw_samples(runner: Runner, say: Say) -> None:
    """A diffusion model's pictures, from what was saved alone."""
    run = load_run(runner.folder, device=runner.world.device)
    draw_run(run, run.conditions(run.config.sample.n), say)
    if "mask" in run.fixed:  # with what was known in its place
        return runner.draw(run.folder / "samples.png")
    if (run.folder / "samples.png").exists():
        runner.show(run.folder / "samples.png")


def draw_grid(runner: Runner, say: Say) -> None:
    """The grid that the run's task draws (an autoencoder's is images above what comes back of them), and its losses."""
    runner.draw(runner.folder / "samples.png")
    try:
        rows = load_metrics(runner.folder / "metrics.jsonl")
        show.save_png(show.loss_plot(rows, per_sigma=False), runner.folder / "loss.png")
    except UserError as e:
        say(f"no loss.png: {' '.join(str(e).split())}")


DRAWINGS: dict[str, Callable[[Runner, Say], None]] = {"denoise": draw_samples, "distill": draw_samples}


def finished(runner: Runner) -> str:
    """Why a run that is read back has nothing left to do, or ''."""
    config, trainer, progress = runner.config, runner.trainer, runner.progress
    if trainer.step >= config.steps:
        return f"step {trainer.step} of {config.steps}"
    if config.time_limit and progress.seconds >= config.time_limit:
        return f"{progress.seconds:.0f} s of time_limit {config.time_limit:g}, step {trainer.step} of {config.steps}"
    if outwaited(runner):
        return f"no better validation loss for {progress.waited} validations, step {trainer.step}"
    return ""


def outwaited(runner: Runner) -> bool:
    """Whether the run has lost patience."""
    return 0 < runner.config.patience <= runner.progress.waited


# -- words -------------------------------------------------------------------------------------------------------------


def opening(runner: Runner) -> str:
    """What is about to be trained, in two lines."""
    config, flops = runner.config, runner.flops
    classes = f", {len(runner.data.classes)} classes" if runner.data.classes else ""
    shape = " x ".join(map(str, runner.data.shape))
    return (
        f"{runner.folder}: {config.data['name']} ({len(runner.data):,} samples of {shape}{classes})\n"
        f"{config.net['name']}, {net_size(runner.trainer.denoiser.net):,} parameters, "
        + (f"{flops / 1e6:,.1f} MFLOPs a sample, " if flops else "")
        + f"on {runner.world.device}"
        + (f" x {runner.world.size}" if runner.world.size > 1 else "")
    )


def closing(runner: Runner, command: Sequence[str]) -> str:
    """Where everything is, and what to try next."""
    names = ("samples.png", "trajectory.gif", "codec", "checkpoint", "metrics.jsonl", "report.html")
    there = [f"  {runner.folder / name}" for name in names if (runner.folder / name).exists()]
    tries = [*TRIES.get(runner.config.task["name"], _generations)(runner), _longer(runner, command)]
    return "\n".join([*there, "try next:", *(f"  {t}" for t in tries)])


def _samplings(runner: Runner) -> list[str]:
    sample = f"nanodiffusion sample {shlex.quote(str(runner.folder))}"
    if "pooled" in runner.trainer.takes:
        return [f"{sample} text='...' guidance=3 n=16", f"{sample} sampler=ddim steps=50"]
    if "label" in runner.trainer.takes:
        return [f"{sample} class=0 guidance=3 n=16", f"{sample} sampler=ddim steps=5 gif=five-steps.gif"]
    return [f"{sample} sampler=ddim steps=5", f"{sample} sampler=euler_ancestral steps=100 gif=long.gif"]


def _encodings(runner: Runner) -> list[str]:
    codec, out = runner.folder / "codec", f"data/{re.sub('[,=]', '-', runner.config.name)}"  # no sweep in data.path=
    words = [_pictures(runner.config.data), f"codec={codec}", f"size={runner.data.shape[-1]}", f"out={out}"]
    return [
        shlex.join(["nanodiffusion", *command])
        for command in (["encode", *words], ["train", "latent-dit", f"data.path={out}"])
    ]


def _pictures(data: Mapping[str, Any]) -> str:
    """A source of `nanodiffusion encode` with the pictures of a run's training data, where it has one."""
    from nanodiffusion.encode import SETS  # slow to import

    if data["name"] != "folder":
        return data["name"] if data["name"] in SETS else "FOLDER"
    parted = all((Path(data["path"]) / split).is_dir() for split in SPLITS)
    return str(Path(data["path"]) / "train") if parted else str(data["path"])


def _few_steps(runner: Runner) -> list[str]:
    return [f"nanodiffusion sample {shlex.quote(str(runner.folder))} sampler=lcm steps=4 guidance=1"]


def _generations(runner: Runner) -> list[str]:
    return [generation(runner.config, runner.folder)]


TRIES: dict[str, Callable[[Runner], list[str]]] = {
    "denoise": _samplings,
    "autoencode": _encodings,
    "distill": _few_steps,
}


def _longer(runner: Runner, command: Sequence[str]) -> str:
    """The command that trains the same run twice as long, without patience where that ended it.

    It names the recipe, so a configuration that the environment names is taken out: only one of the two is allowed.
    """
    config, more = runner.config, {"steps=": f"steps={2 * runner.config.steps}"}
    more |= {"time_limit=": f"time_limit={2 * config.time_limit:g}"} if config.time_limit else {}
    more |= {"patience=": "patience=0"} if outwaited(runner) else {}
    unset = ["env", "-u", VARIABLE] if os.environ.get(VARIABLE) else []
    kept = (word for word in command if not word.lstrip("+").startswith((*more, "overwrite=")))
    return shlex.join([*unset, *kept, *more.values()])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"


def facts(config: Config) -> dict[str, Any]:
    """The resolved config, the net's size and its cost; the data is read for its shape alone."""
    found = asdict(config)
    try:
        data, _ = make_data(config)
        config = fit_net(config, data.shape, len(data.classes), data)
        found["samples"] = f"{len(data):,} of {data.shape}, {len(data.classes)} classes"
    except UserError as e:
        found["samples"] = f"the data is not here ({e.what})"
    return found | size_and_cost(config)


def size_and_cost(config: Config) -> dict[str, str]:
    """How many parameters a config trains, and what a forward pass costs where that is known; no base is fetched for it."""
    base = config.task.get("base")
    if base and not Path(base).exists():
        return {"parameters": f"not counted, as the base is not here: there is no {base}"}
    model = make_denoiser(config)
    flops = make_task(config).flops(model)
    cost = {"FLOPs": f"{flops:,} a forward pass of one sample"} if flops else {}
    return {"parameters": f"{net_size(model.net):,}", **cost}


# -- the progress line -------------------------------------------------------------------------------------------------


class Progress:
    """Step, smoothed loss, images/s and time left while a run trains: a bar on a terminal, else a line now and then.

    The loss stays on its device until it is shown, so that watching costs no synchronisation.
    """

    def __init__(self, runner: Runner, every: float = 10.0) -> None:
        self.runner, self.terminal = runner, sys.stderr.isatty()
        self.every = 0.2 if self.terminal else every
        self.loss: Tensor | None = None
        self.since = self.shown = time.perf_counter()
        self.first = runner.trainer.step
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if self.terminal and self.runner.world.first:
            self.bar = tqdm(total=self.runner.config.steps, initial=self.first, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, step: Step) -> None:
        """Take in a step."""
        if not step.skipped:
            self.loss = step.loss if self.loss is None else self.loss.lerp(step.loss, 0.02)
        now, config = time.perf_counter(), self.runner.config
        logged = step.step % config.log_every == 0 and now - self.shown >= 1
        if self.runner.world.first and (now - self.shown >= self.every or logged or step.step == config.steps):
            self.shown = now
            self._show(step.step, now)

    def _show(self, step: int, now: float) -> None:
        pace = (step - self.first) / max(now - self.since, 1e-9)  # steps a second
        loss = "" if self.loss is None else f"loss {float(self.loss):.4f}"
        rate = f"{pace * self.runner.config.batch_size:,.0f} images/s"
        memory = max(self.runner.memory, self.runner.world.memory / 2**30)
        rate += f", {memory:.1f} GB" if self.bar is not None else f"  {memory:.1f} GB"
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix_str(f"{loss}, {rate}, {_clock(self.left(step, pace))} left")
        else:
            total = self.runner.config.steps
            print(f"step {step}/{total}  {loss}  {rate}  {_clock(self.left(step, pace))} left", flush=True)

    def left(self, step: int, pace: float) -> float:
        """Seconds until the run ends, by its steps or its time."""
        config = self.runner.config
        by_steps = (config.steps - step) / max(pace, 1e-9)
        return (
            min(by_steps, max(0.0, config.time_limit - self.runner.progress.seconds)) if config.time_limit else by_steps
        )
