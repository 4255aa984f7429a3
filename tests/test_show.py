"""Pictures: pixels, geometry, files and fields against numpy, Pillow, PyAV and analytic answers."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from nanodiffusion import show
from nanodiffusion.errors import UserError


class State(NamedTuple):
    x: torch.Tensor
    x0: torch.Tensor
    sigma: float
    sigma_next: float
    step: int


def states(k: int = 5, n: int = 3, shape: tuple[int, ...] = (1, 4, 4)) -> list[State]:
    g = torch.Generator().manual_seed(0)
    ladder = [*np.geomspace(10, 0.1, k), 0.0]
    draw = [torch.randn(2, n, *shape, generator=g) for _ in range(k)]
    return [State(x * s, x0 / 2, s, s_next, i) for i, ((x, x0), s, s_next) in enumerate(zip(draw, ladder, ladder[1:]))]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def numpy_uint8(x: torch.Tensor) -> np.ndarray:
    return (
        np.clip(np.rint((x.numpy() + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_to_uint8_rounds_like_numpy(channels):
    x = torch.linspace(-1.3, 1.3, 2 * channels * 30 * 40).view(2, channels, 30, 40)
    assert_close(show.to_uint8(x), torch.from_numpy(numpy_uint8(x)), rtol=0, atol=0)


def test_to_uint8_keeps_every_level_and_maps_nan_to_black():
    levels = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16)
    assert_close(show.to_uint8(levels / 127.5 - 1).flatten(), torch.arange(256, dtype=torch.uint8))
    assert show.to_uint8(torch.full((1, 1, 1, 1), math.nan)).item() == 0


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (8, 8), (0, 1, 8, 8)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(UserError):
        show.grid(torch.zeros(shape))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_places_every_image_row_by_row(channels, mode):
    x = torch.rand(5, channels, 4, 6) * 2 - 1
    image = show.grid(x, columns=3, scale=2)
    assert (image.mode, image.size) == (mode, (3 * 12 + 2 * show.PAD, 2 * 8 + show.PAD))
    expected = np.full((*image.size[::-1], channels), 255, np.uint8)
    for i, tile in enumerate(numpy_uint8(x)):
        top, left = i // 3 * (8 + show.PAD), i % 3 * (12 + show.PAD)
        expected[top : top + 8, left : left + 12] = np.kron(tile, np.ones((2, 2, 1), np.uint8))
    assert_close(pixels(image).view(expected.shape), torch.from_numpy(expected))


def test_grid_makes_digits_visible_and_leaves_photographs_alone():
    assert show.grid(torch.zeros(1, 1, 8, 8)).size == (64, 64)
    assert show.grid(torch.zeros(4, 3, 100, 100)).size == (200 + show.PAD, 200 + show.PAD)


def test_png_carries_its_text(tmp_path):
    text = {"config": '{"seed": 1}', "prompt": "σ → 0, ein schöner Raum"}
    path = show.save_png(show.grid(torch.zeros(1, 1, 8, 8)), tmp_path / "new" / "a.png", text)
    with Image.open(path) as image:
        assert image.text == text
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(UserError, match="key of a PNG"):
        show.save_png(Image.new("L", (1, 1)), path, {"": "x"})


def test_strip_shows_unit_variance_x_above_x0():
    trajectory = states(k=5, n=3)
    picture = show.strip(iter(trajectory), columns=3, rows=2, scale=4)
    chosen = [trajectory[i] for i in (0, 2, 4)]
    cell, top = 16, show.CAPTION
    band = 2 * cell + show.PAD
    assert picture.size == (show.GUTTER + 3 * cell + 2 * show.PAD, 2 * (show.CAPTION + band))
    for name in ("x", "x0"):
        for column, s in enumerate(chosen):
            for row in range(2):
                x = s.x[row] / math.sqrt(1 + s.sigma_next**2) if name == "x" else s.x0[row]
                expected = np.kron(numpy_uint8(x[None])[0, :, :, 0], np.ones((4, 4), np.uint8))
                left, up = show.GUTTER + column * (cell + show.PAD), top + row * (cell + show.PAD)
                found = pixels(picture)[up : up + cell, left : left + cell]
                assert_close(found, torch.from_numpy(expected), atol=1, rtol=0)
        top += band + show.CAPTION


def test_strip_is_short_when_the_trajectory_is():
    assert show.strip(states(k=2), columns=8, rows=1, scale=1).width == show.GUTTER + 2 * 4 + show.PAD
    with pytest.raises(UserError, match="no trajectory"):
        show.strip([])


def test_trajectory_frames_show_each_step():
    trajectory = states()
    x, x0, both = (show.trajectory_frames(trajectory, kind) for kind in ("x", "x0", "both"))
    assert len(x) == len(x0) == len(both) == len(trajectory)
    assert_close(pixels(x0[1]), pixels(show.grid(trajectory[1].x0)))
    assert_close(pixels(both[-1])[:, : x[-1].width], pixels(show.grid(trajectory[-1].x)))  # sigma_next = 0: unscaled
    assert_close(pixels(both[-1])[:, -x0[-1].width :], pixels(x0[-1]))
    with pytest.raises(UserError, match="did you mean 'both'"):
        show.trajectory_frames(trajectory, "boths")


def test_gif_keeps_frames_times_and_pixels(tmp_path):
    frames = show.trajectory_frames(states(k=7), "x0")
    path = show.save_gif(frames, tmp_path / "a.gif", fps=30, hold_last=2)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (7, 0)
        times = []
        for i, frame in enumerate(frames):
            gif.seek(i)
            times.append(gif.info["duration"])
            assert_close(pixels(gif.convert("L")), pixels(frame))
    assert sum(times[:-1]) == 200  # 6 frames at 30 per second
    assert times[-1] == pytest.approx(2033, abs=10)


@pytest.mark.parametrize("fps", [0, -1, 51, math.nan])
def test_gif_refuses_impossible_speeds(tmp_path, fps):
    with pytest.raises(UserError, match="0 < fps <= 50"):
        show.save_gif([Image.new("L", (2, 2))], tmp_path / "a.gif", fps=fps)


@pytest.mark.parametrize("save", [show.save_gif, show.save_mp4])
def test_an_animation_needs_frames_of_one_size(tmp_path, save):
    for frames in ([], [Image.new("L", (2, 2)), Image.new("L", (3, 2))]):
        with pytest.raises(UserError, match="one size"):
            save(frames, tmp_path / "a")


def test_mp4_decodes_to_the_same_frames(tmp_path):
    av = pytest.importorskip("av")
    frames = [Image.fromarray(np.full((33, 35), v, np.uint8)) for v in range(0, 250, 25)]
    path = show.save_mp4(frames, tmp_path / "a.mp4", fps=12.5)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        assert (stream.width, stream.height, stream.pix_fmt, stream.average_rate) == (36, 34, "yuv420p", 12.5)
        decoded = [f.to_ndarray(format="gray") for f in film.decode(stream)]
    assert len(decoded) == len(frames)
    means = torch.tensor([float(f.mean()) for f in decoded])
    assert_close(means, torch.arange(0, 250, 25.0), atol=4, rtol=0)


def test_mp4_without_av_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"nanodiffusion\[viz\]"):
        show.save_mp4([Image.new("L", (2, 2))], tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["png", "gif", "mp4"])
def test_unwritable_output_is_a_user_error(tmp_path, name):
    (tmp_path / "file").write_text("")
    save = {"png": show.save_png, "gif": lambda f, p: show.save_gif([f], p), "mp4": lambda f, p: show.save_mp4([f], p)}[
        name
    ]
    with pytest.raises(UserError, match="cannot write"):
        save(Image.new("L", (2, 2)), tmp_path / "file" / f"a.{name}")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail():
        with show.atomic(tmp_path / "a") as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_score_field_is_the_score_of_a_gaussian():
    mean, var, sigma = torch.tensor([0.5, -1.0]), 0.49, 1.7

    def D(x, s):
        s2 = s[:, None].to(x) ** 2
        return (var * x + s2 * mean) / (var + s2)

    x, score = show.score_field(D, sigma, (-2.0, 3.0), n=11)
    side = torch.linspace(-2, 3, 11)
    assert_close(x, torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2))
    assert_close(score, (mean - x) / (var + sigma**2))


def test_point_frames_show_each_step_with_and_without_the_field():
    pytest.importorskip("matplotlib")
    trajectory = states(k=3, n=20, shape=(2,))
    data = torch.randn(50, 2)
    plain = show.point_frames(trajectory, data)
    field = show.point_frames(trajectory, data, lambda x, s: x / (1 + s[:, None].to(x) ** 2))
    assert len(plain) == len(field) == 3
    assert len({f.size for f in plain + field}) == 1
    assert all(a.tobytes() != b.tobytes() for a, b in zip(plain, field))
    assert plain[0].tobytes() != plain[1].tobytes()


def test_point_cloud_has_a_colour_per_label():
    pytest.importorskip("matplotlib")
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    image = show.point_cloud(x, label=torch.tensor([0, 1]), limits=(-2, 2), title="two")
    colours = pixels(image).view(-1, 3).float()
    for name in show.COLOURS[:2]:
        rgb = torch.tensor([int(name[i : i + 2], 16) for i in (1, 3, 5)]) * 0.8 + 255 * 0.2  # alpha 0.8 on white
        assert (colours - rgb).abs().sum(1).min() < 8
    with pytest.raises(UserError, match="points of the plane"):
        show.point_cloud(torch.zeros(3, 3))


def test_ladder_levels_are_marked_on_the_schedule():
    sigma = np.geomspace(0.01, 100, 101)
    t, levels = show.ladder_marks(np.linspace(0, 1, 101), sigma, torch.tensor([100.0, 1.0, 0.01, 0.0]))
    assert_close(torch.tensor(t), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert_close(torch.tensor(levels), torch.tensor([100.0, 1.0, 0.01]).double())


@pytest.mark.parametrize("ladder", [None, torch.tensor([80.0, 10.0, 1.0, 0.0])])
def test_schedule_plot_takes_tables_either_way_round(ladder):
    pytest.importorskip("matplotlib")
    for table in (torch.linspace(0, 80, 50), torch.linspace(80, 0, 50)):
        assert show.schedule_plot(table, ladder).width > 1000
    with pytest.raises(UserError, match="no schedule"):
        show.schedule_plot(torch.zeros(3))


def test_smoothing_starts_without_bias_and_keeps_a_constant():
    assert_close(torch.tensor(show.smooth(np.full(500, 3.0))), torch.full((500,), 3.0, dtype=torch.float64))
    assert show.smooth(np.array([5.0]))[0] == 5


def test_a_series_is_sorted_finite_and_without_repeats():
    rows = [{"step": 2, "loss": 2.0}, {"step": 1, "loss": 1}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": math.nan}]
    steps, loss = show.series([*rows, {"step": 4, "lr": 1}, {"loss": 1}, {"step": 5, "loss": "x"}], "loss")
    assert (steps.tolist(), loss.tolist()) == ([1, 2], [1, 3])


def test_loss_plot_draws_levels_given_as_edges_or_centres():
    pytest.importorskip("matplotlib")
    edges = np.array([0.01, 1.0, 100.0])
    row = {"step": 1, "val/loss": 0.5, "val/loss_per_sigma": [0.2, 0.3], "val/ema_loss_per_sigma": [0.1, 0.2]}
    for levels in (edges, np.array([0.1, 10.0])):
        rows = [{"step": 1, "loss": 0.4}, {**row, "val/sigma": levels.tolist()}]
        line = show.loss_figure(rows).axes[1].lines[0]
        assert_close(torch.tensor(line.get_xdata()), torch.tensor([0.1, 10.0]).double())
        assert_close(torch.tensor(line.get_ydata()), torch.tensor([0.2, 0.3]).double())
    assert len(show.loss_figure(rows, per_sigma=False).axes) == 1
    assert show.loss_plot([]).width > 500
    with pytest.raises(UserError, match="do not match"):
        show.loss_figure([{**row, "val/sigma": [1.0, 2.0, 3.0, 4.0]}])
