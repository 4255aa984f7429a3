"""`nanodiffusion evaluate SAMPLES reference=...`: distances and their kin, with how they were made, as a table and as JSON."""

import hashlib
import json
import typing
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanodiffusion import show
from nanodiffusion.checkpoint import checkpoints, content_hash
from nanodiffusion.cli.measured import LEAST, Reference, Task, limited, measure, open_features, read_task
from nanodiffusion.cli.pictures import images
from nanodiffusion.cli.words import changed
from nanodiffusion.config import SampleConfig
from nanodiffusion.draw import check_sampling, draw
from nanodiffusion.errors import UserError, lookup, need
from nanodiffusion.evaluate import statistics as stats
from nanodiffusion.evaluate.images import Images, open_images
from nanodiffusion.fast import tune
from nanodiffusion.run import Run, load_run

CURVES = ("guidance", "steps", "training")


def main(args: Namespace) -> int:
    """Measure, print, and write."""
    task = read_task(args.words)
    tune(task.device)
    if "curve" in task.options:
        return curve(task)
    run = open_run(task) if task.is_run else None
    samples = limited(
        drawn(task, run) if run else open_images(task.where, task.get("split", "train"), task.get("size", 0)), task
    )
    if not run and "reference" not in task.options:
        return save_only(task, samples)
    reference = Reference(task, samples, run)
    row = measure(task, samples, reference)
    print("\n".join(table(row)))
    print(f"wrote {write(task, row)}")
    return 0


def save_only(task: Task, images: Images) -> int:
    """Without a reference: the statistics of SAMPLES, to be a reference themselves."""
    if "save" not in task.options:
        fix = "reference=NAME, FOLDER, FILE.npz; or save=FILE.npz keeps the statistics of these images"
        raise UserError("evaluate against what?", key="reference", fix=fix)
    features = open_features(task, images, None, images)
    found = stats.summarise(features(images, task.get("batch", 64)), images, features)
    stats.save(Path(task.options["save"]), found)
    print(f"wrote {task.options['save']}: {found.n} images, {' '.join(filter(None, (features.name, features.resize)))}")
    return 0


# -- a run's own images ------------------------------------------------------------------------------------------------


def open_run(task: Task, where: str | Path | None = None) -> Run:
    """The run, or one of its checkpoints. UserError: it draws points."""
    run = load_run(where or task.where, task.get("weights", "ema-0"), task.device)
    if len(run.shape) != 3:
        raise UserError("this run draws no images", file=task.where, found=f"samples of {run.shape}")
    return run


def drawn(task: Task, run: Run, changes: Mapping[str, Any] | None = None) -> Images:
    """Images (n) that a run draws with its settings, its classes or prompts in turn, image i from seed + i."""
    config = changed(run.config.sample, {**task.changes, **(changes or {})})
    check_sampling(run.denoiser, config, run.schedule)
    n, seed = task.get("n", LEAST), task.get("seed", 0)
    cond = run.conditions(n)
    device = next(run.denoiser.parameters()).device
    shape = tuple(run.images(torch.zeros(1, *run.shape, device=device)).shape[1:])

    def read(size: int) -> Iterator[Tensor]:
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            own = {name: value[part] for name, value in cond.items()}
            yield _decoded(run, config, range(seed + part.start, seed + part.stop), own)

    about = {"step": run.step, "seed": seed, "weights_sha256": content_hash(run.denoiser.net.state_dict())}
    about |= {"sample": asdict(config)}
    digest = lambda: hashlib.sha256(json.dumps([about, n], sort_keys=True).encode()).hexdigest()
    known = typing.cast(Any, shape)
    return Images(str(run.folder), n, known, read, digest, cond.get("label"), tuple(run.classes), about)


def _decoded(run: Run, config: SampleConfig, seeds: Sequence[int], cond: Mapping[str, Tensor]) -> Tensor:
    """uint8 (b c h w) at these seeds. UserError: NaN."""
    *_, last = draw(run.denoiser, run.shape, run.schedule, config, seeds, cond)
    x = images(run, last.x)
    if not bool(torch.isfinite(x).all()):
        raise UserError("images hold NaN or infinity", file=run.folder, expected="finite numbers")
    return show.to_uint8(x).permute(0, 3, 1, 2).cpu()


