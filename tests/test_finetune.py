"""Training on checkpoints: one step's gradients are those of diffusers' modules, and only what is named changes."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanodiffusion.config import make, read_config
from nanodiffusion.data import order
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.finetune.base import Prepared, posterior_noise
from nanodiffusion.objective import make_density
from nanodiffusion.pretrained import load_pretrained
from nanodiffusion.text.reader import NO_TEXT
from nanodiffusion.train import Trainer
from tests import sd_files
from tests.reference import in_float64

FAMILIES = ("sd1", "sdxl")
SOME = ("sd1", pytest.param("sdxl", marks=pytest.mark.slow))
TASKS = ("text_to_image", "inpaint", "inpaint_by_tokens", "controlnet", "adapter", "lora", "lcm", "textual_inversion")
SAMPLE = {"guidance": 3.0, "steps": 2, "n": 4, "sampler": {"name": "euler"}}
LDM = {
    "prediction": "eps",
    "clock": "table",
    "schedule": {"name": "ldm"},
    "density": {"name": "table"},
    "sample": SAMPLE,
}


@dataclass
class Pixels:
    """Four random pictures of 64 x 64 with captions, a control image and a hole."""

    captions: Any = ("a photo of a cat", "a red dog", "", "the sea by a house")
    shape: tuple[int, ...] = (3, 64, 64)
    draws: int = 1
    classes: tuple[str, ...] = ()
    labels: None = None

    def __len__(self) -> int:
        return 4

    def to(self, device: torch.device) -> "Pixels":
        return self

    def square(self) -> "Pixels":
        return self

    def order(self, batch: int, seed: int, step: int) -> Tensor:
        return order(len(self), batch, seed, step)

    def shape_of(self, index: Tensor) -> tuple[int, ...]:
        return self.shape

    def prefetch(self, index: Tensor, u: Tensor) -> None:
        pass

    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
        hole = torch.zeros(len(index), 1, 64, 64)
        hole[:, :, 16:40, 8:] = 1
        sizes = torch.tensor([[64, 80, 0, 16, 64, 64]]).expand(len(index), 6)
        return x[index], {"row": index, "sizes": sizes, "control": (x[index] + 1) / 2, "hole": hole}


def config_of(task: str, family: str = "sd1", **more: Any) -> Any:
    """A config of a task on a tiny checkpoint; `task_...` are the task's options."""
    options = {k[5:]: more.pop(k) for k in list(more) if k.startswith("task_")}
    spec = {"name": task, "base": str(sd_files.tree(family)), **options}
    return read_config({**LDM, "task": spec, "batch_size": 4, "steps": 3, "device": "cpu", "ema": [], **more})


def trainer_of(task: str, family: str = "sd1", **more: Any) -> Trainer:
    """The loop of such a config on `Pixels`."""
    config = config_of(task, family, **more)
    row = make(FINETUNES, config.task, "task")()
    model = row.model(config)
    return Trainer(model, row.prepared(Pixels(), model), make_density(config), config)


# ---- the same step by diffusers' modules


def in_double(trainer: Trainer) -> Trainer:
    """The loop with the model's weights in float64."""
    trainer.denoiser.double()
    return trainer


def pipeline(family: str) -> Any:
    """The checkpoint as diffusers loads it, its weights in float64."""
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(sd_files.tree(family))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, name, torch.nn.Identity()).double()
    return pipe


