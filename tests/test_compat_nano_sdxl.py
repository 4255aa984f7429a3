"""The stand-in for nano-diffusion's SDXL against diffusers' pipelines, and its examples on a hub of tiny checkpoints.

The cache is laid out as huggingface_hub's. Its networks are tiny, with heads of 64 features and 1,280 features of pooled text
as published, so that what is read off the shapes of a file alone is what it was written from.
"""

import copy
import inspect
import os
import runpy
import warnings
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import sd_files
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sd import relative
from torch.testing import assert_close

from nanodiffusion.compat import nano_sdxl as ours
from nanodiffusion.errors import UserError
from nanodiffusion.nets.sd_unet import SDUNet

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
STEPS = torch.linspace(0, 999, 6, dtype=torch.int64)
PROMPTS = ["a photo of a cat", "red castle by the sea"]
# What the seed's names are called with, in order.
ARGUMENTS = {
    "make_clip_tokenizer": "vocab_file merges_file pad_token_id",
    "make_clip_tokenizer_one": "vocab_file merges_file",
    "make_clip_tokenizer_two": "vocab_file merges_file",
    "sdxl_text_conditioning": "text_encoder_one text_encoder_two text_input_ids_one text_input_ids_two",
    "make_sigmas": "beta_start beta_end num_train_timesteps device",
    "euler_ode_solver": "eps_theta timesteps sigmas x_T",
    "heun_ode_solver": "eps_theta timesteps sigmas x_T",
    "rk4_ode_solver": "eps_theta timesteps sigmas x_T",
    "sdxl_diffusion_loop": "prompts unet tokenizer_one text_encoder_one tokenizer_two text_encoder_two images controlnet"
    " adapter sigmas timesteps x_T micro_conditioning guidance_scale generator negative_prompts sampler"
    " encoder_hidden_states pooled_encoder_hidden_states",
    "sdxl_eps_theta": "x_t t sigma unet encoder_hidden_states pooled_encoder_hidden_states negative_encoder_hidden_states"
    " negative_pooled_encoder_hidden_states micro_conditioning guidance_scale controlnet controlnet_cond"
    " add_to_down_block_outputs",
}


# -- a hub of tiny checkpoints -----------------------------------------------------------------------------------------


def repository(cache: Path, name: str, kind: str = "models") -> Path:
    """A repository's folder in the cache, of one commit."""
    folder = cache / f"{kind}--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder / "snapshots" / COMMIT


POOLED = 1280
UNET = {**sd_files.UNETS["sdxl"], "projection_class_embeddings_input_dim": POOLED + 6 * 8}


def text_encoder(kind: str, *args, **options):
    """sd_files' text encoder, whose pooled output has as many features as the published one."""
    net = SMALL(kind, *args, **options)
    if kind == "bigg":
        net.config.projection_dim = POOLED
        net.text_projection = sd_files.randomised(torch.nn.Linear(net.config.hidden_size, POOLED, bias=False), 9)
    return net


SMALL = sd_files.text_encoder


