"""examples/fine_tuning.py goes its whole way, at a size that is over in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import fine_tuning
from nanodiffusion import grid, save_png
from nanodiffusion.pretrained import load_pretrained
from nanodiffusion.tensors import load_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_a_base_of_our_own_and_every_task_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home, before = tmp_path / "home", torch.get_float32_matmul_precision()
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["fine_tuning", "--setting", "tiny", "--out", str(home)])
    fine_tuning.main()
    torch.set_float32_matmul_precision(before)

    figures = json.loads((home / "figures.json").read_text())
    assert figures.keys() == {"autoencoder", "text_to_image", *fine_tuning.TASKS}
    assert figures["inpaint"]["untouched_outside"] and figures["inpaint_by_tokens"]["untouched_outside"]
    assert figures["lora"]["strength_0_is_the_base"]
    assert figures["textual_inversion"]["rows_learnt"] == 1 and figures["textual_inversion"]["other_rows_unchanged"]
    assert figures["lcm"]["counted"] == 20 and figures["lcm"]["student_4_over_base_30"] > 0
    for task in (*fine_tuning.TASKS, "tasks"):
        assert Image.open(home / f"{task}.png").size > (32, 32)

    base, start = (load_pretrained(home / name, "fp32", "cpu") for name in ("base", "fresh"))
    assert base.family.size == start.family.size == 32
    trained, first = base.denoiser.net.state_dict(), start.denoiser.net.state_dict()
    assert any(not torch.equal(trained[name], first[name]) for name in first)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):  # what is not trained is passed on bit for bit
        old, new = (load_tensors(home / name / f"{part}.safetensors")[0] for name in ("fresh", "base"))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_the_sheet_shows_the_rows_it_names(tmp_path: Path):
    fine_tuning.sheet(tmp_path)
    assert not (tmp_path / "tasks.png").exists()
    drawn = {}
    for task in ("lora", "lcm"):  # the others are not there yet
        rows = np.random.default_rng(len(task)).integers(0, 256, (4, 3, 32, 32, 3), np.uint8)
        save_png(grid(torch.cat([fine_tuning.as_input(row) for row in rows]), columns=3), tmp_path / f"{task}.png")
        drawn[task] = np.asarray(Image.open(tmp_path / f"{task}.png").convert("L"))
    fine_tuning.sheet(tmp_path)
    page, pitch = np.asarray(Image.open(tmp_path / "tasks.png")), fine_tuning.PITCH
    expected = [drawn[task][k * pitch :][:64] for task in drawn for k in fine_tuning.SHEET[task]]
    assert page.shape[0] == pitch * len(expected)
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(page[i * pitch :][:64, fine_tuning.ASIDE :], row)
        assert page[i * pitch :][:64, : fine_tuning.ASIDE].min() == 0  # its name


def test_edges_a_pixel_apart_are_the_same_and_others_are_not():
    there = torch.zeros(1, 16, 16, dtype=torch.bool).numpy()
    there[0, 4, 2:14] = True
    near, far = there.copy(), there.copy()
    near[0], far[0] = there[0, [*range(15, 16), *range(15)]], there[0, [*range(12, 16), *range(12)]]
    assert fine_tuning.overlap(there, there) == fine_tuning.overlap(near, there) == 1
    assert fine_tuning.overlap(far, there) == 0 == fine_tuning.overlap(there & False, there)


def test_the_vocabulary_has_a_token_for_each_word_of_the_captions():
    tokenizer = fine_tuning.CLIPTokenizer(*fine_tuning.vocabulary())
    assert [len(group) for group in tokenizer.groups("a photo of a Sneaker")] == [1] * 5
    assert (
        len(tokenizer.groups("T-shirt/top")) == 5
        and tokenizer.decode(tokenizer.encode("Ankle boot")[1:-1]) == "ankle boot"
    )