def told(pipe: Any, texts: list[str], keep: Tensor, family: str) -> dict[str, Any]:
    """Features of captions by transformers, of those dropped the family's own nothing."""
    texts = [text if k else "" for text, k in zip(texts, keep.tolist())]
    if family == "sd1":
        ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"encoder_hidden_states": pipe.text_encoder(ids)[0]}
    context, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, device="cpu")
    there = torch.tensor([bool(text) for text in texts])
    sizes = torch.tensor([[64.0, 80, 0, 16, 64, 64]]).repeat(4, 1)
    context, pooled = context * there[:, None, None], pooled * there[:, None]
    return {"encoder_hidden_states": context, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def scheduler() -> Any:
    """The published schedule, which can add noise at any timestep."""
    import diffusers

    return diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")


def drawn(trainer: Trainer) -> tuple[Any, Tensor]:
    """The first batch's draw with its noise levels in float64, and the timesteps (4) that they are of."""
    model: Any = trainer.denoiser
    (draw,) = trainer.draw()
    t = model.denoiser.clock(draw.sigma).round().long()
    alphas = scheduler().alphas_cumprod[t]
    return draw._replace(sigma=((1 - alphas) / alphas).sqrt()), t


def reference_loss(pipe: Any, trainer: Trainer, family: str, hook: Any = None) -> Tensor:
    """Mean squared error of the predicted noise, as published training scripts have it.

    In float64: in float32 a gradient's own rounding is 1e-4 of it, for the embedding of t.
    """
    with in_float64():
        loss = _reference_loss(pipe, trainer, family, hook)
        loss.backward()
    return loss.detach()


def _reference_loss(pipe: Any, trainer: Trainer, family: str, hook: Any) -> Tensor:
    draw, t = drawn(trainer)
    data: Any = trainer.data
    pixels, cond = Pixels().batch(draw.index)
    moments = pipe.vae.encode(pixels).latent_dist
    noise = posterior_noise(draw.u[:, -1], (4, 8, 8))
    x0 = (moments.mean + moments.std * noise) * pipe.vae.config.scaling_factor
    x = scheduler().add_noise(x0, draw.eps, t)
    texts = [data.captions[i] for i in draw.index.tolist()]
    given = told(pipe, texts, draw.keep, family)
    x, given = hook(pipe, x, t, cond, given) if hook else (x, given)
    return F.mse_loss(pipe.unet(x, t, **given).sample, draw.eps)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same gradients by name, within 1e-8 of the largest number of each, or of a thousandth of the largest of all."""
    assert ours.keys() == theirs.keys()
    top = max(float(g.abs().max()) for g in theirs.values())
    for name, grad in theirs.items():
        scale = max(float(grad.abs().max()), 1e-3 * top)
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-8 * scale, msg=lambda m, n=name: f"{n}: {m}")


def gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    """By name."""
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def ours_after_a_step(trainer: Trainer) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the first batch, and the gradients it leaves."""
    with in_float64():
        loss = trainer.losses(drawn(trainer)[0]).mean()
        loss.backward()
    return loss.detach(), gradients(trainer.denoiser.net)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_to_image_step_has_the_gradients_of_diffusers(family):
    trainer, pipe = in_double(trainer_of("text_to_image", family, cond_dropout=0.5)), pipeline(family)
    loss, ours = ours_after_a_step(trainer)
    theirs = reference_loss(pipe, trainer, family)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    close(ours, gradients(pipe.unet))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_controlnet_step_has_the_gradients_of_diffusers(family):
    import diffusers

    trainer, pipe = in_double(trainer_of("controlnet", family)), pipeline(family)
    net: Any = trainer.denoiser.net
    with torch.no_grad():  # past the first step, where all but the last layers have no gradient
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    reference: Any = diffusers.ControlNetModel.from_unet(pipe.unet).double()
    reference.load_state_dict(net.state_dict())

    def hook(pipe: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], given: dict[str, Any]) -> Any:
        down, mid = reference(x, t, controlnet_cond=cond["control"], return_dict=False, **given)
        return x, {**given, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    loss, ours = ours_after_a_step(trainer)
    theirs = reference_loss(pipe, trainer, family, hook)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    close(ours, gradients(reference))


@pytest.mark.parametrize("family", SOME)
def test_an_adapter_step_has_the_gradients_of_diffusers(family):
    import diffusers

    trainer, pipe = in_double(trainer_of("adapter", family)), pipeline(family)
    net: Any = trainer.denoiser.net
    c = net.config
    kinds = {"full": "full_adapter", "full_xl": "full_adapter_xl"}
    reference: Any = diffusers.T2IAdapter(3, list(c.widths), c.blocks, c.downscale, kinds[c.kind]).double()
    reference.load_state_dict(net.state_dict())

    def hook(pipe: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], given: dict[str, Any]) -> Any:
        return x, {**given, "down_intrablock_additional_residuals": reference(cond["control"])}

    loss, ours = ours_after_a_step(trainer)
    theirs = reference_loss(pipe, trainer, family, hook)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    close(ours, gradients(reference))


