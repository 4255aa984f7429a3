"""Where images to evaluate come from, the small nets that look at them, and what is kept of a reference."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nanodiffusion.data import TensorData, folder
from nanodiffusion.errors import UserError
from nanodiffusion.evaluate import Images, Sides, moments, of_data, open_images, scores, summarise
from nanodiffusion.evaluate.features import OWN, Features, fit_small, load_small, trained_small
from nanodiffusion.evaluate.scores import METRICS, called, usual
from nanodiffusion.evaluate.statistics import Statistics, cached, check_same, load, save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))


def pixels(n: int = 30, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=g)


def of(x: Tensor, labels: Tensor | None = None) -> Images:
    return of_data(TensorData(x, labels), "made")


def whole(images: Images, batch: int = 7) -> Tensor:
    return torch.cat(list(images.batches(batch)))


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (n 1 8 8) of stripes along either axis, and which."""
    labels = torch.arange(n) % 2
    wave = (torch.arange(8) % 2 * 200).float()
    plain = torch.where(labels[:, None, None] == 0, wave.expand(n, 8, 8), wave[:, None].expand(n, 8, 8))
    noise = 20 * torch.randn(n, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (plain + noise + 20).clamp(0, 255).to(torch.uint8)[:, None], labels


# ---- images


def test_arrays_folders_and_data_sets_give_the_same_images_in_the_same_order(tmp_path: Path):
    x = pixels()
    np.savez(tmp_path / "x.npz", arr_0=x.permute(0, 2, 3, 1).numpy(), labels=np.arange(30) % 3)
    np.savez_compressed(tmp_path / "first.npz", x=x.numpy())
    (tmp_path / "images").mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i:04d}.png")
    names = [tmp_path / "x.npz", tmp_path / "first.npz", tmp_path / "images"]
    for images in (*map(open_images, map(str, names)), of(x)):
        assert (images.n, images.shape) == (30, (3, 8, 8))
        torch.testing.assert_close(whole(images), x, rtol=0, atol=0)
    torch.testing.assert_close(open_images(str(names[0])).labels, torch.arange(30) % 3)


def test_floats_are_the_levels_they_stand_for(tmp_path: Path):
    x = pixels(channels=1)
    np.savez(tmp_path / "x.npz", arr_0=(x.permute(0, 2, 3, 1).double() / 127.5 - 1).numpy())
    torch.testing.assert_close(whole(open_images(str(tmp_path / "x.npz"))), x, rtol=0, atol=0)


def test_grey_folders_stay_grey_and_class_folders_are_labels(tmp_path: Path):
    x = pixels(6, channels=1)
    for i, image in enumerate(x):
        place = tmp_path / f"class {i % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{i}.png")
    images = open_images(str(tmp_path))
    assert (images.shape, images.classes, images.labels.tolist()) == (
        (1, 8, 8),
        ("class 0", "class 1"),
        [0, 0, 0, 1, 1, 1],
    )
    torch.testing.assert_close(whole(images), torch.cat([x[0::2], x[1::2]]), rtol=0, atol=0)


def test_a_size_cuts_images_as_training_does(tmp_path: Path):
    for i, size in enumerate(((12, 20), (16, 16), (9, 8))):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
    torch.testing.assert_close(whole(open_images(str(tmp_path), size=8)), folder(str(tmp_path), 8).x, rtol=0, atol=0)


def test_the_first_n_are_the_first_n(tmp_path: Path):
    images = of(x := pixels(20), torch.arange(20))
    few = images.first(9)
    torch.testing.assert_close(whole(few, 4), x[:9], rtol=0, atol=0)
    assert (few.n, few.labels.tolist()) == (9, list(range(9))) and few.sha256 != images.sha256


