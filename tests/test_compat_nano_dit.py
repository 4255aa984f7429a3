"""The stand-in for nano-diffusion (class-conditional DiT) against its published formulas, and its commands in ours."""

import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.testing import assert_close

from nanodiffusion.cli import main as command
from nanodiffusion.codec import PixelCodec
from nanodiffusion.compat import nano_dit as ours
from nanodiffusion.denoiser import PREDICTIONS
from nanodiffusion.draw import GAIN, bounded
from nanodiffusion.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = {
    "patch_size": 2,
    "hidden_dim": 32,
    "num_attention_heads": 2,
    "num_dit_blocks": 2,
    "activation": "SiLU",
    "normalization_layer": "RMSNorm",
    "num_context_classes": 10,
    "num_timesteps": 1000,
    "vae_name": "ostris/vae-kl-f8-d16",
    "in_channels": 4,
    "dropout": 0.0,
    "device": None,
}
ARGUMENTS = {
    ours.PatchEmbedding: "patch_size hidden_dim in_channels device",
    ours.TimeEmbedding: "num_timesteps hidden_dim device",
    ours.AdaLNSingle: "hidden_dim num_dit_blocks device",
    ours.DiTBlock: "layer_idx adaln_single hidden_dim num_attention_heads activation normalization_layer dropout device",
    ours.Reshaper: "patch_size hidden_dim in_channels normalization_layer device",
    ours.DDIMSampler: "model noise_scheduler num_timesteps num_sampling_steps",
    ours.DDIMSampler.sample: "self x_T context return_intermediates",
    ours.NanoDiffusionTrainer: "model noise_scheduler checkpoint_dir num_sampling_steps loss_fn validation_interval"
    " save_every_n_epochs keep_n_checkpoints vae validation_context fixed_validation_noise",
    ours.NanoDiffusionTrainer.train: "self epochs optimizer lr_scheduler train_dataloader val_dataloader",
    ours.EMAModel: "model decay warmup_steps",
    ours.decode_latents: "latents vae",
}

# gamma(t), Chen 2023, written out; each falls from 1 to 0.
cosine = lambda t: (math.cos((0.8 * t + 0.2) * math.pi / 2) ** 4) / math.cos(0.1 * math.pi) ** 4
logistic = lambda u: 1 / (1 + math.exp(-u))
sigmoid = lambda t: (logistic(3 / 0.7) - logistic(3 * t / 0.7)) / (logistic(3 / 0.7) - logistic(0.0))
CURVES = {
    "linear": (ours.LinearNoiseScheduler, lambda t: 1 - t),
    "cosine": (ours.CosineNoiseScheduler, cosine),
    "sigmoid": (ours.SigmoidNoiseScheduler, sigmoid),
}
every_curve = pytest.mark.parametrize("name", CURVES)


@pytest.mark.parametrize("call", ARGUMENTS, ids=lambda call: call.__qualname__)
def test_arguments_are_that_system_s(call):
    ours_ = list(inspect.signature(call).parameters)
    assert ours_[: len(ARGUMENTS[call].split())] == ARGUMENTS[call].split()


# -- noise -------------------------------------------------------------------------------------------------------------


@every_curve
def test_gamma_is_the_published_curve(name):
    kind, curve = CURVES[name]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    want = torch.tensor([min(max(curve(float(u)), 1e-9), 1.0) for u in t], dtype=torch.float64)
    for scheduler in (kind(1000), kind({"num_timesteps": 1000, "type": kind.__name__}), kind(num_timesteps=1000)):
        assert_close(scheduler.gamma_func(t), want, rtol=1e-9, atol=1e-12)


