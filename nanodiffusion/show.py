"""Pictures of samples, trajectories, point clouds, schedules and losses: PIL images, which a notebook shows by name.

Images are (n c h w) in [-1, 1] with c = 1 or 3, points are (n 2). A state is what the sampler yields after a step:
x lies at `sigma_next`, x0 is the estimate made from `sigma`.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from .errors import UserError, lookup, need

PAD = 2  # pixels between the cells of a grid
CELL = 64  # a grid enlarges small images to about this many pixels
GUTTER, CAPTION = 36, 20  # left margin and caption height of a strip
INK, SOFT, FAINT = "#1f2430", "#6b7280", "#9aa3b2"
COLOURS = (
    "#2f6fde",
    "#e0662f",
    "#1d9a78",
    "#b54fae",
    "#d19a12",
    "#4aa8d8",
    "#c9405b",
    "#7a6ff0",
    "#6b8e23",
    "#8a6d5b",
)

T = TypeVar("T")
Frames = Sequence[Image.Image]
Limits = tuple[float, float]


class State(Protocol):
    """What a picture of a trajectory needs: x (n ...) at level sigma_next, x0 (n ...) estimated from level sigma."""

    @property
    def x(self) -> Tensor: ...
    @property
    def x0(self) -> Tensor: ...
    @property
    def sigma(self) -> Any: ...
    @property
    def sigma_next(self) -> Any: ...


# images


def to_uint8(x: Tensor) -> Tensor:
    """Pixels round((x + 1) * 127.5), half to even, clamped, NaN as 0: x (n c h w) in [-1, 1] -> (n h w c) uint8."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(
            "these are not images",
            expected="(n c h w), c = 1 or 3",
            found=tuple(x.shape),
            fix="decode latents with the codec first",
        )
    levels = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).nan_to_num(0)
    return levels.to(torch.uint8).permute(0, 2, 3, 1)


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images side by side, each pixel a scale x scale square: (n c h w) in [-1, 1] -> one picture, row by row.

    The default is as square as n allows and enlarges small images to about 64 pixels.
    """
    pixels = to_uint8(images).cpu()
    n, h, w, c = pixels.shape
    if not n or min(columns or 1, scale or 1) < 1:
        raise UserError("a grid needs an image, a column and a scale of 1 or more", found=f"{n=} {columns=} {scale=}")
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    scale = scale or max(1, CELL // max(h, w))
    rows, height, width = math.ceil(n / columns), h * scale + PAD, w * scale + PAD
    cells = torch.full((rows * columns, height, width, c), 255, dtype=torch.uint8)
    cells[:n, :-PAD, :-PAD] = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    sheet = cells.view(rows, columns, height, width, c).transpose(1, 2).reshape(rows * height, columns * width, c)
    return Image.fromarray(sheet[:-PAD, :-PAD].squeeze(-1).numpy())


def strip(states: Iterable[State], columns: int = 8, rows: int = 4, scale: int | None = None) -> Image.Image:
    """A trajectory at a glance: x above its x0 estimates, a row per sample, a column per chosen step (the last always).

    x is shown as x / sqrt(1 + sigma^2), of unit variance at every level. Over x stands the level it has reached, over
    x0 the level it was estimated from.
    """
    chosen = evenly(_trajectory(states), columns)
    x, x0 = (_sheet(images, rows, scale) for images in ([_shown(s) for s in chosen], [s.x0 for s in chosen]))
    picture = Image.new(x.mode, (GUTTER + x.width, 2 * (CAPTION + x.height)), "white")
    _band(picture, 0, x, "x", [float(s.sigma_next) for s in chosen])
    _band(picture, CAPTION + x.height, x0, "x0", [float(s.sigma) for s in chosen])
    return picture


def trajectory_frames(
    states: Iterable[State], kind: str = "both", columns: int | None = None, scale: int | None = None
) -> list[Image.Image]:
    """One grid per step of x (scaled as in `strip`), of the x0 estimate, or of both beside each other."""
    views: dict[str, Callable[[State], list[Tensor]]] = {
        "x": lambda s: [_shown(s)],
        "x0": lambda s: [s.x0],
        "both": lambda s: [_shown(s), s.x0],
    }
    view = lookup(views, kind, "kind")
    return [_beside([grid(images, columns, scale) for images in view(s)]) for s in _trajectory(states)]


def _trajectory(states: Iterable[State]) -> list[State]:
    found = list(states)
    if not found:
        raise UserError("there is no trajectory to show", expected="at least one state", found="none")
    return found


def _shown(state: State) -> Tensor:
    return state.x.float() / math.sqrt(1 + float(state.sigma_next) ** 2)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, the last always and the first when count > 1."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(len(items) - 1, 0, max(count, 1)).round().astype(int)[::-1]]


def _sheet(columns: list[Tensor], rows: int, scale: int | None) -> Image.Image:
    return grid(torch.stack([x[:rows] for x in columns], 1).flatten(0, 1), len(columns), scale)


def _band(picture: Image.Image, top: int, sheet: Image.Image, name: str, sigmas: list[float]) -> None:
    picture.paste(sheet, (GUTTER, top + CAPTION))
    draw, pitch = ImageDraw.Draw(picture), (sheet.width + PAD) / len(sigmas)
    draw.text(
        (GUTTER / 2, top + CAPTION + sheet.height / 2),
        name,
        fill=INK,
        font=ImageFont.load_default(14),
        anchor="mm",
    )
    small = {"fill": SOFT, "font": ImageFont.load_default(11), "anchor": "mm"}
    draw.text((GUTTER / 2, top + CAPTION / 2), "sigma", **small)  # Pillow's font has no Greek
    for i, sigma in enumerate(sigmas):
        draw.text((GUTTER + (i + 0.5) * pitch - PAD / 2, top + CAPTION / 2), f"{sigma:.3g}", **small)


def _beside(pictures: Frames) -> Image.Image:
    gap = 6 * PAD
    width = sum(p.width + gap for p in pictures) - gap
    out, left = Image.new(pictures[0].mode, (width, pictures[0].height), "white"), 0
    for p in pictures:
        out.paste(p, (left, 0))
        left += p.width + gap
    return out


# files


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, so that no reader meets half a file."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as e:
        raise UserError(
            f"cannot write {path.name}", file=path, found=e.strerror or str(e), fix="choose a writable path"
        ) from e
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def save_png(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> Path:
    """Write a PNG that carries `text` as its metadata (keys of 1 to 79 latin-1 characters, PNG section 11.3.4)."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        if not (0 < len(key) < 80 and key.isprintable() and all(ord(c) < 256 for c in key)):
            raise UserError("this cannot be a key of a PNG", file=path, key=key, expected="1 to 79 latin-1 characters")
        info.add_text(key, value)
    with atomic(path) as part:
        image.save(part, format="PNG", pnginfo=info)
    return Path(path)


