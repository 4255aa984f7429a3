"""What a user can get wrong with Stable Diffusion: one message of a few lines that names it, exit code 2, nothing written."""

import json
import os
import pickle
import shlex
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sd_files
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nanodiffusion.cli import main
from nanodiffusion.metadata import chunks
from nanodiffusion.nets.sd_unet import SDUNet
from nanodiffusion.show import save_png

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = "unet/diffusion_pytorch_model.safetensors"
SETTINGS: dict[str, Any] = {"nanodiffusion": "0.1.0", "prompt": "a cat", "steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs, sound and broken."""
    place = tmp_path_factory.mktemp("errors")
    for write in (_write_pictures, _write_models, _write_extras, _write_made):
        write(place)
    return place


def _write_pictures(place: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    for name, h, w in (("photo", 64, 64), ("large", 80, 96), ("odd", 64, 60)):
        Image.fromarray(x[:h, :w]).save(place / f"{name}.png")
    Image.new("L", (72, 64)).save(place / "mask.png")
    Image.fromarray(x).save(place / "disguised.png", "BMP")
    (place / "cut.png").write_bytes((place / "large.png").read_bytes()[:3000])
    (place / "text.png").write_text("no picture")
    header = struct.pack(">IIBBBBB", 10_000, 6_500, 8, 2, 0, 0, 0)
    body = b"".join(_chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99)))))
    (place / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _write_models(place: Path) -> None:
    for name in ("unknown", "shapes", "mixed", "shard", "scheduler", "lacking"):
        options = {"max_shard_size": "3MB"} if name == "shard" else {}
        shutil.copytree(sd_files.tree("sd1", **options), place / name)
    unet = load_file(place / "unknown" / UNET)
    save_file({**unet, "conv_in.lora": torch.zeros(1)}, place / "unknown" / UNET)
    save_file({**unet, "conv_in.weight": torch.zeros(32, 5, 3, 3)}, place / "shapes" / UNET)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(place / "mixed" / part)
        shutil.copytree(sd_files.tree("sd2") / part, place / "mixed" / part)
    next((place / "shard/unet").glob("*-00002-*")).unlink()
    config = place / "scheduler/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "noise"))
    shutil.rmtree(place / "lacking/vae")
    whole = sd_files.single("sd1").read_bytes()
    (place / "alone.safetensors").write_bytes(whole)
    (place / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (place / "header.safetensors").write_bytes(whole[:8] + b"x" + whole[9:])
    (place / "empty.safetensors").write_bytes(b"")
    for name in ("model.ckpt", "renamed.safetensors"):
        (place / name).write_bytes(pickle.dumps({"weight": 1}))
    (place / "nothing").mkdir()


def _write_extras(place: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {f"{layer}.lora_A.weight": torch.zeros(2, 64), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(lora, place / "lora.safetensors")
    save_file({k: torch.zeros(2, 192) if "_A" in k else v for k, v in lora.items()}, place / "xl.safetensors")
    save_file({k.replace("to_k", "to_qkv"): v for k, v in lora.items()}, place / "lost.safetensors")
    save_file({**lora, f"{layer}.dora_scale": torch.zeros(32, 1)}, place / "dora.safetensors")
    save_file({f"{layer}.lora_A.weight": torch.zeros(2, 64)}, place / "half.safetensors")
    save_file({"emb_params": torch.zeros(2, 64)}, place / "thing.safetensors")
    save_file({"emb_params": torch.zeros(2, 768)}, place / "wide.safetensors")
    save_file({"emb_params": torch.full((2, 64), torch.nan)}, place / "nan.safetensors")
    (place / "thing.pt").write_bytes(pickle.dumps({"*": 1}))
    (place / "prompts.txt").write_text("\n \n")
    (place / "latin.txt").write_bytes("café".encode("latin-1"))
    (place / "a file").write_text("text")


def _write_made(place: Path) -> None:
    """Pictures with settings in them."""
    picture, model = Image.new("RGB", (8, 8)), str(sd_files.tree("sd1"))
    sound = {**SETTINGS, "model": model}
    for name, settings in {
        "made": sound,
        "newer": {**sound, "quantum": True},
        "typed": {**sound, "steps": "three"},
        "sampler": {**sound, "sampler": {"nme": "euler"}},
        "nested": {**sound, "controls": [{"net": 3}]},
        "controls": {**sound, "controls": [7]},
        "huge": {**sound, "steps": 10**9},
        "copies": {**sound, "batch": 10**9},
        "frame": {**sound, "frames": 2, "frame": 5},
        "null": {**sound, "loras": [{"file": "a\0b"}]},
        "sampled": {"nanodiffusion": "0.1.0", "run": "runs/x", "steps": 3},
        "gone": {**sound, "image": {"file": "no-longer.png", "sha256": "ab" * 32}},
        "other": {**sound, "image": {"file": "photo.png", "sha256": "ab" * 32}},
    }.items():
        save_png(picture, place / f"{name}.png", chunks(settings))
    save_png(picture, place / "theirs.png", {"parameters": "a cat\nSteps: 3, Sampler: Euler, Seed: 1, Model: v1-5"})
    save_png(picture, place / "damaged.png", {"nanodiffusion": "{"})


A = "generate 'a cat' model=SD1 steps=1 out=OUT width=64 height=64"  # is sound, as a test makes sure
B = "generate 'a cat' steps=1 out=OUT"  # and what is wrong with the model
C = "generate 'a cat' model=SD1 steps=1 out=OUT"  # and what is wrong with the pictures
TABLE: dict[str, list[str]] = {
    # words
    "generate model=SD1": ["there is no prompt", "key prompt"],
    "generate '' model=SD1": ["an empty prompt", "prompt="],
    "generate 'a cat'": ["which model", "key model"],
    "generate": ["which model"],
    f"{A} guidence=3": ["unknown key guidence", "did you mean 'guidance'?"],
    f"{A} 'negatve=a blurry dog'": ["unknown key negatve", "did you mean 'negative'?"],
    f"{A} foo=1": ["unknown key foo", "prompt=foo="],
    f"{A} steps=2": ["twice", "key steps"],
    f"{B} model=SD1 steps.x=3": ["steps.x"],
    f"{A} n=many": ["key n", "int", "'many'"],
    f"{A} n=0": ["key n", "at least 1"],
    f"{A} seed=-1": ["key seed"],
    f"{A} seeds=[1,2]": ["key seeds", "1 numbers", "[1, 2]"],
    f"{A} seeds=[99999999999999999999]": ["key seeds"],
    f"{A} 'a dog' negative=a negative=b negative=c": ["key negative", "3"],
    f"{A} prompt_2=castle": ["prompts_2", "one text encoder"],
    f"{A} prompts=none.txt": ["none.txt", "key prompts"],
    f"{A} prompts=prompts.txt": ["prompts.txt", "no prompt"],
    f"{A} prompts=latin.txt": ["latin.txt", "UTF-8"],
    f"{A} sampler=oiler": ["did you mean 'euler'?"],
    f"{A} sampler=lms sampler.ordr=3": ["sampler.ordr", "order"],
    f"{A} ladder=karas": ["did you mean 'karras'?"],
    f"{A} ladder.roh=5": ["ladder.roh", "rho"],
    f"{A} clip_skip=99": ["key clip_skip", "99"],
    f"{A} interval=[1]": ["guidance_interval", "two ends"],
    f"{A} frames=3 n=2": ["frames", "n=1"],
    f"{A} sigmas=[3,4]": ["sigmas", "decreasing"],
    f"{A} sigmas=[3] timesteps=[5]": ["timesteps", "exclude"],
    f"{A} crop=[1,2]": ["key crop", "no sizes"],
    "generate 'a cat' model=SDXL out=OUT crop=[1]": ["key crop", "two numbers"],
    f"{A} batch=0": ["key batch"],
    f"{A} precision=fp8": ["fp8", "bf16"],
    f"{A} memory=tiny": ["tiny", "balanced"],
    f"{A} device=cuda:77": ["no device 'cuda:77'"],
    f"{B} model=SD1 width=100": ["key width", "multiple of 8", "width=96"],
    f"{B} model=SD1 height=-8": ["key height"],
    # the model
    f"{B} model=none.safetensors": ["none.safetensors", "no such model"],
    f"{B} model=somebody/nothing": ["somebody/nothing", "HF_HUB_OFFLINE"],
    f"{B} model=cut.safetensors": ["cut.safetensors", "truncated or damaged"],
    f"{B} model=header.safetensors": ["header.safetensors"],
    f"{B} model=empty.safetensors": ["empty.safetensors", "0 bytes"],
    f"{B} model=model.ckpt": ["model.ckpt", "nanodiffusion convert"],
    f"{B} model=renamed.safetensors": ["renamed.safetensors", "pickle"],
    f"{B} model=nothing": ["nothing", "no checkpoint"],
    f"{B} model=lora.safetensors": ["lora.safetensors", "no whole checkpoint", "lora"],
    f"{B} model=CONTROL": ["no checkpoint", "ControlNet"],
    f"{B} model=unknown": [UNET, "conv_in.lora"],
    f"{B} model=shapes": [UNET, "conv_in.weight"],
    f"{B} model=mixed": ["mixed", "do not belong together", "64, says the U-Net", "128"],
    f"{B} model=shard": ["a shard is missing", "-00002-of-"],
    f"{B} model=scheduler": ["scheduler_config.json", "prediction_type", "noise"],
    f"{B} model=lacking": ["lacking", "lacks a component", "vae"],
    f"{B} model=alone.safetensors": ["no tokenizer", "tokenizer=FOLDER"],
    f"{B} model=alone.safetensors tokenizer=nothing": ["nothing", "vocab.json"],
    f"{A} variant=fp16": ["variant", "fp16"],
    f"{A} prediction=epsilon": ["epsilon", "eps"],
    f"{A} revision=main": ["revision", "main"],
    f"{B} model=INPAINT": ["inpainting U-Net", "mask=..."],
    f"{A} vae=none": ["none", "key vae"],
    f"{A} vae=SDXL": ["does not belong", "key vae", "expected: scale 0.18215", "found: scale 0.13025"],
    f"{A} vae=CONTROL": ["controlnet", "expected: AutoencoderKL", "found: ControlNetModel"],
    # pictures
    f"{A} strength=0.5": ["strength", "image=..."],
    f"{C} image=photo.png strength=1.5": ["key strength", "1.5"],
    f"{C} image=none.png": ["none.png", "No such file"],
    f"{C} image=nothing": ["nothing", "directory"],
    f"{C} image=cut.png": ["cut.png", "truncated"],
    f"{C} image=text.png": ["text.png", "PNG, JPEG or WEBP"],
    f"{C} image=disguised.png": ["disguised.png", "PNG, JPEG or WEBP"],
    f"{C} image=bomb.png": ["bomb.png", "10000 x 6500 pixels", "64 megapixels"],
    f"{C} image=odd.png": ["key width", "multiple of 8", "60"],
    f"{A} image=large.png": ["key image", "64 x 64", "96 x 80", "resize"],
    f"{A} mask=photo.png": ["a mask needs a picture", "key mask"],
    f"{C} image=photo.png mask=mask.png": ["key mask", "72 x 64"],
    f"{A} outpaint=[8,0,0,0]": ["key outpaint", "image=FILE"],
    f"{C} image=photo.png outpaint=[8,8]": ["key outpaint", "left,top,right,bottom"],
    f"{C} image=photo.png outpaint=[-8,0,0,0]": ["cannot grow", "-8"],
    f"{C} image=photo.png outpaint=[4,0,0,0]": ["key width", "68"],
    f"{C} image=photo.png mask=photo.png outpaint=[8,0,0,0]": ["key outpaint", "mask"],
    f"{C} image=photo.png overlap=4": ["key overlap"],
    # what is put on a model
    f"{A} canny=true": ["key canny", "control=NET:FILE"],
    f"{A} guess=true": ["key guess"],
    f"{C} control=CONTROL:photo.png canny=[9]": ["key canny", "[low,high]"],
    f"{C} control=CONTROL:photo.png canny=[9,3]": ["thresholds", "(9, 3)"],
    f"{C} control=none:photo.png": ["none", "key control"],
    f"{C} control=CONTROL:none.png": ["none.png", "key control"],
    f"{C} control=CONTROLXL:photo.png": ["control", "another family"],
    f"{A} control=CONTROL:large.png": ["key control", "64 x 64", "96 x 80"],
    f"{C} control=CONTROL:photo.png:1:0.5:0.2": ["window", "[0.5, 0.2]"],
    f"{A} control=CONTROL": ["a control needs a picture"],
    f"{C} control=ADAPTER:photo.png": ["adapter", "expected: ControlNetModel", "found: T2IAdapter"],
    f"{C} adapter=ADAPTERXL:photo.png": ["adapter|features", "another family|another shape"],
    f"{A} adapter=ADAPTER": ["an adapter needs a picture", "key adapter"],
    f"{A} lora=none.safetensors": ["none.safetensors", "key lora"],
    f"{A} lora=xl.safetensors": ["xl.safetensors", "another family"],
    f"{A} lora=lost.safetensors": ["lost.safetensors", "to_qkv"],
    f"{A} lora=dora.safetensors": ["dora.safetensors", "DoRA"],
    f"{A} lora=half.safetensors": ["half.safetensors", "half of this layer"],
    f"{A} lora=cut.safetensors": ["cut.safetensors", "truncated or damaged"],
    f"{A} lora=photo.png": ["photo.png"],
    f"{A} embedding=thing.safetensors": ["thing", "in no prompt"],
    f"{A} embedding=wide.safetensors:cat": ["64", "768"],
    f"{A} embedding=nan.safetensors": ["nan.safetensors", "damaged"],
    f"{A} embedding=thing.pt": ["thing.pt", "nanodiffusion convert"],
    f"{A} embedding=lora.safetensors": ["lora.safetensors", "not a textual inversion"],
    # what is written
    "generate 'a cat' model=SD1 out=a.jpg": ["key out", "a.jpg", "PNG"],
    "generate 'a cat' model=SD1 'out=a file/x'": ["a file", "key out"],
    f"{A} grid=g.jpg": ["key grid", ".png"],
    f"{A} gif=g.png": ["key gif", ".gif"],
    f"{A} 'latents=a file/l.safetensors'": ["a file", "key latents"],
    f"{A} film=x": ["film", "gif"],
    f"{A} gif=g.gif film=y": ["unknown film 'y'", "eps"],
    f"{A} gif=g.gif preview=none": ["none", "no such model"],
    f"{A} gif=g.gif preview=CONTROL": ["controlnet", "expected: AutoencoderTiny"],
    f"{A} intermediate=true": ["intermediate", "latents=FILE"],
    f"{A} latents=l.safetensors intermediate=yes": ["intermediate", "bool"],
    # the same again
    "regenerate": ["which picture"],
    "regenerate none.png": ["none.png", "No such file"],
    "regenerate photo.png": ["photo.png", "no settings"],
    "regenerate text.png": ["text.png"],
    "regenerate damaged.png": ["damaged.png", "damaged"],
    "regenerate newer.png": ["newer.png", "quantum"],
    "regenerate typed.png": ["typed.png", "key steps", "'three'"],
    "regenerate sampler.png": ["sampler"],
    "regenerate nested.png": ["nested.png", "controls.net", "str"],
    "regenerate controls.png": ["controls.png", "controls"],
    "regenerate huge.png": ["huge.png", "key steps", "1000000000"],
    "regenerate copies.png": ["copies.png", "key batch"],
    "regenerate frame.png": ["frame.png", "frame 5 of 2"],
    "regenerate null.png": ["null.png", "null character"],
    "regenerate sampled.png": ["sampled.png", "nanodiffusion sample"],
    "regenerate gone.png": ["no-longer.png", "key image", "abab", "No such file"],
    "regenerate other.png": ["photo.png", "key image", "not the file", "abab"],
    "regenerate theirs.png": ["which model", "v1-5"],
    "regenerate made.png n=2": ["key n", "one picture"],
    "regenerate made.png 'a dog' 'a cat'": ["key prompt"],
    "regenerate made.png model=none": ["none", "key model"],
    "regenerate made.png stps=3": ["did you mean 'steps'?"],
    # info
    "info model.ckpt": ["model.ckpt", "nanodiffusion convert"],
    "info empty.safetensors": ["empty.safetensors"],
    "info header.safetensors": ["header.safetensors"],
    "info damaged.png": ["damaged.png"],
    "info cut.png": ["cut.png"],
    "info nothing": ["no checkpoint"],
}


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of inputs; no network, an empty hub cache; memory is not counted, which takes longer than drawing."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "nothing"))
    monkeypatch.setattr("nanodiffusion.memory.expected_peak", lambda *_: 1)


def words_of(typed: str) -> list[str]:
    """The words of a command, with the places that capitals stand for."""
    names = {
        "CONTROLXL": sd_files.part("controlnet", "sdxl"),
        "ADAPTERXL": sd_files.part("adapter", "sdxl"),
        "CONTROL": sd_files.part("controlnet", "sd1"),
        "ADAPTER": sd_files.part("adapter", "sd1"),
        "INPAINT": sd_files.tree("sd1", inpaint=True),
        "SDXL": sd_files.tree("sdxl"),
        "SD1": sd_files.tree("sd1"),
        "OUT": "out",
    }
    for name, path in names.items():
        typed = typed.replace(name, str(path))
    return shlex.split(typed)


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, by its size and when it was written."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in place.rglob("*")}


def fails(typed: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as every mistake does; its message."""
    capsys.readouterr()
    code = main(words_of(typed))
    told = capsys.readouterr()
    assert code == 2, told.out
    lines = [line for line in told.err.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(lines) <= 6 and lines[0].startswith("error: "), told.err
    assert "Traceback" not in told.out + told.err
    return "\n".join(lines)


@pytest.mark.parametrize("typed", TABLE)
def test_a_mistake_gets_one_message_and_costs_nothing(typed: str, place: Path, capsys: pytest.CaptureFixture[str]):
    before = snapshot(place)
    message = fails(typed, capsys)
    parts = [part.split("|") for part in TABLE[typed]]
    assert [part for part in parts if not any(p in message for p in part)] == [], message
    assert snapshot(place) == before


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40


def test_the_command_that_the_mistakes_are_added_to_is_sound(tmp_path: Path):
    assert main(words_of(A.replace("OUT", str(tmp_path / "a.png")))) == 0
    assert (tmp_path / "a.png").is_file()


# ---- mistakes of the machine


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError(
            "[enforce fail at alloc.cpp:1] DefaultCPUAllocator: can't allocate: you tried to allocate 99 bytes."
        ),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("typed", [A, "regenerate made.png"])
def test_a_memory_that_is_full_says_what_to_change(
    typed: str, error: Exception, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object, **__: object) -> None:
        raise error

    before = snapshot(place)
    monkeypatch.setattr(SDUNet, "forward", full)
    message = fails(typed, capsys)
    assert "memory is full" in message and "memory=low" in message and "width" in message
    assert ("20.00 GiB" in message) == ("CUDA" in str(error))
    assert snapshot(place) == before


def test_another_error_inside_is_not_taken_for_a_full_memory(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(SDUNet, "forward", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(words_of(A))


@pytest.mark.parametrize(
    ("package", "typed", "extra"),
    [
        ("av", f"{A} mp4=film.mp4", "viz"),
        ("cv2", f"{C} control=CONTROL:photo.png canny=true", "data"),
        ("tokenizers", A, "sd"),
    ],
)
def test_a_missing_package_names_its_extra(
    package: str, typed: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(typed, capsys)
    assert f"nanodiffusion[{extra}]" in message and package in message


@pytest.mark.parametrize("key", ["image", "lora", "embedding", "vae", "model"])
def test_nobody_waits_for_a_pipe(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    os.mkfifo(tmp_path / "pipe.safetensors")
    typed = f"{A} {key}={tmp_path}/pipe.safetensors" if key != "model" else f"{B} model={tmp_path}/pipe.safetensors"
    assert "neither a file nor a folder" in fails(typed, capsys)


def test_a_hostile_text_in_a_picture_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = {**SETTINGS, "model": "\x1b[31mred\u202e\n\n\n\n\n\n\n\nmany lines"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", chunks(json.loads(json.dumps(settings))))
    message = fails(f"regenerate {tmp_path / 'x.png'}", capsys)
    assert "\x1b" not in message and "\u202e" not in message and "\\x1b[31mred" in message
