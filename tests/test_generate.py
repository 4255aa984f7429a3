"""Whole runs against diffusers' pipelines on the same tiny checkpoints, exact inpainting, and what cannot be asked.

The reference's start is ours times a factor: its DDIM and DPM-Solver keep x / sqrt(1 + sigma^2), and it multiplies the
latents that it is given by its scheduler's `init_noise_sigma`. It samples the posterior of the VAE where we take the mean:
here it is told to take the mean too. Its schedulers end in sigma 0 as ours do, but DDIM only with set_alpha_to_one=True
(Stable Diffusion 1's own config ends at the first entry of the table instead, which leaves noise of sigma 0.03).
"""

import json
from dataclasses import asdict, replace
from functools import cache

import diffusers
import numpy as np
import pytest
import sd_files
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from PIL import Image
from sd import randomise
from torch.testing import assert_close

from nanodiffusion import tasks as g
from nanodiffusion.codec import AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.data.conditioning import outpaint
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.nets.adapter import Adapter, AdapterConfig
from nanodiffusion.nets.controlnet import ControlNet, ControlNetConfig
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.nets.sd_unet import SDUNet
from nanodiffusion.pretrained import load_controlnet, load_pretrained
from nanodiffusion.sampler import ImageNoise
from nanodiffusion.show import to_uint8
from nanodiffusion.tasks.conditions import conditioning, pixels
from nanodiffusion.tasks.run import ladder_of

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("sd1", "sd2", "sdxl")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "final_sigmas_type": "zero"}),
    "lms": ("LMSDiscreteScheduler", {"timestep_spacing": "leading"}),
}
PROMPTS = ["a cat in the sea", "red castle"]
STEPS = 5


# -- both sides --------------------------------------------------------------------------------------------------------


@cache
def ours(family, **options):
    return load_pretrained(sd_files.tree(family, **options))


@cache
def parts(family, **options):
    """The modules of a pipeline, loaded by diffusers and transformers."""
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    pipe = getattr(diffusers, name).from_pretrained(sd_files.tree(family, **options))
    return {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}


@cache
def control(family):
    """(ours, diffusers') of one ControlNet."""
    folder = sd_files.part("controlnet", family)
    return load_controlnet(folder), diffusers.ControlNetModel.from_pretrained(folder)


@cache
def adapter(family):
    """(ours, diffusers') of one T2I-Adapter of the U-Net's widths."""
    xl, widths = family == "sdxl", parts(family)["unet"].config.block_out_channels
    kind, factor = ("full_xl", 16) if xl else ("full", 8)
    channels = (*widths, widths[-1])[:4]
    theirs = sd_files.randomised(
        diffusers.T2IAdapter(3, list(channels), 2, factor, kind.replace("full", "full_adapter")), 8
    )
    mine = Adapter(AdapterConfig(kind, widths=channels, downscale=factor))
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def scheduler(sampler, family):
    name, options = SCHEDULERS[sampler]
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    return getattr(diffusers, name)(**BETAS, **options, prediction_type=prediction)


def pipeline(task, family, sampler="euler", extra=None, **options):
    """diffusers' pipeline for a task, on the same files."""
    name = f"StableDiffusion{'XL' * (family == 'sdxl')}{task}Pipeline"
    given = {**parts(family, **options), **(extra or {}), "scheduler": scheduler(sampler, family)}
    safety = {} if family == "sdxl" else {"feature_extractor": None, "requires_safety_checker": False}
    if task in ("ControlNet", "Adapter") and family == "sdxl":
        safety = {}
    pipe = getattr(diffusers, name)(**given, **safety)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(pipe, seeds=(0, 1), **call):
    """Its final latents, the noise drawn from the seeds as ours is."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(num_inference_steps=STEPS, output_type="latent", generator=generators, **call).images


def run(bundle, **call):
    return [*g.generate(bundle, **call)][-1].x


def ladder(pipe):
    """The levels of the reference's last run, those before any img2img slicing: its own sigmas, or its timesteps."""
    pipe.scheduler.set_timesteps(STEPS)
    if isinstance(pipe.scheduler, diffusers.DDIMScheduler):
        return {"timesteps": pipe.scheduler.timesteps.tolist()}
    sigmas = pipe.scheduler.sigmas.double()
    return {"sigmas": list(dict.fromkeys(sigmas.tolist()))}  # Heun's are doubled


def noise_for(pipe, bundle, shape=(4, 8, 8), seeds=(0, 1)):
    """The unit noise with which our start is the reference's, which scales what it draws in its own way."""
    pipe.scheduler.set_timesteps(STEPS)
    sigma = ladder_of(g.settle(g.GenerateConfig(), **ladder(pipe)), bundle.schedule)[0]
    vp = isinstance(pipe.scheduler, diffusers.DDIMScheduler | diffusers.DPMSolverMultistepScheduler)
    scale = pipe.scheduler.init_noise_sigma * ((1 + sigma**2) ** 0.5 if vp else 1)
    return ImageNoise(seeds).draw(*shape) * float(scale / sigma)