def test_hashes_tell_images_apart_and_files_by_their_content(tmp_path: Path):
    x = pixels()
    assert of(x).sha256 == of(x.clone()).sha256 != of(pixels(seed=1)).sha256
    assert of(x).sha256 != of(x, torch.arange(30)).sha256
    np.savez(tmp_path / "x.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    assert open_images(str(tmp_path / "x.npz")).sha256 == hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()


# ---- features


def test_a_small_net_tells_the_classes_apart_and_is_the_same_each_time():
    images = of(*stripes(200, 0))
    net = fit_small(images, steps=40)
    x, labels = stripes(100, 1)
    assert (net(x.float() / 127.5 - 1).argmax(1) == labels).float().mean() > 0.95
    again = fit_small(images, steps=40)
    torch.testing.assert_close(net.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_a_small_net_is_kept_for_its_data_and_read_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanodiffusion.evaluate.features.STEPS", 5)
    images = of(*stripes(60, 0))
    file = trained_small(images)
    before = file.stat().st_mtime_ns
    assert trained_small(of(*stripes(60, 0))) == file and file.stat().st_mtime_ns == before
    assert trained_small(of(*stripes(60, 1))) != file
    x = stripes(9, 2)[0]
    expected = load_small(file).features(x.float() / 127.5 - 1)
    torch.testing.assert_close(OWN["small"](images, "cpu")(of(x)), expected.detach())


@pytest.mark.parametrize("name", ["random", "pixels"])
def test_untrained_features_do_not_depend_on_batches_or_chance(name: str):
    images = of(pixels(20, size=9))
    torch.manual_seed(1)
    first = OWN[name](images, "cpu")(images, 3)
    torch.manual_seed(2)
    torch.testing.assert_close(first, OWN[name](images, "cpu")(images, 20), rtol=1e-5, atol=1e-6)
    assert len(first) == 20


def test_training_a_small_net_leaves_the_global_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fit_small(of(*stripes(20, 0)), steps=2)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


# ---- statistics and scores


def made(dim: int = 4, name: str = "made", sha256: str = "1", resize: str = "") -> Features:
    return Features(name, sha256, resize, dim, lambda x: x.flatten(1)[:, :dim].float() / 255)


def test_stored_statistics_are_the_same_and_others_can_read_them(tmp_path: Path):
    images = of(pixels(40), torch.arange(40) % 3)
    x = made()(images)
    found = summarise(x, images, made())
    save(tmp_path / "s.npz", found)
    again = load(tmp_path / "s.npz")
    assert (again.n, again.classes, again.about) == (40, images.classes, found.about)
    for a, b in (
        (again.moments.mean, found.moments.mean),
        (again.moments.factor, found.moments.factor),
        (again.examples, found.examples),
        (again.labels, found.labels),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with np.load(tmp_path / "s.npz") as arrays:
        np.testing.assert_allclose(arrays["mu"], x.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(arrays["sigma"], np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)


def test_a_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    images = of(pixels(40))
    first = cached(images, made())
    monkeypatch.setattr(Features, "__call__", lambda *_: pytest.fail("computed again"))
    torch.testing.assert_close(cached(of(pixels(40)), made()).examples, first.examples, rtol=0, atol=0)
    for other in (made(sha256="2"), made(resize="tf1")):
        with pytest.raises(pytest.fail.Exception):
            cached(images, other)


def test_statistics_of_other_tools_are_taken_with_a_note(tmp_path: Path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    known = load(tmp_path / "s.npz")
    assert (known.n, known.examples) == (0, None)
    assert check_same(known, made(), "s.npz") == ["the reference does not say of which features and resizing it is"]
    sides = Sides(torch.randn(50, 4), None, known)
    assert usual(sides) == ["frechet"]
    with pytest.raises(UserError, match="moments only"):
        scores(sides, ["precision"])


def test_of_another_programs_file_only_the_statistics_are_read(tmp_path: Path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4), dataset="cifar10", arr_0=np.array(["x"] * 3))
    found = load(tmp_path / "s.npz").moments
    torch.testing.assert_close(found.covariance, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(found.mean, torch.zeros(4, dtype=torch.float64))


def test_other_features_are_refused():
    images = of(pixels(40))
    known = summarise(made()(images), images, made())
    for other in (made(sha256="2"), made(resize="tf1"), made(dim=5)):
        with pytest.raises(UserError, match="statistics of other features"):
            check_same(known, other, "s.npz")


def test_scores_order_three_samples_of_known_quality():
    def sides(seed: int, noise: float) -> Sides:
        x, labels = stripes(300, seed)
        noisy = (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 255)
        return Sides(noisy.flatten(1) / 127.5 - 1, labels, reference)

    real, labels = stripes(300, 0)
    examples = real.flatten(1) / 127.5 - 1
    reference = Statistics(moments(examples), examples, labels, ("0", "1"))
    good, fair, poor = (scores(sides(i + 1, noise)) for i, noise in enumerate((0, 15, 150)))
    assert list(good) == list(METRICS)
    for name in ("frechet", "kernel"):
        assert good[name].value < fair[name].value < poor[name].value
    for name in ("precision", "density", "coverage"):
        assert good[name].value > fair[name].value >= poor[name].value
    assert good["accuracy"].value == 1 and poor["accuracy"].value < 1
    for score in good.values():
        assert score.low <= score.value <= score.high and score.interval


def test_accuracy_is_had_only_where_classes_are_the_same():
    images = of(pixels(40), torch.arange(40) % 3)
    reference = summarise(made()(images), images, made())
    x = torch.rand(20, 4)
    assert "accuracy" in usual(Sides(x, torch.zeros(20, dtype=torch.int64), reference))
    without = [
        Sides(x, None, reference),
        Sides(x, torch.full((20,), 3), reference),
        Sides(x, torch.zeros(20, dtype=torch.int64), reference, ("a", "b", "c")),
    ]
    for sides in without:
        assert "accuracy" not in usual(sides)
        with pytest.raises(UserError, match="no class accuracy"):
            scores(sides, ["accuracy"])


def test_only_the_published_weights_make_an_fid():
    assert [called(m, "inception", True) for m in ("frechet", "kernel", "recall")] == ["FID", "KID", "recall"]
    assert called("frechet", "small", False) == "frechet_distance (features: small)"


# ---- what is refused

NPZ = {
    "NaN": ({"arr_0": np.full((3, 8, 8, 3), np.nan, np.float32)}, "NaN"),
    "unknown range": ({"arr_0": np.full((3, 8, 8, 3), 255.0, np.float32)}, "unknown range"),
    "channels": ({"arr_0": np.zeros((3, 4, 8, 8), np.uint8)}, "no images"),
    "points": ({"x": np.zeros((3, 2), np.float32)}, "no images"),
    "whole numbers": ({"arr_0": np.zeros((3, 8, 8, 3), np.int64)}, "no images"),
    "objects": ({"arr_0": np.array([{}, {}], object)}, "cannot be read"),
    "labels": ({"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "labels": np.arange(4)}, "one label per image"),
    "another key": ({"picture": np.zeros((3, 8, 8, 3), np.uint8)}, "holds no images"),
}


@pytest.mark.parametrize("case", NPZ)
def test_arrays_that_are_no_images_are_refused(case: str, tmp_path: Path):
    arrays, said = NPZ[case]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=said):
        whole(open_images(str(tmp_path / "x.npz")))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_damaged_arrays_are_refused(share: float, tmp_path: Path):
    file = tmp_path / "x.npz"
    np.savez(file, arr_0=pixels().permute(0, 2, 3, 1).numpy())
    raw = file.read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match="cannot be read"):
        whole(open_images(str(file)))


def test_a_flipped_byte_is_noticed(tmp_path: Path):
    file = tmp_path / "x.npz"
    np.savez(file, arr_0=pixels().permute(0, 2, 3, 1).numpy())
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read"):
        whole(open_images(str(file)))


STATISTICS = {
    "shapes": ({"mu": np.zeros(4), "sigma": np.eye(3)}, "do not fit"),
    "NaN": ({"mu": np.zeros(4), "sigma": np.full((4, 4), np.nan)}, "NaN"),
    "another file": ({"arr_0": np.zeros(4)}, "no statistics"),
    "texts": ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "mu of <U1"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_cannot_be_are_refused(case: str, tmp_path: Path):
    arrays, said = STATISTICS[case]
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "s.npz")


def test_features_that_images_do_not_fit_are_refused():
    features = OWN["random"](of(pixels(size=16)), "cpu")
    with pytest.raises(UserError, match="another size"):
        features(of(pixels(size=8)))
    with pytest.raises(UserError, match="too large"):
        OWN["pixels"](of(pixels(3, size=64)), "cpu")
    with pytest.raises(UserError, match="too small"):
        OWN["random"](of(pixels(size=3)), "cpu")
    with pytest.raises(UserError, match="trained on labels"):
        OWN["small"](of(pixels()), "cpu")
    with pytest.raises(UserError, match="no images"):
        of_data(TensorData(torch.zeros(5, 2)), "points")


def test_grey_images_beside_coloured_ones_are_three_channels_alike():
    grey, colour = of(pixels(channels=1)), of(pixels(channels=3, seed=1))
    both = grey.in_colour(colour)
    assert torch.equal(whole(both), pixels(channels=1).expand(-1, 3, -1, -1)) and both.sha256 != grey.sha256
    assert grey.in_colour(of(pixels(channels=1))) is grey and colour.in_colour(grey) is colour
