"""The stand-in for transformer_latent_diffusion against its published formulas, and its examples run at a tiny size."""

import csv
import inspect
import io
import json
import math
import os
import subprocess
import sys
import tarfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from nanodiffusion.cli import main as command
from nanodiffusion.codec import PixelCodec
from nanodiffusion.compat.tld import configs, data, denoiser, diffusion, train
from nanodiffusion.errors import UserError
from nanodiffusion.pretrained import load_codec

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = {"image_size": 8, "noise_embed_dims": 16, "patch_size": 2, "embed_dim": 64, "dropout": 0.0, "n_layers": 1}
NET = {**SIZE, "text_emb_size": 16}
ARGUMENTS = {
    diffusion.DiffusionGenerator: "model vae device model_dtype",
    diffusion.DiffusionGenerator.generate: "self labels n_iter num_imgs class_guidance seed scale_factor img_size sharp_f"
    " bright_f exponent seeds noise_levels use_ddpm_plus",
    diffusion.DiffusionTransformer.generate_image_from_text: "self prompt class_guidance seed num_imgs img_size n_iter",
    denoiser.Denoiser: "image_size noise_embed_dims patch_size embed_dim dropout n_layers text_emb_size mlp_multiplier"
    " n_channels",
    data.download_and_process_data: "latent_save_path raw_imgs_save_path csv_path image_size bs caption_col url_col"
    " download_data number_sample_per_shard",
    data.encode_image: "img vae",
    data.decode_latents: "out_latents vae",
    data.quantize_latents: "lat clip_val",
    data.dequantize_latents: "lat clip_val",
    configs.DataConfig: "latent_path text_emb_path val_path",
    configs.DenoiserLoad: "dtype file_url local_filename",
}


class Toy(nn.Module):
    """Some smooth x0 of all three inputs, called as that system calls its models: (b c h w), (b 1), (b d)."""

    n_channels = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.text = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x, noise_level, label):
        text = self.text(label)[:, :, None, None]
        return torch.tanh(self.mix(x) + text) * (1 - noise_level[:, :, None, None] / 2)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (3 16), noise (3 4 8 8)."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 16, generator=g), torch.randn(3, 4, 8, 8, generator=g)


def guided(model: Toy, x: torch.Tensor, labels: torch.Tensor, level: float, scale: float) -> torch.Tensor:
    """E45, the README's formula of guidance: scale * conditional + (1 - scale) * unconditional."""
    noise = torch.full((len(x), 1), level, dtype=x.dtype)
    return scale * model(x, noise, labels) + (1 - scale) * model(x, noise, torch.zeros_like(labels))


def readme_levels(n: int, exponent: float = 1.0) -> list[float]:
    """The README's levels; where its second is above its first, 0.99, the first is half way from the second to 1."""
    rest = [1 - (i / n) ** exponent for i in range(1, n)]
    return [0.99 if rest[0] < 0.99 else (1 + rest[0]) / 2, *rest]


def readme_ddim(model: Toy, x: torch.Tensor, labels: torch.Tensor, levels: list[float], scale: float) -> torch.Tensor:
    """E44, the README's loop: each x a weighted average of the last one and of the predicted x0."""
    model, x, labels = model.double(), x.double(), labels.double()
    for now, then in pairwise(levels):
        x0 = guided(model, x, labels, now, scale)
        x = ((now - then) * x0 + then * x) / now
    return guided(model, x, labels, levels[-1], scale)