@pytest.fixture
def mean_latents(monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture
def mended_lms(monkeypatch):
    """diffusers' LMS, started in the middle of its ladder, takes weights for slopes that it does not have yet."""
    weight = diffusers.LMSDiscreteScheduler.get_lms_coefficient
    mended = lambda self, order, t, i: weight(self, min(order, len(self.derivatives)), t, i)
    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "get_lms_coefficient", mended)


def check(got, want, limit=1e-4):
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) <= limit


def picture(seed, mode="RGB", size=(64, 64)):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def hole(size=(64, 64)):
    """A mask with soft edges."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[16:40, 24:56] = 255
    mask[40:48, 24:56] = 90
    mask[12:16, 24:56] = 180
    return Image.fromarray(mask)


# -- text to image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_text_to_image_is_the_reference_pipelines(family, sampler, guidance):
    pipe, bundle = pipeline("", family, sampler), ours(family)
    want = reference(pipe, prompt=PROMPTS, guidance_scale=guidance, height=64, width=64)
    call = {"guidance": guidance, "sampler": sampler, "noise": noise_for(pipe, bundle), **ladder(pipe)}
    check(run(bundle, prompt=PROMPTS, **call), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_and_several_pictures_of_a_prompt(family):
    pipe, bundle = pipeline("", family), ours(family)
    seeds, negative = (4, 9, 2, 7), ["a dog", "blue house"]
    call = {"guidance_scale": 5.0, "num_images_per_prompt": 2, "height": 64, "width": 64}
    want = reference(pipe, seeds, prompt=PROMPTS, negative_prompt=negative, **call)
    noise = noise_for(pipe, bundle, seeds=seeds)
    check(
        run(bundle, prompt=PROMPTS, negative=negative, guidance=5.0, n=2, noise=noise, sampler="euler", **ladder(pipe)),
        want,
    )


def test_clip_skip_is_the_references():
    """Of SDXL: for SD 1.x the reference's own clip_skip fails with transformers 5 (test_text.py compares the encoder)."""
    pipe, bundle = pipeline("", "sdxl"), ours("sdxl")
    want = reference(pipe, prompt=PROMPTS, clip_skip=1, guidance_scale=3.0, height=64, width=64)
    noise = noise_for(pipe, bundle)
    got = run(bundle, prompt=PROMPTS, clip_skip=1, guidance=3.0, noise=noise, sampler="euler", **ladder(pipe))
    check(got, want)


def test_sdxls_second_prompt_and_micro_conditioning_are_the_references():
    """For one prompt: of several, the reference interleaves the rows of negative and other sizes as no other input's."""
    pipe, bundle = pipeline("", "sdxl"), ours("sdxl")
    sizes = {"original_size": (333, 777), "target_size": (1023, 515), "negative_original_size": (64, 65)}
    crops = {"crop": (17, 400), "negative_crop": (3, 0)}
    renamed = {k.replace("crop", "crops_coords_top_left"): v for k, v in crops.items()}
    call = {"prompt": "a cat", "prompt_2": "red castle", "height": 40, "width": 72, "negative_target_size": (128, 96)}
    want = reference(pipe, (6,), guidance_scale=5.0, **call, **sizes, **renamed)
    given = {**call, **sizes, **crops, "guidance": 5.0, "sampler": "euler"}
    got = run(bundle, noise=noise_for(pipe, bundle, (4, 5, 9), (6,)), **given, **ladder(pipe))
    check(got, want)


def test_sizes_are_not_rounded_by_half_precision():
    config = g.settle(g.GenerateConfig(), PROMPTS, original_size=(1023, 1025), width=64, height=64)
    conds = conditioning(ours("sdxl"), g.complete(ours("sdxl"), config, g.Inputs()))
    assert torch.equal(conds[0]["sizes"], torch.tensor([[1023, 1025, 0, 0, 64, 64]] * 2))


# -- from a picture ----------------------------------------------------------------------------------------------------

# The reference takes int(steps * strength) steps and we round: at these strengths the two agree.


@pytest.mark.usefixtures("mean_latents", "mended_lms")
@pytest.mark.parametrize(
    ("sampler", "strength"), [("ddim", 0.6), ("euler", 0.4), ("heun", 0.6), ("dpmpp_2m", 1.0), ("lms", 0.8)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image_is_the_reference_pipelines(family, sampler, strength):
    pipe, bundle = pipeline("Img2Img", family, sampler), ours(family)
    want = reference(pipe, prompt=PROMPTS, image=picture(0), strength=strength, guidance_scale=4.0)
    call = {"image": picture(0), "strength": strength, "guidance": 4.0, "sampler": sampler}
    check(run(bundle, prompt=PROMPTS, **call, **ladder(pipe)), want)


@pytest.mark.usefixtures("mean_latents", "mended_lms")
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "lms"])
def test_holding_what_is_known_in_d_is_the_references_blend_after_every_step(sampler):
    pipe, bundle = pipeline("Inpaint", "sd1", sampler), ours("sd1")
    pictures = {"image": picture(1), "height": 64, "width": 64}
    want = reference(pipe, prompt=PROMPTS, **pictures, mask_image=hole(), strength=0.8, guidance_scale=4.0)
    call = {"mask": hole(), "strength": 0.8, "guidance": 4.0, "sampler": sampler}
    check(run(bundle, prompt=PROMPTS, **pictures, **call, **ladder(pipe)), want)


