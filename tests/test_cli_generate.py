"""`generate`, `regenerate` and what `info` says of weights: called as a user calls them, on tiny checkpoints."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sd_files
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from nanodiffusion import tasks as g
from nanodiffusion.cli import main
from nanodiffusion.cli.asked import (
    Helper,
    LoraFile,
    TokenFile,
    asked_of,
    config_of,
    keys,
    read_back,
    read_words,
    settings_of,
)
from nanodiffusion.cli.digest import digest, file_digest
from nanodiffusion.errors import UserError
from nanodiffusion.lora import new_lora, save_lora
from nanodiffusion.metadata import chunks, read_settings
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.pretrained import load_pretrained, load_tokens, replace_part
from nanodiffusion.show import save_png
from nanodiffusion.tensors import load_meta, save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = "steps=2 width=64 height=64"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a LoRA and an embedding."""
    folder = tmp_path_factory.mktemp("generate")
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    smooth.save(folder / "photo.png")
    smooth.resize((96, 80)).save(folder / "large.jpg", quality=95)
    smooth.resize((40, 48)).save(folder / "small.webp", lossless=True)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 24:56], mask[40:44, 24:56] = 255, 120
    Image.fromarray(mask).save(folder / "mask.png")
    write_lora(folder / "style.safetensors", "sd1")
    save_file(
        {"emb_params": torch.randn(2, 64, generator=torch.Generator().manual_seed(3))}, folder / "thing.safetensors"
    )
    tokens = InpaintTokens(64, positions=True).state_dict()
    drawn = {name: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for name, v in tokens.items()}
    save_tensors(folder / "tokens.safetensors", drawn, {"positions": True})
    return folder


def write_lora(path: Path, family: str, layout: str = "kohya") -> None:
    """A LoRA with random factors on every attention layer of a tiny checkpoint."""
    bundle = load_pretrained(sd_files.tree(family))
    nets = {"unet": bundle.denoiser.net, **dict(zip(("text", "text_2"), (part.net for part in bundle.text.parts)))}
    lora = new_lora(nets, rank=2, alpha=1.0, generator=torch.Generator().manual_seed(5))
    for i, factor in enumerate(lora.parameters()):
        factor.data = 0.3 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(i))
    save_lora(lora.lora, path, layout)


@pytest.fixture(autouse=True)
def _memory_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting is tested elsewhere, and takes longer than drawing so small a picture."""
    monkeypatch.setattr("nanodiffusion.memory.expected_peak", lambda *_: 1)


@pytest.fixture
def run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command, typed with spaces, in the folder of inputs; OUT is an empty folder, SD1 etc. are checkpoints."""
    monkeypatch.chdir(place)
    names = {"OUT": tmp_path, **{family.upper(): sd_files.tree(family) for family in ("sd1", "sdxl")}}

    def command(typed: str) -> str:
        for name, path in names.items():
            typed = typed.replace(name, str(path))
        capsys.readouterr()
        code = main(shlex.split(typed))
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    return command


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def part(kind: str, family: str = "sd1") -> Path:
    return sd_files.part(kind, family)


# ---- pictures


def test_every_picture_is_a_file_with_the_next_free_number_and_its_seed(run, tmp_path):
    run(f"generate 'a cat' 'red sea' model=SD1 {QUICK} n=2 seed=7 out=OUT/p")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [f"0000{i}-{7 + i}.png" for i in range(4)]
    before = {p: p.read_bytes() for p in (tmp_path / "p").iterdir()}
    run(f"generate 'a cat' model=SD1 {QUICK} out=OUT/p")
    assert (tmp_path / "p/00004-0.png").is_file()
    assert all(p.read_bytes() == old for p, old in before.items())