def half(folder: Path) -> None:
    """Beside every weight file its half-precision variant."""
    for file in [*folder.glob("*/*.safetensors")]:
        tensors = {name: t.half() for name, t in load_file(file).items()}
        save_file(tensors, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "hub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sd_files.UNETS, "sdxl", UNET)
        patch.setattr(sd_files, "text_encoder", text_encoder)
        base = repository(folder, "stabilityai/stable-diffusion-xl-base-1.0")
        sd_files.write_sdxl(base)
        half(base)
        sd_files.write_controlnet(repository(folder, "diffusers/controlnet-canny-sdxl-1.0"), "sdxl")
    sd_files.write_vae(repository(folder, "madebyollin/sdxl-vae-fp16-fix"), "sdxl")
    adapter = diffusers.T2IAdapter(3, [64, 64, 128, 128], 2, 16, "full_adapter_xl")
    sd_files.randomised(adapter, 8).save_pretrained(repository(folder, "TencentARC/t2i-adapter-canny-sdxl-1.0"))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    misc = repository(folder, "williamberman/misc", "datasets")
    Image.fromarray(pixels).save(misc / "bright_room_with_chair.png")
    return folder


@pytest.fixture(autouse=True)
def hub(cache, monkeypatch):
    """The environment of a machine without a network whose cache is the hub."""
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(ours, "SIDE", 8)
    return cache


def snapshot(hub: Path, name: str) -> Path:
    return hub / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def parts(cache):
    """The loop's own arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(cache.parent))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return {
            "unet": ours.SDXLUNet.load_fp32(),
            "tokenizer_one": ours.make_clip_tokenizer_one_from_hub(),
            "text_encoder_one": ours.SDXLCLIPOne.load_fp32(),
            "tokenizer_two": ours.make_clip_tokenizer_two_from_hub(),
            "text_encoder_two": ours.SDXLCLIPTwo.load_fp32(),
        }


@pytest.fixture(scope="module")
def components(cache):
    """The same, loaded by diffusers and transformers."""
    folder = snapshot(cache, "stabilityai/stable-diffusion-xl-base-1.0")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    return {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}


@pytest.fixture(scope="module")
def controlnet(cache):
    """(ours, diffusers')."""
    folder = snapshot(cache, "diffusers/controlnet-canny-sdxl-1.0")
    net = ours.SDXLControlNet.load(folder / "diffusion_pytorch_model.safetensors")
    return net, diffusers.ControlNetModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def adapter(cache):
    """(ours, diffusers')."""
    folder = snapshot(cache, "TencentARC/t2i-adapter-canny-sdxl-1.0")
    net = ours.SDXLAdapter.load(folder / "diffusion_pytorch_model.safetensors")
    return net, diffusers.T2IAdapter.from_pretrained(folder)


def pipeline(components, task="", scheduler="EulerDiscreteScheduler", **extra):
    pipe = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")(
        **{**components, **extra, "scheduler": getattr(diffusers, scheduler)(**BETAS)}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(pipe, noise, prompt=PROMPTS, timesteps=STEPS, **call):
    """Its final latents at our default micro-conditioning."""
    sizes = {"original_size": (1024, 1024), "target_size": (1024, 1024), "guidance_scale": 5.0}
    shape = {"height": 8 * noise.shape[2], "width": 8 * noise.shape[3], "output_type": "latent"}
    return pipe(prompt=prompt, latents=noise, timesteps=timesteps.flip(0).tolist(), **sizes, **shape, **call).images


def unit(b=2, h=8, w=8):
    return torch.randn(b, 4, h, w, generator=torch.Generator().manual_seed(3))


def scaled(noise, timesteps=STEPS):
    return noise * (ours.make_sigmas()[timesteps[-1]] ** 2 + 1) ** 0.5


def loop(parts, prompts=PROMPTS, noise=None, **call):
    x_T = None if noise is None else scaled(noise, call.get("timesteps", STEPS))
    return ours.sdxl_diffusion_loop(prompts, **parts, **{"timesteps": STEPS, "x_T": x_T, **call})


def check(mine, theirs, tolerance=1e-5):
    assert relative(mine, theirs) < tolerance


def picture(b=1, h=64, w=64):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(5))


# -- the names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_in_the_order_of_the_seed(name):
    assert list(inspect.signature(getattr(ours, name)).parameters) == ARGUMENTS[name].split()


def test_one_import_line_brings_every_name():
    found = {}
    exec("from nanodiffusion.compat.nano_sdxl import *", found)
    assert set(ours.__all__) <= set(found) and "make_clip_tokenizer_from_hub" in found


# -- loading -----------------------------------------------------------------------------------------------------------


def test_weights_that_come_alone_tell_their_architecture_by_their_shapes(hub, parts, controlnet, adapter, tmp_path):
    base = snapshot(hub, "stabilityai/stable-diffusion-xl-base-1.0")
    found = {
        "unet/diffusion_pytorch_model": parts["unet"],
        "text_encoder/model": parts["text_encoder_one"],
        "text_encoder_2/model": parts["text_encoder_two"],
    }
    for file, net in found.items():
        alone = tmp_path / "weights.safetensors"
        alone.write_bytes((base / f"{file}.safetensors").read_bytes())
        again = type(net).load(str(alone))
        assert again.config == net.config and again.dtype == torch.float32
        assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert parts["text_encoder_one"].config.activation == "quick_gelu"
    assert parts["text_encoder_two"].config.activation == "gelu"
    assert (parts["unet"].config.heads, parts["unet"].config.pooled_dim) == ((1, 1, 2), POOLED)
    assert controlnet[0].control.hint_widths == (8, 8, 16, 16) and adapter[0].config.kind == "full_xl"


def test_half_precision_is_the_variant_of_the_file():
    for cls in (ours.SDXLUNet, ours.SDXLCLIPOne, ours.SDXLCLIPTwo, ours.SDXLUNetInpainting):
        full, narrow = cls.load_fp32(), cls.load_fp16(device="cpu")
        assert narrow.dtype == torch.float16 and narrow.device.type == "cpu"
        assert_close(narrow.state_dict(), {k: t.half() for k, t in full.state_dict().items()}, rtol=0, atol=0)


def test_the_device_is_where_the_weights_go(monkeypatch):
    asked = []
    monkeypatch.setattr(ours.Part, "load", lambda part, build, dtype, device: asked.append((dtype, device)))
    for load in (ours.SDXLUNet.load_fp32, ours.SDXLCLIPTwo.load_fp16, ours.SDXLVae.load_fp16_fix):
        load(device="cuda:1")
    assert asked == [(None, torch.device("cuda:1"))] * 3  # the file's own dtype


@pytest.mark.gpu
def test_on_a_gpu_the_loop_and_its_noise_are_there():
    unet = ours.SDXLUNet.load_fp16(device="cuda")
    call = {"encoder_hidden_states": torch.ones(1, 77, 192), "pooled_encoder_hidden_states": torch.ones(1, POOLED)}
    for device in ("cuda", "cpu"):
        seeded = [
            ours.sdxl_diffusion_loop(None, unet, **call, generator=torch.Generator(device).manual_seed(0)) for _ in "ab"
        ]
        assert seeded[0].device.type == "cuda" and seeded[0].isfinite().all()
        assert_close(seeded[0], seeded[1], rtol=0, atol=0)


def test_constructors_build_the_published_sizes():
    counts = {
        ours.SDXLUNet: 2_567_463_684,
        ours.SDXLUNetInpainting: 2_567_463_684 + 5 * 9 * 320,
        ours.SDXLControlNet: 1_251_014_160,
        ours.SDXLAdapter: 79_028_160,
        ours.SDXLVae: 83_653_863,
        ours.SDXLCLIPOne: 123_060_480,
        ours.SDXLCLIPTwo: 694_659_840,
    }
    with torch.device("meta"):
        assert {cls: sum(p.numel() for p in cls().parameters()) for cls in counts} == counts


def test_strict_false_leaves_out_what_does_not_fit(hub, tmp_path):
    file = tmp_path / "some.safetensors"
    tensors = load_file(
        snapshot(hub, "stabilityai/stable-diffusion-xl-base-1.0") / "unet/diffusion_pytorch_model.safetensors"
    )
    bias = tensors.pop("conv_out.bias")
    save_file({**tensors, "something.else": bias}, file)
    with pytest.raises(UserError, match=r"something\.else"):
        ours.SDXLUNet.load(file)
    net = ours.SDXLUNet.load(file, strict=False)
    kept = {k: t for k, t in net.state_dict().items() if k != "conv_out.bias"}
    assert_close(kept, tensors, rtol=0, atol=0)


def test_strict_false_reads_older_clip_files_in_their_dtype(hub, tmp_path):
    """transformers before 4.31 wrote the positions 0, 1, 2, ... too: int64, and by their alignment first in the file."""
    file = snapshot(hub, "stabilityai/stable-diffusion-xl-base-1.0") / "text_encoder/model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(tensors | positions, tmp_path / "older.safetensors")
    net = ours.SDXLCLIPOne.load(tmp_path / "older.safetensors", strict=False)
    assert_close(net.state_dict(), tensors, rtol=0, atol=0)


def test_pickles_are_refused_and_missing_files_named(tmp_path):
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(UserError, match="never opened"):
        ours.SDXLUNet.load(tmp_path / "net.bin")
    with pytest.raises(UserError, match="nothing"):
        ours.SDXLUNet.load(tmp_path / "nothing.safetensors")


def test_one_file_in_the_cache_is_enough_and_none_is_named(monkeypatch, tmp_path, hub):
    name = "madebyollin/sdxl-vae-fp16-fix"
    file = repository(tmp_path / "hub", name) / "diffusion_pytorch_model.safetensors"
    file.write_bytes((snapshot(hub, name) / file.name).read_bytes())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert ours.SDXLVae.load_fp16_fix().config.scale == ours.SDXL_VAE.scale
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        ours.SDXLVae.load_fp16_fix()
    with pytest.raises(UserError, match="stable-diffusion-xl-base"):
        ours.make_clip_tokenizer_one_from_hub()


def test_tokenizers_pad_as_published_and_keep_the_padding_s_word(hub):
    folder = snapshot(hub, "stabilityai/stable-diffusion-xl-base-1.0") / "tokenizer"
    files = folder / "vocab.json", folder / "merges.txt"
    one, two = ours.make_clip_tokenizer_one(*files), ours.make_clip_tokenizer_two(*files)
    rows = [[t.ids for t in tokenizer.encode_batch(["a cat!", "a"])] for tokenizer in (one, two)]
    assert torch.tensor(rows).shape == (2, 2, 77)
    assert [rows[0][1][-1], rows[1][1][-1]] == [one.end, 0]
    assert rows[0][0][:5] == rows[1][0][:5] and rows[1][0][3] != 0  # "!" is a word here, and 0 pads
    readme = ours.make_clip_tokenizer_from_hub(two.end)
    assert_close(readme(PROMPTS), one(PROMPTS))


# -- nets called as the seed calls them --------------------------------------------------------------------------------


@pytest.fixture
def given(parts):
    """Arguments of a U-Net or ControlNet by the seed's names, and diffusers' for the same."""
    g = torch.Generator().manual_seed(1)
    context, pooled = torch.randn(2, 5, 192, generator=g), torch.randn(2, POOLED, generator=g)
    sizes = torch.tensor([[1024, 768, 0, 5, 512, 512]] * 2)
    mine = {"encoder_hidden_states": context, "pooled_encoder_hidden_states": pooled, "micro_conditioning": sizes}
    added = {"text_embeds": pooled, "time_ids": sizes}
    theirs = {"encoder_hidden_states": context, "added_cond_kwargs": added, "return_dict": False}
    return {"x_t": unit(), "t": torch.tensor([500]), **mine}, (unit(), torch.tensor([500])), theirs


@torch.no_grad()
def test_nets_called_by_the_seed_s_names_equal_diffusers(parts, components, controlnet, adapter, given):
    mine, args, theirs = given
    check(parts["unet"](**mine), components["unet"](*args, **theirs)[0])
    control = controlnet[0](**mine, controlnet_cond=picture(2))
    down, middle = controlnet[1](*args, controlnet_cond=picture(2), **theirs)
    check(control["mid_block_res_sample"], middle)
    for a, b in zip(control["down_block_res_samples"], down, strict=True):
        check(a, b)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    check(parts["unet"](**mine, **added), components["unet"](*args, **theirs, **added)[0])
    maps, expected = adapter[0](picture(2)), adapter[1](picture(2))
    for a, b in zip(maps, expected, strict=True):
        check(a, b)
    out = components["unet"](*args, **theirs, down_intrablock_additional_residuals=[m.clone() for m in expected])[0]
    check(parts["unet"](**mine, add_to_down_block_outputs=maps), out)


@torch.no_grad()
def test_text_conditioning_equals_the_pipeline_s(parts, components):
    ids = [torch.tensor([row.ids for row in parts[f"tokenizer_{n}"].encode_batch(PROMPTS)]) for n in ("one", "two")]
    context, pooled = ours.sdxl_text_conditioning(parts["text_encoder_one"], parts["text_encoder_two"], *ids)
    expected = pipeline(components).encode_prompt(PROMPTS, do_classifier_free_guidance=False, device="cpu")
    check(context, expected[0])
    check(pooled, expected[2])


def test_a_net_and_its_core_are_one(parts, given):
    unet, mine = parts["unet"], given[0]
    core = unet.core
    assert type(core) is SDUNet and core.conv_in.weight is unet.conv_in.weight
    out = core(mine["x_t"], mine["t"].repeat(2), *(mine[k] for k in list(mine)[2:]))
    assert_close(out, unet(**mine), rtol=0, atol=0)
    again = copy.deepcopy(unet)
    assert_close(again(**mine), out, rtol=0, atol=0)


def test_a_controlnet_from_a_u_net_changes_nothing_yet(parts, given):
    net = ours.SDXLControlNet.from_unet(parts["unet"])
    control = net(**given[0], controlnet_cond=picture(2))
    assert isinstance(net, ours.SDXLControlNet)
    assert all(not r.any() for r in (*control["down_block_res_samples"], control["mid_block_res_sample"]))
    assert_close(net.down_blocks.state_dict(), parts["unet"].down_blocks.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_the_inpainting_u_net_starts_as_the_plain_one(parts, given):
    net, mine = ours.SDXLUNetInpainting.load_fp32(), given[0]
    more = torch.randn(2, 5, 8, 8)
    wide = {**mine, "x_t": torch.cat([mine["x_t"], more], 1)}
    assert_close(net(**wide), parts["unet"](**mine))
    text = (mine["encoder_hidden_states"], mine["pooled_encoder_hidden_states"])
    rest = (*text, None, None, mine["micro_conditioning"])
    sigma, t = torch.tensor([2.0]), torch.tensor([600])
    mine_9 = ours.sdxl_eps_theta_unet_inpainting(mine["x_t"], t, sigma, net, *rest, more, 3.0)
    assert_close(mine_9, ours.sdxl_eps_theta_(mine["x_t"], t, sigma, parts["unet"], *rest, 3.0))


@torch.no_grad()
def test_inpainting_by_cross_attention_is_a_longer_context(parts, given, tmp_path):
    net, mine = ours.SDXLUNetInpaintingCrossAttentionConditioning.load_fp32(), given[0]
    x0, mask = unit(), (torch.rand(2, 1, 8, 8) > 0.5).float()
    pixels = (
        net.conditioning_image_proj(x0.flatten(2).mT)
        + net.conditioning_image_mask_embeddings.weight[mask.flatten(1).long()]
    )
    longer = {**mine, "encoder_hidden_states": torch.cat([mine["encoder_hidden_states"], pixels], 1)}
    expected = parts["unet"](**longer)
    assert_close(net(**mine, conditioning_image=x0, conditioning_image_mask=mask), expected)
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    again = type(net).load(tmp_path / "own.safetensors")
    assert_close(again(**mine, conditioning_image=x0, conditioning_image_mask=mask), expected)
    sigma = torch.tensor([2.0])
    text = (mine["encoder_hidden_states"], mine["pooled_encoder_hidden_states"])
    rest = (None, None, mine["micro_conditioning"])
    theta = ours.sdxl_eps_theta_unet_inpainting_cross_attention_conditioning
    out = theta(mine["x_t"] * 5**0.5, mine["t"], sigma, net, *text, *rest, x0, mask, 1.0)
    assert_close(out, expected)


def test_computing_blocks_again_for_the_gradient_changes_memory_alone(parts, given):
    unet = copy.deepcopy(parts["unet"]).requires_grad_(True)
    found = []
    for again in (False, True):
        ours.set_attention_checkpoint_kv(again)
        kept: list[int] = []
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
                unet(**given[0]).square().mean().backward()
        finally:
            ours.set_attention_checkpoint_kv(False)
        found.append((unet.mid_block.attentions[0].proj_in.weight.grad, sum(kept)))
        unet.zero_grad()
    assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert found[1][1] < found[0][1] / 2


def test_attention_is_torch_s_own_by_either_name():
    for name in ("xformers", "torch_2.0_scaled_dot_product"):
        ours.set_attention_implementation(name)
    with pytest.raises(UserError, match="did you mean 'xformers'"):
        ours.set_attention_implementation("xformer")


# -- the VAE -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_vae_equals_diffusers_with_the_same_generator(hub):
    vae = ours.SDXLVae.load_fp16_fix(device="cpu")
    theirs = diffusers.AutoencoderKL.from_pretrained(snapshot(hub, "madebyollin/sdxl-vae-fp16-fix"))
    image = picture(2, 32, 48) * 2 - 1
    x0 = vae.encode(image, generator=torch.Generator().manual_seed(0))
    expected = theirs.encode(image).latent_dist.sample(torch.Generator().manual_seed(0)) * theirs.config.scaling_factor
    check(x0, expected)
    check(vae.decode(x0), theirs.decode(expected / theirs.config.scaling_factor).sample)


def test_pictures_to_tensors_and_back():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    image = ours.SDXLVae.input_pil_to_tensor(Image.fromarray(pixels))
    assert_close(image, torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    assert ours.SDXLVae.input_pil_to_tensor(pixels, include_batch_dim=False).shape == (3, 6, 4)
    (back,) = ours.SDXLVae.output_tensor_to_pil(image)
    assert np.array_equal(np.array(back), pixels)


# -- levels and solvers ------------------------------------------------------------------------------------------------


def test_sigmas_are_sdxl_s():
    sigmas = ours.make_sigmas(device="cpu")
    keep = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    expected = torch.tensor(np.sqrt((1 - keep) / keep), dtype=torch.float32)
    assert sigmas.dtype == torch.float32 and len(sigmas) == 1000
    assert_close(sigmas, expected, rtol=1e-6, atol=0)
    assert_close(sigmas[[0, -1]], torch.tensor([0.02917, 14.6146]), rtol=1e-4, atol=0)
    assert len(ours.make_sigmas(0.001, 0.02, 10)) == 10


def gaussian(x_t, t, sigma):
    """eps of data from N(0, 1), exactly."""
    return x_t * sigma / (1 + sigma**2)


@pytest.mark.parametrize(
    ("solver", "deviations"),
    [("euler", (0.864, 0.931, 0.972)), ("heun", (1.026, 1.005, 1.0004)), ("rk4", (0.99991, 0.99959, 0.99958))],
)
def test_solvers_of_a_gaussian_leave_the_deviation_that_the_seed_s_facts_say(solver, deviations):
    sigmas = ours.make_sigmas().double()
    for k, expected in zip((10, 20, 50), deviations):
        times = torch.linspace(0, 999, k, dtype=torch.int64)
        x_T = (sigmas[-1] ** 2 + 1).sqrt().reshape(1, 1)
        out = getattr(ours, f"{solver}_ode_solver")(gaussian, times, sigmas, x_T)
        assert float(out) == pytest.approx(expected, abs=1.2e-3 if solver != "rk4" else 2e-5)


def test_a_solver_asks_at_the_timesteps_and_between_them_at_their_sigma():
    asked = []

    def eps(x_t, t, sigma):
        asked.append((t.item(), sigma.item(), t.shape, sigma.shape, t.dtype))
        return torch.zeros_like(x_t)

    sigmas, times = ours.make_sigmas(), torch.tensor([3, 500, 999])
    ours.euler_ode_solver(eps, times, sigmas, torch.ones(2, 4, 2, 2))
    assert [a[0] for a in asked] == [999, 500, 3] and {a[2:] for a in asked} == {((1,), (1,), torch.int64)}
    assert_close(torch.tensor([a[1] for a in asked]), sigmas[times.flip(0)])
    asked.clear()
    ours.rk4_ode_solver(eps, times, sigmas, torch.ones(1))
    t, sigma = asked[1][:2]
    assert sigma == pytest.approx(float(sigmas[[500, 999]].mean()), rel=1e-6) and 500 < t < 999
    assert float(np.interp(t, np.arange(1000), sigmas)) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", [ours.euler_ode_solver, ours.rk4_ode_solver], ids=["euler", "rk4"])
def test_levels_rounded_to_half_precision_work(parts, dtype, solver):
    exact, rounded = ours.make_sigmas(), ours.make_sigmas().to(dtype)
    call = {"prompts": "a cat", "noise": unit(1), "sampler": solver}
    check(loop(parts, **call, sigmas=rounded), loop(parts, **call, sigmas=exact), 0.02)


@pytest.mark.parametrize("timesteps", [[], [0, 1000], [-1, 5], [0.5, 3.0], [[1, 2]]], ids=str)
def test_timesteps_that_are_no_indices_are_named(timesteps):
    with pytest.raises(UserError, match="timesteps"):
        ours.euler_ode_solver(gaussian, torch.tensor(timesteps), ours.make_sigmas(), torch.ones(1))


def test_the_progress_bar_is_a_switch(capsys):
    for shown in (True, False):
        ours.set_with_tqdm(shown)
        ours.euler_ode_solver(gaussian, STEPS, ours.make_sigmas(), torch.ones(1))
        assert ("6/6" in capsys.readouterr().err) is shown


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["Euler", "Heun"])
def test_the_loop_equals_the_pipeline(parts, components, solver):
    theirs = reference(pipeline(components, scheduler=f"{solver}DiscreteScheduler"), unit())
    mine = loop(parts, noise=unit(), sampler=getattr(ours, f"{solver.lower()}_ode_solver"))
    check(mine, theirs, 1e-4)


def test_the_loop_with_a_controlnet_equals_the_pipeline(parts, components, controlnet):
    theirs = reference(pipeline(components, "ControlNet", controlnet=controlnet[1]), unit(), image=picture(2))
    check(loop(parts, noise=unit(), controlnet=controlnet[0], images=picture(2)), theirs, 1e-4)
    plain = reference(pipeline(components), unit())
    assert relative(theirs, plain) > 0.01


def test_the_loop_with_an_adapter_equals_the_pipeline(parts, components, adapter):
    theirs = reference(pipeline(components, "Adapter", adapter=adapter[1]), unit(), image=picture(2))
    mine = loop(parts, noise=unit(), adapter=adapter[0], images=picture(2))
    check(mine, theirs, 1e-4)


def test_controlnet_and_adapter_act_together(parts, components, controlnet, adapter):
    """diffusers has no pipeline for both: its modules in Euler's loop."""
    sigmas = torch.cat([torch.zeros(1), ours.make_sigmas()[STEPS]])
    one = pipeline(components)
    text = one.encode_prompt(PROMPTS, do_classifier_free_guidance=False, device="cpu")
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2)
    given = {
        "encoder_hidden_states": text[0],
        "added_cond_kwargs": {"text_embeds": text[2], "time_ids": sizes},
        "return_dict": False,
    }
    x = scaled(unit())
    with torch.no_grad():
        maps = adapter[1](picture(1).expand(2, -1, -1, -1))
        for i in reversed(range(len(STEPS))):
            z = x / (sigmas[i + 1] ** 2 + 1) ** 0.5
            down, middle = controlnet[1](z, STEPS[i], controlnet_cond=picture(1).expand(2, -1, -1, -1), **given)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            intra = [m.clone() for m in maps]
            eps = components["unet"](z, STEPS[i], **given, **added, down_intrablock_additional_residuals=intra)[0]
            x = x + (sigmas[i] - sigmas[i + 1]) * eps
    controls = {"controlnet": controlnet[0], "adapter": adapter[0], "images": picture(1)}
    check(loop(parts, noise=unit(), guidance_scale=1.0, **controls), x, 1e-4)


def test_guidance_of_one_or_less_asks_for_the_prompt_alone(parts):
    rows = []
    hook = parts["unet"].conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        loop(parts, noise=unit(), guidance_scale=1.0, timesteps=STEPS[:2])
        loop(parts, noise=unit(), guidance_scale=5.0, timesteps=STEPS[:2])
    finally:
        hook.remove()
    assert rows == [2, 2, 4, 4]


def test_negative_prompts_are_a_text_or_a_list_that_stays_as_it_is(parts, components):
    negative, prompts = ["blue hat", "dog"], list(PROMPTS)
    theirs = reference(pipeline(components), unit(), negative_prompt=negative)
    check(loop(parts, prompts, noise=unit(), negative_prompts=negative), theirs, 1e-4)
    assert prompts == PROMPTS and negative == ["blue hat", "dog"]
    one = loop(parts, noise=unit(), negative_prompts="dog")
    assert_close(one, loop(parts, noise=unit(), negative_prompts=["dog", "dog"]), rtol=0, atol=0)


def test_embeddings_computed_before_give_the_same(parts):
    ids = [torch.tensor([row.ids for row in parts[f"tokenizer_{n}"].encode_batch(PROMPTS)]) for n in ("one", "two")]
    context, pooled = ours.sdxl_text_conditioning(parts["text_encoder_one"], parts["text_encoder_two"], *ids)
    embeddings = {"encoder_hidden_states": context, "pooled_encoder_hidden_states": pooled}
    mine = loop({"unet": parts["unet"]}, None, unit(), **embeddings)
    check(mine, loop(parts, noise=unit()))
    with_negative = loop(parts, None, unit(), **embeddings, negative_prompts="dog")
    check(with_negative, loop(parts, noise=unit(), negative_prompts="dog"))


def test_a_generator_makes_the_run_reproducible(parts):
    seeded = lambda seed: loop(parts, "a cat", generator=torch.Generator().manual_seed(seed))
    assert seeded(0).shape == (1, 4, 8, 8)
    assert_close(seeded(0), seeded(0), rtol=0, atol=0)
    assert relative(seeded(0), seeded(1)) > 0.1
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check(seeded(0), loop(parts, "a cat", start))


def test_the_defaults_are_fifty_steps_at_1024(parts, monkeypatch):
    monkeypatch.undo()  # the size
    told = []

    def keep(eps_theta, timesteps, sigmas, x_T):
        eps_theta(x_t=x_T[..., :8, :8], t=timesteps[-1:], sigma=sigmas[-1:])
        told.append((timesteps, sigmas, x_T))
        return x_T

    sizes = lambda net, args, given: told.append(given["sizes"])
    hook = parts["unet"].register_forward_pre_hook(sizes, with_kwargs=True)
    try:
        out = ours.sdxl_diffusion_loop("a cat", **parts, sampler=keep, generator=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    assert_close(told[0], torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2))
    timesteps, sigmas, x_T = told[1]
    assert_close(timesteps, torch.linspace(0, 999, 50, dtype=torch.int64))
    assert_close(sigmas, ours.make_sigmas())
    unit = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    assert_close(x_T, unit * (sigmas[-1] ** 2 + 1) ** 0.5)
    assert_close(out, x_T, rtol=0, atol=0)
    assert inspect.signature(ours.sdxl_diffusion_loop).parameters["guidance_scale"].default == 5.0
    assert inspect.signature(ours.sdxl_diffusion_loop).parameters["sampler"].default is ours.euler_ode_solver


def test_the_start_has_the_size_of_x_t_or_of_the_image(parts, controlnet):
    assert loop(parts, noise=unit(2, 6, 10)).shape == (2, 4, 6, 10)
    assert loop(parts, controlnet=controlnet[0], images=picture(1, 64, 32)).shape == (2, 4, 8, 4)


def test_micro_conditioning_is_what_the_u_net_is_told(parts, components):
    pipe, sizes = pipeline(components), torch.tensor([[300, 400, 10, 20, 640, 512]])
    call = {"height": 64, "width": 64, "output_type": "latent", "guidance_scale": 5.0, "prompt": PROMPTS}
    where = {"original_size": (300, 400), "crops_coords_top_left": (10, 20), "target_size": (640, 512)}
    theirs = pipe(latents=unit(), timesteps=STEPS.flip(0).tolist(), **call, **where).images
    check(loop(parts, noise=unit(), micro_conditioning=sizes), theirs, 1e-4)


def test_a_sampler_of_one_s_own_is_called_by_the_seed_s_names(parts):
    def mine(eps_theta, timesteps, sigmas, x_T):
        x = x_T
        for i in range(len(timesteps) - 1, -1, -1):
            t = timesteps[i][None]
            after = sigmas[timesteps[i - 1]] if i else 0
            x = x + (after - sigmas[t]) * eps_theta(x_t=x, t=t, sigma=sigmas[t])
        return x

    assert_close(loop(parts, noise=unit(), sampler=mine), loop(parts, noise=unit()), rtol=1e-4, atol=1e-4)


def test_an_index_is_not_rounded_to_the_precision_of_a_sample():
    found = []
    spy = lambda x, t, **cond: found.append(t) or x
    eps_theta = ours._EpsTheta(torch.nn.Module(), {}, None, 1.0)
    eps_theta.denoiser.net.forward = spy
    eps_theta(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), torch.tensor([999]), torch.ones(1))
    assert found[0].tolist() == [999]