def test_a_lora_step_has_the_gradients_of_peft():
    import peft

    trainer, pipe = in_double(trainer_of("lora", task_rank=4, task_alpha=2.0)), pipeline("sd1")
    net: Any = trainer.denoiser.net
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("up"):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets))
    theirs_of = dict(pipe.unet.named_parameters())
    ends = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    place = {}
    for name, p in net.named_parameters():
        *layer, part = name.split("/")
        place[name] = f"{'.'.join(layer[1:])}.{ends[part]}"
        theirs_of[place[name]].data.copy_(p.data)
    loss, ours = ours_after_a_step(trainer)
    theirs = reference_loss(pipe, trainer, "sd1")
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    close({place[name]: grad for name, grad in ours.items()}, gradients(pipe.unet))


@pytest.mark.parametrize("family", SOME)
def test_an_inpainting_step_has_the_gradients_of_diffusers(family):
    trainer, pipe = in_double(trainer_of("inpaint", family)), pipeline(family)
    net: Any = trainer.denoiser.net
    with torch.no_grad():
        net.conv_in.weight[:, 4:] = 0.05 * torch.randn(
            net.conv_in.weight[:, 4:].shape, generator=torch.Generator().manual_seed(1)
        )
    pipe.unet.conv_in = torch.nn.Conv2d(9, net.config.widths[0], 3, padding=1).double()
    pipe.unet.load_state_dict(net.state_dict())

    def hook(pipe: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], given: dict[str, Any]) -> Any:
        pixels, _ = Pixels().batch(drawn(trainer)[0].index)
        hidden = pipe.vae.encode(pixels * (cond["hole"] < 0.5)).latent_dist.mean * pipe.vae.config.scaling_factor
        return torch.cat([x, F.interpolate(cond["hole"], (8, 8)), hidden], 1), given

    loss, ours = ours_after_a_step(trainer)
    theirs = reference_loss(pipe, trainer, family, hook)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    close(ours, gradients(pipe.unet))


# ---- what changes, and what does not


EVERY = {"sd1": ["unet", "text"], "sd2": ["unet", "text"], "sdxl": ["unet", "text", "text_2"]}