def table(row: Mapping[str, Any]) -> Iterator[str]:
    """What a person reads."""
    samples, reference, features = row["samples"], row["reference"], row["features"]
    yield f"samples     {samples['name']}, {samples['n']} images"
    yield f"reference   {reference['name']}, {reference['n'] or 'unknown number of'} images"
    how = f", resize {features['resize']}" if features["resize"] else ""
    yield f"features    {features['name']}{how}, {features['dim']} numbers, weights {features['sha256'][:16] or 'none'}"
    width = max(map(len, row["metrics"]))
    for name, score in row["metrics"].items():
        limits = f"[{score['low']:.5g}, {score['high']:.5g}]  {score['interval']}" if "low" in score else ""
        yield f"  {name:{width}}  {score['value']:<10.5g} {limits}"
    for note in row["notes"]:
        yield f"note: {note}"


def write(task: Task, row: Mapping[str, Any], suffix: str = "") -> Path:
    """The JSON beside what was evaluated, or where out= says."""
    where = Path(task.where)
    own = where / f"evaluation{suffix}.json" if task.is_run else where.with_name(f"{where.name}.evaluation.json")
    path = Path(task.options["out"]) if "out" in task.options else own
    with show.atomic(path) as part:
        part.write_text(json.dumps(row, indent=1, allow_nan=False) + "\n")
    return path


# -- curves ------------------------------------------------------------------------------------------------------------


def curve(task: Task) -> int:
    """A run measured again and again: over guidance, the sampler's steps, or its checkpoints."""
    kind, values = task.options["curve"], task.get("values", [])
    lookup(dict.fromkeys(CURVES), kind, "curve")
    if kind != "training" and (not values or not all(type(v) in (int, float) for v in values)):
        raise UserError("a curve over which values?", key="values", expected="values=[1,1.5,2]", found=values or None)
    need("matplotlib.figure", "viz")  # before anything is drawn
    points = list(_points(task, kind, values))
    reference, rows = None, []
    for value, run, changes in points:
        samples = limited(drawn(task, run, changes), task)
        reference = reference or Reference(task, samples, run)
        row = measure(task, samples, reference, ("frechet",))
        rows.append({"value": value, **row})
        print(f"{kind} {value}: " + ", ".join(f"{k} {v['value']:.5g}" for k, v in row["metrics"].items()), flush=True)
    path = write(task, {"curve": kind, "rows": rows}, f"-{kind}")
    print(f"wrote {path} and {show.save_png(plot(kind, rows), path.with_suffix('.png'))}")
    return 0


def _points(task: Task, kind: str, values: Sequence[Any]) -> Iterator[tuple[Any, Run, dict[str, Any]]]:
    """Where a curve is measured: value, run, changes of its settings."""
    if kind != "training":
        run = open_run(task)
        yield from ((value, run, {kind: value}) for value in values)
        return
    folders = {int(folder.name.partition("-")[2]): folder for folder in checkpoints(Path(task.where) / "checkpoint")}
    if missing := [v for v in values if v not in folders]:
        raise UserError("there is no such checkpoint", key="values", expected=sorted(folders), found=missing)
    if not folders:
        raise UserError("this run has no checkpoints", file=task.where)
    for step in values or sorted(folders):
        yield step, open_run(task, folders[step]), {}


def plot(kind: str, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A panel for every measure, its interval shaded: one PIL picture."""
    names = list(rows[0]["metrics"])
    figure, axes = show.make_figure(len(names), 4.2 * len(names), 3.2)
    for axis, name in zip(axes, names):
        points = sorted(((row["value"], row["metrics"][name]) for row in rows), key=lambda point: point[0])
        x, found = [p[0] for p in points], [p[1] for p in points]
        axis.plot(x, [f["value"] for f in found], "o-", color=show.COLOURS[0], markersize=4)
        if all("low" in f for f in found):
            limits = ([f[end] for f in found] for end in ("low", "high"))
            axis.fill_between(x, *limits, color=show.COLOURS[0], alpha=0.15)
        show.set_title(axis, name, kind)
    return show.render(figure)
