"""One self-contained HTML page per run, made from what lies in its folder; it opens offline."""

import base64
import html
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from . import show
from .errors import UserError, need
from .tracking import flat

Row = Mapping[str, Any]

MAX_ROWS, MAX_KEY, MAX_TEXT = 150, 80, 300  # rows of one file in the page; characters of a name, of a value
KB = 1000
# name in the folder, caption, most bytes of it in the page
SCHEDULE = ("schedule.png", "Noise schedule and the sampler's levels", 150 * KB)
PICTURES = (
    ("samples.png", "Samples", 600 * KB),
    ("trajectory.gif", "Trajectory: x on the left, its x0 estimate on the right", 700 * KB),
    ("strip.png", "From noise to sample", 250 * KB),
)
GRIDS, GRID_BYTES = 6, 110 * KB  # of samples/step-*.png


def load_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut off by a kill is dropped, any other bad line is a UserError."""
    lines = _read(Path(path)).split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as e:
            if number == len(lines):  # no newline ends it: the writer was stopped in the middle
                break
            raise UserError(
                "a bad line of metrics",
                file=path,
                key=f"line {number}",
                expected="a JSON object",
                found=str(e),
            ) from e
        rows += [row] if row else []
    return rows


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html (at most 5 MB) from what is there, and say where.

    Known are config.json, environment.json, data.json, metrics.jsonl, samples.png, trajectory.gif, strip.png,
    schedule.png and samples/step-*.png; what is missing is left out.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise UserError("there is no such run", file=run, expected="a run's folder")
    page = _page(run).encode("utf-8", "replace")
    with show.atomic(run / "report.html") as part:
        part.write_bytes(page)
    return run / "report.html"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path.name}", file=path, found=e.strerror) from e


def _read_dict(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path))
    except ValueError as e:
        raise UserError(f"{path.name} is not JSON", file=path, found=str(e)) from e
    if not isinstance(found, dict):
        raise UserError(f"{path.name} is not an object", file=path, expected="{...}", found=type(found).__name__)
    return found


# the page


def _page(run: Path) -> str:
    config, environment, data = (_read_dict(run / f"{n}.json") for n in ("config", "environment", "data"))
    rows = load_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    command, timings = environment.pop("command", None), environment.pop("timings", {})
    parts = [
        _header(run, command),
        _tiles(config, environment, data, rows),
        _section("Samples", _columns(_pictures(run, PICTURES))),
        _section("Training", "".join([_loss(rows), _metrics_table(rows), *_pictures(run, [SCHEDULE])])),
        _section("Samples during training", _columns(_grids(run / "samples"), "narrow")),
        _section("Data", _census(data)),
        _section("Timings", _nested({"seconds": timings} if timings else {})),
        _section("Configuration", _nested(config)),
        _section("Environment", _nested(environment)),
    ]
    return PAGE.format(title=_text(run.resolve().name), style=STYLE, body="\n".join(p for p in parts if p))


def _text(value: Any, most: int = MAX_TEXT) -> str:
    """Any value as short, escaped text: names and values come from files and are trusted in nothing."""
    words = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
    words = words if len(words) <= most else words[: most - 1] + "…"
    return html.escape(words, quote=True)


def _header(run: Path, command: Any) -> str:
    """The run's name and the exact command, a string or a list of words."""
    words = shlex.join(map(str, command)) if isinstance(command, list) else command
    shown = f"<pre>{html.escape(str(words)[: 20 * MAX_TEXT])}</pre>" if words else ""
    return f"<header><p class=eyebrow>nanodiffusion run</p><h1>{_text(run.resolve().name)}</h1>{shown}</header>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _columns(cells: Sequence[str], width: str = "wide") -> str:
    return f'<div class="columns {width}">{"".join(cells)}</div>' if cells else ""