def test_the_pictures_are_the_librarys(run, tmp_path):
    run(f"generate 'a cat' 'red sea' model=SD1 {QUICK} n=2 seed=7 negative=dog guidance=3 sampler=heun out=OUT/p")
    bundle = load_pretrained(sd_files.tree("sd1"))
    call = {"steps": 2, "width": 64, "height": 64, "n": 2, "seed": 7, "negative": "dog", "guidance": 3.0}
    *_, state = g.generate(bundle, ["a cat", "red sea"], sampler="heun", **call)
    for path, image in zip(sorted((tmp_path / "p").iterdir()), g.pictures(bundle, state.x), strict=True):
        assert np.abs(pixels(path).astype(int) - np.asarray(image)).max() <= 1


def test_what_the_second_encoder_reads_is_said_once_for_all_prompts(run, tmp_path):
    for folder, words in (("once", "prompt_2=castle"), ("twice", "prompt_2=castle prompt_2=castle")):
        run(f"generate 'a cat' 'red sea' model=SDXL {QUICK} {words} out=OUT/{folder}")
    once, twice = ([pixels(p) for p in sorted((tmp_path / folder).iterdir())] for folder in ("once", "twice"))
    assert len(once) == 2 and np.array_equal(once, twice)


@pytest.mark.parametrize("key", ["negative", "prompt_2"])
def test_texts_that_are_not_one_per_prompt_are_refused_before_the_model_is_loaded(key, monkeypatch, capsys):
    monkeypatch.setattr("nanodiffusion.cli.generate.load_parts", lambda *_: pytest.fail("the model was loaded"))
    assert main(["generate", "a", "b", "c", "model=x", f"{key}=d", f"{key}=e"]) == 2
    assert "or one per prompt" in (said := capsys.readouterr().err) and f"key {key}" in said


def test_without_out_they_go_into_the_folder_pictures(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "pictures/00000-3.png" in run(f"generate 'a cat' model=SD1 {QUICK} seed=3")
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_a_picture_is_the_same_alone_and_in_company(run, tmp_path, sampler):
    """To the bit one at a time, whatever the other prompts' lengths; in a batch but for rounding."""
    long = "'" + "a red castle by the sea " * 16 + "'"
    for name, batch in (("one", 1), ("four", 4)):
        run(f"generate 'a cat' {long} model=SD1 {QUICK} n=2 seed=5 sampler={sampler} batch={batch} out=OUT/{name}")
    run(f"generate 'a cat' model=SD1 {QUICK} seed=6 sampler={sampler} out=OUT/a.png")
    run(f"generate {long} model=SD1 {QUICK} seed=7 sampler={sampler} out=OUT/b.png")
    for alone, name in (("a.png", "00001-6.png"), ("b.png", "00002-7.png")):
        assert np.array_equal(pixels(tmp_path / alone), pixels(tmp_path / "one" / name))
        off = np.abs(pixels(tmp_path / alone).astype(int) - pixels(tmp_path / "four" / name))
        assert off.max() <= 1 and (off > 0).mean() < 0.01


def test_prompts_come_from_words_and_from_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\n  red sea: x=1 \n", encoding="utf-8")
    run(f"generate 'a cat' 'sea=blue water' prompts=OUT/prompts.txt prompt= model=SD1 {QUICK} out=OUT/p")
    told = [read_settings(p)["prompt"] for p in sorted((tmp_path / "p").iterdir())]
    assert sorted(told) == sorted(["a cat", "sea=blue water", "a dog", "red sea: x=1", ""])


def test_a_grid_shows_all_of_them_and_does_not_pass_for_one(run, tmp_path, capsys):
    run(f"generate 'a cat' model=SD1 {QUICK} n=3 out=OUT/p grid=OUT/g.png")
    sheet = pixels(tmp_path / "g.png")
    assert sheet.shape == (130, 130, 3)
    assert np.array_equal(sheet[:64, 66:], pixels(tmp_path / "p/00001-1.png"))
    assert main(["regenerate", str(tmp_path / "g.png")]) == 2
    assert "grid" in capsys.readouterr().err


def test_half_precision_and_low_memory_run(run, tmp_path):
    told = run(f"generate 'a cat' model=SD1 {QUICK} memory=low out=OUT/a.png")
    assert "bf16" in told and "memory low" in told and "measured peak" in told
    run("regenerate OUT/a.png out=OUT/b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert read_settings(tmp_path / "a.png")["precision"] == "bf16"


def test_a_component_of_another_name_drops_the_options(run, tmp_path):
    run(f"generate 'a cat' model=SD1 {QUICK} sampler=lms sampler.order=3 ladder=karras ladder.rho=5 out=OUT/a.png")
    told = read_settings(tmp_path / "a.png")
    assert told["sampler"] == {"name": "lms", "order": 3} and told["ladder"] == {"name": "karras", "rho": 5}
    run("regenerate OUT/a.png sampler=heun ladder.rho=6 out=OUT/b.png")
    told = read_settings(tmp_path / "b.png")
    assert told["sampler"] == {"name": "heun"} and told["ladder"] == {"name": "karras", "rho": 6}


# ---- given pictures


def test_pictures_are_turned_upright_and_laid_on_white(run, tmp_path):
    photo = Image.open("photo.png")
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, 20:] = 255
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(alpha))
    clear.save(tmp_path / "clear.png")
    white = np.asarray(photo).copy()
    white[:, :20] = 255
    Image.fromarray(white).save(tmp_path / "white.png")
    for name in ("photo.png", "OUT/turned.png", "OUT/clear.png", "OUT/white.png"):
        run(f"generate 'a cat' model=SD1 steps=2 image={name} out=OUT/from-{Path(name).name}")
    assert np.array_equal(pixels(tmp_path / "from-photo.png"), pixels(tmp_path / "from-turned.png"))
    assert np.array_equal(pixels(tmp_path / "from-clear.png"), pixels(tmp_path / "from-white.png"))


