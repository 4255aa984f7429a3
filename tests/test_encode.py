"""Encoding: bytes that depend on the settings alone, whatever kills it, whoever shares the work; sources; bad inputs.

As a program, `python -m tests.test_encode JOB.json`, it encodes under kills and as two processes: forked, from one thread.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanodiffusion.cli import main
from nanodiffusion.codec import AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.data import load_data
from nanodiffusion.data.encoded import read_manifest
from nanodiffusion.distributed import World, world
from nanodiffusion.encode import EncodeConfig, Encoder, Found, Source, square
from nanodiffusion.errors import UserError
from nanodiffusion.pretrained import load_codec
from nanodiffusion.pretrained.architecture import vae_json
from nanodiffusion.tensors import save_tensors
from nanodiffusion.text import open_text
from tests.test_shards import FAULTS, dirty_set
from tests.tiny import IMAGES, dies_at_sync, forked, make_runner

pytestmark = pytest.mark.usefixtures("one_thread")

N = 20  # sound samples in the shards
SIZE = 16


def contents(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def unlike(a, b):
    """The names of files that two folders do not share, or not with the same bytes."""
    ours, theirs = contents(a), contents(b)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def encode(out, w=None, **options):
    """Encode into `out`, silently."""
    return Encoder(EncodeConfig(**options), out, w or World(), lambda text: None).run()


# -- what there is to encode -------------------------------------------------------------------------------------------


def picture(i, width=18, height=16):
    """Smooth colours that tell i."""
    g = np.random.default_rng(i)
    small = Image.fromarray(g.integers(0, 256, (3, 3, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_shards(folder):
    """Three shards of twenty sound samples, one without a caption, and one that is no picture."""
    from nanodiffusion.data.shards import Sample, encode_sample, write_shard

    cuts = (0, 9, 13, N)
    for k in range(3):
        rows = [
            encode_sample(Sample(f"{i:04d}", picture(i, 14 + i), f"picture {i}" * (i != 5), i % 4, {}, ""))
            for i in range(cuts[k], cuts[k + 1])
        ]
        if k == 1:
            rows.insert(1, ("bad", {"png": b"this is no picture", "txt": b"no", "cls": b"1"}))
        write_shard(folder / f"{k:05d}.tar", rows)
    return folder


def write_codec(folder, channels=3):
    """A tiny KL autoencoder of factor 2 in diffusers' layout, of random weights."""
    config = AutoencoderKLConfig(channels=channels, widths=(4, 8), blocks=1, groups=2)
    g = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(v.shape, generator=g) / v[0].numel() ** 0.5 for k, v in codec_shapes(config).items()}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {})
    (folder / "config.json").write_text(json.dumps(vae_json(config)))
    return folder


def codec_shapes(config):
    with torch.device("meta"):
        return AutoencoderKL(config).state_dict()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `shards`, `codec` and, of all settings that are random or shared, the encoding `whole`."""
    folder = tmp_path_factory.mktemp("encode")
    write_shards(folder / "shards")
    write_codec(folder / "codec")
    encode(folder / "whole", **options_of(folder))
    return folder


def options_of(place, **more):
    """Everything at work: posterior samples, mirrored pictures, words, parts of two batches."""
    paths = {"source": str(place / "shards"), "codec": str(place / "codec"), "text": "words:8"}
    return {**paths, "size": SIZE, "batch": 2, "part": 4, "flip": True, "sample": "posterior", "seed": 3, **more}


def images():
    """The sound samples' squares, as the encoder is to see them: uint8 (n 3 h w)."""
    return np.stack([square(picture(i, 14 + i), SIZE, 3) for i in range(N)])


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_latents_are_the_codecs_of_every_sound_sample_and_of_its_mirror_image(place, tmp_path):
    encode(tmp_path / "x", **options_of(place, sample="mean", quantise=False, dtype="float32"))
    data = load_data("encoded", path=str(tmp_path / "x"), flip=True, verify=True)
    codec = load_codec(place / "codec", device="cpu")
    for stored, pixels in ((data.x, images()), (data.flipped, images()[..., ::-1].copy())):
        image = torch.from_numpy(pixels) / 255 * 2 - 1
        torch.testing.assert_close(stored, codec.encode(image), rtol=0, atol=1e-5)
    assert data.shape == (4, 8, 8) and data.codec == str(place / "codec")
    assert data.labels.tolist() == [i % 4 for i in range(N)]
    assert data.captions == tuple(f"picture {i}" if i != 5 else "" for i in range(N))


