"""`nanodiffusion evaluate SAMPLES reference=...`: distances and their kin, with how they were made, as a table and as JSON."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nanodiffusion import show
from nanodiffusion.checkpoint import checkpoints
from nanodiffusion.cli.evaluate.reference import Reference, open_features
from nanodiffusion.cli.evaluate.result import measure, table, write
from nanodiffusion.cli.evaluate.samples import drawn, open_run
from nanodiffusion.cli.evaluate.task import Task, limited, read_task
from nanodiffusion.errors import UserError, lookup, need
from nanodiffusion.evaluate import statistics as stats
from nanodiffusion.evaluate.images import Images, open_images
from nanodiffusion.fast import tune
from nanodiffusion.run import Run

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