def test_what_a_mask_leaves_comes_back_to_the_bit(run, tmp_path):
    run("generate 'a cat' model=SD1 steps=2 image=photo.png mask=mask.png n=2 out=OUT/p")
    known = pixels(Path("mask.png")) == 0
    for path in (tmp_path / "p").iterdir():
        assert np.array_equal(pixels(path)[known], pixels(Path("photo.png"))[known])
        assert not np.array_equal(pixels(path), pixels(Path("photo.png")))


def test_outpainting_keeps_the_picture_in_its_place(run, tmp_path):
    run("generate 'a cat' model=SD1 steps=2 image=small.webp outpaint=[24,8,0,8] out=OUT/a.png")
    made = pixels(tmp_path / "a.png")
    assert made.shape == (64, 64, 3)
    assert np.array_equal(made[8:56, 24:], pixels(Path("small.webp")))


def test_fit_cuts_and_scales(run, tmp_path):
    run(f"generate 'a cat' model=SD1 {QUICK} image=large.jpg fit=true strength=0.5 out=OUT/a.png")
    assert pixels(tmp_path / "a.png").shape == (64, 64, 3)


# ---- what a picture carries


THEIRS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # as AUTOMATIC1111's interface reads them


def test_others_can_read_the_settings(run, tmp_path):
    words = f"model=SD1 {QUICK} seed=9 guidance=4.5 negative='a dog, red' sampler=euler ladder=karras"
    run(f"generate 'a cat, blue: (sea:1.2)' {words} out=OUT/a.png")
    lines = Image.open(tmp_path / "a.png").text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert lines[:2] == ["a cat, blue: (sea:1.2)", "Negative prompt: a dog, red"]
    pairs = dict(THEIRS.findall(lines[2]))
    want = {
        "Steps": "2",
        "Sampler": "Euler",
        "Schedule type": "Karras",
        "CFG scale": "4.5",
        "Seed": "9",
        "Size": "64x64",
    }
    assert want.items() <= pairs.items()
    assert pairs["Model"] == sd_files.tree("sd1").name and re.fullmatch("[0-9a-f]{10}", pairs["Model hash"])