def test_bytes_are_within_half_a_level_and_the_range_reaches_to_the_largest_value(place, tmp_path):
    encode(tmp_path / "x", **options_of(place, sample="mean", flip=False))
    data = load_data("encoded", path=str(tmp_path / "x"))
    image = torch.from_numpy(images()) / 255 * 2 - 1
    expected = load_codec(place / "codec", device="cpu").encode(image)
    assert data.limit == pytest.approx(float(expected.abs().max()), rel=1e-5)
    x0, _ = data.batch(torch.arange(N))
    torch.testing.assert_close(x0, expected, rtol=0, atol=data.limit / 255 * 1.001)
    assert data.x.dtype == torch.uint8 and read_manifest(tmp_path / "x")["latents"]["clipped"] == 0


def test_a_given_limit_cuts_and_counts_what_is_beyond(place, tmp_path):
    manifest = encode(tmp_path / "x", **options_of(place, sample="mean", flip=False, limit=0.1))
    image = torch.from_numpy(images()) / 255 * 2 - 1
    expected = load_codec(place / "codec", device="cpu").encode(image)
    assert manifest["latents"]["clipped"] == int((expected.abs() > 0.1).sum()) > 0
    data = load_data("encoded", path=str(tmp_path / "x"))
    torch.testing.assert_close(data.batch(torch.arange(N))[0], expected.clamp(-0.1, 0.1), rtol=0, atol=0.1 / 255 * 1.01)


def test_posterior_samples_have_the_codecs_spread_and_depend_on_the_seed_and_the_sample_alone(place, tmp_path):
    more = {"quantise": False, "dtype": "float32", "text": ""}
    encode(tmp_path / "a", **options_of(place, **more))
    encode(tmp_path / "n", **options_of(place, n=7, **more))
    encode(tmp_path / "b", **options_of(place, **{**more, "seed": 4}))
    a, n, b = (load_data("encoded", path=str(tmp_path / name), flip=True) for name in "anb")
    torch.testing.assert_close(a.x[:7], n.x, rtol=0, atol=1e-6)
    codec = load_codec(place / "codec", device="cpu")
    mean, logvar = codec.moments(torch.from_numpy(images()) / 255 * 2 - 1)
    for data in (a, b):
        noise = (data.x / codec.config.scale - mean) / (0.5 * logvar).exp()
        assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert float((a.x - b.x).abs().max()) > 0.01 and float((a.x - a.flipped).abs().max()) > 0.01


def test_the_pooled_texts_are_the_encoders_and_zeros_where_there_is_none(place):
    pooled = load_data("encoded", path=str(place / "whole")).pooled
    expected = open_text("words:8").encode([f"picture {i}" if i != 5 else "" for i in range(N)])
    torch.testing.assert_close(pooled, expected.half(), rtol=0, atol=0)
    assert bool((pooled[5] == 0).all())


def test_the_manifest_says_what_is_there_and_what_was_left_out(place):
    manifest = read_manifest(place / "whole")
    census = manifest["census"]
    assert (manifest["count"], manifest["faults"], census["without_caption"]) == (N, 1, 1)
    assert census["widths"] == [14, 14 + N - 1] and census["heights"] == [16, 16] and census["smaller"] == 2
    assert "00001.tar:bad" in (place / "whole/faults.txt").read_text()
    files = {f.name for f in (place / "whole").iterdir()}
    arrays = {"latents.npy", "flipped.npy", "pooled.npy", "labels.npy"}
    assert files == {*arrays, "captions.jsonl", "faults.txt", "manifest.json"}
    assert manifest["codec"]["scale"] == 0.18215 and manifest["codec"]["factor"] == 2
    assert len(manifest["codec"]["sha256"]) == len(manifest["text"]["sha256"]) == 64