@pytest.mark.usefixtures("mean_latents")
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_u_net_of_9_channels_inpaints_as_the_references(family, sampler, strength):
    pipe, bundle = pipeline("Inpaint", family, sampler, inpaint=True), ours(family, inpaint=True)
    pictures = {"image": picture(1), "height": 64, "width": 64}
    want = reference(pipe, prompt=PROMPTS, **pictures, mask_image=hole(), strength=strength, guidance_scale=4.0)
    call = {"mask": hole(), "strength": strength, "guidance": 4.0, "sampler": sampler, **ladder(pipe)}
    call |= {} if strength < 1 else {"noise": noise_for(pipe, bundle)}
    check(run(bundle, prompt=PROMPTS, **pictures, **call), want)


@pytest.mark.usefixtures("mean_latents")
def test_sdxl_without_an_inpainting_u_net_holds_what_is_known():
    pipe, bundle = pipeline("Inpaint", "sdxl"), ours("sdxl")
    pictures = {"image": picture(1), "height": 64, "width": 64}
    want = reference(pipe, prompt=PROMPTS, **pictures, mask_image=hole(), strength=0.6, guidance_scale=4.0)
    got = run(
        bundle, prompt=PROMPTS, **pictures, mask=hole(), strength=0.6, guidance=4.0, sampler="euler", **ladder(pipe)
    )
    check(got, want)


# -- controls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_controlnet_is_the_reference_pipelines(family, guidance, guess):
    mine, theirs = control(family)
    pipe, bundle = pipeline("ControlNet", family, extra={"controlnet": theirs}), ours(family)
    call = {"controlnet_conditioning_scale": 0.8, "guess_mode": guess, "guidance_scale": guidance}
    want = reference(pipe, prompt=PROMPTS, image=picture(3), **call)
    controls = [g.Control(mine, picture(3), strength=0.8, guess=guess)]
    given = {"noise": noise_for(pipe, bundle), "guidance": guidance, "sampler": "euler", **ladder(pipe)}
    check(run(bundle, prompt=PROMPTS, controls=controls, **given), want)


def test_several_controlnets_with_windows_are_the_reference_pipelines():
    mine, theirs = control("sd1")
    several = diffusers.MultiControlNetModel([theirs, theirs])
    pipe, bundle = pipeline("ControlNet", "sd1", "lms", extra={"controlnet": several}), ours("sd1")
    windows = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.5, 0.9]}
    call = {"controlnet_conditioning_scale": [1.0, 0.7], "guidance_scale": 4.0, **windows}
    want = reference(pipe, prompt=PROMPTS, image=[picture(3), picture(4)], **call)
    controls = [g.Control(mine, picture(3), end=0.5), g.Control(mine, picture(4), 0.7, start=0.3, end=0.9)]
    given = {"noise": noise_for(pipe, bundle), "guidance": 4.0, "sampler": "lms", **ladder(pipe)}
    check(run(bundle, prompt=PROMPTS, controls=controls, **given), want)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 2), ("heun", 4)])
def test_outside_its_window_a_controlnet_is_not_asked_and_its_picture_is_read_once(sampler, calls):
    mine, _ = control("sd1")
    asked, read = [], []
    hooks = [mine.register_forward_hook(lambda *_: asked.append(1))]
    hooks += [mine.controlnet_cond_embedding.register_forward_hook(lambda *_: read.append(1))]
    run(
        ours("sd1"),
        prompt="a cat",
        controls=[g.Control(mine, picture(3), start=0.2, end=0.7)],
        steps=6,
        sampler=sampler,
    )
    for hook in hooks:
        hook.remove()
    assert (len(asked), len(read)) == (calls, 1)  # at two levels, steps 3 and 4 of 6


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_adapter_is_the_reference_pipelines(family):
    mine, theirs = adapter(family)
    pipe, bundle = pipeline("Adapter", family, extra={"adapter": theirs}), ours(family)
    end = {"adapter_conditioning_factor": 0.5} if family == "sdxl" else {}
    call = {"adapter_conditioning_scale": 0.7, "guidance_scale": 4.0, "height": 64, "width": 64, **end}
    want = reference(pipe, prompt=PROMPTS, image=[picture(5)] * 2, **call)  # it repeats no picture
    adapters = [g.AdapterInput(mine, picture(5), 0.7, end=0.5 if end else 1.0)]
    given = {"noise": noise_for(pipe, bundle), "guidance": 4.0, "sampler": "euler", **ladder(pipe)}
    check(run(bundle, prompt=PROMPTS, adapters=adapters, **given), want)