def readme_dpm(model: Toy, x: torch.Tensor, labels: torch.Tensor, levels: list[float], scale: float) -> torch.Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2, with alpha = 1 - sigma: lambda is the log of their ratio."""
    model, x, labels = model.double(), x.double(), labels.double()
    lam = [math.log((1 - level) / level) for level in levels]
    old = None
    for i in range(1, len(levels)):
        x0 = guided(model, x, labels, levels[i - 1], scale)
        d = x0
        if old is not None:
            r = (lam[i - 1] - lam[i - 2]) / (lam[i] - lam[i - 1])
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        alpha = 1 - levels[i]
        x = levels[i] / levels[i - 1] * x - alpha * (math.exp(lam[i - 1] - lam[i]) - 1) * d
        old = x0
    return guided(model, x, labels, levels[-1], scale)


def draw(model: nn.Module, labels: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    vae = PixelCodec(4)
    size = {"num_imgs": 3, "img_size": 8}
    return diffusion.DiffusionGenerator(model, vae, torch.device("cpu")).generate(labels, **{**size, **options})


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ARGUMENTS, ids=lambda call: call.__qualname__)
def test_arguments_are_that_system_s(call):
    ours = list(inspect.signature(call).parameters)
    assert ours[: len(ARGUMENTS[call].split())] == ARGUMENTS[call].split()


def test_defaults_are_that_system_s():
    c = configs.LTDConfig()
    assert asdict(c.denoiser_cfg) == {
        "image_size": 16,
        "noise_embed_dims": 256,
        "patch_size": 2,
        "embed_dim": 128,
        "dropout": 0,
        "n_layers": 3,
        "text_emb_size": 768,
        "n_channels": 4,
        "mlp_multiplier": 4,
        "legacy": False,
    }
    assert (c.vae_cfg.vae_scale_factor, c.vae_cfg.vae_name) == (8, "madebyollin/sdxl-vae-fp16-fix")
    t = configs.TrainConfig()
    assert (t.batch_size, t.lr, t.n_epoch, t.alpha) == (128, 3e-4, 100, 0.999)


def test_every_config_comes_back_from_its_json():
    written = configs.LTDConfig(
        denoiser_cfg=configs.DenoiserConfig(n_channels=8, legacy=True),
        denoiser_load=configs.DenoiserLoad(dtype=torch.bfloat16, local_filename="w.safetensors"),
    )
    assert configs.LTDConfig(**json.loads(written.json())) == written
    run = configs.ModelConfig(
        configs.DataConfig("a.npy", "b.npy", "c.npy"), train_config=configs.TrainConfig(n_epoch=2)
    )
    assert configs.ModelConfig(**json.loads(run.json())) == run


def test_parameter_counts_are_the_published_ones():
    files = configs.DataConfig("a", "b", "c")
    sizes = [
        (configs.DenoiserConfig(32, 256, 2, 768, 0, 12), 101_164_352),
        (configs.DenoiserConfig(), 868_800),
        (train.ModelConfig(embed_dim=512, n_layers=6, noise_embed_dims=256).nested(files).denoiser_config, 23_115_072),
    ]
    for config, count in sizes:
        with torch.device("meta"):
            net = denoiser.Denoiser(**asdict(config))
        assert sum(p.numel() for p in net.parameters()) == count


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 15, 49])
@pytest.mark.parametrize("exponent", [1, 2])
def test_ddim_is_the_readme_s_loop(n, exponent, inputs):
    labels, noise = inputs
    options = {"n_iter": n, "exponent": exponent, "class_guidance": 3, "sharp_f": 0, "bright_f": 0}
    _, x0 = draw(Toy(), labels, seeds=noise, use_ddpm_plus=False, **options)
    want = readme_ddim(Toy(), noise, labels, readme_levels(n, exponent), 3)
    assert_close(x0.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [2, 5, 15])
def test_dpm_solver_is_the_paper_s(n, inputs):
    labels, noise = inputs
    _, x0 = draw(Toy(), labels, seeds=noise, n_iter=n, class_guidance=4.5, sharp_f=0, bright_f=0)
    assert_close(x0.double(), readme_dpm(Toy(), noise, labels, readme_levels(n), 4.5), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_guidance_is_the_readme_s_formula(scale, inputs):
    labels, noise = inputs
    generator = diffusion.DiffusionGenerator(Toy(), None, "cpu")
    both = torch.cat([labels, torch.zeros_like(labels)])
    got = generator.pred_image(noise, both, 0.4, scale)
    assert_close(got, guided(Toy(), noise, labels, 0.4, scale), rtol=0, atol=1e-5)


def test_levels_of_one_s_own_are_used_and_left_alone(inputs):
    labels, noise = inputs
    levels = [1.0, 0.7, 0.2]
    options = {"use_ddpm_plus": False, "sharp_f": 0, "bright_f": 0}
    _, x0 = draw(Toy(), labels, seeds=noise, noise_levels=levels, **options)
    assert levels == [1.0, 0.7, 0.2]
    assert_close(x0.double(), readme_ddim(Toy(), noise, labels, [0.99, 0.7, 0.2], 3), rtol=0, atol=1e-5)


def test_picture_i_depends_on_its_own_seed_alone(inputs):
    labels, _ = inputs
    _, three = draw(Toy(), labels, seed=5, n_iter=3)
    _, one = draw(Toy(), labels[2:], num_imgs=1, seed=7, n_iter=3)
    assert_close(three[2:], one, rtol=0, atol=1e-6)


def test_a_drawing_is_shifted_and_scaled_for_the_vae(inputs):
    labels, noise = inputs
    _, plain = draw(Toy(), labels, seeds=noise, n_iter=3, sharp_f=0, bright_f=0)
    image, x0 = draw(Toy(), labels, seeds=noise, n_iter=3, sharp_f=0.25, bright_f=-0.5, scale_factor=5)
    moved = plain.clone()
    moved[:, 3] += 0.25
    moved[:, 0] -= 0.5
    assert_close(x0, moved)
    assert_close(image, moved * 5)


def test_half_precision_and_another_system_s_model_draw_nearly_the_same(inputs):
    """Our net's clock stays exact; another's model gets all that it is given in its own precision."""
    labels = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    for make, text in ((filled, labels), (Toy, inputs[0])):
        full, half = (
            diffusion.DiffusionGenerator(make(), PixelCodec(4), "cpu", dtype).generate(
                text, n_iter=4, num_imgs=3, img_size=8, seeds=inputs[1]
            )[1]
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert half.dtype == torch.float32
        assert_close(half, full, rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(**blocks, **sizes, sample_size=16, scaling_factor=0.13025).eval()


@pytest.fixture(scope="module")
def vae_folder(vae, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_diffusers_vae_and_ours_decode_alike(vae, vae_folder, inputs):
    z = inputs[1] * 8
    want = vae.decode(z).sample
    for one in (vae, load_codec(vae_folder, device="cpu")):
        assert_close(diffusion.codecs.decode(one, z), want, rtol=1e-4, atol=1e-5)
        assert_close(data.decode_latents(z, one), (want / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_diffusers_vae_and_ours_encode_alike(vae, vae_folder):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    posterior = vae.encode(images * 2 - 1).latent_dist
    for one in (vae, load_codec(vae_folder, device="cpu")):
        z = data.encode_image(images, one)
        assert bool(((z - posterior.mean).abs() <= 6 * posterior.std + 1e-4).all())
        assert z.std() > 0


# -- text to picture ---------------------------------------------------------------------------------------------------


def filled(legacy: bool = False, **options) -> denoiser.Denoiser:
    """A net that says something: fresh ones say zero."""
    torch.manual_seed(3)
    net = denoiser.Denoiser(**{**NET, "text_emb_size": 32, **options}, legacy=legacy)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    return net


def ltd(weights: Path | None, vae_folder: str) -> configs.LTDConfig:
    return configs.LTDConfig(
        configs.DenoiserConfig(**{**NET, "text_emb_size": 32}),
        configs.DenoiserLoad(local_filename=str(weights) if weights else None),
        configs.VaeConfig(vae_name=vae_folder),
        configs.ClipConfig("words:32"),
    )


def test_a_prompt_becomes_a_grid_of_pictures(tmp_path, vae_folder):
    save_file(filled().state_dict(), tmp_path / "w.safetensors")
    made = diffusion.DiffusionTransformer(ltd(tmp_path / "w.safetensors", vae_folder))
    one = made.generate_image_from_text("a cute cat", num_imgs=1, n_iter=3)
    assert isinstance(one, Image.Image) and one.size == (16, 16)
    again, other = (made.generate_image_from_text(p, n_iter=3) for p in ("a cute cat", "a red castle"))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert made.generate_image_from_text("a cute cat", num_imgs=4, n_iter=2).width > 32
    assert made.generate_image_from_text("a cute cat", img_size=12, n_iter=2).size == (24, 24)  # positions resized


@pytest.mark.parametrize("prefix", ["", "model_ema.", "model_ema._orig_mod.", "_orig_mod.", "module."])
@pytest.mark.parametrize("legacy", [False, True], ids=["now", "legacy"])
@torch.no_grad()
def test_weights_load_from_a_file_whatever_their_prefixes(prefix, legacy, tmp_path, inputs):
    net = filled(legacy, embed_dim=256)
    nested = {prefix + key: value.clone() for key, value in net.state_dict().items()}
    if prefix.startswith("model_ema"):
        nested |= {"opt_state.state.0.exp_avg": torch.zeros(3), "global_step": torch.tensor(7)}
    save_file(nested, tmp_path / "w.safetensors")
    again = denoiser.Denoiser(**{**NET, "text_emb_size": 32, "embed_dim": 256}, legacy=legacy)
    denoiser.read_weights(again, tmp_path / "w.safetensors")
    x, t, label = inputs[1], torch.rand(3, 1), torch.randn(3, 32)
    assert torch.equal(again(x, t, label), net(x, t, label))


def test_that_system_s_training_checkpoint_loads_after_convert(tmp_path):
    """As its train.py leaves it: compiled, nested and pickled."""
    net = filled()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(1, 4, 8, 8), torch.rand(1, 1), torch.randn(1, 32)).sum().backward()
    optimizer.step()
    average = {f"_orig_mod.{name}": value for name, value in net.state_dict().items()}
    whole = {"model_ema": average, "opt_state": optimizer.state_dict(), "global_step": 378000}
    torch.save(whole, tmp_path / "state_dict.pth")
    assert command(["convert", str(tmp_path / "state_dict.pth"), str(tmp_path / "w.safetensors")]) == 0
    again = denoiser.Denoiser(**{**NET, "text_emb_size": 32})
    denoiser.read_weights(again, tmp_path / "w.safetensors")
    assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_the_legacy_layout_is_another_function_of_the_same_weights(inputs):
    old, new = filled(True, embed_dim=256), filled(False, embed_dim=256)
    assert old.state_dict().keys() == new.state_dict().keys()
    x, t, label = inputs[1], torch.rand(3, 1), torch.randn(3, 32)
    assert not torch.allclose(old(x, t, label), new(x, t, label), atol=1e-3)


def test_a_denoiser_is_called_as_in_that_system_s_test():
    net = denoiser.Denoiser(**asdict(configs.DenoiserConfig(image_size=8)))
    out = net(torch.rand(4, 4, 8, 8), torch.rand(4, 1), torch.rand(4, 768))
    assert out.shape == (4, 4, 8, 8)


# -- training ----------------------------------------------------------------------------------------------------------


def arrays(folder: Path, n: int = 8, dim: int = 16) -> configs.DataConfig:
    g = np.random.default_rng(0)
    made = {
        "latents": g.normal(size=(n, 4, 8, 8)) * 8,
        "texts": g.normal(size=(n, dim)),
        "val": g.normal(size=(2, dim)),
    }
    for name, value in made.items():
        np.save(folder / f"{name}.npy", value.astype(np.float32))
    return configs.DataConfig(*(str(folder / f"{name}.npy") for name in made))


def small(**options) -> train.ModelConfig:
    sizes = {"embed_dim": 64, "n_layers": 1, "image_size": 8, "clip_embed_size": 16, "noise_embed_dims": 16}
    return train.ModelConfig(**{**sizes, "batch_size": 4, "n_epoch": 2, "vae_name": "", **options})


def test_a_recipe_says_what_the_options_mean(tmp_path):
    recipe = train.run_config(small(n_epoch=3, alpha=0.9).nested(arrays(tmp_path, n=10)), processes=2)
    assert (recipe.batch_size, recipe.steps, recipe.lr) == (8, 6, 3e-4)
    assert (recipe.prediction, recipe.clock, recipe.cond_dropout) == ("x0_linear", "flow", 0.15)
    assert recipe.data["scale"] == 1 / 8 and recipe.ema == [{"name": "constant", "decay": 0.9}]
    assert recipe.density == {"name": "beta", "a": 0.75, "b": 0.75} and recipe.precision == "fp32"
    assert recipe.net["dim"] == 64 and recipe.net["depth"] == 1


def test_training_writes_weights_that_draw_and_that_training_goes_on_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = arrays(tmp_path)
    train.main(small(model_name="made.pth"), files)
    run = next(Path("runs").iterdir())
    average = next(run.glob("checkpoint/step-*4/ema-0.safetensors"))
    assert load_file("made.safetensors").keys() == load_file(average).keys()
    for weights in ("made.safetensors", str(run)):
        net = denoiser.Denoiser(**NET)
        denoiser.read_weights(net, weights)
        saved = load_file("made.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    later = small(model_name="made.safetensors", from_scratch=False, n_epoch=1, lr=0.0, run_id="later")
    train.main(later, files)
    kept = load_file("made.safetensors")
    assert_close(kept, saved, rtol=0, atol=1e-6)


def test_the_later_versions_main_takes_one_config(tmp_path, monkeypatch):
    """H09."""
    monkeypatch.chdir(tmp_path)
    config = configs.ModelConfig(
        data_config=arrays(tmp_path),
        denoiser_config=configs.DenoiserConfig(**NET),
        train_config=configs.TrainConfig(
            n_epoch=1, batch_size=4, save_model=False, compile=False, use_wandb=False, run_id="h09"
        ),
        vae_cfg=configs.VaeConfig(vae_name=""),
    )
    train.main(config)
    rows = [json.loads(line) for line in Path("runs/h09/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and math.isfinite(rows[-1]["loss"])


def run_python(folder: Path, *arguments: str) -> str:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


LAUNCHERS = {
    "accelerate": "from accelerate import notebook_launcher; notebook_launcher(main, (model, data), num_processes=2)",
    "torchrun": "main(model, data)",
    "launch": "from nanodiffusion.distributed import launch; launch(main, (model, data), 2)",
}
RUNNERS = {"torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}
SCRIPT = """
from nanodiffusion.compat.tld.train import main, DataConfig, ModelConfig
data = DataConfig(latent_path="latents.npy", text_emb_path="texts.npy", val_path="val.npy")
model = ModelConfig(embed_dim=64, n_layers=2, image_size=8, clip_embed_size=16, batch_size=4, n_epoch=1, vae_name="",
                    noise_embed_dims=16, run_id="{name}")