def test_the_first_n_are_those_of_all(place, tmp_path):
    whole = load_data("encoded", path=str(place / "whole"))
    for n in (1, 9, 10, 19):
        encode(tmp_path / str(n), **options_of(place, n=n, limit=whole.limit))
        data = load_data("encoded", path=str(tmp_path / str(n)))
        assert len(data) == n and data.captions == whole.captions[:n]
        off = (data.x.int() - whole.x[:n].int()).abs().max()  # a last batch that is smaller may round otherwise
        assert int(off) <= 1


def test_pixels_without_a_codec_are_the_bytes_themselves(tmp_path):
    encode(tmp_path / "x", source="digits", text="words:16", n=300, flip=True)
    data, digits = load_data("encoded", path=str(tmp_path / "x"), flip=True), load_data("digits")
    torch.testing.assert_close(data.x, digits.x[:300], rtol=0, atol=0)
    torch.testing.assert_close(data.flipped, digits.x[:300].flip(3), rtol=0, atol=0)
    x0, cond = data.batch(torch.arange(300))
    expected, label = digits.batch(torch.arange(300))
    torch.testing.assert_close(x0, expected)
    torch.testing.assert_close(cond["label"], label["label"])
    assert data.classes == digits.classes and data.captions[:3] == tuple(str(i) for i in label["label"][:3].tolist())
    assert data.codec == "" and data.text == "words:16"


def labelled_shards(folder, metas, labels):
    """One shard of small pictures of those labels, and what their json says."""
    from nanodiffusion.data.shards import Sample, encode_sample, write_shard

    rows = zip(metas, labels, strict=True)
    samples = [Sample(f"{i:04d}", picture(i), "", label, meta, "") for i, (meta, label) in enumerate(rows)]
    write_shard(folder / "00000.tar", map(encode_sample, samples))
    return str(folder)


CAT, FOX = {"class": "cat"}, {"class": "red_fox"}


@pytest.mark.parametrize(
    ("metas", "labels", "names"),
    [
        ([FOX, CAT, FOX], [2, 0, 2], ("cat", "1", "red_fox")),
        ([FOX, CAT, {}], [1, 0, 1], ("0", "1")),
        ([FOX, CAT, CAT], [1, 0, 1], ("0", "1")),
        ([CAT, CAT, CAT], [0, 1, 0], ("0", "1")),
        ([{"class": 3}, CAT, CAT], [1, 0, 0], ("0", "1")),
        ([{"class": "1"}, {"class": "1"}, FOX], [0, 0, 2], ("0", "1", "2")),
    ],
    ids=["named", "one without", "two names", "one name twice", "no text", "another's number"],
)
def test_shards_that_name_every_class_give_their_names(tmp_path, metas, labels, names):
    shards = labelled_shards(tmp_path, metas, labels)
    encode(tmp_path / "x", source=shards, size=8)
    data = load_data("encoded", path=str(tmp_path / "x"))
    assert data.classes == names and data.labels.tolist() == labels