def test_our_settings_are_complete_and_one_pictures_own(run, tmp_path):
    run(f"generate 'a cat' 'red sea' model=SD1 {QUICK} n=2 seed=7 image=photo.png lora=style.safetensors:0.5 out=OUT/p")
    told = json.loads(Image.open(tmp_path / "p/00003-10.png").text["nanodiffusion"])  # type: ignore[attr-defined]
    own = {"prompt": "red sea", "n": 1, "seed": 10, "strength": 0.8, "guidance": 7.5, "precision": "fp32"}
    assert own.items() <= told.items()
    assert told["image"] == {"file": "photo.png", "sha256": file_digest("photo.png")}
    assert told["loras"] == [{"file": "style.safetensors", "sha256": file_digest("style.safetensors"), "strength": 0.5}]
    assert told["model_sha256"] == load_pretrained(sd_files.tree("sd1")).sha256()
    assert told.keys() >= {f for f in keys() if f in g.GenerateConfig.__dataclass_fields__}


def test_a_trained_u_net_and_its_tokens_draw_as_the_library_does(run, place, tmp_path):
    other = sd_files.tree("sd1", seed=1) / "unet"
    words = "image=photo.png mask=mask.png tokens=tokens.safetensors"
    run(f"generate 'a cat' model=SD1 unet={other} {words} steps=2 negative=dog guidance=3 out=OUT/a.png")
    bundle = replace_part(load_pretrained(sd_files.tree("sd1")), "unet", other)
    tokens = load_tokens(place / "tokens.safetensors")
    given: dict = {"image": Image.open(place / "photo.png"), "mask": Image.open(place / "mask.png")}
    *_, last = g.generate(bundle, "a cat", steps=2, negative="dog", guidance=3.0, tokens=tokens, **given)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(g.pictures(bundle, last.x, **given)[0]))
    settings = read_settings(tmp_path / "a.png")
    files = [
        *other.glob("*.safetensors"),
        other.parent / "scheduler/scheduler_config.json",
    ]  # which says how it is read
    assert settings["unet"] == {"file": str(other), "sha256": digest(files)}
    assert settings["tokens"] == {"file": "tokens.safetensors", "sha256": digest([place / "tokens.safetensors"])}


# ---- the same again

XL = f"model=SDXL {QUICK} original_size=[512,256] crop=[8,0] negative_target_size=[32,32] clip_skip=1"
TASKS = {
    "text": f"'a (cat:1.3)' model=SD1 {QUICK} seed=3 negative= rescale=0.3 interval=[0.1,9]",
    "many": f"'a cat' 'red sea' model=SD1 {QUICK} n=2 negative=dog negative=house seeds=[4,9,2,7]",
    "batch": f"'a cat' 'red sea' model=SD1 {QUICK} n=2 batch=3 sampler=dpmpp_2m_sde",
    "sdxl": f"'a cat' {XL} prompt_2=castle sharpness=0.1 brightness=-0.2",
    "image": "'a cat' model=SD1 width=64 height=64 steps=4 image=large.jpg fit=true strength=0.6 sampler=heun ladder=trailing",
    "inpaint": "'a cat' model=SD1 steps=3 image=photo.png mask=mask.png strength=0.8",
    "outpaint": "'a cat' model=SD1 steps=2 image=small.webp outpaint=[24,8,0,8] overlap=4",
    "control": "'a cat' model=SD1 steps=2 control=CONTROL:photo.png:0.8:0:0.5 canny=[50,150] guess=true",
    "helpers": "'a cat' model=SD1 steps=2 control=CONTROL:photo.png control=CONTROL:mask.png:0.5 "
    "adapter=ADAPTER:photo.png:0.7",
    "lora": f"'a thing' model=SD1 {QUICK} lora=style.safetensors:0.7 lora=style.safetensors embedding=thing.safetensors",
    "vae": f"'a cat' model=SD1 {QUICK} vae=VAE precision=bf16 timesteps=[900,400]",
    "tokens": "'a cat' model=SD1 steps=2 unet=OTHER tokens=tokens.safetensors lora=style.safetensors image=photo.png "
    "mask=mask.png",
    "frames": f"'a cat' 'red sea' model=SD1 {QUICK} frames=3 seeds=[1,5] sampler=euler_ancestral",
}