def save_gif(frames: Frames, path: str | Path, fps: float = 20, hold_last: float = 1.5) -> Path:
    """Write an endless GIF at 0 < fps <= 50 whose last frame stays `hold_last` seconds longer.

    GIF time comes in 1/100 s: frame times are rounded, not durations, so the whole keeps its length. Pillow joins equal
    neighbours into one longer frame.
    """
    _check_frames(frames, path)
    if not 0 < fps <= 50:
        raise UserError("a GIF cannot run at this speed", file=path, key="fps", expected="0 < fps <= 50", found=fps)
    times = np.diff((np.arange(len(frames) + 1) * 100 / fps).round()).astype(int) * 10  # milliseconds
    times[-1] += round(hold_last * 100) * 10
    with atomic(path) as part:
        frames[0].save(part, "GIF", save_all=True, append_images=frames[1:], duration=times.tolist(), loop=0)
    return Path(path)


def save_mp4(frames: Frames, path: str | Path, fps: float = 20) -> Path:
    """Write an H.264 MP4 that every player opens (yuv420p, odd sizes padded by repeating the edge); extra `viz`."""
    av = need("av", "viz")
    _check_frames(frames, path)
    if not 0 < fps <= 1000:
        raise UserError("a film cannot run at this speed", file=path, key="fps", expected="0 < fps <= 1000", found=fps)
    with (
        atomic(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as film,
    ):
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.pix_fmt, (stream.width, stream.height) = "yuv420p", _even(frames[0]).size
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_image(_even(frame))))
        film.mux(stream.encode(None))
    return Path(path)


def _check_frames(frames: Frames, path: str | Path) -> None:
    sizes = sorted({f.size for f in frames})
    if len(sizes) != 1:
        raise UserError(
            "an animation needs frames of one size", file=path, expected="one size", found=sizes or "no frame"
        )