@every_curve
@pytest.mark.parametrize("b", [1.0, 0.5])
def test_noising_is_the_published_formula(name, b):
    kind, curve = CURVES[name]
    x, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    scheduler = kind(OmegaConf.create({"type": "x", "num_timesteps": 100, "scale_factor": b}))
    noisy, noise = scheduler(x, torch.tensor([10, 50, 90]), eps)
    for i, t in enumerate((0.1, 0.5, 0.9)):
        gamma = curve(t)
        assert_close(noisy[i], math.sqrt(gamma) * b * x[i] + math.sqrt(1 - gamma) * eps[i], rtol=1e-5, atol=1e-6)
    assert noise is eps and torch.equal(scheduler(x, torch.tensor([10, 50, 90]), eps, return_noise=False), noisy)


class Smooth(nn.Module):
    """Some smooth eps of all three inputs."""

    def forward(self, x, timestep, context):
        assert timestep.dtype == torch.int64 and timestep.shape == context.shape == x.shape[:1]
        scale = 0.7 + 0.1 * torch.cos(timestep / 300 + context)
        return torch.tanh(x) * scale.reshape(-1, 1, 1, 1).to(x)


def published_loop(model, x, times, curve, context):
    """The README's sampler: x0 of eps, then noise again at the next gamma; every x on the way."""
    out = []
    for now, then in pairwise(times):
        gamma, lower = curve(now / 1000), curve(then / 1000)
        eps = model(x, torch.full((len(x),), now), context)
        x0 = (x - math.sqrt(1 - gamma) * eps) / math.sqrt(gamma)
        x = math.sqrt(lower) * x0 + math.sqrt(max(1 - lower, 0.0)) * eps
        out.append(x)
    return out


@every_curve
@pytest.mark.parametrize("steps", [6, 20])
def test_ddim_is_the_published_loop_away_from_the_last_level(name, steps):
    kind, curve = CURVES[name]
    torch.manual_seed(0)
    x, context = torch.randn(3, 2, 4, 4), torch.arange(3)
    sampler = ours.DDIMSampler(Smooth(), kind(1000), 1000, steps)
    times = sampler.timesteps().tolist()
    even = torch.linspace(0, 1000, steps).round().long().flip(0).tolist()
    assert times[1:] == even[len(even) - len(times) + 1 :]  # that system's, but for the first
    want = published_loop(Smooth(), x.double(), times, lambda t: max(curve(t), 1e-9), context)
    x0, noisy = sampler.sample(x, context, return_intermediates=True)
    assert len(noisy) == len(want) == len(times) - 1 and torch.equal(noisy[-1], x0)
    for got, expected in zip(noisy, want):
        assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sampler.sample(x, context), x0) and not x0.requires_grad


def ideal_eps(curve, std: float, error: float = 0.0):
    """eps of Gaussian data, E[eps | x] = sqrt(1 - gamma) x / (gamma std^2 + 1 - gamma), and an error beside it."""

    def model(x, timestep, context):
        gamma = max(curve(float(timestep[0]) / 1000), 1e-9)
        wrong = error * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        return math.sqrt(1 - gamma) / (gamma * std**2 + 1 - gamma) * x + wrong

    return model


@every_curve
@pytest.mark.parametrize("steps", [2, 6, 20, 50, 200])
def test_the_first_step_does_not_blow_up_what_the_model_gets_wrong(name, steps):
    """An error of eps of 0.01 makes the first x at most a tenth larger; from gamma = 1e-9 it would be up to 45 times x."""
    kind, curve = CURVES[name]
    x, context = torch.randn(1000, 1, 2, 2), torch.zeros(1000, dtype=torch.int64)
    first = lambda error: ours.DDIMSampler(ideal_eps(curve, 1.0, error), kind(1000), 1000, steps).sample(
        x, context, return_intermediates=True
    )[1][0]
    wrong, right = first(0.01), first(0.0)
    assert float((wrong - right).norm() / x.norm()) <= 1.05 * 0.01 * GAIN
    assert steps == 2 or float(wrong.norm()) <= 1.1 * float(right.norm())  # of two steps the first is the last