def test_half_precision_nets_follow_the_full_ones_within_their_rounding(parts, controlnet):
    narrow = copy.deepcopy(parts["unet"]).half()
    for extra in ({}, {"controlnet": controlnet[0], "images": picture(1)}):  # the ControlNet stays as it is
        full = loop(parts, "a cat", unit(1), timesteps=STEPS[::2], **extra)
        mine = loop({**parts, "unet": narrow}, "a cat", unit(1), timesteps=STEPS[::2], **extra)
        check(mine, full, 0.05)
    assert loop({**parts, "unet": narrow}, "a cat", timesteps=STEPS[:1]).dtype == torch.float16


def test_prompts_are_plain_text_cut_at_77_tokens_with_a_word_about_it(parts, components):
    text = "(a cat:1.5) [dog] BREAK red " + "castle " * 90
    with pytest.warns(UserWarning, match="left out"):
        mine = loop(parts, text, unit(1))
    check(mine, reference(pipeline(components), unit(1), [text]), 1e-4)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"unet": None}, "unet"),
        ({"prompts": None}, "prompts"),
        ({"prompts": []}, "prompt"),
        ({"tokenizer_two": None}, "tokenizer_two"),
        ({"encoder_hidden_states": torch.zeros(1, 77, 192)}, "pair"),
        ({"adapter": "adapter"}, "images"),
        ({"controlnet": "controlnet"}, "images"),
        ({"controlnet": "controlnet", "images": picture(3)}, "images"),
        ({"micro_conditioning": torch.zeros(3, 6)}, "micro_conditioning"),
        ({"negative_prompts": ["a", "b", "c"]}, "negative"),
        ({"timesteps": torch.tensor([0.5])}, "timesteps"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_named(parts, controlnet, adapter, call, word):
    nets = {"controlnet": controlnet[0], "adapter": adapter[0]}
    call = {k: nets[v] if isinstance(v, str) and v in nets else v for k, v in call.items()}
    with pytest.raises(UserError, match=word):
        ours.sdxl_diffusion_loop(**{"prompts": PROMPTS, **parts, "timesteps": STEPS[:1], **call})


# -- the examples ------------------------------------------------------------------------------------------------------

EXPECTED = dict.fromkeys(("basic", "fp16", "seeded", "heun", "timesteps", "controlnet", "adapter"), 1) | {"batched": 3}


def execute(script, monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("SIZE", "64")
    monkeypatch.setattr(ours, "STEPS", 5)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    return runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_seed_s_examples_run(name, monkeypatch, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        execute("nano_sdxl.py", monkeypatch, tmp_path, name)
    files = sorted(os.listdir(tmp_path))
    assert files == [f"{name}_{i}.png" for i in range(EXPECTED[name])]
    pixels = [np.array(Image.open(tmp_path / file)) for file in files]
    assert all(p.shape == (64, 64, 3) and p.std() > 1 for p in pixels)
    ours.set_with_tqdm(False)


def test_one_file_denoise_keeps_every_x(monkeypatch, tmp_path, capsys):
    found = execute("one_file_denoise.py", monkeypatch, tmp_path)
    assert_close(found["ladder"][:-1].float(), ours.make_sigmas()[list(range(999, -1, -50))], rtol=1e-5, atol=0)
    xs = found["xs"]
    assert len(xs) == 21 and all(x.shape == (2, 4, 8, 8) for x in xs)
    assert Image.open(tmp_path / "trajectory.png").size == (21 * 66 - 2, 2 * 66 - 2)
