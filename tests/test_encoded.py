"""Encoded data sets: bytes for latents, batches as pure functions of their draws, outpainting, files that may be wrong."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from nanodiffusion.data import (
    EncodedData,
    dequantise,
    load_data,
    map_labels,
    only_classes,
    quantise,
    split,
    subset,
    without_labels,
)
from nanodiffusion.data.encoded import FORMAT, manifest_bytes, open_half
from nanodiffusion.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=12, flip=False, **more):
    """A set whose every number tells its place."""
    x = torch.arange(n * 2 * 3 * 5, dtype=torch.float32).reshape(n, 2, 3, 5)
    flipped = -x.flip(3) if flip else None
    pooled = torch.arange(n * 7).reshape(n, 7).half()
    return EncodedData(x, flipped=flipped, labels=torch.arange(n) % 3, classes=("a", "b", "c"), pooled=pooled, **more)


# -- bytes for latents -------------------------------------------------------------------------------------------------

DRAWS = {
    "uniform": lambda: (torch.rand(200_000, generator=generator()) * 2 - 1) * 20,
    "normal": lambda: (torch.randn(200_000, generator=generator()) * 4).clamp(-20, 20),
    "narrow": lambda: torch.randn(200_000, generator=generator()) * 0.5,
}


def bias_and_error(levels, x, limit):
    """From the levels' values by their definition: level k of 256 lies at limit (2 k / 255 - 1)."""
    error = limit * (2 * levels.double() / 255 - 1) - x.double()
    return float(error.mean()), float(error.abs().max())


@pytest.mark.parametrize("name", DRAWS)
def test_levels_are_the_nearest_and_have_no_bias(name):
    x, half_a_step = DRAWS[name](), 20 / 255
    bias, error = bias_and_error(quantise(x, 20.0), x, 20)
    assert abs(bias) < 1e-3 and error <= half_a_step + 1e-5
    truncated = ((x / 20 + 1) / 2 * 255).to(torch.uint8)
    bias, error = bias_and_error(truncated, x, 20)
    assert not (abs(bias) < 1e-3 or error <= half_a_step + 1e-5)
    assert bias == pytest.approx(-half_a_step, abs=2e-3)


def test_the_ends_of_the_range_come_back_exactly_and_what_is_beyond_is_cut():
    x = torch.tensor([-20.0, 20.0, -21.0, 1e6, -1e6, 0.0])
    back = dequantise(quantise(x, 20.0), 20.0)
    torch.testing.assert_close(back[:5], torch.tensor([-20.0, 20, -20, 20, -20]), rtol=0, atol=1e-5)
    assert abs(float(back[5])) <= 20 / 255 + 1e-6