def _tiles(config: Row, environment: Row, data: Row, rows: Sequence[Row]) -> str:
    """The figures a reader looks for first."""
    known = {**dict(flat(config)), **dict(flat(environment))}
    by_name = {key.rpartition(".")[2]: value for key, value in known.items()}
    _, rate = show.series(rows, "images_per_s")
    tiles = [
        ("steps", _count(show.series(rows, "loss")[0][-1:])),
        ("training loss, smoothed", _number(show.smooth(show.series(rows, "loss")[1])[-1:])),
        ("best validation loss", _number(_least(show.series(rows, "val/loss")[1]))),
        ("best validation loss, EMA", _number(_least(show.series(rows, "val/ema_loss")[1]))),
        ("images per second", _count([float(np.median(rate))] if len(rate) else [])),
        ("parameters", _count(by_name.get("parameters"))),
        ("FLOPs per forward", _count(by_name.get("flops"))),
        ("training examples", _count(data.get("n"))),
    ]
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles if value)
    return f"<dl class=tiles>{joined}</dl>" if (joined := "".join(cells)) else ""


def _least(values: np.ndarray) -> np.ndarray:
    return values.min(keepdims=True) if len(values) else values


def _number(found: Any) -> str:
    """A number, or the only one of a list, to four digits; anything else as nothing."""
    value = found[0] if isinstance(found, list | np.ndarray) and len(found) else found
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else ""