COSTLY = {"text", "batch", "vae", "outpaint"}  # of which others go the same ways


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow) if task in COSTLY else task for task in TASKS]
)
def test_every_picture_can_be_made_again_to_the_bit(run, tmp_path, task):
    parts = {"CONTROL": part("controlnet"), "ADAPTER": part("adapter"), "VAE": part("vae")}
    parts["OTHER"] = sd_files.tree("sd1", seed=1) / "unet"
    typed = TASKS[task]
    for name, path in parts.items():
        typed = typed.replace(name, str(path))
    run(f"generate {typed} out=OUT/p")
    made = sorted((tmp_path / "p").iterdir())
    assert len(made) == {"many": 4, "batch": 4, "frames": 3}.get(task, 1)
    assert len({pixels(p).tobytes() for p in made}) == len(made)
    for path in made[-2:]:
        run(f"regenerate {path}")
        again = path.with_name(f"{path.stem}-again.png")
        assert np.array_equal(pixels(path), pixels(again))
        assert read_settings(again) == read_settings(path)


def test_something_can_be_changed(run, tmp_path):
    run(f"generate 'a cat' model=SD1 {QUICK} seed=3 lora=style.safetensors n=2 batch=2 out=OUT/p")
    run("regenerate OUT/p/00001-4.png 'a dog' steps=3 lora= seed=8 out=OUT/a.png")
    run(f"generate 'a dog' model=SD1 {QUICK.replace('2', '3', 1)} seed=8 out=OUT/b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert read_settings(tmp_path / "a.png") == read_settings(tmp_path / "b.png")


def test_a_second_time_takes_another_name(run, tmp_path):
    run(f"generate 'a cat' model=SD1 {QUICK} out=OUT/a.png")
    assert [run("regenerate OUT/a.png").splitlines()[2].rpartition("/")[2] for _ in range(2)] == [
        "a-again.png",
        "a-again-2.png",
    ]


def test_a_picture_of_a_device_that_is_not_here_is_made_on_another(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(f"generate 'a cat' model=SD1 {QUICK} out=OUT/a.png")
    settings = read_settings(tmp_path / "a.png") | {"device": "cuda"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "b.png", chunks(settings))
    assert "made on cuda, which is not here" in run("regenerate OUT/b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b-again.png"))


def test_inputs_are_found_beside_the_picture(run, place, tmp_path, monkeypatch):
    run("generate 'a cat' model=SD1 steps=2 image=photo.png out=OUT/a.png")
    (tmp_path / "photo.png").write_bytes((place / "photo.png").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("regenerate OUT/a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "a-again.png"))


@pytest.mark.parametrize("change", ["other", "missing"])
@pytest.mark.parametrize(
    "key", ["image", "lora", "control", "model", *(pytest.param(k, marks=pytest.mark.slow) for k in ("unet", "tokens"))]
)
def test_a_file_that_is_not_what_it_was_is_named(run, place, tmp_path, capsys, key, change):
    import shutil

    for name in ("photo.png", "mask.png", "style.safetensors", "tokens.safetensors"):
        shutil.copy(place / name, tmp_path)
    shutil.copytree(sd_files.tree("sd1") / "unet", tmp_path / "trained")
    shutil.copytree(part("controlnet"), tmp_path / "net")
    shutil.copytree(sd_files.tree("sd1"), tmp_path / "model")
    words = "image=OUT/photo.png lora=OUT/style.safetensors control=OUT/net:photo.png mask=mask.png unet=OUT/trained"
    run(f"generate 'a cat' model=OUT/model steps=1 {words} tokens=OUT/tokens.safetensors out=OUT/a.png")
    weights = "diffusion_pytorch_model.safetensors"
    names = {
        "image": "photo.png",
        "lora": "style.safetensors",
        "tokens": "tokens.safetensors",
        "control": f"net/{weights}",
        "unet": f"trained/{weights}",
        "model": f"model/unet/{weights}",
    }
    file = tmp_path / names[key]
    if change == "missing":
        (file if file.parent == tmp_path else tmp_path / names[key].split("/")[0]).rename(tmp_path / "gone")
    elif key == "image":
        Image.new("RGB", (64, 64)).save(file)
    else:
        tensors = load_file(file)
        name = min(tensors)
        save_file({**tensors, name: tensors[name] + 1}, file)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert main(["regenerate", str(tmp_path / "b.png"), f"out={tmp_path / 'c.png'}"]) == 2
    message = capsys.readouterr().err
    assert names[key].split("/")[0] in message and not (tmp_path / "c.png").exists()
    assert re.search("expected: SHA-256 [0-9a-f]{64}\n  found: ", message)
    assert bool(re.search("found: [0-9a-f]{64}", message)) == (change == "other")


def test_a_picture_of_another_program_needs_its_model(run, tmp_path, capsys):
    text = """a red cat <lora:some style:0.8>
Negative prompt: dog
Steps: 3, Sampler: Euler, Schedule type: Karras, CFG scale: 4, Seed: 11, Size: 64x64, Model hash: 6ce0161689, \
Model: v1-5-pruned, Denoising strength: 0.5, Hires upscale: 2"""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    assert main(["regenerate", str(tmp_path / "theirs.png")]) == 2
    assert "v1-5-pruned 6ce0161689" in capsys.readouterr().err
    said = "left out, as not understood: Hires upscale, <lora:some style:0.8>, strength"
    assert said in run("regenerate OUT/theirs.png model=SD1")
    words = "negative=dog steps=3 sampler=euler ladder=karras guidance=4 seed=11 width=64 height=64"
    run(f"generate 'a red cat' model=SD1 {words} out=OUT/ours.png")
    assert np.array_equal(pixels(tmp_path / "theirs-again.png"), pixels(tmp_path / "ours.png"))


def test_settings_survive_the_way_into_a_picture_and_back():
    asked = asked_of(read_words(["model=m", "control=n:f.png:2", "lora=l:0.5", "canny=true", "image=i"]))
    config = config_of(read_words(["a", "prompt=b", "negative=c", "sampler=lms", "sampler.order=3"]))
    told = json.loads(json.dumps(settings_of(asked, config, "sd1")))
    assert read_back(told) == (config, asked, {})


# ---- films and latents


@pytest.mark.slow
def test_a_film_has_a_frame_for_every_step(run, tmp_path):
    for kind in ("x", "x0", "eps"):
        words = f"steps=5 sampler=heun gif=OUT/{kind}.gif film={kind}"
        run(f"generate 'a cat' model=SD1 width=64 height=64 n=2 {words} out=OUT/{kind}")
    for kind in ("x", "x0", "eps"):
        film = Image.open(tmp_path / f"{kind}.gif")
        assert (film.n_frames, film.size) == (5, (130, 64))  # type: ignore[attr-defined]
    last = np.asarray(Image.open(tmp_path / "x/00000-0.png"))
    film = Image.open(tmp_path / "x.gif")
    film.seek(4)
    assert np.abs(np.asarray(film.convert("RGB"))[:, :64].astype(int) - last).mean() < 12  # but for the GIF's palette


def test_a_tiny_decoder_draws_the_film(run, tmp_path):
    pytest.importorskip("av")
    words = f"model=SD1 {QUICK} gif=OUT/f.gif mp4=OUT/f.mp4 preview={sd_files.part('tiny')}"
    run(f"generate 'a cat' {words} out=OUT/a.png")
    assert Image.open(tmp_path / "f.gif").n_frames == 2  # type: ignore[attr-defined]
    assert (tmp_path / "f.mp4").stat().st_size > 500


def test_the_film_of_frames_is_of_the_pictures(run, tmp_path):
    run(f"generate 'a cat' 'red sea' model=SD1 {QUICK} frames=4 gif=OUT/f.gif out=OUT/p")
    assert Image.open(tmp_path / "f.gif").n_frames == len([*(tmp_path / "p").iterdir()]) == 4  # type: ignore[attr-defined]


def test_latents_are_those_of_the_pictures(run, tmp_path):
    words = "model=SD1 width=64 height=64 steps=3 sampler=euler n=3 out=OUT/p"
    run(f"generate 'a cat' {words} latents=OUT/l.safetensors intermediate=true")
    run(f"generate 'a cat' {words} latents=OUT/k.safetensors batch=3")
    every, last = load_file(tmp_path / "l.safetensors"), load_file(tmp_path / "k.safetensors")
    assert every["x"].shape == (3, 4, 4, 8, 8) and every["x0"].shape == (3, 3, 4, 8, 8) and last.keys() == {"x"}
    assert_close(every["x"][:, -1], last["x"], rtol=1e-4, atol=1e-4)
    x, x0, s = every["x"].double(), every["x0"].double(), every["sigmas"]
    for i in range(3):  # Euler moves straight toward x0
        assert_close(x[:, i + 1], x0[:, i] + s[i + 1] / s[i] * (x[:, i] - x0[:, i]), rtol=1e-4, atol=1e-4)
    bundle = load_pretrained(sd_files.tree("sd1"))
    for path, image in zip(sorted((tmp_path / "p").iterdir()), g.pictures(bundle, every["x"][:, -1])):
        assert np.abs(pixels(path).astype(int) - np.asarray(image)).max() <= 1
    assert load_meta(tmp_path / "k.safetensors")["generate"]["pictures"] == 3
    assert "a cat" in run("info OUT/l.safetensors")


# ---- words


def test_a_word_is_a_prompt_unless_it_is_a_key():
    words = read_words(
        ["a cat", "x = y", "sea=blue water", "e=mc2 on a wall", "steps=3", "rescale=0.5", "lora=a:b:0.5"]
    )
    assert words.prompts == ["a cat", "x = y", "sea=blue water", "e=mc2 on a wall"]
    assert words.config == {"steps": 3, "guidance_rescale": 0.5} and words.asked == {
        "loras": [LoraFile("a:b", "", 0.5)]
    }
    for typo in ("negatve=a blurry dog", "guidence=3", "foo=1", "Steps=3"):
        with pytest.raises(UserError, match="unknown key"):
            read_words([typo])


def test_helpers_are_split_from_the_right():
    words = read_words(
        ["control=me/net:a.png:0.5:0.1:1", "control=net:b 1.png", "control=net", "adapter=n:f.png:2", "embedding=e:<t>"]
    ).asked
    first = Helper("me/net", file="a.png", strength=0.5, start=0.1, end=1.0)
    assert words["controls"] == [first, Helper("net", file="b 1.png"), Helper("net")]
    assert words["adapters"] == [Helper("n", file="f.png", strength=2.0)]
    assert words["embeddings"] == [TokenFile("e", token="<t>")]


@pytest.mark.parametrize("command", ["generate", "regenerate"])
def test_the_help_names_every_key(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    short = {"guidance_rescale": "rescale", "guidance_interval": "interval"}
    if command == "generate":
        assert [k for k in keys() if not re.search(rf"\b{short.get(k, k)}=", told)] == []


def test_digests_of_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nanodiffusion.cli.digest.REMEMBERED", 10)
    import hashlib
    import os

    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"x" * 100)
    small.write_bytes(b"y")
    of = lambda data: hashlib.sha256(data).hexdigest()
    assert (file_digest(large), file_digest(small)) == (of(b"x" * 100), of(b"y"))
    assert list(json.loads((tmp_path / "cache/sha256.json").read_text())) == [str(large.resolve())]
    with monkeypatch.context() as patch:
        patch.setattr("nanodiffusion.cli.digest.file_sha256", lambda path: pytest.fail("read again"))
        assert file_digest(large) == of(b"x" * 100)
    large.write_bytes(b"z" * 100)
    os.utime(large, ns=(1, 1))
    assert file_digest(large) == of(b"z" * 100)
    assert digest([large, small]) == of((of(b"z" * 100) + of(b"y")).encode())
    (tmp_path / "cache/sha256.json").write_text("[")
    assert file_digest(large) == of(b"z" * 100)


# ---- info


def told(run, target) -> str:
    return " ".join(run(f"info {shlex.quote(str(target))}").split())


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            lambda: sd_files.tree("sd1"),
            ["family Stable Diffusion 1.x", "unet 2,491,844 parameters in F32", "predicts eps"],
        ),
        (lambda: sd_files.tree("sdxl", variant="fp16"), ["family SDXL", "in F16, variants fp16", "text_encoder_2"]),
        (lambda: sd_files.tree("sd2", max_shard_size="300KB"), ["Stable Diffusion 2.x", "shards", "predicts v"]),
        (
            lambda: sd_files.single("sdxl", marks=("v_pred",)),
            ["what a checkpoint", "family SDXL", "original", "predicts v"],
        ),
        (lambda: sd_files.single("sd1", inpaint=True), ["a checkpoint", "inpainting", "text 191,680 parameters"]),
        (lambda: sd_files.tree("sd1") / "unet", ["what a U-Net", "family Stable Diffusion 1.x", "tensors"]),
        (lambda: sd_files.tree("sd1") / "text_encoder", ["what a CLIP text encoder"]),
        (lambda: sd_files.tree("sd1") / "vae/diffusion_pytorch_model.safetensors", ["what a VAE", "4 latent channels"]),
        (lambda: part("controlnet", "sdxl"), ["what a ControlNet", "family SDXL", "layout diffusers"]),
        (lambda: part("adapter", "sdxl"), ["what a T2I-Adapter", "family SDXL"]),
        (lambda: sd_files.part("tiny"), ["what a tiny VAE"]),
    ],
)
def test_info_explains_weights(run, file, words):
    said = told(run, file())
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(("layout", "dialect"), [("kohya", "kohya"), ("diffusers", "diffusers")])
def test_info_explains_loras(run, tmp_path, layout, dialect):
    write_lora(tmp_path / "l.safetensors", "sdxl", layout)
    said = told(run, tmp_path / "l.safetensors")
    for word in ("what a LoRA", f"dialect {dialect}", "rank 2", "text_2 12 layers", "unet ", "family SDXL"):
        assert word in said, said
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "h.safetensors")
    assert "not usable this is no plain LoRA: LoHa" in told(run, tmp_path / "h.safetensors")