@pytest.mark.parametrize("family", ["sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd1", "sd2"))])
def test_every_factor_of_a_lora_has_a_gradient_and_diffusers_reads_them_all(family, tmp_path, caplog):
    said = {"prediction": "v"} if family == "sd2" else {}
    match = ["to_v", "to_out.0", "q_proj", "out_proj", "fc1", "text_projection"]
    trainer = trainer_of("lora", family, task_targets=EVERY[family], task_match=match, task_rank=2, **said)
    model: Any = trainer.denoiser
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trainer.losses(trainer.draw()[0]).mean().backward()
    nothing = [name for name, p in model.net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not nothing
    config: Any = trainer.config
    make(FINETUNES, config.task, "task")().publish(model, None, 0, tmp_path)
    pipe = loaded_by_diffusers(family)
    with caplog.at_level("WARNING"):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert not [r.getMessage() for r in caplog.records if "key" in r.getMessage()]
    names = {"unet": "unet", "text": "text_encoder", "text_2": "text_encoder_2"}
    read = {
        f"{target}/{layer.removeprefix('text_model.')}"
        for target, name in names.items()
        for layer, module in getattr(getattr(pipe, name, None), "named_modules", list)()
        if hasattr(module, "lora_A")
    }
    assert read == {f"{t}/{layer.removeprefix('text_model.')}" for t, layer, _ in model.net.applied.lora}


def loaded_by_diffusers(family: str) -> Any:
    """The checkpoint as diffusers loads it."""
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(sd_files.tree(family))


@pytest.mark.parametrize(
    "task",
    ["text_to_image", *(pytest.param(t, marks=pytest.mark.slow) for t in ("inpaint", "inpaint_by_tokens", "lora"))],
)
def test_frozen_parts_in_half_precision_beside_a_network_trained_in_float32(task):
    trainer = trainer_of(task, task_frozen="bf16", steps=1)
    losses, exact = ([float(step.loss) for step in t] for t in (trainer, trainer_of(task, steps=1)))
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert losses == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("text_to_image", {}),
        ("controlnet", {}),
        ("lcm", {"task_rank": 0}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("inpaint", "inpaint_by_tokens")),
    ],
)
def test_what_is_trained_starts_unrounded_whatever_the_frozen_parts_are_in(task, more):
    config = config_of(task, task_frozen="bf16", precision="bf16", **more)
    model = make(FINETUNES, config.task, "task")().model(config)
    base = sd_files.tensors(sd_files.tree("sd1") / "unet")
    own = {name.removeprefix("unet."): p for name, p in model.net.state_dict().items()}
    same = [name for name in base if name in own and own[name].shape == base[name].shape]
    assert len(same) > len(base) / 3  # of a ControlNet the way up is missing
    for name in same:
        torch.testing.assert_close(own[name], base[name], rtol=0, atol=0)
    rest = [p for p in model.parameters() if not p.requires_grad]
    assert rest and {p.dtype for p in rest} == {torch.bfloat16}
    if task in ("controlnet", "lcm"):
        frozen = model.denoiser.net.net if task == "controlnet" else model.distilled.teacher.denoiser.net
        for name, p in frozen.state_dict().items():
            torch.testing.assert_close(p, base[name].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("task", TASKS)
def test_nothing_but_what_is_trained_changes(task, family):
    trainer = trainer_of(task, family, lr=1e-2)
    model: Any = trainer.denoiser
    trained = {id(p) for p in model.net.parameters()}
    before = {name: p.clone() for name, p in model.state_dict(keep_vars=True).items()}
    for _ in trainer:
        pass
    own = {name for name, p in model.state_dict(keep_vars=True).items() if id(p) in trained}
    after = model.state_dict()
    assert own and all(torch.equal(after[name], before[name]) for name in before if name not in own)
    assert any(not torch.equal(after[name], before[name]) for name in own)
    assert {id(p) for p in trainer.parameters} == trained


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("task", ["controlnet", "lora", "inpaint"])
def test_a_fresh_addition_changes_nothing_yet(task, family):
    plain, added = (trainer_of(name, family) for name in ("text_to_image", task))
    (draw,) = plain.draw()
    x0, cond = plain.data.batch(draw.index, draw.u)
    _, more = added.data.batch(draw.index, draw.u)
    with torch.no_grad():
        ours, theirs = (
            t.denoiser.loss(x0, draw.sigma, draw.eps, t.conditions(c)) for t, c in ((added, more), (plain, cond))
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_the_new_rows_of_the_table_are_trained():
    trainer = trainer_of("textual_inversion", lr=1e-1, task_token="<thing>", task_start="a", task_vectors=3)
    model: Any = trainer.denoiser
    table = model.reader.encoders[0].text_model.embeddings.token_embedding
    frozen, rows = table.frozen.clone(), table.rows.detach().clone()
    _, word, _ = model.reader.text.parts[0].tokenizer.encode("a")
    torch.testing.assert_close(rows, frozen[word].expand(3, -1), rtol=0, atol=0)
    for _ in trainer:
        pass
    assert torch.equal(table.frozen, frozen) and not (table.rows == rows).all(1).any()


# ---- nothing, and chance


@pytest.mark.parametrize("family", FAMILIES)
def test_no_caption_means_in_training_what_it_means_in_sampling(family):
    from nanodiffusion.tasks.conditions import conditioning
    from nanodiffusion.tasks.request import GenerateConfig, Inputs, complete

    trainer = trainer_of("text_to_image", family)
    model: Any = trainer.denoiser
    _, cond = trainer.data.batch(torch.tensor([0]))
    bundle = load_pretrained(sd_files.tree(family), device="cpu")
    request = complete(bundle, GenerateConfig(prompt=["a photo of a cat"], height=64, width=64, guidance=3.0), Inputs())
    generated = conditioning(bundle, request)
    for name in ("context", "pooled") if family == "sdxl" else ("context",):
        trained = [model.condition(c)[name] for c in (cond, model.unconditional(cond))]
        for ours, theirs in zip(trained, generated):
            torch.testing.assert_close(ours, theirs[name], rtol=1e-5, atol=1e-6)


def test_noise_of_the_posterior_is_a_function_of_its_own_u():
    u = torch.rand(6, generator=torch.Generator().manual_seed(3))
    whole = posterior_noise(u, (4, 8, 8))
    for i in range(6):
        torch.testing.assert_close(posterior_noise(u[i : i + 1], (4, 8, 8))[0], whole[i], rtol=0, atol=0)
    many = posterior_noise(torch.rand(2000, generator=torch.Generator().manual_seed(4)), (10, 10))
    assert abs(float(many.mean())) < 0.01 and abs(float(many.std()) - 1) < 0.01


def test_ids_of_no_text_are_marked_only_where_zeros_stand_for_it():
    for family, zeros in (("sd1", False), ("sdxl", True)):
        model: Any = trainer_of("lora", family).denoiser
        ids = model.reader.tokens(["", "a cat"])
        assert bool((ids[0] == NO_TEXT).all()) is zeros and not (ids[1] == NO_TEXT).any()


# ---- what is refused


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("text_to_image", {"prediction": "v"}, "predicts something else"),
        ("text_to_image", {"task_base": "/nowhere/at/all"}, "base|nowhere"),
        ("lora", {"task_targets": ["text_2"]}, "no such part"),
        ("lora", {"task_targets": []}, "no such part"),
        ("lora", {"task_match": ["nothing.like.this"]}, "no layer matches"),
        ("lora", {"task_rank": 0}, "rank"),
        ("lora", {"task_layout": "khoya"}, "task.layout(.|\n)*did you mean 'kohya'"),
        ("textual_inversion", {"task_vectors": 0}, "needs a vector"),
        ("textual_inversion", {"task_templates": "poem"}, "templates"),
        ("textual_inversion", {"task_token": "cat"}, "cat"),
        ("textual_inversion", {"task_start": "cat dog puppy sea"}, "more tokens"),
        ("adapter", {"task_kind": "strange"}, "kind"),
        ("adapter", {"task_kind": "light", "task_base": str(sd_files.tree("sdxl"))}, "does not fit(.|\n)*task.kind"),
        ("adapter", {"task_start": str(sd_files.part("adapter", "sdxl"))}, "does not fit(.|\n)*task.start"),
        ("controlnet", {"task_start": "/nowhere/at/all"}, "nowhere"),
        ("text_to_image", {"task_frozen": "fp8"}, "task.frozen(.|\n)*fp8"),
        ("no_such_task", {}, "task.name"),
        ("lora", {"task_strength": 1.0}, "strength"),
        ("lora", {"task_start": "/nowhere/at/all.safetensors"}, "nowhere"),
        ("lora", {"task_start": str(sd_files.part("controlnet", "sd1"))}, "LoRA"),
        ("text_to_image", {"task_start": "/nowhere/at/all"}, "nowhere"),
        ("text_to_image", {"task_start": str(sd_files.part("controlnet", "sd1"))}, "no UNet2DConditionModel"),
        ("text_to_image", {"task_start": str(sd_files.tree("sd2") / "unet")}, "does not belong"),
        ("text_to_image", {"task_start": str(sd_files.tree("sd1", inpaint=True))}, "task.name=inpaint"),
        ("text_to_image", {"schedule": {"name": "ldm_zero_snr"}}, r"schedule=\{name: ldm\}"),
        ("controlnet", {"task_frozen": "bf16"}, "precision=bf16"),
        ("text_to_image", {"prediction": "flow", "task_new_prediction": True}, "no such prediction"),
    ],
)
def test_what_cannot_be_trained_is_one_message(task, more, said):
    def build() -> None:
        config = config_of(task, **{"task_base": str(sd_files.tree("sd1")), **more})
        make(FINETUNES, config.task, "task")().model(config)

    with pytest.raises(UserError, match=said):
        build()