@every_curve
@pytest.mark.parametrize("steps", [2, 20, 50, 200, 1001])
@pytest.mark.parametrize("b", [1.0, 0.5])
def test_sampling_starts_where_the_core_s_does(name, steps, b):
    """Its first timestep is the last whole one at or below the level that `draw.bounded` makes of the whole ladder."""
    kind, curve = CURVES[name]
    level = lambda t: math.sqrt(1 / max(curve(t / 1000), 1e-9) - 1)
    even = torch.linspace(1000, 0, steps).round().tolist()
    highest = bounded(torch.tensor([level(t) for t in even], dtype=torch.float64), PREDICTIONS["eps"])[0]
    times = ours.DDIMSampler(Smooth(), kind(1000, scale_factor=b), 1000, steps).timesteps()
    assert int(times[0]) == max(t for t in range(1, 1001) if level(t) <= float(highest) * (1 + 1e-9))


@every_curve
def test_samples_of_a_gaussian_have_its_variance(name):
    """One Euler step a timestep leaves what one step gets wrong, below 1 %."""
    kind, curve = CURVES[name]
    x, context = torch.randn(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64)
    out = ours.DDIMSampler(ideal_eps(curve, 1.0), kind(1000), 1000, 1001).sample(x, context)
    assert abs(float(out.var() / x.var()) - 1) < 0.01


def test_the_input_scale_is_undone():
    """Data twice as wide noised with b = 1/2 is data noised with b = 1: the samples are twice as wide."""
    x, context = torch.randn(500, 1, 2, 2), torch.zeros(500, dtype=torch.int64)
    one, half = (
        ours.DDIMSampler(ideal_eps(CURVES["cosine"][1], 1.0), ours.CosineNoiseScheduler(1000, scale_factor=b), 1000, 20)
        for b in (1.0, 0.5)
    )
    assert_close(half.sample(x, context), 2 * one.sample(x, context), rtol=1e-4, atol=1e-4)


def test_step_is_the_published_formula():
    sampler = ours.DDIMSampler(Smooth(), ours.LinearNoiseScheduler(10), 10, 5)
    x, eps, gamma = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), torch.tensor(0.3)
    assert_close(sampler.step(x, eps, gamma), (x - 0.7**0.5 * eps) / 0.3**0.5)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_default_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        sizes = {"hidden_dim": 768, "num_attention_heads": 12, "num_dit_blocks": 12, "in_channels": 16}
        net = ours.NanoDiffusionModel({**MODEL, **sizes})
    assert sum(p.numel() for p in net.parameters()) == 88_733_248 + 768  # and the class that stands for none
    names = {key.replace("dit_blocks.11", "dit_blocks.N") for key in net.state_dict()}
    for name in ("patch_embedding.lin_projection.weight", "adaln_single.layer_embeddings", "context_embedding.weight"):
        assert name in names
    assert {"dit_blocks.N.multi_head_attn.in_proj_weight", "reshaper.lin_projection.bias"} <= names


@pytest.mark.parametrize(
    "config", [MODEL, OmegaConf.create(MODEL), SimpleNamespace(**MODEL)], ids=["dict", "omega", "ns"]
)
def test_the_model_takes_any_config_and_any_size(config):
    torch.manual_seed(0)
    net = ours.NanoDiffusionModel(config)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    for size in ((4, 4), (8, 6)):
        x, labels = torch.randn(2, 4, *size), torch.tensor([0, 9])
        out = net(x, torch.tensor([5, 5]), labels)
        assert out.shape == x.shape
        assert_close(net(x, torch.tensor(5), labels), out)
        assert not torch.allclose(net(x, torch.tensor([5, 900]), labels)[1], out[1], atol=1e-4)


