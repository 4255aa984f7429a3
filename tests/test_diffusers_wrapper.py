"""examples/diffusers_wrapper.py: diffusers' networks in our loop and in smalldiffusion's equal diffusers' pipelines and ours."""

import importlib.util
import runpy
from functools import cache
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import sd_files
import torch
from PIL import Image
from sd import relative
from torch.testing import assert_close

from nanodiffusion.compat.smalldiffusion import ScheduleLDM, samples
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import cfg
from nanodiffusion.noise import trailing
from nanodiffusion.pretrained import load_pretrained
from nanodiffusion.sampler import dpmpp_2m, sample

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[1] / "examples" / "diffusers_wrapper.py"
FAMILIES = ("sd1", "sd2", "sdxl")
PROMPT, NEGATIVE = "a cat in the sea", "blue hat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@cache
def example():
    spec = importlib.util.spec_from_file_location("diffusers_wrapper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def wrapped(family):
    return example().ModelLatentDiffusion(sd_files.tree(family))


def unit(b=2, h=8, w=8):
    return torch.randn(b, 4, h, w, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("negative", [NEGATIVE, ""], ids=["negative", "without"])
def test_the_wrapped_model_equals_the_one_loaded_by_ourselves(family, negative):
    model, bundle = wrapped(family), load_pretrained(sd_files.tree(family), device="cpu")
    model.set_text_condition(PROMPT, negative, 3.0)
    zeros = not negative and bundle.family.zero_uncond
    cond, uncond = bundle.text.encode([PROMPT] * 2, [negative] * 2)
    uncond = {key: torch.zeros_like(v) for key, v in uncond.items()} if zeros else uncond
    sizes = {"sizes": torch.tensor([[64, 96, 0, 0, 64, 96]] * 2)} if bundle.family.sizes else {}
    D = cfg(bundle.denoiser, {**cond, **sizes}, {**uncond, **sizes}, 3.0)
    x, sigma = 5 * unit(2, 8, 12), torch.tensor([5.0, 5.0])
    expected = D(x, sigma)
    assert relative(model.denoise(x, sigma), expected) < 1e-5
    assert relative(model(x, torch.tensor(5.0)), (x - expected) / 5) < 1e-4
    assert_close(model.schedule.sigmas, bundle.schedule.sigmas)
    image, noise = expected[:, :3].tanh(), unit(2, 1, 1)
    image = torch.nn.functional.interpolate(image, (8, 8))
    assert relative(model.codec.encode(image, noise), bundle.codec.encode(image, noise)) < 1e-5
    assert relative(model.codec.encode(image), bundle.codec.encode(image)) < 1e-5
    assert relative(model.decode_latents(x), bundle.codec.decode(x)) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_smalldiffusion_s_sampler_on_it_equals_the_pipeline_s_ddim(family):
    model, steps = wrapped(family), 5
    model.set_text_condition([PROMPT, "red castle"], NEGATIVE, 5.0)
    ladder = ScheduleLDM(1000).sample_sigmas(steps)
    x = unit() * (ladder[0] ** 2 + 1) ** 0.5
    *_, x0 = samples(model, ladder, xt=x)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = diffusers.DDIMScheduler(
        **betas,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    pipe = diffusers.StableDiffusionPipeline(
        **{**model.pipe.components, "scheduler": ddim}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"negative_prompt": [NEGATIVE] * 2, "guidance_scale": 5.0, "num_inference_steps": steps}
    shape = {"height": 64, "width": 64, "output_type": "latent", "latents": unit()}
    assert relative(x0, pipe([PROMPT, "red castle"], **call, **shape).images) < 1e-4


def test_our_own_sampler_works_on_it():
    model = wrapped("sdxl")
    model.set_text_condition(PROMPT, text_guidance_scale=1)
    ladder = trailing(model.schedule, 5)
    *_, state = sample(model.denoise, float(ladder[0]) * unit(3), ladder, dpmpp_2m)
    assert state.x.shape == (3, 4, 8, 8) and state.x.isfinite().all()


def test_what_cannot_be_asked_is_named():
    model = example().ModelLatentDiffusion(sd_files.tree("sd1"))
    with pytest.raises(UserError, match="prompt"):
        model(unit(), torch.tensor(1.0))
    model.set_text_condition(["a", "b"])
    with pytest.raises(UserError, match="1 or 3"):
        model(unit(3), torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_the_seed_s_example_runs(monkeypatch, tmp_path):
    """By the name of the model on the hub, whose cache has a tiny one."""
    folder = tmp_path / "hub" / "models--stabilityai--stable-diffusion-2-1-base"
    sd_files.write_sd2(folder / "snapshots" / COMMIT, prediction="epsilon")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(diffusers.pipelines.pipeline_utils, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(SCRIPT), run_name="__main__")
    assert len(found["xts"]) == 49 and found["x0"].shape == (1, 4, 8, 8)
    picture = np.array(Image.open("sample.png"))
    assert picture.shape == (64, 64, 3) and picture.std() > 1