def test_a_layout_that_has_no_place_for_the_layers_is_refused_before_training():
    config = config_of("lora", task_layout="kohya-sdxl")
    task = make(FINETUNES, config.task, "task")()
    with pytest.raises(UserError, match="SDXL has no such layer"):
        task.check(task.model(config), config, (4, 8, 8))


def test_captions_without_the_token_are_refused_and_one_with_it_in_any_letters_is_not():
    config = config_of("textual_inversion", task_templates="captions", task_token="<thing>")
    task = make(FINETUNES, config.task, "task")()
    model = task.model(config)
    with pytest.raises(UserError, match=r"nothing would be trained(.|\n)*<thing>"):
        task.prepared(Pixels(), model)
    data = task.prepared(Pixels(captions=("a red dog", "", "a <Thing> in the sea", "")), model)
    _, cond = data.batch(torch.tensor([2]))
    model.condition(cond)["context"].sum().backward()
    assert all(rows.grad.abs().sum() > 0 for rows in model.net.values())


ZERO = {"rescale_betas_zero_snr": True}
OTHER = {"beta_start": 0.0005, "beta_end": 0.02}
TRAINED = {
    "trained_betas": [round((0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2, 9) for i in range(1000)]
}


@pytest.mark.parametrize(
    ("changes", "schedule", "fix"),
    [
        (ZERO, "ldm_zero_snr", r"schedule=\{name: ldm_zero_snr\}"),
        (OTHER, "", "a schedule of these levels"),
        pytest.param({"timestep_spacing": "trailing", "steps_offset": 0}, "ldm", "", marks=pytest.mark.slow),
        pytest.param(TRAINED, "ldm", "", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_trained_on_its_own_noise_levels_unless_others_are_asked_for(changes, schedule, fix):
    base = str(sd_files.tree("sd1", scheduler=changes))

    def build(**more: Any) -> Any:
        config = config_of("text_to_image", task_base=base, **more)
        return make(FINETUNES, config.task, "task")().model(config)

    if fix:
        with pytest.raises(UserError, match=fix) as e:
            build()
        assert "1000 levels" in str(e.value) and len(str(e.value).splitlines()) <= 6
        build(task_new_prediction=True)
    if schedule:
        build(schedule={"name": schedule})


def test_pictures_that_the_codec_cannot_halve_are_refused():
    model: Any = trainer_of("text_to_image").denoiser
    with pytest.raises(UserError, match=r"data\.size"):
        Prepared(Pixels(shape=(3, 60, 64)), model)


# ---- checkpoints that are not of the usual size


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose codec halves twice, and whose latents are 8 wide."""
    folder = tmp_path_factory.mktemp("shallow") / "base"
    shutil.copytree(sd_files.tree("sd1"), folder)
    shutil.rmtree(folder / "vae")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sd_files.vae("sd1", block_out_channels=(32, 32, 64), **kinds).save_pretrained(folder / "vae")  # type: ignore[operator]
    return folder


@pytest.mark.parametrize(("task", "more"), [("controlnet", {}), ("adapter", {}), ("adapter", {"task_kind": "light"})])
def test_what_reads_a_control_fits_a_codec_that_halves_less_often(task, more, shallow):
    trainer = trainer_of(task, task_base=str(shallow), **more)
    losses = [float(step.loss) for step in trainer]
    assert trainer.data.shape == (4, 16, 16) and len(losses) == 3 and all(map(math.isfinite, losses))


def test_the_size_of_latents_says_the_size_of_pictures_by_the_codec_s_factor(shallow, tmp_path):
    assert load_pretrained(shallow, device="cpu").family.size == 32  # 8 latent pixels of 4
    assert load_pretrained(sd_files.tree("sd1"), device="cpu").family.size == 64


@pytest.mark.parametrize("task", ["text_to_image", "inpaint", "inpaint_by_tokens"])
def test_a_trained_unet_keeps_the_natural_size_of_its_base(task, shallow, tmp_path):
    for name, base in (("deep", sd_files.tree("sd1")), ("shallow", shallow)):
        config = config_of(task, task_base=str(base))
        row = make(FINETUNES, config.task, "task")()
        row.publish(row.model(config), None, 0, tmp_path / name)
        assert json.loads((tmp_path / name / "unet/config.json").read_text())["sample_size"] == 8


# ---- what training goes on from


def grown(family: str, file: Path, layout: str = "kohya") -> None:
    """A LoRA of the U-Net and the first text encoder, of two ranks and alphas, as other trainers leave it."""
    from nanodiffusion.lora import Lora, new_lora, save_lora

    bundle, draw = load_pretrained(sd_files.tree(family), device="cpu"), torch.Generator().manual_seed(2)
    parts: Any = {}
    for target, net, rank in (("unet", bundle.denoiser.net, 3), ("text", bundle.text.parts[0].net, 2)):
        applied = new_lora({target: net}, rank, 5.0, generator=draw)
        for p in applied.parameters():
            p.data = 0.2 * torch.randn(p.shape, generator=draw)
        parts |= applied.lora.parts
    save_lora(Lora(parts), file, layout)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_started_lora_gives_what_the_base_gives_with_it_and_goes_on(family, tmp_path):
    from nanodiffusion.lora import add_lora, read_lora

    file = tmp_path / "theirs.safetensors"
    grown(family, file)
    trainer, plain = (
        trainer_of("lora", family, task_start=str(file), lr=1e-2, steps=1),
        trainer_of("text_to_image", family),
    )
    model: Any = trainer.denoiser
    bare: Any = plain.denoiser
    nets: Any = {"unet": bare.denoiser.net, "text": bare.reader.encoders[0]}
    (draw,) = plain.draw()
    x0, cond = plain.data.batch(draw.index, draw.u)
    with torch.no_grad():
        before = bare(x0, draw.sigma, plain.conditions(cond))
        add_lora(nets, read_lora(file))
        wanted = bare(x0, draw.sigma, plain.conditions(cond))
        found = model(x0, draw.sigma, plain.conditions(cond))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - before).abs().max() > 0.01
    net: Any = model.net
    assert {(t, f.rank, f.alpha) for t, _, f in net.applied.lora} == {("unet", 3, 5.0), ("text", 2, 5.0)}
    started = [p.detach().clone() for p in trainer.parameters]
    for _ in trainer:
        pass
    assert not any(torch.equal(a, b) for a, b in zip(started, trainer.parameters))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text_to_image", "inpaint"])
def test_a_unet_goes_on_from_what_a_run_left_and_says_how_it_is_read(task, tmp_path):
    """With the prediction and the noise levels that the run changed, which diffusers reads too."""
    import diffusers

    new = {"prediction": "v", "schedule": {"name": "ldm_zero_snr"}}
    first = trainer_of(task, task_new_prediction=True, lr=1e-3, steps=1, **new)
    for _ in first:
        pass
    config: Any = first.config
    make(FINETUNES, config.task, "task")().publish(first.denoiser, None, 0, tmp_path)
    scheduler: Any = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    read = scheduler.config
    assert (read.prediction_type, read.rescale_betas_zero_snr) == ("v_prediction", True)
    for where in (tmp_path, tmp_path / "unet", tmp_path / "unet/diffusion_pytorch_model.safetensors"):
        again: Any = trainer_of(task, task_start=str(where), **new).denoiser
        torch.testing.assert_close(again.net.state_dict(), first.denoiser.net.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="prediction=v"):
        trainer_of(task, task_start=str(tmp_path))


def test_a_new_word_begins_as_a_word_of_one_token():
    model: Any = trainer_of("textual_inversion", task_start="cat").denoiser
    part = model.reader.text.parts[0]
    table = part.net.text_model.embeddings.token_embedding
    _, word, _ = part.tokenizer.encode("cat")
    torch.testing.assert_close(table.rows.detach(), table.frozen[[word]], rtol=0, atol=0)


@pytest.mark.parametrize("family", SOME)
def test_the_teacher_of_few_steps_is_led_away_from_no_text(family):
    trainer = trainer_of("lcm", family, cond_dropout=0.0)
    model: Any = trainer.denoiser
    (draw,) = trainer.draw()
    _, cond = trainer.data.batch(draw.index, draw.u)
    told = model.condition(cond)
    nothing, led = model.condition(model.unconditional(cond)), model.distilled.teacher.unconditional(told)
    assert nothing.keys() == led.keys() and "context" in led
    for name, value in nothing.items():
        torch.testing.assert_close(led[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text_to_image", "controlnet"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(task, tmp_path):
    from nanodiffusion.distributed import World
    from nanodiffusion.runner import Runner
    from tests.tiny import differences

    pictures = write_pictures(tmp_path / "photos")
    data = {"name": "pictures", "path": str(pictures), "size": 64, "control": {"name": "canny"}}

    def run(name: str, *ends: int) -> Any:
        for steps in ends:
            config = config_of(task, data=data, steps=steps, out=str(tmp_path), name=name, log_every=1, lr=1e-3)
            Runner(config, World(), say=lambda _: None).run()
        return tmp_path / name

    assert not differences(run("whole", 4), run("stopped", 2, 4))


def write_pictures(folder: Any) -> Any:
    """Six pictures of 72 x 88 with captions beside them."""
    from PIL import Image

    folder.mkdir()
    for i in range(6):
        pixels = torch.randint(0, 256, (72, 88, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of cat {i}")
    return folder


def test_aspects_are_trained_and_validated_and_what_is_left_out_is_said(tmp_path):
    from PIL import Image

    from nanodiffusion.distributed import World
    from nanodiffusion.runner import Runner

    folder = write_pictures(tmp_path / "photos")
    for i, size in enumerate(((64, 128), (64, 130), (128, 64), (128, 66))):
        Image.new("RGB", size, (40 * i, 9, 200)).save(folder / f"wide{i}.png")
        (folder / f"wide{i}.txt").write_text("a red dog")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a cat")
    data = {"name": "pictures", "path": str(folder), "size": 64, "buckets": [[64, 64], [64, 128], [128, 64]]}
    said: list[str] = []
    config = config_of(
        "lora",
        data=data,
        batch_size=2,
        out=str(tmp_path),
        name="aspects",
        validation=0.3,
        validate_every=3,
        log_every=1,
    )
    runner = Runner(config, World(), said.append)
    shapes = {tuple(runner.trainer.data.batch(d.index, d.u)[0].shape[1:]) for d in first_draws(runner.trainer, 12)}
    assert shapes == {(4, 8, 8), (4, 8, 16), (4, 16, 8)} and runner.run() == "done"
    assert said[0].startswith("10 pictures of ") and "; 1 left out: 1 " in said[0]


def first_draws(trainer: Trainer, n: int) -> list[Any]:
    """What the first n updates draw, one micro-batch each; the loop stands where it did."""
    found = []
    for trainer.step in range(n):
        found += trainer.draw()
    trainer.step = 0
    return found
