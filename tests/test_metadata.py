"""What made a picture survives in it, exactly in our JSON and as far as the common format goes in `parameters`."""

import json
import random

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nanodiffusion.errors import UserError
from nanodiffusion.metadata import LADDERS, SAMPLERS, chunks, parameters, parse_parameters, read_settings
from nanodiffusion.show import save_png

PICTURE = Image.fromarray(np.zeros((2, 2, 3), np.uint8))

# A text as AUTOMATIC1111's interface writes it (its wiki and issue threads show many).
THEIRS = """a photo of a (red:1.2) fox, "sharp"
second line
Negative prompt: blurry, low quality
worse
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 640x512, \
Model hash: 6ce0161689, Model: "v1-5, pruned: emaonly", Denoising strength: 0.55, Clip skip: 2, \
Lora hashes: "one: abc, two: def", Version: v1.10.1"""


def random_text(r: random.Random) -> str:
    alphabet = [*"abc XYZ019,:;()[]{}<>|\\/\"'\n\t", "é", "雪", "🦊", "\u202e", "ß"]
    return "".join(r.choices(alphabet, k=r.randrange(40)))


def random_settings(r: random.Random) -> dict:
    return {
        "nanodiffusion": "0.1.0",
        "prompt": random_text(r),
        "negative": random_text(r),
        "seed": r.randrange(2**63),
        "steps": r.randrange(1, 200),
        "guidance": r.choice([1.0, 7.5, r.uniform(0, 30)]),
        "width": 8 * r.randrange(1, 300),
        "height": 8 * r.randrange(1, 300),
        "sampler": {"name": r.choice(sorted(SAMPLERS)), "eta": r.random()},
        "ladder": {"name": r.choice(sorted(LADDERS))},
        "strength": r.random(),
        "model": random_text(r),
        "loras": [{"file": random_text(r), "strength": r.uniform(-1, 2)}],
    }


def test_any_settings_come_back_from_a_png_exactly(tmp_path):
    r = random.Random(0)
    for i in range(200):
        settings = random_settings(r)
        save_png(PICTURE, tmp_path / "a.png", chunks(settings))
        assert read_settings(tmp_path / "a.png") == settings, i


def test_a_text_of_another_program_is_understood():
    assert parse_parameters(THEIRS) == {
        "prompt": 'a photo of a (red:1.2) fox, "sharp"\nsecond line',
        "negative": "blurry, low quality\nworse",
        "steps": 28,
        "sampler": {"name": "dpmpp_2m"},
        "ladder": {"name": "karras"},
        "guidance": 6.5,
        "seed": 1234567890,
        "width": 640,
        "height": 512,
        "model_hash": "6ce0161689",
        "model": "v1-5, pruned: emaonly",
        "strength": 0.55,
        "clip_skip": 1,
        "Lora hashes": "one: abc, two: def",
        "Version": "v1.10.1",
    }


def test_older_texts_name_sampler_and_ladder_in_one():
    found = parse_parameters("x\nSteps: 5, Sampler: DPM++ 2M Karras, CFG scale: 7")
    assert found["sampler"] == {"name": "dpmpp_2m"} and found["ladder"] == {"name": "karras"}


def test_a_prompt_alone_is_a_text_too():
    assert parse_parameters("just words\nand more") == {"prompt": "just words\nand more"}


@pytest.mark.parametrize("seed", range(20))
def test_the_common_text_carries_what_the_format_has(seed):
    settings = random_settings(random.Random(seed)) | {"prompt": "a (b:1.2), c\nd", "negative": "e, f"}
    kept = ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "strength", "model")
    found = parse_parameters(parameters(settings))
    assert {k: found[k] for k in kept} == {k: settings[k] for k in kept}
    assert found["sampler"]["name"] == settings["sampler"]["name"]
    assert found["ladder"] == settings["ladder"]


@pytest.mark.parametrize("text", ["{", "[]x", "[" * 100_000, "3"])
def test_damaged_settings_are_one_clear_error(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("nanodiffusion", text)
    PICTURE.save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match="damaged"):
        read_settings(tmp_path / "a.png")


def test_pictures_without_settings_and_files_that_are_none_are_refused(tmp_path):
    PICTURE.save(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text(json.dumps({}))
    for name, words in (("bare.png", "no settings"), ("text.png", "cannot be read"), ("none.png", "cannot be read")):
        with pytest.raises(UserError, match=words):
            read_settings(tmp_path / name)