def test_several_adapters_are_the_reference_pipelines():
    mine, theirs = adapter("sd1")
    pipe, bundle = pipeline("Adapter", "sd1", extra={"adapter": diffusers.MultiAdapter([theirs, theirs])}), ours("sd1")
    call = {"adapter_conditioning_scale": [0.7, 0.4], "guidance_scale": 4.0, "height": 64, "width": 64}
    want = reference(pipe, prompt=PROMPTS, image=[[picture(5)] * 2, [picture(6)] * 2], **call)
    adapters = [g.AdapterInput(mine, picture(5), 0.7), g.AdapterInput(mine, picture(6), 0.4)]
    given = {"noise": noise_for(pipe, bundle), "guidance": 4.0, "sampler": "euler", **ladder(pipe)}
    check(run(bundle, prompt=PROMPTS, adapters=adapters, **given), want)


# -- one evaluation, against the reference's modules: what no pipeline of it does ----------------------------------------


def first(bundle, **call):
    """The job and its first state."""
    inputs = {
        k: call.pop(k) for k in ("embeddings", "image", "mask", "controls", "adapters", "tokens", "loss") if k in call
    }
    job = g.prepare(bundle, g.settle(g.GenerateConfig(), **call), g.Inputs(**inputs))
    return job, next(job.states())


@torch.no_grad()
def x0_by_reference(family, job, context, **more):
    """The reference U-Net's x0 of the first evaluation, without guidance."""
    sigma = job.sigmas[0]
    t = ours(family).schedule.t(sigma[None]).float()
    scaled = job.x / (sigma**2 + 1) ** 0.5
    out = parts(family)["unet"](scaled.float(), t, context, return_dict=False, **more)[0]
    return (job.x - sigma * out).float()