@pytest.mark.parametrize("limit", [1.0, 3.7, 20.0])
def test_every_level_comes_back_as_itself_and_levels_are_symmetric(limit):
    levels = torch.arange(256, dtype=torch.uint8)
    values = dequantise(levels, limit)
    torch.testing.assert_close(quantise(values, limit), levels)
    torch.testing.assert_close(values, -values.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(
        values.double(), torch.linspace(-limit, limit, 256, dtype=torch.float64), rtol=0, atol=limit * 1e-6
    )


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_the_numbers_name():
    data = make()
    index = torch.tensor([3, 0, 3, 11])
    x0, cond = data.batch(index)
    torch.testing.assert_close(x0, data.x[[3, 0, 3, 11]], rtol=0, atol=0)
    torch.testing.assert_close(cond["label"], torch.tensor([0, 0, 0, 2]))
    torch.testing.assert_close(cond["pooled"], torch.arange(84).reshape(12, 7)[[3, 0, 3, 11]].float())
    assert data.draws == 0 and data.shape == (2, 3, 5) and len(data) == 12


def test_bytes_come_as_their_values_times_the_scale():
    levels = torch.randint(0, 256, (6, 4, 2, 2), generator=generator(), dtype=torch.uint8)
    x0, cond = EncodedData(levels, limit=20.0, scale=0.125).batch(torch.arange(6))
    torch.testing.assert_close(x0, (levels.double() / 255 * 40 - 20).div(8).float())
    assert cond == {}


def test_a_flip_is_the_stored_mirror_encoding_and_never_a_mirrored_latent():
    data = make(flip=True)
    index, u = torch.arange(12), torch.rand(12, 1, generator=generator())
    x0, _ = data.batch(index, u)
    expected = torch.stack([data.flipped[i] if u[i, 0] < 0.5 else data.x[i] for i in range(12)])
    torch.testing.assert_close(x0, expected, rtol=0, atol=0)
    assert data.draws == 1 and 0 < int((u < 0.5).sum()) < 12
    torch.testing.assert_close(data.batch(index)[0], data.x, rtol=0, atol=0)


def test_a_batch_leaves_the_data_as_it_is_and_is_a_function_of_its_draws():
    data = make(flip=True, outpaint=0.5)
    before = data.x.clone()
    u = torch.rand(12, data.draws, generator=generator())
    first, cond = data.batch(torch.arange(12), u)
    again, cond_again = data.batch(torch.arange(12), u)
    torch.testing.assert_close((first, cond), (again, cond_again), rtol=0, atol=0)
    one = [data.batch(torch.tensor([i]), u[i : i + 1]) for i in range(12)]
    torch.testing.assert_close(first, torch.cat([x for x, _ in one]), rtol=0, atol=0)
    torch.testing.assert_close(cond["mask"], torch.cat([c["mask"] for _, c in one]), rtol=0, atol=0)
    first.add_(1)
    cond["concat"].add_(1)
    torch.testing.assert_close(data.x, before, rtol=0, atol=0)


# -- outpainting -------------------------------------------------------------------------------------------------------


def test_each_half_is_open_for_its_quarter_of_the_share():
    x0 = torch.ones(5, 1, 4, 6)
    masks = open_half(x0, torch.tensor([0.0, 0.11, 0.21, 0.39, 0.41]), 0.4)[:, 0]
    left, right, top, bottom = (torch.zeros(4, 6) for _ in range(4))
    left[:, :3], right[:, 3:], top[:2], bottom[2:] = 1, 1, 1, 1
    torch.testing.assert_close(masks, torch.stack([left, right, top, bottom, torch.ones(4, 6)]), rtol=0, atol=0)


def test_the_known_half_is_given_and_the_loss_is_on_the_other():
    data = make(outpaint=1.0)
    assert data.draws == 1
    u = torch.rand(12, 1, generator=generator())
    x0, cond = data.batch(torch.arange(12), u)
    torch.testing.assert_close(cond["concat"] + cond["mask"] * x0, x0, rtol=0, atol=0)
    assert cond["mask"].shape == (12, 1, 3, 5) and bool(((cond["mask"] == 0) | (cond["mask"] == 1)).all())
    known = (cond["mask"] == 0).expand_as(x0)
    assert bool((cond["concat"][~known] == 0).all()) and bool((cond["mask"].flatten(1).mean(1) < 0.5).all())


def test_where_nothing_is_known_everything_is_drawn():
    data = make(outpaint=0.25)
    for u in (None, torch.full((4, 1), 0.25), torch.full((4, 1), 0.999)):
        x0, cond = data.batch(torch.arange(4), u)
        torch.testing.assert_close(cond["concat"], torch.zeros_like(x0), rtol=0, atol=0)
        torch.testing.assert_close(cond["mask"], torch.ones(4, 1, 3, 5), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_share_of_outpainted_draws_is_the_one_asked_for_and_the_sides_are_alike_often(share):
    u = torch.rand(40_000, generator=generator())
    masks = open_half(torch.zeros(40_000, 1, 2, 2), u, share).flatten(1)
    kinds = {(1, 0, 1, 0): 0, (0, 1, 0, 1): 1, (1, 1, 0, 0): 2, (0, 0, 1, 1): 3, (1, 1, 1, 1): 4}
    counts = torch.zeros(5)
    for pattern, number in kinds.items():
        counts[number] = (masks == torch.tensor(pattern)).all(1).sum()
    expected = torch.tensor([share / 4] * 4 + [1 - share]) * 40_000
    assert counts.sum() == 40_000
    torch.testing.assert_close(counts, expected, rtol=0, atol=500)


# -- parts of a set ----------------------------------------------------------------------------------------------------


def test_a_subset_is_those_samples_in_that_order_and_so_is_a_subset_of_it():
    data = make(flip=True)
    twice = subset(subset(data, [7, 5, 2, 9]), [3, 0])
    x0, cond = twice.batch(torch.tensor([0, 1]))
    torch.testing.assert_close(x0, data.x[[9, 7]], rtol=0, atol=0)
    torch.testing.assert_close(cond["label"], torch.tensor([0, 1]))
    torch.testing.assert_close(cond["pooled"], data.pooled[[9, 7]].float(), rtol=0, atol=0)
    torch.testing.assert_close(twice.batch(torch.arange(2), torch.zeros(2, 1))[0], data.flipped[[9, 7]], rtol=0, atol=0)
    assert twice.x.data_ptr() == data.x.data_ptr() and twice.classes == data.classes


def test_a_split_is_disjoint_and_stratified():
    train, test = split(make(30), 0.2, seed=3)
    assert (len(train), len(test)) == (24, 6)
    assert test.labels.bincount().tolist() == [2, 2, 2]
    rows = sorted([*train.rows.tolist(), *test.rows.tolist()])
    assert rows == list(range(30))
    again = split(test, 0.5, seed=1)
    assert sorted([*again[0].rows.tolist(), *again[1].rows.tolist()]) == sorted(test.rows.tolist())


def test_classes_can_be_chosen():
    chosen = only_classes(make(), "c", "a")
    x0, cond = chosen.batch(torch.arange(len(chosen)))
    assert chosen.classes == ("c", "a") and len(chosen) == 8
    torch.testing.assert_close(cond["label"], torch.tensor([1, 0] * 4))
    torch.testing.assert_close(x0, make().x[[0, 2, 3, 5, 6, 8, 9, 11]], rtol=0, atol=0)


def test_labels_can_be_mapped_and_left_out():
    data = map_labels(make(), {0: 1, 1: 0, 2: 1})
    torch.testing.assert_close(data.batch(torch.arange(4))[1]["label"], torch.tensor([1, 0, 1, 1]))
    assert data.classes == ("b", "a+c")
    bare = without_labels(make())
    assert set(bare.batch(torch.arange(4))[1]) == {"pooled"} and bare.classes == ()


def test_the_device_has_everything():
    moved = make(flip=True, outpaint=0.5).to("meta")
    parts = [moved.x, moved.flipped, moved.labels, moved.pooled]
    assert all(part.is_meta and len(part) == 12 for part in parts)
    few = subset(make(flip=True), [5, 3]).to("meta")
    assert few.x.shape == few.flipped.shape == (2, 2, 3, 5) and len(few) == len(few.pooled) == 2
    data = make()
    assert data.to("cpu") is data


# -- a folder ----------------------------------------------------------------------------------------------------------


def write_folder(folder, n=10, limit=2.0, text=True):
    """An encoded folder, written by hand."""
    import hashlib

    folder.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(0)
    np.save(folder / "latents.npy", g.integers(0, 256, (n, 2, 4, 4), np.uint8))
    np.save(folder / "labels.npy", np.arange(n) % 2)
    if text:
        np.save(folder / "pooled.npy", g.normal(size=(n, 3)).astype(np.float16))
        lines = [json.dumps({"key": str(i), "caption": f"number {i} \u2028 line"}) for i in range(n)]
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    files = {
        f.name: {"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in folder.iterdir()
    }
    manifest = {
        "format": FORMAT,
        "count": n,
        "shape": [2, 4, 4],
        "latents": {"file": "latents.npy", "dtype": "uint8", "limit": limit},
        "flipped": None,
        "labels": "labels.npy",
        "classes": ["even", "odd"],
        "pooled": {"file": "pooled.npy", "dim": 3} if text else None,
        "captions": "captions.jsonl" if text else None,
        "codec": {"where": "some/vae"},
        "text": {"where": "words:3"} if text else None,
        "files": files,
    }
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    return folder


def test_a_folder_reads_back(tmp_path):
    data = load_data("encoded", path=str(write_folder(tmp_path)), verify=True)
    levels = np.load(tmp_path / "latents.npy")
    x0, cond = data.batch(torch.arange(10))
    torch.testing.assert_close(x0, torch.from_numpy(levels / 255 * 4 - 2).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(cond["pooled"], torch.from_numpy(np.load(tmp_path / "pooled.npy")).float())
    assert (data.codec, data.text, data.classes) == ("some/vae", "words:3", ("even", "odd"))
    assert data.captions[3] == "number 3 \u2028 line" and subset(data, [4, 1]).captions[1] == data.captions[1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_the_files_are_mapped_and_not_read(tmp_path):
    mapped = lambda: {
        Path(line.split()[-1]).name
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
    }
    data = load_data("encoded", path=str(write_folder(tmp_path)))
    assert mapped() == {"latents.npy", "labels.npy", "pooled.npy"}
    data = split(data.to("cpu"), 0.2)[0]
    assert {"latents.npy", "pooled.npy"} <= mapped()
    np.save(tmp_path / "z.npy", np.zeros((3, 4, 2, 2), np.float16))
    data = load_data("latents", path=str(tmp_path / "z.npy"))
    assert "z.npy" in mapped() and len(data) == 3


def test_a_folder_without_texts_has_none(tmp_path):
    data = load_data("encoded", path=str(write_folder(tmp_path, text=False)))
    assert data.captions == () and data.text == "" and set(data.batch(torch.arange(2))[1]) == {"label"}


def test_the_test_set_is_its_own_folder_or_a_fraction(tmp_path):
    write_folder(tmp_path / "train", 8), write_folder(tmp_path / "test", 4)
    assert [len(load_data("encoded", path=str(tmp_path), split=s)) for s in ("train", "test")] == [8, 4]
    parts = [load_data("encoded", path=str(tmp_path / "train"), split=s, test_fraction=0.25) for s in ("train", "test")]
    assert [len(p) for p in parts] == [6, 2]
    assert not set(parts[0].rows.tolist()) & set(parts[1].rows.tolist())


# -- arrays of others --------------------------------------------------------------------------------------------------


def test_the_arrays_of_transformer_latent_diffusion_read_from_npy_and_from_hdf5(tmp_path):
    g = np.random.default_rng(1)
    levels, texts = g.integers(0, 256, (6, 4, 8, 8), np.uint8), g.normal(size=(6, 768)).astype(np.float16)
    for name, values in (("image_latents", levels), ("text_encodings", texts), ("val", texts[:2])):
        np.save(tmp_path / f"{name}.npy", values)
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file.create_dataset(name, data=values)
    for suffix in ("npy", "hdf5"):
        paths = {"path": "image_latents", "text_path": "text_encodings", "val_path": "val"}
        data = load_data("latents", **{k: str(tmp_path / f"{v}.{suffix}") for k, v in paths.items()})
        x0, cond = data.batch(torch.arange(6))
        expected = (levels.astype(np.float64) / 255 * 2 - 1) * 20 / 8
        torch.testing.assert_close(x0, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(cond["pooled"], torch.from_numpy(texts).float(), rtol=0, atol=0)
        torch.testing.assert_close(data.prompts, torch.from_numpy(texts[:2]).float(), rtol=0, atol=0)


def test_floats_are_read_as_they_are_and_labels_beside_them(tmp_path):
    values = np.random.default_rng(2).normal(size=(5, 4, 2, 2))
    for kind in (np.float16, np.float32):
        np.save(tmp_path / "x.npy", values.astype(kind))
        with h5py.File(tmp_path / "x.hdf5", "w") as file:
            file.create_dataset("train", data=values.astype(kind))
        x0, _ = load_data("latents", path=str(tmp_path / "x.hdf5")).batch(torch.arange(5))  # divided by 8
        torch.testing.assert_close(x0, torch.from_numpy(values.astype(kind).astype(np.float64) / 8).float())
        np.save(tmp_path / "y.npy", np.array([0, 1, 2, 1, 0], np.int32))
        data = load_data("latents", path=str(tmp_path / "x.npy"), label_path=str(tmp_path / "y.npy"), scale=1.0)
        x0, cond = data.batch(torch.arange(5))
        torch.testing.assert_close(x0, torch.from_numpy(values.astype(kind)).float(), rtol=0, atol=0)
        torch.testing.assert_close(cond["label"], torch.tensor([0, 1, 2, 1, 0]))


# -- bad inputs --------------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    """Change the manifest as a person would, in an editor."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1, sort_keys=True))


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def forge(folder, **changes):
    """A manifest that is sound in itself but lies."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


WRONG = {
    "no such folder": (lambda f: None, {"path": "nothing/here"}, "nothing is encoded"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), {}, "nothing is encoded"),
    "manifest edited": (lambda f: edit(f, classes=["one", "two"]), {}, "manifest is damaged"),
    "manifest cut": (lambda f: cut(f / "manifest.json"), {}, "manifest is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), {}, "manifest is damaged"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), {}, "manifest is damaged"),
    "another format": (lambda f: forge(f, format="theirs"), {}, "manifest is damaged"),
    "fields missing": (lambda f: forge(f, latents=None), {}, "manifest is damaged"),
    "another count": (lambda f: forge(f, count=11), {}, "not those of the manifest"),
    "outside": (lambda f: forge(f, files={"../x": {"size": 1}}), {}, "outside its folder"),
    "latents cut": (lambda f: cut(f / "latents.npy"), {}, "not as it was"),
    "latents gone": (lambda f: (f / "latents.npy").unlink(), {}, "no such file"),
    "a bit flipped": (lambda f: flip_a_bit(f / "latents.npy"), {"verify": True}, "not as it was"),
    "no mirrored images": (lambda f: None, {"flip": True}, "mirrored images"),
    "no test part": (lambda f: None, {"split": "test"}, "no test part"),
    "unknown split": (lambda f: None, {"split": "tset"}, "unknown split"),
    "share above one": (lambda f: None, {"outpaint": 1.5}, "no share"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_is_wrong_is_one_message(tmp_path, name):
    spoil, options, words = WRONG[name]
    spoil(write_folder(tmp_path / "set"))
    with pytest.raises(UserError, match=words) as caught:
        load_data("encoded", **{"path": str(tmp_path / "set"), **options})
    assert len(str(caught.value).splitlines()) <= 6


def save(path, values):
    if path.suffix == ".npy":
        np.save(path, values, allow_pickle=True)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=values)


GOOD = np.zeros((3, 4, 2, 2), np.float32)
WRONG_ARRAYS = {
    "pickle": ("x.npy", lambda p: save(p, np.array([{}, 1], object)), {}, "cannot be read"),
    "cut": ("x.npy", lambda p: (save(p, GOOD), cut(p)), {}, "cannot be read"),
    "no hdf5": ("x.hdf5", lambda p: p.write_bytes(b"PK" * 99), {}, "cannot be read"),
    "empty hdf5": ("x.hdf5", lambda p: h5py.File(p, "w").close(), {}, "cannot be read"),
    "missing": ("x.npy", lambda p: None, {}, "cannot be read"),
    "another kind": ("x.pt", lambda p: p.write_bytes(b"x"), {}, "file type"),
    "three axes": ("x.npy", lambda p: save(p, GOOD[0]), {}, "no latents"),
    "doubles": ("x.npy", lambda p: save(p, GOOD.astype(np.float64)), {}, "no latents"),
    "not finite": ("x.npy", lambda p: save(p, GOOD + np.array([0, np.inf], np.float32)), {}, "NaN or infinity"),
    "texts": ("x.npy", lambda p: save(p, np.array(["a", "b"])), {}, "cannot be read"),
    "negative limit": ("x.npy", lambda p: save(p, GOOD.astype(np.uint8)), {"limit": -20.0}, "positive"),
    "no test part": ("x.npy", lambda p: save(p, GOOD), {"split": "test"}, "no test part"),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_an_array_that_is_wrong_is_one_message(tmp_path, name):
    file, write, options, words = WRONG_ARRAYS[name]
    write(tmp_path / file)
    with pytest.raises(UserError, match=words) as caught:
        load_data("latents", path=str(tmp_path / file), **options)
    assert len(str(caught.value).splitlines()) <= 6


def test_parts_that_do_not_belong_together_are_one_message(tmp_path):
    data = make()
    for name, part in (
        ("pooled", torch.zeros(11, 7)),
        ("labels", torch.zeros(13, dtype=torch.int64)),
        ("flipped", data.x.half()),
    ):
        with pytest.raises(UserError) as caught:
            replace(data, **{name: part})
        assert len(str(caught.value).splitlines()) <= 6
    save(tmp_path / "x.npy", GOOD), save(tmp_path / "t.npy", np.zeros((2, 5), np.float16))
    with pytest.raises(UserError, match="belong"):
        load_data("latents", path=str(tmp_path / "x.npy"), text_path=str(tmp_path / "t.npy"))
    with pytest.raises(UserError, match="vectors"):
        load_data("latents", path=str(tmp_path / "x.npy"), text_path=str(tmp_path / "x.npy"))