def test_prepared_shards_are_encoded_with_the_names_of_their_folders(tmp_path):
    for name in ("cat", "red fox", "zebra"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            picture(i).save(tmp_path / "pictures" / name / f"{i}.png")
    assert main(["prepare", str(tmp_path / "pictures"), f"out={tmp_path / 'shards'}", "per_shard=4"]) == 0
    encode(tmp_path / "x", source=str(tmp_path / "shards"), size=8)
    assert load_data("encoded", path=str(tmp_path / "x")).classes == ("cat", "red fox", "zebra")


def test_the_test_split_of_a_set_by_name_makes_the_other_half(tmp_path):
    for part in ("train", "test"):
        encode(tmp_path / part, source="digits", split=part, n=50)
    for part in ("train", "test"):
        data = load_data("encoded", path=str(tmp_path), split=part)
        torch.testing.assert_close(data.x, load_data("digits", part).x[:50], rtol=0, atol=0)


def test_a_folder_of_captioned_pictures_is_read_in_the_order_of_its_names(place, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, caption in (("b.png", "second"), ("a.png", None), ("sub/c.png", "third"), (".hidden.png", "no")):
        picture(len(name), 20, 20).save(folder / name)
        if caption:
            (folder / name).with_suffix(".txt").write_text(caption)
    (folder / "z.png").write_bytes(b"no picture")
    manifest = encode(tmp_path / "x", source=str(folder), codec=str(place / "codec"), text="words:8", size=SIZE)
    data = load_data("encoded", path=str(tmp_path / "x"))
    assert data.captions == ("", "second", "third") and manifest["faults"] == 1
    assert "z.png" in (tmp_path / "x/faults.txt").read_text()


def test_faults_of_a_folder_are_listed_and_left_out_and_a_second_reading_finds_the_same(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abcdefg":
        picture(ord(name)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("sound")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.json").write_text("[1]")
    (folder / "d.json").write_text('{"width": 3}')
    (folder / "e.png").write_bytes(b"no picture")
    (folder / "f.png").write_bytes(b"")
    rows = [("g.png", "one"), ("g.png", "two"), ("none.png", "of nothing"), ("../a.png", "outside")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows))
    manifests = [encode(tmp_path / out, source=str(folder), text="words:8", size=SIZE) for out in "xy"]
    assert (tmp_path / "x/faults.txt").read_text().splitlines() == [
        "b.png: the caption is not UTF-8 at byte 3",
        "c.png: the json is not an object",
        "e.png: not a PNG, JPEG or WEBP",
        "f.png: the file is empty",
        "g.png: it has two captions",
        "../a.png: the path leaves the folder",
        "none.png: it has a caption, but there is no such picture",
    ]
    assert contents(tmp_path / "x") == contents(tmp_path / "y") and manifests[0]["faults"] == 7
    assert load_data("encoded", path=str(tmp_path / "x")).captions == ("sound", "")
    assert manifests[0]["census"]["without_caption"] == 1


def test_shards_of_forty_kinds_of_fault_are_encoded_to_their_end_with_the_same_list_every_time(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    shards = dirty_set(folder)
    source = f"{folder}/{{{','.join(s.stem for s in shards)}}}.tar"
    manifests = [encode(tmp_path / out, source=source, size=SIZE) for out in "xy"]
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    faults = (tmp_path / "x/faults.txt").read_text().splitlines()
    wanting = {"no_caption", "blank_caption", "json_without_caption"}  # sound, but without a caption
    named = {kind: sum(bool(re.fullmatch(pattern_of(kind), fault)) for fault in faults) for kind in FAULTS}
    assert named == {kind: int(kind not in wanting) for kind in FAULTS}
    broken = {
        "cut_in_data.tar",
        "cut_in_header.tar",
        "no_end.tar",
        "no_tar.tar",
        "empty.tar",
        "nothing.tar",
        "torn.tar",
    }
    assert {f.split(":")[0] for f in faults} - {"0.tar"} == broken
    lines = (tmp_path / "x/captions.jsonl").read_text().splitlines()
    keys = {json.loads(line)["key"] for line in lines}
    assert wanting <= keys and "z" in keys and not (FAULTS.keys() - wanting) & keys
    assert manifests[0]["faults"] == len(faults) > 40 and manifests[0]["count"] == len(lines)


def pattern_of(kind):
    """A pattern of the fault of that kind in the set of `dirty_set`."""
    reason = re.sub(r"\bk\.", f"{kind}.", FAULTS[kind][1])
    return rf"0\.tar:[^ ]*\b{kind}\b[^ ]*: {reason}"


def test_faults_of_shards_of_one_name_in_two_folders_are_told_apart(place, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(place / "shards/00001.tar", tmp_path / name)
    encode(tmp_path / "x", source=f"{tmp_path}/{{a,b}}/00001.tar", size=SIZE)
    faults = (tmp_path / "x/faults.txt").read_text().splitlines()
    where = [f"{tmp_path}/{name}/00001.tar:bad: not a PNG, JPEG or WEBP" for name in "ab"]
    assert faults == where


def test_the_manifest_has_the_hash_of_every_file(place):
    manifest = read_manifest(place / "whole")
    files = contents(place / "whole")
    del files["manifest.json"]
    assert manifest["files"] == {k: {"sha256": sha256(v).hexdigest(), "size": len(v)} for k, v in files.items()}


def test_pictures_of_bytes_differ_from_those_of_floats_as_little_as_noise_of_half_a_level_makes_them(place, tmp_path):
    encode(tmp_path / "x", **options_of(place, sample="mean", flip=False))
    data, codec = load_data("encoded", path=str(tmp_path / "x")), load_codec(place / "codec", device="cpu")
    exact = codec.encode(torch.from_numpy(images()) / 255 * 2 - 1)
    stored = data.batch(torch.arange(N))[0]
    noise = (torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * data.limit / 255
    decoded = codec.decode(exact)
    by_bytes, by_noise = ((codec.decode(z) - decoded).square().mean().sqrt() for z in (stored, exact + noise))
    assert 0 < float(by_bytes) < 1.2 * float(by_noise) < 0.1 * float(decoded.std())


def test_no_more_pictures_than_a_batch_are_in_memory(monkeypatch, tmp_path):
    alive, most = [0], [0]

    def read(unit, faults):
        for i in range(60):
            x = np.full((1, 8, 8), i, np.uint8)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(x, lambda: alive.__setitem__(0, alive[0] - 1))
            yield Found(f"{i}", "", i % 2, x)

    source = Source(("0",), read, ("a", "b"), 8, 1)
    monkeypatch.setattr("nanodiffusion.encode.encoder.open_source", lambda *args: source)
    assert encode(tmp_path / "x", source="made", batch=4, part=20)["count"] == 60
    assert alive == [0] and 1 <= most[0] <= 6
    assert np.load(tmp_path / "x/latents.npy")[:, 0, 0, 0].tolist() == list(range(60))


def test_grey_pictures_become_colour_where_the_codec_wants_it(place, tmp_path):
    encode(tmp_path / "x", source="digits", codec=str(place / "codec"), n=4, quantise=False, dtype="float32")
    x = load_data("digits").x[:4].expand(-1, 3, -1, -1) / 255 * 2 - 1
    expected = load_codec(place / "codec", device="cpu").encode(x)
    torch.testing.assert_close(load_data("encoded", path=str(tmp_path / "x")).x, expected, rtol=0, atol=1e-5)


# -- the same bytes ----------------------------------------------------------------------------------------------------


def test_the_size_of_the_parts_does_not_change_the_arrays_and_that_of_the_batch_rounding_only(place, tmp_path):
    encode(tmp_path / "parts", **options_of(place, part=14))
    encode(tmp_path / "batch", **options_of(place, batch=7, limit=read_manifest(place / "whole")["latents"]["limit"]))
    whole, parts, batch = (contents(f) for f in (place / "whole", tmp_path / "parts", tmp_path / "batch"))
    for name in whole.keys() - {"manifest.json"}:
        assert parts[name] == whole[name]
        if name not in ("latents.npy", "flipped.npy"):
            assert batch[name] == whole[name]
    off = np.load(tmp_path / "batch/latents.npy").astype(int) - np.load(place / "whole/latents.npy")
    assert np.abs(off).max() <= 1 and (off != 0).mean() < 0.01


def test_a_second_call_finds_everything_there(place):
    before = {p.name: p.stat().st_mtime_ns for p in (place / "whole").iterdir()}
    encode(place / "whole", **options_of(place))
    assert {p.name: p.stat().st_mtime_ns for p in (place / "whole").iterdir()} == before


def captioned(folder, n=3):
    """A folder of n captioned pictures."""
    folder.mkdir()
    for i in range(n):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


CHANGES = {
    "another picture": lambda folder: picture(9).save(folder / "9.png"),
    "other bytes of a picture": lambda folder: os.utime(folder / "1.png", ns=(0, 0)),  # as an editor leaves them
    "another caption": lambda folder: (folder / "1.txt").write_text("a cat"),
    "another original size": lambda folder: (folder / "1.json").write_text('{"original_height": 9}'),
    "one picture less": lambda folder: (folder / "2.png").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changed_is_not_taken_for_encoded(tmp_path, monkeypatch, change):
    source = captioned(tmp_path / "pictures")
    encode(tmp_path / "x", source=str(source), size=SIZE)
    monkeypatch.chdir(source)  # what lies here decides nothing
    assert encode(tmp_path / "x", source=str(source), size=SIZE)["count"] == 3
    before = contents(tmp_path / "x")
    CHANGES[change](source)
    with pytest.raises(UserError, match="the source has changed since it was encoded") as e:
        encode(tmp_path / "x", source=str(source), size=SIZE)
    assert f"delete {tmp_path / 'x'}" in str(e.value) and contents(tmp_path / "x") == before


def test_a_folder_that_changed_after_it_was_counted_is_counted_anew(tmp_path, monkeypatch):
    source = captioned(tmp_path / "pictures")
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(tmp_path / "x", source=str(source), size=SIZE)
    (source / "1.txt").write_text("a cat")
    assert encode(tmp_path / "x", source=str(source), size=SIZE)["count"] == 3
    lines = (tmp_path / "x/captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == ["number 0", "a cat", "number 2"]


def test_a_source_that_became_shorter_at_the_end_of_a_batch_is_one_message(tmp_path, monkeypatch):
    rounds = []

    def read(unit, faults):
        rounds.append(unit)
        yield from (Found(f"{i}", "", 0, np.zeros((1, 8, 8), np.uint8)) for i in range(8 if len(rounds) == 1 else 4))

    source = Source(("0",), read, ("a",), 8, 1)
    monkeypatch.setattr("nanodiffusion.encode.encoder.open_source", lambda *args: source)
    with pytest.raises(UserError, match="fewer samples than were counted"):
        encode(tmp_path / "x", source="made", batch=4)


def test_calls_that_failed_before_any_part_leave_the_folder_free(place, tmp_path):
    spoken = tmp_path / "silent"
    spoken.mkdir()
    picture(0).save(spoken / "a.png")
    options = options_of(place, source=str(spoken), flip=False)
    with pytest.raises(UserError, match="no captions"):
        encode(tmp_path / "x", **options)
    assert encode(tmp_path / "x", **{**options, "text": ""})["count"] == 1


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1]", b"null", b'{"sorce": "x"}'])
def test_damaged_settings_are_one_message_and_nothing_is_removed(place, tmp_path, text):
    work = tmp_path / "x/.work"
    work.mkdir(parents=True)
    (work / "settings.json").write_bytes(text)
    (work / "part-000000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="these settings are damaged") as e:
        encode(tmp_path / "x", **options_of(place))
    assert e.value.details["file"] == work / "settings.json" and f"delete {work}" in str(e.value)
    assert len(contents(work)) == 2


def test_a_setting_by_another_name_is_another_encoding(place, tmp_path):
    work = tmp_path / "x/.work"
    shutil.copytree(place / "whole", work)
    settings = json.loads((work / "manifest.json").read_bytes())["settings"]
    (work / "settings.json").write_text(json.dumps({**settings, "limits": 3.0}))
    (work / "part-000000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="another encoding") as e:
        encode(tmp_path / "x", **options_of(place))
    assert e.value.details["key"] == "limits"


# As a program: one import of torch for all the forks.


def harassed(folder, options, kills, seed=0):
    """Encode again and again under SIGKILLs, at an fsync or at any time, every result equal to `folder`/whole; counts."""
    dice, out = random.Random(seed), folder / "killed"
    start = time.perf_counter()
    pid = forked(lambda: encode(folder / "again", **options))
    assert os.waitpid(pid, 0)[1] == 0
    whole = time.perf_counter() - start
    counts = {"at_sync": 0, "timed": 0, "finished": 0}
    while counts["at_sync"] + counts["timed"] < kills or out.exists():
        at = dice.randint(1, 12) if dice.random() < 0.6 else 0

        def work(at=at):
            if at:
                dies_at_sync(at)
            encode(out, **options)

        pid = forked(work)
        if not at:
            time.sleep(dice.random() * whole / 2)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            counts["at_sync" if at else "timed"] += 1
            continue
        assert status == 0, "the encoding failed"
        for other in ("again", "whole"):
            assert not unlike(out, folder / other), f"other bytes than {other}"
        counts["finished"] += 1
        shutil.rmtree(out)
    return counts


def shared(folder, options, port):
    """The same by two processes over gloo."""

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with world("cpu") as w:
            assert w.size == 2 and w.rank == rank
            encode(folder / "two", w, **options)

    pids = [forked(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert contents(folder / "two") == contents(folder / "whole")


def program(place, tmp_path, **job):
    """Run this file as a program; what it prints."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shutil.copytree(place / "whole", tmp_path / "whole")
    job = {"folder": str(tmp_path), "options": options_of(place), "port": port, **job}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.test_encode", str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout)


def test_killed_again_and_again_and_shared_by_two_processes_it_makes_the_same_bytes(place, tmp_path):
    counts = program(place, tmp_path, kills=5)
    assert counts["at_sync"] + counts["timed"] >= 5 and counts["finished"] >= 1


@pytest.mark.slow
def test_killed_fifty_times_it_makes_the_same_bytes(place, tmp_path):
    counts = program(place, tmp_path, kills=50)
    assert counts["at_sync"] >= 20 and counts["timed"] >= 10 and counts["finished"] >= 1


@pytest.mark.slow
def test_torchrun_shares_the_command_line(place, tmp_path):
    options = options_of(place)
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items() if k != "source"]
    words = ["encode", options["source"], *words, "device=cpu"]
    assert main([*words, f"out={tmp_path / 'one'}"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "nanodiffusion", *words, f"out={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# -- the command and bad inputs ----------------------------------------------------------------------------------------


def test_the_command_says_what_there_is_and_training_reads_it(tmp_path, capsys):
    out = tmp_path / "digits"
    words = ["encode", "digits", f"out={out}", "codec=none", "text=words:8", "n=64", "device=cpu"]
    assert main(words) == 0
    assert "64 samples of 1 x 8 x 8, uint8 in ±1 (pooled, labels, captions)" in capsys.readouterr().out
    runner = make_runner(tmp_path, IMAGES, data={"name": "encoded", "path": str(out)}, steps=2, validation=0.2)
    assert runner.run() == "done"
    assert runner.config.text == "words:8" and runner.config.codec == ""
    assert 48 <= len(runner.data) < 64


WORDS = {
    "no source": ("codec=none out=x", "encode what"),
    "no out": ("digits codec=none", "encode needs out"),
    "no codec": ("digits out=x", "encode needs codec"),
    "unknown key": ("digits out=x codec=none sizes=3", "unknown key"),
    "no such shards": ("nothing/{00..03}.tar out=x codec=none", "not there"),
    "no such folder": ("nothing out=x codec=none", "not there"),
    "a pipe": ("pipe:cat out=x codec=none", "shards"),
    "no such codec": ("digits out=x codec=no/such-codec-here", "no such model"),
    "no such text": ("digits out=x codec=none text=words:0", "not a number of features"),
    "negative limit": ("digits out=x codec=none limit=-2", "range must be positive"),
    "infinite limit": ("digits out=x codec=none limit=inf", "range must be positive"),
    "limit of floats": ("digits out=x codec=none limit=2 quantise=false", "only bytes"),
    "dtype of bytes": ("digits out=x codec=none dtype=float16", "dtype"),
    "unknown dtype": ("digits out=x codec=none quantise=false dtype=int8", "dtype"),
    "unknown sampling": ("digits out=x codec=none sample=both", "sample"),
    "no batch": ("digits out=x codec=none batch=0", "batch"),
    "a text for a number": ("digits out=x codec=none size=big", "size"),
    "unknown split": ("digits out=x codec=none split=dev", "split"),
    "a split of shards": ("{place}/shards out=x codec=none split=test", "only sets by name have parts"),
    "size and factor": ("digits out=x codec={place}/codec size=9", "whole latent pixels"),
    "a text as codec": ("digits out=x codec={place}/shards", "holds no weights"),
    "another encoding": ("digits out={place}/whole codec=none", "another encoding"),
    "something else": ("digits out={place}/shards codec=none", "something else"),
    "a file": ("digits out={place}/shards/00000.tar codec=none", "something else"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_mistake_is_one_message_and_exit_code_2(place, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, said = WORDS[name]
    assert main(["encode", *words.replace("{place}", str(place)).split(), "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 6
    assert not (tmp_path / "x/manifest.json").exists()


def test_an_edited_manifest_is_not_gone_on_with(place, tmp_path):
    shutil.copytree(place / "whole", tmp_path / "x")
    file = tmp_path / "x/manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"count": 20', b'"count": 19'))
    with pytest.raises(UserError, match="manifest is damaged"):
        encode(tmp_path / "x", **options_of(place))


def test_an_array_changed_afterwards_is_found_where_it_is_verified(place, tmp_path):
    shutil.copytree(place / "whole", tmp_path / "x")
    raw = bytearray((tmp_path / "x/flipped.npy").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "x/flipped.npy").write_bytes(raw)
    with pytest.raises(UserError, match="not as it was"):
        load_data("encoded", path=str(tmp_path / "x"), verify=True)


def test_a_codec_of_other_channels_is_one_message(tmp_path, capsys):
    write_codec(tmp_path / "codec", channels=5)
    assert main(["encode", "digits", f"out={tmp_path / 'x'}", f"codec={tmp_path / 'codec'}", "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert "channels" in error and len(error.strip().splitlines()) <= 6


def test_shards_that_changed_since_they_were_counted_are_one_message(place, tmp_path, monkeypatch):
    shutil.copytree(place / "shards", tmp_path / "shards")
    options = options_of(place, source=str(tmp_path / "shards"), text="")
    encoder = Encoder(EncodeConfig(**options), tmp_path / "x", World(), lambda text: None)
    monkeypatch.setattr(
        encoder, "_tell", lambda census: shutil.copy(tmp_path / "shards/00000.tar", tmp_path / "shards/00001.tar")
    )
    with pytest.raises(UserError, match="source has changed"):
        encoder.run()


def test_where_nothing_is_sound_it_says_why(place, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no sound sample") as caught:
        encode(tmp_path / "x", **options_of(place, source=str(tmp_path / "bad"), text=""))
    assert "a.png" in str(caught.value)


def test_a_codec_whose_numbers_overflow_is_one_message(place, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "codec", tmp_path / "codec")
    file = tmp_path / "codec/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v * float("nan") if k == "quant_conv.bias" else v for k, v in weights.items()}, file)
    with pytest.raises(UserError, match="no numbers") as caught:
        encode(tmp_path / "x", **options_of(place, codec=str(tmp_path / "codec")))
    assert "0000" in str(caught.value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    home = Path(given["folder"])
    result = harassed(home, given["options"], given["kills"])
    shared(home, given["options"], given["port"])
    print(json.dumps(result))