def test_info_explains_textual_inversions(run, tmp_path):
    save_file({"emb_params": torch.zeros(3, 768)}, tmp_path / "thing.safetensors")
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, tmp_path / "xl.safetensors")
    save_file({"<cat>": torch.zeros(1024)}, tmp_path / "two.safetensors")
    said = told(run, tmp_path / "thing.safetensors")
    assert "token thing" in said and "3 vectors of 768 features" in said and "Stable Diffusion 1.x" in said
    said = told(run, tmp_path / "xl.safetensors")
    assert "clip_g 2 vectors of 1280" in said and "SDXL" in said
    assert "token <cat>" in told(run, tmp_path / "two.safetensors")


def test_info_explains_inpainting_tokens(run, place, tmp_path):
    said = told(run, place / "tokens.safetensors")
    assert "what inpainting tokens" in said and "positions true" in said
    save_file(InpaintTokens(768).state_dict(), tmp_path / "t.safetensors")
    assert "family Stable Diffusion 1.x" in told(run, tmp_path / "t.safetensors")


def test_info_explains_pictures_of_ours_and_of_others(run, tmp_path):
    run(f"generate 'a cat' model=SD1 {QUICK} seed=4 out=OUT/a.png")
    said = told(run, tmp_path / "a.png")
    assert "made by nanodiffusion" in said and "seed 4" in said and "prompt a cat" in said
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "evil \x1b[31m\u202e\nSteps: 3, Sampler: Euler a, Seed: 1")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=info)
    said = told(run, tmp_path / "b.png")
    assert "another program" in said and "steps 3" in said and "euler_ancestral" in said
    assert "\x1b" not in said and "\u202e" not in said  # a prompt cannot steer the terminal


def test_info_says_what_is_wrong_with_a_checkpoint(run, tmp_path, capsys):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(sd_files.tree("sd2", max_shard_size="300KB"), folder)
    next((folder / "vae").glob("*-00002-*")).unlink()
    assert main(["info", str(folder)]) == 2
    assert "vae           DAMAGED: a shard is missing" in capsys.readouterr().out