def _count(found: Any) -> str:
    """A count as a person would say it: 12,345, and from a million on 4.56 M."""
    value = found[0] if isinstance(found, list | np.ndarray) and len(found) else found
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    if abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    power = min(3, int(math.log10(abs(value)) // 3 - 2))
    return f"{value / 1000 ** (power + 2):.3g} {'MGTP'[power]}"


def _table(pairs: Sequence[tuple[str, Any]], most: int = MAX_ROWS) -> str:
    if not pairs:
        return ""
    body = "".join(f"<tr><th>{_text(k, MAX_KEY)}</th><td>{_text(v)}</td></tr>" for k, v in pairs[:most])
    return f"<table class=facts>{body}</table>{_more(len(pairs) - most)}"


def _more(count: int) -> str:
    return f"<p class=note>and {count} more</p>" if count > 0 else ""


def _nested(tree: Row) -> str:
    """A table per group of a nested dict, the loose values first, at most MAX_ROWS rows together."""
    loose = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    groups = {"general": loose, **{key: value for key, value in tree.items() if isinstance(value, Mapping)}}
    tables, left = [], MAX_ROWS
    for name, pairs in ((name, flat(group)) for name, group in groups.items() if group):
        if left > 0:
            tables.append(f"<div><h3>{_text(name, MAX_KEY)}</h3>{_table(pairs, left)}</div>")
        left -= len(pairs)
    return _columns(tables)


def _census(data: Row) -> str:
    """What is in the data: its facts as a table, its classes as bars."""
    counts = data.get("classes")
    facts = _table(flat({k: v for k, v in data.items() if k != "classes" or not isinstance(counts, Mapping)}))
    bars = _bars(counts) if isinstance(counts, Mapping) else ""
    return _columns([f"<div>{part}</div>" for part in (facts, bars) if part])


def _bars(counts: Row, most: int = 40) -> str:
    numbers = [(key, n) for key, n in counts.items() if isinstance(n, int | float) and math.isfinite(n) and n >= 0]
    top = max((n for _, n in numbers), default=0) or 1
    body = "".join(
        f"<tr><th>{_text(key, MAX_KEY)}</th><td class=bar><i style='width:{100 * n / top:.1f}%'></i></td>"
        f"<td class=n>{n:,}</td></tr>"
        for key, n in numbers[:most]
    )
    return f"<table>{body}</table>{_more(len(numbers) - most)}" if body else ""


def _metrics_table(rows: Sequence[Row]) -> str:
    """Each number that was logged: how often, first, least, median, last."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    values = [(key, show.series(rows, key)[1]) for key in keys[:MAX_ROWS]]
    head = "".join(f"<th>{name}</th>" for name in ("", "rows", "first", "least", "median", "last"))
    body = "".join(
        f"<tr><th>{_text(key, MAX_KEY)}</th>{''.join(f'<td class=n>{_text(x)}</td>' for x in _summary(v))}</tr>"
        for key, v in values
        if len(v)
    )
    return f"<div class=scroll><table class=numbers><thead><tr>{head}</tr></thead>{body}</table></div>" if body else ""


def _summary(values: np.ndarray) -> list[Any]:
    return [
        len(values),
        *(f"{float(v):.4g}" for v in (values[0], values.min(), np.median(values), values[-1])),
    ]


# plots


def _loss(rows: Sequence[Row]) -> str:
    """The loss curves as vector graphics in the page's own ink, or a plain curve where matplotlib is missing."""
    steps, loss = show.series(rows, "loss")
    if not len(loss):
        return ""
    try:
        need("matplotlib.figure", "viz")
    except UserError:
        return f"<figure>{_polyline(steps, show.smooth(loss))}<figcaption>Training loss, smoothed</figcaption></figure>"
    return f"<figure>{_svg(show.loss_figure(rows), 'loss')}</figure>"


def _svg(figure: Any, salt: str) -> str:
    """A matplotlib figure as inline SVG: text stays text, ink follows the page, no namespaces (they are URLs)."""
    out = io.StringIO()
    with need("matplotlib", "viz").rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
    return svg.replace(show.INK, "currentColor")


def _polyline(x: np.ndarray, y: np.ndarray, width: int = 880, height: int = 240) -> str:
    """y over x as one line, its extremes written at the corners."""
    thin = slice(None, None, max(1, len(x) // 1000))
    span_x, span_y = float(np.ptp(x)) or 1.0, float(np.ptp(y)) or 1.0
    px = 60 + (x[thin] - x[0]) / span_x * (width - 70)
    py = 10 + (y.max() - y[thin]) / span_y * (height - 40)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py))
    labels = (
        (54, 16, "end", f"{y.max():.3g}"),
        (54, height - 28, "end", f"{y.min():.3g}"),
        (60, height - 8, "start", f"step {x[0]:g}"),
        (width - 10, height - 8, "end", f"{x[-1]:g}"),
    )
    text = "".join(f'<text x="{a}" y="{b}" text-anchor="{anchor}">{words}</text>' for a, b, anchor, words in labels)
    line = f'<polyline points="{points}" fill="none" stroke="{show.COLOURS[0]}" stroke-width="2"/>'
    return f'<svg viewBox="0 0 {width} {height}" class=plain>{line}{text}</svg>'


# pictures


def _grids(folder: Path) -> list[str]:
    """At most six of samples/step-*.png, evenly spaced, the last always."""

    def step(path: Path) -> int:
        return int("0" + "".join(re.findall(r"\d+", path.stem)[:1]))

    def caption(path: Path) -> str:
        return re.sub(r"\d+", f"{step(path):,}", path.stem, count=1).replace("-", " ")

    found = sorted(folder.glob("step-*.png"), key=lambda path: (step(path), path.name))
    return [_figure(path, caption(path), GRID_BYTES) for path in show.evenly(found, GRIDS)]


def _pictures(run: Path, known: Iterable[tuple[str, str, int]]) -> list[str]:
    return [_figure(run / name, caption, most) for name, caption, most in known if (run / name).exists()]


def _figure(path: Path, caption: str, most: int) -> str:
    kind, content = _fitted(path, most)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<figure><img src="{source}" alt="{_text(caption)}"><figcaption>{_text(caption)}</figcaption></figure>'


def _fitted(path: Path, most: int) -> tuple[str, bytes]:
    """The file as it is when it is small enough, else a smaller copy of it: (kind, at most `most` bytes)."""
    content = _read(path)
    kind = path.suffix[1:]
    if len(content) <= most:
        return kind, content
    try:
        with Image.open(io.BytesIO(content)) as image:
            return (
                ("gif", _shrunk(image, _small_gif, most))
                if kind == "gif"
                else ("jpeg", _shrunk(image, _small_jpeg, most))
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(
            f"{path.name} is not a picture", file=path, found=str(e), fix="remove it or write it again"
        ) from e


def _shrunk(image: Image.Image, encode: Callable[[Image.Image, int], bytes], most: int) -> bytes:
    """encode(image, side) at the first side, from 640 down, that gives at most `most` bytes."""
    side, content = 640, encode(image, 640)
    while len(content) > most and side > 1:
        side = max(1, int(side * min(0.9, 0.95 * math.sqrt(most / len(content)))))  # bytes grow with the area
        content = encode(image, side)
    return content


def _small_jpeg(image: Image.Image, side: int) -> bytes:
    copy, out = image.convert("RGB"), io.BytesIO()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    copy.save(out, "JPEG", quality=82)
    return out.getvalue()


def _small_gif(image: Image.Image, side: int) -> bytes:
    """At most 40 frames, the time of those left out given to the ones before them."""
    total = getattr(image, "n_frames", 1)
    kept = show.evenly(range(total), min(40, total))
    frames, times, out = [], [], io.BytesIO()
    for i, frame in enumerate(ImageSequence.Iterator(image)):
        time = int(frame.info.get("duration", 50))
        if i in kept or not frames:
            frames.append(frame.convert("RGB"))
            frames[-1].thumbnail((side, side), Image.Resampling.LANCZOS)
            times.append(time)
        else:
            times[-1] += time
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return out.getvalue()


STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1f2430; --soft: #667085; --line: #e4e4df;
  --accent: #2f6fde; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1b1e24; --ink: #e6e8ec; --soft: #98a1b0; --line: #2c313a; --accent: #79a6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 3.5rem 1.5rem 5rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 2.4rem; line-height: 1.15; letter-spacing: -0.02em; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { margin: 3.2rem 0 1.1rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.15rem;
  font-weight: 650; }
h3 { margin: 0 0 0.4rem; font-size: 0.95rem; font-weight: 600; overflow-wrap: anywhere; }
.eyebrow { margin: 0 0 0.3rem; color: var(--accent); font-size: 0.8rem; font-weight: 600; letter-spacing: 0.08em;
  text-transform: uppercase; }
pre { margin: 1.2rem 0 0; padding: 0.8rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 0.8rem; margin: 1.6rem 0 0; }
.tiles div { padding: 0.8rem 1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
dt, figcaption, .note { color: var(--soft); font-size: 0.85rem; }
dd { margin: 0.1rem 0 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1.6rem 2.4rem;
  align-items: start; }
.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.4rem; }
figure { margin: 0; }
.scroll + figure { margin-top: 2rem; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text, svg.plain text { font-family: inherit !important; }
svg.plain text { fill: currentColor; font-size: 12px; }
figcaption { margin-top: 0.5rem; }
table { width: 100%; border-collapse: collapse; font-size: 0.88rem; }
th { padding: 0.32rem 1rem 0.32rem 0; color: var(--soft); font-weight: 400; text-align: left; vertical-align: top; }
td { padding: 0.32rem 0; overflow-wrap: anywhere; }
.facts th { width: 42%; overflow-wrap: anywhere; }
tr + tr > *, thead + tbody > tr:first-child > * { border-top: 1px solid var(--line); }
.n { padding-left: 0.8rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers { margin-top: 1.4rem; }
.numbers thead th { padding-right: 0; text-align: right; font-size: 0.8rem; }
.bar { width: 60%; }
.bar i { display: block; height: 0.55rem; border-radius: 3px; background: var(--accent); opacity: 0.75; }
.scroll { overflow-x: auto; }
footer { margin-top: 4rem; color: var(--soft); font-size: 0.85rem; }
"""

# The policy makes the browser refuse what the page does not ask for anyway: any request.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} · nanodiffusion</title>
<style>{style}</style>
</head>
<body>
{body}
<footer>Everything on this page is inside this file.</footer>
</body>
</html>
"""