if __name__ == "__main__":
    {launch}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_train_as_one_with_their_batch(name, tmp_path):
    """E43: the README's notebook_launcher, on a CPU; the weights are those of one process with the whole batch."""
    if name == "accelerate":
        pytest.importorskip("accelerate")
    files = arrays(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT.format(name=name, launch=LAUNCHERS[name]))
    run_python(tmp_path, *RUNNERS.get(name, []), "script.py")
    folder = next((tmp_path / "runs" / name / "checkpoint").glob("step-*1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        train.main(small(n_layers=2, batch_size=8, n_epoch=1, run_id="one"), files)
    alone = load_file(tmp_path / "runs/one/checkpoint" / folder.name / "model.safetensors")
    assert_close(load_file(folder / "model.safetensors"), alone, rtol=1e-4, atol=1e-6)


# -- data --------------------------------------------------------------------------------------------------------------


def test_bytes_are_rounded_and_without_bias():
    z = torch.linspace(-20, 20, 10001, dtype=torch.float64).float()
    levels = data.quantize_latents(z)
    assert levels.dtype == torch.uint8
    assert_close(levels.double(), ((z.double() / 20 + 1) * 127.5).round(), rtol=0, atol=1)
    error = data.dequantize_latents(levels).double() - z.double()
    assert error.abs().max() <= 20 / 255 + 1e-5 and error.mean().abs() < 1e-3
    assert data.quantize_latents(torch.tensor([-99.0, 99.0])).tolist() == [0, 255]


def shards(folder: Path, n: int = 3) -> list[str]:
    """A shard as img2dataset leaves it, and its captions."""
    folder.mkdir()
    captions = [f"a photo of {word}" for word in ("a cat", "snow, at night", "two owls")][:n]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, caption in enumerate(captions):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "PNG")
            said = json.dumps({"caption": caption, "url": f"u{i}"}).encode()
            for ending, raw in (("png", picture.getvalue()), ("json", said), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i:09d}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return captions


def test_shards_become_the_arrays_that_training_reads(tmp_path, vae, vae_folder):
    """H13, without its download: latents are the VAE's unscaled ones, rows of texts belong to rows of latents."""
    captions = shards(tmp_path / "raw")
    config = data.DataDownloadConfig(
        data_link="none.csv",
        latent_save_path=str(tmp_path / "arrays"),
        raw_imgs_save_path=str(tmp_path / "raw"),
        download_data=False,
        image_size=16,
        batch_size=2,
        vae_cfg=configs.VaeConfig(vae_name=vae_folder),
        clip_cfg=configs.ClipConfig("words:16"),
    )
    data.main(config)
    made = {name: np.load(tmp_path / "arrays" / f"{name}.npy") for name in ("image_latents", "text_encodings")}
    assert made["image_latents"].shape == (3, 4, 8, 8) and made["text_encodings"].shape == (3, 16)
    with open(tmp_path / "arrays/metadata.csv", encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == captions
    pictures = np.stack([np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8) for i in range(3)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    z = torch.from_numpy(made["image_latents"]).float()
    assert bool(((z - posterior.mean).abs() <= 6 * posterior.std + 2e-2).all())
    assert json.loads((tmp_path / "arrays/config.json").read_text())["image_size"] == 16
    np.save(tmp_path / "val.npy", made["text_encodings"][:1].astype(np.float32))
    files = [str(tmp_path / name) for name in ("arrays/image_latents.npy", "arrays/text_encodings.npy", "val.npy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        train.main(small(batch_size=3, n_epoch=1, run_id="from-shards"), configs.DataConfig(*files))
    assert (tmp_path / "runs/from-shards/checkpoint").is_dir()


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_prepares_trains_draws_and_interpolates(tmp_path, vae_folder):
    """E43, E44, E45 and H08 as a script."""
    pytest.importorskip("accelerate")
    out = run_python(tmp_path, str(EXAMPLES / "transformer_latent_diffusion.py"), "tiny", vae_folder)
    for name in ("cat.png", "interpolated.png", "ddim.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 8
    assert float(out.split("DDIM by hand differs by ")[1].split()[0]) <= 1e-4


# -- what can be wrong -------------------------------------------------------------------------------------------------

BAD_LOADS = {
    "nothing named": ({}, "local_filename"),
    "an address alone": ({"file_url": "https://example.org/w.pth"}, "without a local_filename"),
    "no such file": ({"local_filename": "gone.safetensors"}, "gone.safetensors"),
    "a pickle": ({"local_filename": "w.pth"}, "nanodiffusion convert"),
    "another net's": ({"local_filename": "other.safetensors"}, "denoiser_trans_block"),
    "another size": ({"local_filename": "size.safetensors"}, "wrong shape"),
    "no download": ({"file_url": "file:///nowhere/w.safetensors", "local_filename": "new.safetensors"}, "download"),
}


@pytest.mark.parametrize("name", BAD_LOADS)
def test_weights_are_never_random_by_accident(name, tmp_path, monkeypatch, vae_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"\x80\x02}q\x00.")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file(filled(embed_dim=128).state_dict(), tmp_path / "size.safetensors")
    load, said = BAD_LOADS[name]
    config = ltd(None, vae_folder)
    config.denoiser_load = configs.DenoiserLoad(**load)
    with pytest.raises(UserError, match=said):
        diffusion.DiffusionTransformer(config)
    assert not (tmp_path / "new.safetensors").exists()


BAD_DRAWINGS = {
    "labels": ({"num_imgs": 2}, "every picture"),
    "levels rise": ({"noise_levels": [0.5, 0.8]}, "fall"),
    "levels below 0": ({"noise_levels": [0.5, -0.1]}, "fall"),
    "no steps": ({"n_iter": 0}, "steps"),
}


@pytest.mark.parametrize("name", BAD_DRAWINGS)
def test_a_drawing_that_cannot_be_is_refused(name, inputs):
    options, said = BAD_DRAWINGS[name]
    with pytest.raises(UserError, match=said):
        draw(Toy(), inputs[0], **options)


def test_a_net_of_another_size_is_refused():
    with pytest.raises(UserError, match="another shape"):
        draw(filled(), torch.zeros(3, 32), img_size=12)


BAD_DATA = {
    "no table": ({"csv_path": "gone.csv"}, "gone.csv"),
    "no such column": ({"csv_path": "table.csv", "caption_col": "texts"}, "texts"),
    "no shards": ({"download_data": False}, "raw_imgs"),
    "no vae": ({"download_data": False, "raw_imgs_save_path": "raw", "vae_name": "gone/"}, "gone"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("url,caption\nhttp://localhost/a.png,a cat\n")
    shards(tmp_path / "raw")
    options, said = BAD_DATA[name]
    with pytest.raises(UserError, match=said):
        data.download_and_process_data(clip_model_name="words:8", image_size=16, **options)


BAD_RUNS = {
    "no data": (lambda files: train.main(small()), "data"),
    "no such array": (lambda files: train.main(small(), configs.DataConfig("gone.npy", "b.npy", "c.npy")), "gone.npy"),
    "another size": (lambda files: train.main(small(image_size=16), files), "does not fit"),
    "texts of another size": (lambda files: train.main(small(clip_embed_size=12), files), "12"),
    "no epochs": (lambda files: train.main(small(n_epoch=0), files), "steps"),
    "nothing to go on from": (lambda files: train.main(small(from_scratch=False), files), "model_name"),
    "a pickle to go on from": (
        lambda files: train.main(small(from_scratch=False, model_name="a.pth"), files),
        "convert",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_run_that_cannot_be_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = BAD_RUNS[name]
    with pytest.raises(UserError, match=said):
        call(arrays(tmp_path))


BAD_CONFIGS = {
    "unknown key": (lambda: configs.LTDConfig(denoiser_cfg={"embed_dims": 64}), "embed_dim"),
    "wrong type": (lambda: configs.DenoiserConfig(embed_dim="wide"), "embed_dim"),
    "unknown dtype": (lambda: configs.DenoiserLoad(dtype="float12"), "float16"),
    "no data": (lambda: configs.ModelConfig(None), "data"),
    "heads": (lambda: denoiser.Denoiser(8, 16, 2, 100, 0.0, 1), "multiple of 64"),
    "a drive": (lambda: data.main(data.DataDownloadConfig("a.csv", use_drive=True)), "drive"),
    "no levels": (lambda: data.dequantize_latents(torch.zeros(3)), "uint8"),
    "no range": (lambda: data.quantize_latents(torch.zeros(3), 0), "positive"),
    "no vae": (lambda: data.decode_latents(torch.zeros(1, 4, 2, 2), object()), "VAE"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_an_option_that_cannot_be_is_refused(name):
    call, said = BAD_CONFIGS[name]
    with pytest.raises(UserError, match=said):
        call()