def test_parts_make_up_the_model():
    """The model is its parts in turn, each with the model's weights."""
    torch.manual_seed(0)
    net = ours.NanoDiffusionModel(MODEL)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    state = net.state_dict()
    part = lambda at: {k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}
    options = dict(MODEL)
    embed, adaln, last = ours.PatchEmbedding(**options), ours.AdaLNSingle(**options), ours.Reshaper(**options)
    blocks = [ours.DiTBlock(layer_idx=i, adaln_single=adaln, **options) for i in range(2)]
    for module, at in ((embed, "patch_embedding."), (adaln, "adaln_single."), (last, "reshaper.")):
        module.load_state_dict(part(at))
    for i, block in enumerate(blocks):
        block.load_state_dict(part(f"dit_blocks.{i}."))
    x, t, labels = torch.randn(2, 4, 6, 4), torch.tensor([3, 700]), torch.tensor([1, 2])
    six = adaln(ours.TimeEmbedding(1000, 32)(t))
    tokens, x_pos, y_pos = embed(x, patch_pos=True)
    for block in blocks:
        tokens = block(tokens, six, state["context_embedding.weight"][labels].unsqueeze(1))
    assert_close(last(tokens, x_pos, y_pos), net(x, t, labels), rtol=1e-4, atol=1e-5)


def test_patches_go_left_to_right_then_down():
    embed = ours.PatchEmbedding(2, 32, 1)
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    patches, x_pos, y_pos = embed.patchify(x)
    assert patches[0, 1].tolist() == [2, 3, 8, 9]
    assert (x_pos.tolist(), y_pos.tolist()) == ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1])


def test_the_gate_of_attention_works():
    """In that system perturbing it changed nothing."""
    torch.manual_seed(0)
    adaln = ours.AdaLNSingle(32, 1)
    block = ours.DiTBlock(0, adaln, 32, 2)
    x = torch.randn(1, 3, 32)
    changed = []
    for gate in range(6):
        with torch.no_grad():
            adaln.layer_embeddings.zero_().add_(0.5)
            base = block(x, torch.zeros(1, 192))
            adaln.layer_embeddings[0, gate * 32 : (gate + 1) * 32] += 0.5
            changed.append(float((block(x, torch.zeros(1, 192)) - base).abs().max()))
    assert min(changed) > 1e-3


# -- training ----------------------------------------------------------------------------------------------------------


def batches(n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 4, 4, 4, generator=g), torch.randint(10, (4,), generator=g)) for _ in range(n)]