def _even(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.convert("RGB"))
    h, w, _ = pixels.shape
    return Image.fromarray(np.pad(pixels, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge"))


# figures


def make_figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A matplotlib figure of its own (no pyplot, no global state) and its axes, in inches."""
    figure = need("matplotlib.figure", "viz").Figure((width, height), dpi=144, layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
        axis.tick_params(which="both", color=INK, labelcolor=INK, labelsize=8, length=3, width=0.6)
        axis.grid(color=INK, alpha=0.1, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def set_title(axis: Any, title: str, x: str = "", y: str = "") -> None:
    """An axis' title and what lies along its sides, in the library's style."""
    axis.set_title(title, color=INK, fontsize=10, loc="left", fontweight="bold")
    axis.set_xlabel(x, color=INK, fontsize=9)
    axis.set_ylabel(y, color=INK, fontsize=9)


def _legend(axis: Any) -> None:
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(frameon=False, labelcolor=INK, fontsize=8)


def render(figure: Any) -> Image.Image:
    """A figure of `make_figure` as an RGB picture."""
    canvas = need("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB")


# points


def point_cloud(
    x: Tensor,
    label: Tensor | None = None,
    data: Tensor | None = None,
    limits: Limits | None = None,
    title: str = "",
) -> Image.Image:
    """Points x (n 2) coloured by label (n), over the data (m 2) in grey; limits (low, high) hold for both axes."""
    figure, (axis,) = make_figure(1, 4.4, 4.4)
    _square(axis, limits or _limits(x if data is None else data), title)
    _cloud(axis, data, FAINT, 0.35)
    colours = COLOURS[0] if label is None else [COLOURS[i % len(COLOURS)] for i in label.tolist()]
    _cloud(axis, x, colours, 0.8)
    return render(figure)


def score_field(
    D: Callable[[Tensor, Tensor], Tensor],
    sigma: float,
    limits: Limits,
    n: int = 20,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """A lattice of points (n*n 2) and the score there, (D(x, sigma) - x) / sigma^2 (n*n 2) (Karras 2022, eq. 3)."""
    axis = torch.linspace(*limits, n, device=device)
    x = torch.cartesian_prod(axis, axis)
    with torch.inference_mode():
        x0 = D(x, torch.full((n * n,), float(sigma), device=device))
    return x, (x0.to(x) - x) / float(sigma) ** 2


def point_frames(
    states: Iterable[State],
    data: Tensor | None = None,
    D: Callable[[Tensor, Tensor], Tensor] | None = None,
    limits: Limits | None = None,
) -> list[Image.Image]:
    """One frame per step: x / sqrt(1 + sigma^2) (n 2) left, its x0 estimate right, over the data (m 2) in grey.

    With D the left panel shows the score of the level that the step started from, long arrows shortened.
    """
    trajectory = _trajectory(states)
    limits = limits or _limits(trajectory[-1].x0 if data is None else data)
    figure, (left, right) = make_figure(2, 8.4, 4.4)
    clouds = []
    for axis, colour in ((left, COLOURS[0]), (right, COLOURS[1])):
        _square(axis, limits, "")
        _cloud(axis, data, FAINT, 0.3)
        clouds.append(_cloud(axis, trajectory[0].x0, colour, 0.8))
    arrows = None if D is None else _arrows(left, limits)
    frames = []
    for s in trajectory:
        for cloud, points in zip(clouds, (_shown(s), s.x0)):
            cloud.set_offsets(_points(points))
        set_title(left, f"x at σ = {float(s.sigma_next):.3g}")
        set_title(right, f"x0 estimated from σ = {float(s.sigma):.3g}")
        if D is not None and arrows is not None:
            arrows.set_UVC(*_arrow_lengths(D, float(s.sigma), limits, s.x.device))
        frames.append(render(figure))
    return frames


ARROWS = 21  # per side


def _arrows(axis: Any, limits: Limits) -> Any:
    side = np.linspace(*limits, ARROWS)
    still = np.zeros((ARROWS, ARROWS))
    scale = (ARROWS - 1) / (limits[1] - limits[0])  # an arrow of length 1 reaches the next lattice point
    style = {"color": INK, "alpha": 0.35, "width": 0.003, "zorder": 1}
    mesh = np.meshgrid(side, side, indexing="ij")
    return axis.quiver(*mesh, still, still, angles="xy", scale_units="xy", scale=scale, **style)


def _arrow_lengths(
    D: Callable[[Tensor, Tensor], Tensor], sigma: float, limits: Limits, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """sigma * score (a noise of about unit size) at the points shown as lattice, |a| squeezed into [0, 1) by tanh."""
    spread = math.sqrt(1 + sigma**2)
    _, score = score_field(D, sigma, (limits[0] * spread, limits[1] * spread), ARROWS, device)
    arrow = sigma * score.float().cpu().numpy()
    length = np.linalg.norm(arrow, axis=1, keepdims=True)
    arrow = arrow * np.tanh(length) / np.maximum(length, 1e-12)
    return arrow[:, 0].reshape(ARROWS, ARROWS), arrow[:, 1].reshape(ARROWS, ARROWS)


def _points(x: Tensor) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != 2:
        raise UserError("these are not points of the plane", expected="(n 2)", found=tuple(x.shape))
    return x.detach().float().cpu().numpy()


def _limits(x: Tensor) -> Limits:
    """The square around the finite points, a tenth wider."""
    points = _points(x)
    points = points[np.isfinite(points).all(1)]
    low, high = (float(points.min()), float(points.max())) if len(points) else (-1.0, 1.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _square(axis: Any, limits: Limits, title: str) -> None:
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    set_title(axis, title)


def _cloud(axis: Any, x: Tensor | None, colour: Any, alpha: float) -> Any:
    """Dots that get smaller as they get more: about a tenth of the panel is covered whatever n is."""
    if x is None:
        return None
    points = _points(x)
    return axis.scatter(
        *points.T,
        s=min(24, max(1.5, 8000 / max(len(points), 1))),
        c=colour,
        alpha=alpha,
        linewidths=0,
        zorder=2,
    )


# curves


def schedule_plot(sigmas: Tensor, ladder: Tensor | None = None) -> Image.Image:
    """sigma(t) and log-SNR(t) = -2 ln sigma of a table (n), t in [0, 1], a sampler's ladder (k+1) marked on them."""
    table = np.asarray(torch.as_tensor(sigmas).detach().double().cpu()).ravel()
    keep = np.isfinite(table) & (table > 0)
    t, sigma = np.linspace(0, 1, len(table))[keep], table[keep]
    if not len(sigma):
        raise UserError("there is no schedule to show", expected="positive noise levels", found=table.tolist()[:4])
    figure, (left, right) = make_figure(2, 8.8, 3.4)
    marks = ladder_marks(t, sigma, ladder)
    for axis, curve in ((left, lambda s: s), (right, lambda s: -2 * np.log(s))):
        axis.plot(t, curve(sigma), color=COLOURS[0], linewidth=1.6)
        if marks is not None:
            axis.plot(
                marks[0],
                curve(marks[1]),
                "o",
                color=COLOURS[1],
                markersize=4,
                label=f"{len(marks[0])} levels of the ladder",
            )
            axis.vlines(marks[0], 0, 0.035, color=COLOURS[1], linewidth=0.8, transform=axis.get_xaxis_transform())
    left.set_yscale("log")
    set_title(left, "Noise level", "t", "σ")
    set_title(right, "log-SNR", "t", "−2 ln σ")
    if marks is not None:
        right.legend(frameon=False, labelcolor=INK, fontsize=8)
    return render(figure)


def ladder_marks(t: np.ndarray, sigma: np.ndarray, ladder: Tensor | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(t, sigma) of the ladder's levels above 0, t interpolated in ln sigma."""
    if ladder is None:
        return None
    levels = np.asarray(torch.as_tensor(ladder).detach().double().cpu()).ravel()
    levels = levels[np.isfinite(levels) & (levels > 0)]
    order = np.argsort(sigma)
    return np.interp(np.log(levels), np.log(sigma[order]), t[order]), levels


Row = Mapping[str, Any]


def loss_plot(rows: Sequence[Row], per_sigma: bool = True) -> Image.Image:
    """The figure of `loss_figure` as a picture."""
    return render(loss_figure(rows, per_sigma))


def loss_figure(rows: Sequence[Row], per_sigma: bool = True) -> Any:
    """Loss against step (raw, smoothed, validation with the raw and the EMA weights), validation loss against sigma.

    The rows are those of metrics.jsonl; curves they do not have are left out, and so is the second panel.
    """
    levels = [r for r in rows if r.get("val/sigma") and r.get("val/loss_per_sigma")] if per_sigma else []
    figure, axes = make_figure(2 if levels else 1, 8.8, 3.4)
    _draw_loss(axes[0], rows)
    if levels:
        _draw_loss_per_sigma(axes[1], levels)
    return figure


def series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the finite numbers under `key`, by step; of a step logged twice, as by a resume, the last."""
    number = (int, float)
    found = {r["step"]: r[key] for r in rows if isinstance(r.get("step"), number) and isinstance(r.get(key), number)}
    pairs = [(step, float(found[step])) for step in sorted(found) if math.isfinite(found[step])]
    return np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a hundredth of the curve, without the start's bias (Kingma & Ba 2015, section 3)."""
    beta, mean, weight, out = 1 - 1 / (1 + len(values) / 100), 0.0, 0.0, []
    for value in values:
        mean, weight = beta * mean + (1 - beta) * value, beta * weight + (1 - beta)
        out.append(mean / weight)
    return np.array(out)


def _draw_loss(axis: Any, rows: Sequence[Row]) -> None:
    steps, loss = series(rows, "loss")
    thin = slice(None, None, max(1, len(steps) // 2000))
    axis.plot(steps[thin], loss[thin], color=FAINT, linewidth=0.7, alpha=0.7)
    axis.plot(steps[thin], smooth(loss)[thin], color=COLOURS[0], linewidth=1.6, label="training")
    drawn = [loss]
    for key, name, colour in (
        ("val/loss", "validation", COLOURS[1]),
        ("val/ema_loss", "validation, EMA", COLOURS[2]),
    ):
        at, value = series(rows, key)
        drawn.append(value)
        if len(at):
            axis.plot(at, value, color=colour, linewidth=1.2, marker="o", markersize=3, label=name)
    _log_scale(axis, np.concatenate(drawn))
    set_title(axis, "Loss", "step")
    _legend(axis)


def _draw_loss_per_sigma(axis: Any, rows: Sequence[Row]) -> None:
    """The last evaluation in colour, up to six earlier ones fading behind it."""
    *earlier, last = evenly(rows, 7)
    for i, row in enumerate(earlier):
        _draw_levels(axis, row, "val/loss_per_sigma", color=FAINT, linewidth=0.8, alpha=0.25 + 0.6 * i / len(earlier))
    _draw_levels(
        axis,
        last,
        "val/loss_per_sigma",
        color=COLOURS[1],
        linewidth=1.4,
        marker="o",
        markersize=3,
        label="validation",
    )
    _draw_levels(
        axis,
        last,
        "val/ema_loss_per_sigma",
        color=COLOURS[2],
        linewidth=1.4,
        marker="o",
        markersize=3,
        label="validation, EMA",
    )
    axis.set_xscale("log")
    _log_scale(axis, np.concatenate([line.get_ydata() for line in axis.lines]))
    set_title(axis, f"Loss per noise level, step {last.get('step', '?')}", "σ")
    _legend(axis)


def _draw_levels(axis: Any, row: Row, key: str, **style: Any) -> None:
    loss = np.array(row.get(key) or [], dtype=float)
    if len(loss):
        axis.plot(_centres(np.array(row["val/sigma"], dtype=float), len(loss)), loss, **style)


def _centres(levels: np.ndarray, count: int) -> np.ndarray:
    """Bin centres (count): `levels` are those already, or count + 1 edges, whose geometric means they are."""
    if len(levels) == count:
        return levels
    if len(levels) != count + 1:
        raise UserError(
            "levels and losses do not match",
            key="val/sigma",
            expected=f"{count} or {count + 1}",
            found=len(levels),
        )
    low, high = levels[:-1], levels[1:]
    return np.where(low > 0, np.sqrt(low * high), (low + high) / 2)


def _log_scale(axis: Any, values: np.ndarray) -> None:
    """A logarithmic y axis when every value allows it, with plain numbers at 1, 2 and 5."""
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0:
        return
    ticker = need("matplotlib.ticker", "viz")
    axis.set_yscale("log")
    few_decades = values.max() / values.min() < 1000
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
