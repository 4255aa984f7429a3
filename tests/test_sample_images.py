"""The user's own pictures for a run's grids: made into conditions as training makes them, and refused before it begins."""

import functools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from nanodiffusion.config import make
from nanodiffusion.data import load_data
from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.runner import Runner
from nanodiffusion.tensors import load_tensors
from tests import sd_files
from tests.test_finetune import SAMPLE, config_of, write_pictures
from tests.tiny import IMAGES, images, make_runner

pytestmark = pytest.mark.usefixtures("one_thread")

CANNY = {"control": {"name": "canny"}}
HOLES = {"hole": {"name": "random"}}
PROMPTS = ["a photo of a cat", "a red dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train on, two photos that are not square, and two masks, of which one is of half the size."""
    folder = tmp_path_factory.mktemp("given")
    write_pictures(folder / "photos")
    for name, width, height in (("coffee", 150, 100), ("chelsea", 90, 120)):
        photo = Image.fromarray(getattr(skimage.data, name)()).resize((width, height))
        photo.save(folder / f"{name}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 3 :] = 255
        scale = 2 if name == "chelsea" else 1
        Image.fromarray(mask[::scale, ::scale]).save(folder / f"{name}-mask.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def named(place: Path, *names: str) -> list[str]:
    return [str(place / f"{name}.png") for name in names]


def options(place: Path, task: str, data: dict[str, Any], **given: Any) -> Any:
    """A run's config with what is given for its pictures, files of `place` by name."""
    files = {key: named(place, *given.pop(key)) for key in ("images", "masks") if key in given}
    pictures = {"name": "pictures", "path": str(place / "photos"), "size": 64, **data}
    return config_of(task, data=pictures, sample={**SAMPLE, **files, **given}, name="run", out=str(place))


@functools.cache
def model_of(task: str) -> Any:
    """The model of a task, which no option of data and pictures changes."""
    config = config_of(task)
    return make(FINETUNES, config.task, "task")().model(config)


def fixed(place: Path, task: str, data: dict[str, Any], **given: Any) -> dict[str, Tensor]:
    """What a run's pictures are drawn from."""
    config = options(place, task, data, **given)
    row, model = make(FINETUNES, config.task, "task")(), model_of(task)
    row.check(model, config, (4, 8, 8))
    return row.fixed(config, model, row.prepared(load_data(**config.data), model))


def samples(place: Path, data: dict[str, Any], *names: str, masks: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The conditions that a data set makes of files of `place`."""
    whole = load_data("pictures", **{"path": str(place / "photos"), "size": 64, **data})
    return whole.own(named(place, *names), named(place, *masks), names).batch(torch.arange(len(names)))[1]


def crops(place: Path, *names: str) -> np.ndarray:
    """The middle of files by Pillow, shorter side 64, (n 64 64 3)."""
    found = []
    for name in names:
        image = Image.open(place / f"{name}.png").convert("RGB")
        w, h = image.size
        w, h = (64, h * 64 // w) if w < h else (w * 64 // h, 64)
        left, top = (w - 64) // 2, (h - 64) // 2
        found.append(np.asarray(image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))))
    return np.stack(found)


def as_images(levels: np.ndarray) -> Tensor:
    """(n h w 3) bytes -> (n 3 h w) in [0, 1]."""
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def holes(place: Path, *names: str) -> Tensor:
    """Where masks of files are white: (n 1 64 64)."""
    return as_images(crops(place, *(f"{name}-mask" for name in names)))[:, :1] >= 0.5


# -- what pictures are made into ---------------------------------------------------------------------------------------


def test_every_prompt_is_drawn_where_there_are_fewer_samples_than_prompts(place):
    found = fixed(place, "text_to_image", {}, prompts=[f"a photo of {thing}" for thing in "abcdefghijklmnop"])
    assert len(found["ids"].unique(dim=0)) == 16


def test_a_control_is_opencvs_edges_of_the_users_picture_whose_size_is_told(place):
    found = samples(place, {**CANNY, "buckets": [[64, 64], [64, 128]]}, "coffee", "chelsea")
    edges = np.stack([cv2.Canny(crop, 100, 200) for crop in crops(place, "coffee", "chelsea")])
    assert_close(found["control"], as_images(edges[..., None].repeat(3, 3)), rtol=0, atol=0)
    assert found["sizes"].tolist() == [[100, 150, 0, 16, 64, 64], [120, 90, 10, 0, 64, 64]]


def test_a_picture_is_the_control_image_itself_where_controls_are_paired(place, tmp_path):
    for end in ("png", "control.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"0.{end}")
    (tmp_path / "0.txt").write_text("a cat")
    found = samples(place, {"path": str(tmp_path), "control": {"name": "paired"}}, "coffee")
    assert_close(found["control"], as_images(crops(place, "coffee")), rtol=0, atol=1e-7)


def test_a_control_for_inpainting_has_the_hole_of_the_mask(place):
    data = {**HOLES, "control": {"name": "inpainting"}}
    found = samples(place, data, "coffee", "chelsea", masks=("coffee-mask", "chelsea-mask"))
    hole, picture = holes(place, "coffee", "chelsea"), as_images(crops(place, "coffee", "chelsea"))
    assert 0.1 < hole.float().mean() < 0.3
    assert_close(found["control"], torch.where(hole, -1.0, picture), rtol=0, atol=1e-7)


@pytest.mark.parametrize("task", ["inpaint", pytest.param("inpaint_by_tokens", marks=pytest.mark.slow)])
def test_a_picture_with_a_hole_is_encoded_as_diffusers_does(place, task):
    import diffusers

    given = {"images": ["coffee", "chelsea"], "masks": ["coffee-mask", "chelsea-mask"]}
    found = fixed(place, task, HOLES, **given)
    vae: Any = diffusers.AutoencoderKL.from_pretrained(sd_files.tree("sd1") / "vae")
    hole = holes(place, "coffee", "chelsea").float()
    picture = (as_images(crops(place, "coffee", "chelsea")) * 2 - 1) * (hole < 0.5)
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mean * vae.config.scaling_factor
    assert_close(found["concat"], torch.cat([F.interpolate(hole, (8, 8)), latents], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("task", "data"), [("adapter", CANNY), ("inpaint", HOLES)], ids=["canny", "holes"])
def test_the_files_of_the_first_samples_give_what_the_first_samples_give(place, task, data):
    """Training's own conditions of them, crop, hole and captions, bit for bit."""
    captions = [f"a photo of cat {i}" for i in range(6)]
    again = fixed(place, task, data, images=[f"photos/{i}" for i in range(6)], prompts=captions)
    assert_close(again, fixed(place, task, data), rtol=0, atol=0)


def test_one_picture_is_for_all_prompts_and_without_prompts_there_are_no_words(place):
    both = fixed(place, "adapter", CANNY, images=["coffee"], prompts=PROMPTS)
    assert both["control"].shape == (2, 3, 64, 64) and torch.equal(*both["control"])
    ids = model_of("adapter").told([*PROMPTS, "", ""])["ids"]
    silent = fixed(place, "adapter", CANNY, images=["coffee", "chelsea"])  # a stranger's words would mislead
    assert_close(torch.cat([both["ids"], silent["ids"]]), ids, rtol=0, atol=0)
    assert_close(silent["control"][0], both["control"][0], rtol=0, atol=0)


def test_a_run_draws_and_keeps_the_users_pictures_or_does_not_begin(place):
    with pytest.raises(UserError, match=r"gone\.png"):
        Runner(options(place, "adapter", CANNY, images=["gone"]), World(), lambda text: None)
    assert not (place / "run").exists()
    runner = Runner(options(place, "adapter", CANNY, images=["coffee", "chelsea"]), World(), lambda text: None)
    runner.draw(runner.folder / "samples.png")
    assert Image.open(runner.folder / "samples.png").size[0] > 2 * 64
    saved, _ = load_tensors(runner.folder / "pictures.safetensors")
    assert_close(saved["control"], samples(place, CANNY, "coffee", "chelsea")["control"], rtol=0, atol=0)
    assert runner.prompts == []


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "a file that is not there": ("adapter", CANNY, {"images": ["gone"]}, "gone.png"),
    "no picture": ("adapter", CANNY, {"images": ["coffee", "broken"]}, "this picture cannot be used"),
    "a mask that is not there": ("inpaint", HOLES, {"images": ["coffee"], "masks": ["gone"]}, "gone.png"),
    "a mask of another shape": ("inpaint", HOLES, {"images": ["coffee"], "masks": ["chelsea-mask"]}, "does not fit"),
    "a mask and no hole": ("adapter", CANNY, {"images": ["coffee"], "masks": ["coffee-mask"]}, "sample.masks"),
    "masks without images": ("inpaint", HOLES, {"masks": ["coffee-mask"]}, "masks of no pictures"),
    "2 images, 3 prompts": ("adapter", CANNY, {"images": ["coffee"] * 2, "prompts": ["a"] * 3}, "sample.images"),
    "3 images, 2 prompts": ("adapter", CANNY, {"images": ["coffee"] * 3, "prompts": ["a"] * 2}, "sample.prompts"),
    "3 images, 2 masks": ("inpaint", HOLES, {"images": ["coffee"] * 3, "masks": ["coffee-mask"] * 2}, "sample.masks"),
    "lora": ("lora", {}, {"images": ["coffee"]}, "this task reads no picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pictures_that_cannot_be_meant_are_refused(place, case):
    task, data, given, said = REFUSED[case]
    with pytest.raises(UserError) as e:
        fixed(place, task, data, **given)
    assert said in str(e.value) and len(str(e.value).splitlines()) <= 6


@pytest.mark.parametrize("task", ["denoise", "autoencode"])
def test_a_run_without_a_checkpoint_reads_no_pictures(tmp_path, task):
    net = {} if task == "denoise" else {"net": {"name": "autoencoder", "widths": [8, 8], "groups": 4}}
    more = {**net, "task": {"name": task}, "sample": {"steps": 2, "n": 4, "images": ["a.png"]}}
    with pytest.raises(UserError, match="this task reads no picture"):
        make_runner(tmp_path, IMAGES, {"data": images(tmp_path)}, more)