def trained(folder: Path, epochs: int, **options):
    torch.manual_seed(1)
    model = ours.NanoDiffusionModel(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    ema = ours.EMAModel(model, 0.9, 5)
    every = {"num_sampling_steps": 4, "validation_interval": 1, "save_every_n_epochs": 1, "keep_n_checkpoints": 2}
    trainer = ours.NanoDiffusionTrainer(
        model, ours.CosineNoiseScheduler(1000), folder, ema_model=ema, **{**every, **options}
    )
    trainer.train(epochs, optimizer, lr_scheduler, batches(), batches(1))
    return trainer, optimizer, lr_scheduler


def test_training_leaves_checkpoints_that_go_on_and_pictures(tmp_path):
    trainer, *_ = trained(tmp_path, 3)
    folders = sorted(f.name for f in (tmp_path / "checkpoint").iterdir())
    assert folders == ["best", "step-00000001", "step-00000002"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and "loss_val_ema" in rows[0]
    assert rows[-1]["loss_val"] < rows[0]["loss_val"]
    again, optimizer, lr_scheduler = trained(tmp_path / "again", 0)
    epoch, loss = again.load_checkpoint(tmp_path / "checkpoint/step-00000002", optimizer, lr_scheduler)
    assert (epoch, loss) == (2, rows[-1]["loss_val_ema"])
    assert_close(again.model.state_dict(), trainer.model.state_dict())
    assert_close(again.ema_model.model.state_dict(), trainer.ema_model.model.state_dict())
    assert lr_scheduler.last_epoch == 9 and again.best_val_loss == trainer.best_val_loss


def test_an_interval_of_0_is_never(tmp_path):
    trained(tmp_path, 3, validation_interval=0, save_every_n_epochs=0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and not any("loss_val" in row for row in rows)
    assert [f.name for f in (tmp_path / "checkpoint").iterdir()] == ["step-00000002"]  # the end


@pytest.mark.parametrize("fixed", [False, True])
def test_validation_draws_its_classes(fixed, tmp_path):
    pictures = {"vae": PixelCodec(3), "validation_context": [3, 7], "fixed_validation_noise": fixed}
    model = ours.NanoDiffusionModel({**MODEL, "in_channels": 3})
    drawn = ours.NanoDiffusionTrainer(
        model, ours.LinearNoiseScheduler(20), tmp_path, 4, validation_interval=1, **pictures
    )
    images = [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    drawn.train(2, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), images)
    first, second = (np.asarray(Image.open(tmp_path / f"samples/epoch_000{i}_class_7.png")) for i in range(2))
    assert first.shape == (4, 4, 3) and np.array_equal(first, second) == fixed


def test_training_goes_on_where_it_was_and_stops_when_it_waits(tmp_path):
    trainer, optimizer, lr_scheduler = trained(tmp_path, 1)
    trainer.train(3, optimizer, lr_scheduler, batches(), batches(1))
    steps = lambda: [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps() == [0, 1, 2]
    trainer.patience, trainer.best_val_loss = 2, 0.0
    trainer.train(30, optimizer, lr_scheduler, batches(), batches(1))
    assert steps() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_the_loss_is_torch_s_between_noises(loss, tmp_path):
    trainer = ours.NanoDiffusionTrainer(Smooth(), ours.CosineNoiseScheduler(1000), tmp_path, 5, loss)
    x0, context = batches(1)[0]
    got = trainer.compute_loss((x0, context), torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    t, eps = torch.randint(0, 1001, (4,), generator=g), torch.randn(4, 4, 4, 4, generator=g)
    gamma = torch.tensor([max(cosine(int(k) / 1000), 1e-9) for k in t]).reshape(-1, 1, 1, 1)
    out = Smooth()(gamma.sqrt() * x0 + (1 - gamma).sqrt() * eps, t, context)
    assert_close(got, getattr(nn.functional, loss)(out, eps), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = torch.compile(ours.NanoDiffusionModel(MODEL), backend="eager")
    trainer = ours.NanoDiffusionTrainer(model, ours.LinearNoiseScheduler(10), tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = trainer.save_checkpoint(0, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), 1.0)
    plain = ours.NanoDiffusionTrainer(ours.NanoDiffusionModel(MODEL), ours.LinearNoiseScheduler(10), tmp_path)
    assert plain.load_checkpoint(path) == (0, 1.0)


def test_an_average_rises_to_its_decay():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema, want = ours.EMAModel(model, decay=0.8, warmup_steps=4), 0.0
    for step in range(6):
        nn.init.constant_(model.weight, step + 1.0)
        ema.update(model)
        decay = 0.8 * min(1.0, step / 4)
        want = decay * want + (1 - decay) * (step + 1.0)
        assert float(ema.model.weight) == pytest.approx(want, rel=1e-6)
    other = ours.EMAModel(model, 0.8, 4)
    other.load_state_dict(ema.state_dict())
    assert other.step == 6 and torch.equal(other.model.weight, ema.model.weight)


# -- helpers -----------------------------------------------------------------------------------------------------------


def test_helpers_do_what_they_did():
    assert ours.slugify("  My Run: Épreuve #2__ ") == "my-run-epreuve-2"
    assert ours.slugify("Été_1", allow_unicode=True) == "été_1"
    assert ours.get_kwargs(OmegaConf.create({"type": "AdamW", "lr": 0.1})) == {"lr": 0.1}
    assert ours.get_available_device().type in ("cuda", "mps", "cpu")
    mlp = ours.create_mlp([4, 8, 2], "GELU", final_activation=nn.Tanh, dropout=0.5)
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "GELU", "Dropout", "Linear", "Tanh"]
    assert [type(layer).__name__ for layer in ours.create_mlp([4, 8, 2])] == ["Linear", "SiLU", "Linear"]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Of ostris/vae-kl-f8-d16's shape, tiny: 8 pixels a latent pixel, 16 channels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    return AutoencoderKL(**blocks, **sizes, sample_size=32, scaling_factor=0.5).eval()


@torch.no_grad()
def test_latents_are_scaled_as_diffusers_scales_them(vae):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = vae.encode(images).latent_dist
    x0 = ours.encode_images(images, vae)
    assert bool(((x0 - 0.5 * posterior.mean).abs() <= 3 * posterior.std + 1e-4).all())
    decoded = vae.decode(x0 / 0.5).sample.permute(0, 2, 3, 1)
    want = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    for picture, expected in zip(ours.decode_latents(x0, vae), want):
        assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1


# -- its commands, in ours ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory) -> Path:
    """E20: a folder with data/cifar10-latents, digits in CIFAR-10's place, which needs no download."""
    home = tmp_path_factory.mktemp("nano")
    vae.save_pretrained(home / "vae")
    words = ["encode", "digits", "codec=vae", "size=32", "n=40", "flip=true", "out=data/cifar10-latents"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert command([*words, "device=cpu"]) == 0
    return home


TINY = [
    "device=cpu",
    "net.dim=32",
    "net.depth=1",
    "net.heads=2",
    "precision=fp32",
    "sample_every=0",
    "validate_every=0",
]
TINY += ["validation=0", "steps=2", "sample.steps=2", "sample.n=10"]
TRAINS = {
    "default": ["cifar10-latent", "batch_size=4"],  # E21
    "debug": ["--config-name=config_debug"],  # E23
    "batch": ["cifar10-latent", "batch_size=128"],  # E24
}


@pytest.mark.parametrize("name", TRAINS)
def test_its_training_commands_run(name, encoded, monkeypatch):
    monkeypatch.chdir(encoded)
    assert command(["train", *TRAINS[name][:1], *TINY, *TRAINS[name][1:], f"name={name}"]) == 0
    config = json.loads((encoded / "runs" / name / "config.json").read_text())
    assert config["net"]["name"] == "pixart" and config["net"]["channels_in"] == 16
    assert config["batch_size"] == {"default": 4, "debug": 16, "batch": 128}[name]


def test_a_batch_of_pictures_by_classes_of_a_file(encoded, monkeypatch):
    """E26, and E25's grid and trajectories."""
    monkeypatch.chdir(encoded)
    assert command(["train", "cifar10-latent", *TINY, "batch_size=4", "name=drawn"]) == 0
    Path("classes.yaml").write_text("[3, 7, 7]")
    assert command(["sample", "runs/drawn", "class=classes.yaml", "out=images", "steps=2", "device=cpu"]) == 0
    assert len(list(Path("images").glob("*.png"))) == 3
    words = ["n=10", "grid=grid.png", "trajectories=trajectories.png", "steps=3", "device=cpu"]
    assert command(["sample", "runs/drawn", *words]) == 0
    assert Path("grid.png").exists() and Path("trajectories.png").exists()


@pytest.mark.skipif(importlib.util.find_spec("flask") is None, reason="the server comes with the whole of mlflow")
def test_runs_go_to_an_mlflow_server(encoded, monkeypatch):
    """E22 with the store in place of the server, which is what the server shows."""
    monkeypatch.chdir(encoded)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{encoded}/mlflow.db")
    words = ["train", "cifar10-latent", *TINY, "batch_size=4", "name=tracked", "trackers=[mlflow]"]
    assert command(words) == 0


@pytest.mark.slow
def test_the_example_trains_and_draws(tmp_path):
    """E25's grid of all classes and trajectories, from a script."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "EPOCHS": "1", "WIDTH": "16"}
    script = [sys.executable, str(EXAMPLES / "nano_dit.py")]
    done = subprocess.run(
        script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("grid.png", "trajectories.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > picture.height / 2


# -- what can be wrong -------------------------------------------------------------------------------------------------

MODELS = {
    "no classes": (lambda: ours.NanoDiffusionModel({**MODEL, "num_context_classes": 0}), "num_context_classes"),
    "activation": (lambda: ours.NanoDiffusionModel({**MODEL, "activation": "SiLUU"}), "silu"),
    "norm": (lambda: ours.NanoDiffusionModel({**MODEL, "normalization_layer": "BatchNorm"}), "norm"),
    "heads": (lambda: ours.NanoDiffusionModel({**MODEL, "num_attention_heads": 5}), "heads"),
    "type": (lambda: ours.NanoDiffusionModel({**MODEL, "hidden_dim": "wide"}), "dim"),
    "odd size": (
        lambda: ours.NanoDiffusionModel(MODEL)(torch.zeros(1, 4, 5, 4), torch.zeros(1), torch.zeros(1)),
        "height",
    ),
    "odd patch": (lambda: ours.PatchEmbedding(4, 16, 3).patchify(torch.zeros(2, 3, 32, 33)), "width"),
    "its own weights": (
        lambda: ours.NanoDiffusionModel(MODEL).load_state_dict({"time_embedding.omega": torch.zeros(16)}),
        "train them anew",
    ),
    "no curve": (lambda: ours.CosineNoiseScheduler({"num_timesteps": 10, "stop": 1.0}), "start"),
    "no timesteps": (lambda: ours.LinearNoiseScheduler({}), "num_timesteps"),
    "one step": (lambda: ours.DDIMSampler(Smooth(), ours.LinearNoiseScheduler(10), 10, 1), "two steps"),
    "classes": (
        lambda: ours.DDIMSampler(Smooth(), ours.LinearNoiseScheduler(10), 10, 3).sample(
            torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
        ),
        "context",
    ),
    "mlp": (lambda: ours.create_mlp([4]), "layer_dims"),
    "average": (lambda: ours.EMAModel(nn.Linear(1, 1), 1.0), "decay"),
    "no vae": (lambda: ours.decode_latents(torch.zeros(1, 4, 2, 2), None), "VAE"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_is_refused(name):
    call, said = MODELS[name]
    with pytest.raises(UserError, match=said):
        call()


TRAINERS = {
    "loss": ({"loss_fn": "mse"}, {}, "mse_loss"),
    "empty loader": ({}, {"train_dataloader": []}, "no batch"),
    "empty validation": ({}, {"val_dataloader": []}, "no batch"),
    "not finite": ({}, {"train_dataloader": [(torch.full((2, 4, 4, 4), math.nan), torch.zeros(2).long())]}, "finite"),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_training_that_cannot_be_is_refused(name, tmp_path):
    options, loaders, said = TRAINERS[name]
    model = ours.NanoDiffusionModel(MODEL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def run() -> None:
        trainer = ours.NanoDiffusionTrainer(model, ours.LinearNoiseScheduler(10), tmp_path, **options)
        trainer.train(1, optimizer, constant, **{"train_dataloader": batches(1), **loaders})

    with pytest.raises(UserError, match=said):
        run()


@pytest.mark.parametrize("break_it", ["gone", "cut"])
def test_a_checkpoint_that_is_no_more_is_refused(break_it, tmp_path):
    trainer, *_ = trained(tmp_path, 1)
    folder = tmp_path / "checkpoint/step-00000000"
    if break_it == "cut":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError):
        trainer.load_checkpoint(folder if break_it == "cut" else tmp_path / "nowhere")