@torch.no_grad()
def concat_by_reference(family, image, mask):
    """Mask and masked latent (1 5 h w), encoded by the reference."""
    pixels = torch.from_numpy(np.array(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
    mask, vae = torch.from_numpy(np.array(mask) >= 127.5).float()[None, None], parts(family)["vae"]
    masked = vae.encode(pixels * (1 - mask)).latent_dist.mode() * vae.config.scaling_factor
    return torch.cat([mask[:, :, ::8, ::8], masked], 1)


def context_of(family, prompt):
    return ours(family).text.encode([prompt])[0]["context"]


def test_controlnet_and_adapter_together_are_the_references_modules_together():
    (mine, theirs), (my_adapter, their_adapter) = control("sd1"), adapter("sd1")
    given = {
        "controls": (g.Control(mine, picture(3), 0.6),),
        "adapters": (g.AdapterInput(my_adapter, picture(5), 0.7),),
    }
    job, state = first(ours("sd1"), prompt="a cat", guidance=1.0, width=64, height=64, **given)
    context, sigma = context_of("sd1", "a cat"), job.sigmas[0]
    scaled, t = (job.x / (sigma**2 + 1) ** 0.5).float(), ours("sd1").schedule.t(sigma[None]).float()
    images = [torch.from_numpy(np.array(picture(s)) / 255).permute(2, 0, 1)[None].float() for s in (3, 5)]
    with torch.no_grad():
        down, mid = theirs(scaled, t, context, images[0], conditioning_scale=0.6, return_dict=False)
        features = [0.7 * f for f in their_adapter(images[1])]
    both = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    both["down_intrablock_additional_residuals"] = features
    check(state.x0, x0_by_reference("sd1", job, context, **both), 1e-5)


PAINT = {"prompt": "a cat", "image": picture(1), "mask": hole()}


@cache
def inpaint_tokens(family, positions=False):
    """Tokens at random, and what they are of PAINT (1 64 d) by the formula, the latent by the reference's VAE."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        tokens = InpaintTokens(ours(family).config.context_dim, positions=positions)
        mask, masked = concat_by_reference(family, picture(1), hole()).split([1, 4], 1)
        pixels = masked.flatten(2).mT @ tokens.conditioning_image_proj.weight.T + tokens.conditioning_image_proj.bias
        known = tokens.conditioning_image_mask_embeddings.weight[mask.flatten(1).long()]
    places = get_2d_sincos_pos_embed(known.shape[2], 8, base_size=8, output_type="pt").float() if positions else 0
    return tokens, pixels + known + places


@pytest.mark.parametrize("positions", [False, True])
def test_inpainting_tokens_follow_the_text_for_the_prompt_and_the_negative_one(positions):
    tokens, known = inpaint_tokens("sd1", positions)
    job, state = first(ours("sd1"), **PAINT, tokens=tokens, negative="a dog", guidance=3.0)
    contexts = (torch.cat([context_of("sd1", text), known], 1) for text in ("a cat", "a dog"))
    told, untold = (x0_by_reference("sd1", job, context) for context in contexts)
    check(state.x0, untold + 3 * (told - untold), 1e-5)


@pytest.mark.parametrize("sampler", ["heun", pytest.param("dpmpp_2m_sde", marks=pytest.mark.slow)])
def test_inpainting_tokens_are_the_same_at_every_call_of_the_u_net(sampler):
    (tokens, known), bundle, seen = inpaint_tokens("sdxl"), ours("sdxl"), []
    hook = bundle.denoiser.net.register_forward_pre_hook(lambda _, x, kw: seen.append(kw["context"]), with_kwargs=True)
    run(bundle, **PAINT, tokens=tokens, guidance=3.0, n=2, steps=3, sampler=sampler)
    hook.remove()
    text = context_of("sdxl", "a cat")
    rows = torch.cat([torch.cat([c, known], 1).expand(2, -1, -1) for c in (text, torch.zeros_like(text))])
    assert len(seen) == {"heun": 5, "dpmpp_2m_sde": 3}[sampler]
    for context in seen:
        torch.testing.assert_close(context, rows, rtol=1e-4, atol=1e-4)


def test_a_controlnet_reads_the_text_and_not_the_inpainting_tokens():
    (tokens, known), (mine, theirs) = inpaint_tokens("sd1"), control("sd1")
    controls = (g.Control(mine, picture(3), 0.6),)
    job, state = first(ours("sd1"), **PAINT, tokens=tokens, guidance=1.0, controls=controls)
    text, sigma = context_of("sd1", "a cat"), job.sigmas[0]
    scaled, t = (job.x / (sigma**2 + 1) ** 0.5).float(), ours("sd1").schedule.t(sigma[None]).float()
    hint = torch.from_numpy(np.array(picture(3)) / 255).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        down, mid = theirs(scaled, t, text, hint, conditioning_scale=0.6, return_dict=False)
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    check(state.x0, x0_by_reference("sd1", job, torch.cat([text, known], 1), **more), 1e-5)


def test_a_pass_through_u_net_and_a_pre_encoded_controlnet_read_mask_and_masked_latent():
    bundle, given = ours("sd1"), {"prompt": "a cat", "guidance": 1.0, "image": picture(1), "mask": hole()}
    config = replace(bundle.denoiser.net.config, pass_through=5)
    net = randomise(SDUNet(config), 3)
    control = randomise(
        ControlNet(ControlNetConfig(replace(config, channels_in=9, pass_through=0), hint_channels=0)), 4
    )
    changed = replace(bundle, denoiser=Denoiser(net, "eps", "table", bundle.schedule))
    job, state = first(changed, **given, controls=(g.Control(control, None, 0.5),))
    concat, sigma = concat_by_reference("sd1", picture(1), hole()), job.sigmas[0]
    scaled, t, context = (
        (job.x / (sigma**2 + 1) ** 0.5).float(),
        bundle.schedule.t(sigma[None]).float(),
        context_of("sd1", "a cat"),
    )
    with torch.no_grad():
        residuals = [0.5 * r for r in control(scaled, t, concat, context)]
        out = net(scaled, t, context, concat=concat, residuals=residuals)
    check(state.x0, (job.x - sigma * out).float(), 1e-5)


def test_loss_guidance_descends_the_loss_of_the_decoded_picture_every_k_steps():
    seen = []

    def blue(image):
        seen.append(image.shape)
        return (image[:, 2] - 0.9).abs().mean((1, 2))

    vae, call = parts("sd1")["vae"], {"prompt": PROMPTS, "guidance": 1.0, "width": 64, "height": 64, "sampler": "euler"}
    job, plain = first(ours("sd1"), **call)
    _, moved = first(ours("sd1"), **call, loss=blue, loss_scale=2.0, loss_every=3)
    x0 = plain.x0.clone().requires_grad_()
    loss = blue(vae.decode(x0 / vae.config.scaling_factor).sample)
    (gradient,) = torch.autograd.grad(loss.sum(), x0)
    check(plain.x0 - moved.x0, 2 * job.sigmas[0] ** 2 * gradient)
    seen.clear()
    run(ours("sd1"), **call, loss=blue, loss_every=3, steps=7)
    assert seen == [(2, 3, 64, 64)] * 3  # steps 1, 4 and 7


# -- seeds, ladders, states --------------------------------------------------------------------------------------------

QUICK = {"steps": 3, "width": 64, "height": 64}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_a_picture_depends_on_its_seed_alone(sampler):
    call = {"prompt": "a cat", "sampler": sampler, "guidance": 3.0, **QUICK}
    batch = run(ours("sd1"), n=3, seeds=[5, 1, 8], **call)
    alone = run(ours("sd1"), seed=1, **call)
    check(batch[1:2], alone, 1e-5)
    assert torch.equal(
        first(ours("sd1"), n=3, seeds=[5, 1, 8], **call)[0].x[1:2], first(ours("sd1"), seed=1, **call)[0].x
    )


def test_given_noise_leaves_the_noise_of_the_steps_as_it_is():
    call = {"prompt": "a cat", "sampler": "euler_ancestral", "guidance": 1.0, **QUICK}
    drawn = ImageNoise([6, 7]).draw(4, 8, 8)
    assert torch.equal(run(ours("sd1"), n=2, seed=6, **call), run(ours("sd1"), n=2, seed=6, noise=drawn, **call))


def test_a_jobs_config_is_json_and_makes_the_same_pictures():
    call = {"prompt": PROMPTS, "negative": "a dog", "sampler": "heun", "ladder": "karras", "image": picture(2), **QUICK}
    job, _ = first(ours("sd1"), **call)
    again = g.settle(g.GenerateConfig(), **json.loads(json.dumps(asdict(job.config))))
    assert again == job.config and job.config.strength == 0.8 and job.config.guidance == ours("sd1").family.guidance
    bare, _ = first(ours("sd1"), prompt=PROMPTS)
    redone = g.prepare(ours("sd1"), bare.config)
    assert torch.equal(redone.x, bare.x) and torch.equal(redone.sigmas, bare.sigmas)


def test_in_half_precision_every_input_reaches_the_networks_in_it():
    bundle = load_pretrained(sd_files.tree("sdxl", inpaint=True), dtype="bf16")
    wide, (my_adapter, _) = ours("sdxl", inpaint=True), adapter("sdxl")
    call = {
        "prompt": PROMPTS,
        "image": picture(1),
        "mask": hole(),
        "sampler": "euler",
        "original_size": (99, 99),
        "steps": 2,
    }
    call["adapters"] = [g.AdapterInput(my_adapter, picture(2))]
    mine = load_controlnet(sd_files.part("controlnet", "sdxl"), dtype="bf16")
    half = run(bundle, **call, controls=[g.Control(mine, picture(3), guess=True)])
    full = run(wide, **call, controls=[g.Control(control("sdxl")[0], picture(3), guess=True)])
    assert half.dtype == torch.float32
    check(half, full, 0.1)
    with pytest.raises(UserError, match="the ControlNet's precision"):
        g.generate(bundle, **call, controls=[g.Control(control("sdxl")[0], picture(3))])


def test_states_can_be_run_again():
    job, state = first(ours("sd1"), prompt="a cat", sampler="ddpm", **QUICK)
    assert torch.equal(next(job.states()).x, state.x)


def test_eps_is_what_the_step_saw():
    job, state = first(ours("sd1"), prompt="a cat", sampler="euler", **QUICK)
    eps = g.eps_of(job.x, state)
    assert_close(state.x0 + state.sigma_next * eps, state.x)
    assert_close(state.x0 + state.sigma * eps, job.x)
    pairs = [*g.with_eps(job)]
    assert len(pairs) == 3 and torch.equal(pairs[0][1], eps)
    assert_close(pairs[1][0].x0 + pairs[1][0].sigma * pairs[1][1], pairs[0][0].x)


def test_sharpness_and_brightness_shift_two_channels_of_the_last_latent_only():
    plain = [*g.generate(ours("sd1"), "a cat", **QUICK)]
    shifted = [*g.generate(ours("sd1"), "a cat", sharpness=0.3, brightness=-0.2, **QUICK)]
    assert all(torch.equal(a.x, b.x) for a, b in zip(plain[:-1], shifted[:-1]))
    shift = torch.tensor([-0.2, 0, 0, 0.3])[None, :, None, None]
    assert_close(shifted[-1].x, plain[-1].x + shift)


def test_embeddings_take_the_place_of_a_prompt():
    for family in ("sd1", "sdxl"):
        text = ours(family).text
        want = run(ours(family), prompt=PROMPTS, negative="a dog", guidance=3.0, **QUICK)
        both = text.encode(PROMPTS, ["a dog"] * 2)
        assert torch.equal(run(ours(family), embeddings=both, guidance=3.0, **QUICK), want)
        plain = run(ours(family), prompt=PROMPTS, guidance=3.0, **QUICK)
        assert torch.equal(run(ours(family), embeddings=both[0], guidance=3.0, **QUICK), plain)


# -- interpolation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_embeddings_may_be_of_another_precision_than_the_nets(family):
    cond, _ = ours(family).text.encode(PROMPTS)
    half = {key: value.half() for key, value in cond.items()}
    made = run(ours(family), embeddings=half, steps=2)
    check(made, run(ours(family), embeddings={key: value.float() for key, value in half.items()}, steps=2), 0)


def test_frames_go_from_prompt_to_prompt():
    bundle, call = ours("sd1"), {"guidance": 3.0, "seeds": [4], **QUICK}
    frames = run(bundle, prompt=PROMPTS, frames=5, **call)
    ends = [run(bundle, prompt=p, **call) for p in PROMPTS]
    check(frames[:1], ends[0], 1e-5)
    check(frames[4:], ends[1], 1e-5)
    cond = bundle.text.encode(PROMPTS)[0]
    quarter = {k: torch.lerp(v[:1], v[1:], 0.25) for k, v in cond.items()}
    check(frames[1:2], run(bundle, embeddings=quarter, **call), 1e-5)


def test_frames_go_from_seed_to_seed_on_the_sphere():
    job, _ = first(ours("sd1"), prompt="a cat", frames=3, seeds=[4, 9], **QUICK)
    a, b = ImageNoise([4, 9]).draw(4, 8, 8).double()
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    middle = (torch.sin(angle / 2) * (a + b) / torch.sin(angle)).float()
    assert_close(job.x / job.sigmas[0].float(), torch.stack([a.float(), middle, b.float()]))


def test_between_and_slerp_at_their_ends():
    rows = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    path = g.between({"context": rows}, 5)["context"]
    assert_close(path, torch.stack([rows[0], (rows[0] + rows[1]) / 2, rows[1], (rows[1] + rows[2]) / 2, rows[2]]))
    assert_close(g.slerp(rows[0], rows[1], 0.0), rows[0])
    assert_close(g.slerp(rows[0], rows[1], 1.0), rows[1])
    assert_close(g.slerp(rows[0], rows[0], 0.3), rows[0])


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_the_references_decoded_pictures():
    pipe, x = pipeline("", "sd1"), ImageNoise([3, 4]).draw(4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    want = pipe.image_processor.postprocess(decoded, output_type="pil")
    got = g.pictures(ours("sd1"), x)
    assert max(np.abs(np.array(a).astype(int) - np.array(b)).max() for a, b in zip(got, want)) <= 1


def test_what_is_known_comes_back_bit_for_bit():
    """1,000 random picture and mask pairs; every second mask has soft edges."""
    random = np.random.default_rng(0)
    for i in range(1000):
        h, w = random.integers(1, 40, 2)
        made, known = random.integers(0, 256, (2, 1, h, w, 3), dtype=np.uint8)
        mask = random.integers(0, 256, (1, h, w), dtype=np.uint8) * (random.random((1, h, w)) < 0.5).astype(np.uint8)
        mask = mask if i % 2 else np.where(mask > 127, 255, 0).astype(np.uint8)
        out = g.paste(made, known, mask if i % 3 else mask.astype(np.float32) / 255)
        assert np.array_equal(out[mask == 0], known[mask == 0]) and np.array_equal(out[mask == 255], made[mask == 255])
        soft, low, high = (mask > 0) & (mask < 255), np.minimum(made, known), np.maximum(made, known)
        assert (low[soft] <= out[soft]).all() and (out[soft] <= high[soft]).all()


def test_inpainting_and_outpainting_give_the_known_pixels_back():
    for image, mask in ((picture(1), hole()), outpaint(picture(2, size=(40, 48)), left=24, bottom=16)):
        states = [*g.generate(ours("sd1"), "a cat", image=image, mask=mask, n=2, steps=2)]
        for made in g.pictures(ours("sd1"), states[-1].x, image=image, mask=mask):
            known = np.array(mask) == 0
            assert made.size == image.size and np.array_equal(np.array(made)[known], np.array(image)[known])


def test_each_of_several_pictures_comes_back_where_it_was_drawn_n_times():
    images = [picture(0), picture(1)]
    made = run(ours("sd1"), prompt=PROMPTS, n=2, image=images, mask=[hole(), hole()], steps=2)
    pasted = g.pictures(ours("sd1"), made, images, [hole(), hole()])
    known = np.asarray(hole()) == 0
    for i, image in enumerate(pasted):
        assert (np.asarray(image)[known] == np.asarray(images[i // 2])[known]).all()


def test_a_picture_of_bytes_has_its_own_size_in_either_order_of_axes():
    rows = np.asarray(picture(0, size=(72, 64)))
    for given in (rows, rows.transpose(2, 0, 1), torch.from_numpy(rows.copy())):
        assert g.complete(ours("sd1"), g.settle(g.GenerateConfig(), "a"), g.Inputs(image=given)).width == 72


def test_every_byte_survives_the_way_to_a_tensor_and_back():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([ramp] * 3, -1))
    config = g.GenerateConfig(width=16, height=16)
    assert np.array_equal(to_uint8(pixels(image, config, "image", low=-1))[0].numpy(), np.array(image))


# -- what cannot be asked ----------------------------------------------------------------------------------------------

SMALL = Image.new("RGB", (56, 64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "there is no prompt"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": [3]}, "wrong type"),
        ({"prompt": "a", "sampler": "eular"}, "did you mean 'euler'"),
        ({"prompt": "a", "ladder": "caras"}, "unknown sample.ladder"),
        ({"prompt": "a", "sampler": {"name": "heun", "chum": 1}}, "unknown key"),
        ({"prompt": "a", "step": 3}, "unknown key"),
        ({"prompt": "a", "steps": 0}, "impossible number of sampling steps"),
        ({"prompt": "a", "n": 0}, "must be at least 1"),
        ({"prompt": "a", "width": 100}, "must be a multiple of 8"),
        ({"prompt": "a", "height": -8}, "must be a number from 0 up"),
        ({"prompt": "a", "seed": -1}, "must be a number from 0 up"),
        ({"prompt": "a", "n": 2, "seeds": [1]}, "every picture has a seed"),
        ({"prompt": "a", "seed": 2**64}, "must be a number from 0 up"),
        ({"prompt": "a", "seeds": [2**64]}, "must be numbers from 0 up"),
        ({"prompt": "a", "seeds": [-1]}, "must be numbers from 0 up"),
        ({"prompt": "a", "guidance": float("nan")}, "must be a finite number"),
        ({"prompt": "a", "brightness": float("inf")}, "must be a finite number"),
        ({"prompt": "a", "n": 2, "image": [picture(0), SMALL], "width": 64}, "do not go together"),
        ({"prompt": PROMPTS, "negative": ["a", "b", "c"]}, "one negative prompt, or one per prompt"),
        ({"prompt": PROMPTS, "prompt_2": ["a", "b", "c"]}, "or one per prompt"),
        ({"prompt": "a", "prompt_2": "b"}, "second"),
        ({"prompt": "a", "clip_skip": 9}, "clip_skip"),
        ({"prompt": "a", "embeddings": {"context": torch.zeros(1, 77, 32)}}, "embeddings take the place"),
        ({"prompt": "a", "noise": torch.zeros(1, 4, 9, 8)}, "noise of another shape"),
        ({"prompt": "a", "sigmas": [3.0, 4.0]}, "strictly decreasing"),
        ({"prompt": "a", "sigmas": [3.0], "timesteps": [3]}, "exclude each other"),
        ({"prompt": "a", "strength": 0.5}, "strength needs a picture"),
        ({"prompt": "a", "image": picture(0), "strength": 1.5}, "impossible strength"),
        ({"prompt": "a", "image": SMALL, "width": 64}, "a picture of another size"),
        ({"prompt": "a", "image": Image.new("RGB", (60, 64))}, "must be a multiple of 8"),
        ({"prompt": "a", "image": torch.zeros(1, 4, 64, 64)}, "another number of channels"),
        ({"prompt": "a", "image": torch.full((3, 64, 64), 255.0)}, "values out of range"),
        ({"prompt": "a", "image": [picture(0)] * 3}, "not as many as there are"),
        ({"prompt": "a", "image": []}, "an empty list of pictures"),
        ({"prompt": "a", "mask": hole()}, "a mask needs a picture"),
        ({"prompt": "a", "image": picture(0), "mask": hole((64, 72))}, "a picture of another size"),
        ({"prompt": "a", "image": picture(0), "tokens": InpaintTokens(64)}, "inpainting tokens need"),
        ({"prompt": "a", "tokens": InpaintTokens(64)}, "inpainting tokens need"),
        ({**PAINT, "tokens": InpaintTokens(32)}, "inpainting tokens are of another U-Net"),
        ({**PAINT, "tokens": InpaintTokens(64, channels=8)}, "inpainting tokens are of another U-Net"),
        ({"prompt": "a", "crop": [3, 4]}, "take no sizes"),
        ({"prompt": "a", "frames": 3, "n": 2}, "frames and n exclude each other"),
        ({"prompt": "a", "guidance_interval": [1.0]}, "an interval has two ends"),
        ({"prompt": "a", "loss": lambda image: image.sum()}, "a loss is one number per picture"),
        ({"prompt": "a", "loss_every": 0}, "must be at least 1"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v.replace(" ", "-"),
)
def test_what_cannot_be_asked_is_said_in_a_few_lines(call, message):
    with pytest.raises(UserError, match=message) as e:
        [*g.generate(ours("sd1"), **call)]
    assert len(str(e.value).splitlines()) <= 6


def test_a_u_net_that_reads_the_picture_takes_no_tokens():
    with pytest.raises(UserError, match="by itself, not by tokens") as e:
        [*g.generate(ours("sd1", inpaint=True), **PAINT, tokens=InpaintTokens(64))]
    assert len(str(e.value).splitlines()) <= 6


def controlled(family, image=None, **options):
    return {"controls": [g.Control(control(family)[0], image or picture(3), **options)]}


def like_sd1(kind, downscale):
    return AdapterConfig(kind, widths=ours("sd1").config.widths, downscale=downscale)


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("sd1", lambda: controlled("sd1", SMALL, end=0.5) | {"width": 64}, "a picture of another size"),
        ("sd1", lambda: controlled("sdxl"), "another family"),
        ("sdxl", lambda: controlled("sd1"), "another family"),
        ("sd1", lambda: controlled("sd1", start=0.5, end=0.5), "a window is"),
        ("sd1", lambda: controlled("sd1", end=1.5), "a window is"),
        (
            "sd1",
            lambda: {"adapters": [g.AdapterInput(adapter("sdxl")[0], picture(3))]},
            "another family",
        ),
        ("sdxl", lambda: {"adapters": [g.AdapterInput(adapter("sd1")[0], picture(3))]}, "another family"),
        (
            "sd1",  # the widths alone would fit
            lambda: {"adapters": [g.AdapterInput(Adapter(like_sd1("full_xl", 16)), picture(3))]},
            "another family",
        ),
        ("sdxl", lambda: {"crop": [1, 2, 3]}, "two numbers"),
    ],
)
def test_helpers_that_do_not_fit_are_named(family, more, message):
    with pytest.raises(UserError, match=message) as e:
        [*g.generate(ours(family), "a cat", steps=2, **more())]
    assert len(str(e.value).splitlines()) <= 6


def test_a_vae_of_other_latents_is_named():
    other = replace(ours("sd1"), codec=AutoencoderKL(AutoencoderKLConfig(latent_channels=16, widths=(32,), groups=4)))
    with pytest.raises(UserError, match="another number of channels than the U-Net's"):
        g.generate(other, "a cat")


def test_an_inpainting_u_net_asks_for_its_mask():
    with pytest.raises(UserError, match="needs a picture and a mask"):
        g.generate(ours("sd1", inpaint=True), "a cat")
    with pytest.raises(UserError, match="needs a picture and a mask"):
        g.generate(ours("sd1", inpaint=True), "a cat", image=picture(0))
