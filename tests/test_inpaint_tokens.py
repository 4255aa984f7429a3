"""Inpainting tokens: their places, their memory, and their file from training to loading."""

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from torch.testing import assert_close

from nanodiffusion.config import make, read_config
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.memory import PLANS
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.pretrained import load_pretrained, load_tokens
from nanodiffusion.tasks import GenerateConfig, Inputs, complete
from nanodiffusion.tasks.plan import stages
from nanodiffusion.tensors import load_tensors
from tests import sd_files

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(**options) -> InpaintTokens:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InpaintTokens(64, **options)


def test_a_place_is_the_references_sinusoids_whatever_the_size_of_the_picture():
    x0, mask = torch.randn(2, 4, 6, 9), torch.randint(0, 2, (2, 1, 6, 9)).float()
    plain, placed = (seeded(positions=positions)(x0, mask) for positions in (False, True))
    every = get_2d_sincos_pos_embed(64, 12, base_size=12, output_type="pt").float().view(12, 12, 64)
    assert_close(placed - plain, every[:6, :9].reshape(1, 54, 64).expand(2, -1, -1), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="context_dim"):
        InpaintTokens(6, positions=True)


@pytest.mark.parametrize("positions", [False, True])
def test_what_training_leaves_is_loaded_as_it_was_trained(tmp_path, positions):
    task = {"name": "inpaint_by_tokens", "base": str(sd_files.tree("sd1")), "positions": positions}
    config = read_config({"task": task, "prediction": "eps", "clock": "table", "schedule": {"name": "ldm"}})
    row = make(FINETUNES, config.task, "task")()
    model = row.model(config)
    row.publish(model, None, 0, tmp_path)
    loaded = load_tokens(tmp_path / "tokens.safetensors", "fp32", "cpu")
    x0, mask = torch.randn(1, 4, 8, 8), torch.randint(0, 2, (1, 1, 8, 8)).float()
    assert_close(loaded(x0, mask), model.net.tokens(x0, mask), rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_file_that_says_nothing_of_places_has_none(tmp_path):
    tokens, x0, mask = seeded(), torch.randn(1, 4, 4, 4), torch.ones(1, 1, 4, 4)
    save_file(tokens.state_dict(), tmp_path / "t.safetensors")
    assert_close(load_tokens(tmp_path / "t.safetensors", "fp32", "cpu")(x0, mask), tokens(x0, mask), rtol=0, atol=0)


def test_the_memory_of_the_tokens_is_counted():
    bundle, seen = load_pretrained(sd_files.tree("sd1"), device="cpu"), []
    picture: dict[str, Any] = {"image": torch.zeros(1, 3, 64, 48), "mask": torch.ones(1, 1, 64, 48)}
    config = complete(bundle, GenerateConfig(prompt=["a"], n=2), Inputs(**picture))
    bundle.denoiser.net.register_forward_pre_hook(lambda _, x, kw: seen.append(kw["context"].shape), with_kwargs=True)
    for tokens in (None, seeded()):
        stage = stages(bundle, config, Inputs(**picture, tokens=tokens), PLANS["fast"])["denoiser"]
        stage.call(stage.module)
    assert seen == [(4, 77, 64), (4, 77 + 8 * 6, 64)]


def broken(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = {**seeded().state_dict(), name: value}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            lambda: load_tensors(next((sd_files.tree("sd1") / "unet").glob("*.safetensors")))[0],
            "holds no set of inpainting tokens",
        ),
        (lambda: broken("conditioning_image_proj.bias", None), "holds no set of inpainting tokens"),
        (lambda: broken("conditioning_image_proj.weight", torch.zeros(64)), "holds no set of inpainting tokens"),
        (lambda: broken("conditioning_image_proj.bias", torch.zeros(3)), "do not fit"),
    ],
)
def test_what_is_no_file_of_tokens_is_named(tmp_path, tensors, message):
    save_file(tensors(), tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=message) as e:
        load_tokens(tmp_path / "t.safetensors")
    assert "t.safetensors" in str(e.value) and len(str(e.value).splitlines()) <= 6
