"""The autoencoder task: its loss by torch's own distributions, its run like any other, its codec in diffusers."""

import json
import math
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import differences, make_runner, rows
from torch.testing import assert_close

from nanodiffusion.autoencode import Autoencoder, AutoencoderConfig, Autoencoding, divergence, latent_statistics, psnr
from nanodiffusion.errors import UserError
from nanodiffusion.run import load_run
from nanodiffusion.train import Step

NET = {"name": "autoencoder", "widths": [8, 8], "latent_channels": 2, "groups": 4}


def squares(folder: Path, n: int = 40, c: int = 1) -> dict[str, Any]:
    """A recipe's `data`: n images (c 8 8) of one bright square each."""
    random = np.random.default_rng(0)
    x = np.zeros((n, c, 8, 8), dtype=np.uint8)
    for image in x:
        row, column, side = random.integers(0, 4), random.integers(0, 4), random.integers(2, 5)
        image[:, row : row + side, column : column + side] = random.integers(100, 256)
    np.savez(folder / f"squares-{c}.npz", x=x)
    return {"name": "array", "path": str(folder / f"squares-{c}.npz"), "key": "x"}


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "task": {"name": "autoencode", "kl": 1e-4},
        "data": squares(folder),
        "net": NET,
        "batch_size": 8,
        "steps": 12,
        "lr": 3e-3,
        "loss": "l1",
        "ema": [{"name": "constant", "decay": 0.8}],
        "validation": 0.25,
        "validate_every": 6,
        "log_every": 4,
        "checkpoint_every": 0,
        "sample": {"n": 4},
    } | more


def model(kl: float = 0.1) -> Autoencoding:
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=1, widths=(8, 8), latent_channels=2, groups=4, in_size=(8, 8))
    return Autoencoding(Autoencoder(config), kl)


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_torchs_normals():
    g = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(3, 2, 4, 4, generator=g), torch.randn(3, 2, 4, 4, generator=g)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum((1, 2, 3))
    assert_close(divergence(mean, logvar), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("distance", "power"), [("l1", 1), ("mse", 2)])
def test_the_loss_is_the_distance_and_the_weighted_divergence_per_value_of_the_image(distance, power):
    task = model(kl=0.1)
    g = torch.Generator().manual_seed(1)
    image, eps = torch.rand(3, 1, 8, 8, generator=g) * 2 - 1, torch.randn(3, 2, 4, 4, generator=g)
    normal = torch.distributions.Normal
    with torch.no_grad():
        mean, logvar = task.net.quant_conv(task.net.encoder(image)).chunk(2, 1)
        out = task.net.decoder(task.net.post_quant_conv(mean + (logvar / 2).exp() * eps))
        nats = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum((1, 2, 3))
        expected = (out - image).abs().pow(power).mean((1, 2, 3)) + 0.1 * nats / 64
        found = task.loss(image, torch.ones(3), eps, {}, distance)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_psnr_in_decibels():
    assert psnr(0.01) == pytest.approx(20.0) and psnr(1.0) == 0 and psnr(0.0) == math.inf


# -- the run ---------------------------------------------------------------------------------------------------------


def test_a_stopped_autoencoder_continues_bit_by_bit(tmp_path):
    def stop(step: Step) -> None:
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    make_runner(tmp_path / "whole", options(tmp_path)).run()
    assert make_runner(tmp_path / "cut", options(tmp_path)).run(stop) == "signal"
    assert make_runner(tmp_path / "cut", options(tmp_path)).run() == "done"
    assert differences(tmp_path / "whole/run", tmp_path / "cut/run") == []
    ours, theirs = (tmp_path / name / "run/codec" for name in ("whole", "cut"))
    assert {f.name: f.read_bytes() for f in ours.iterdir()} == {f.name: f.read_bytes() for f in theirs.iterdir()}


@pytest.mark.slow
def test_training_reconstructs_better(tmp_path):
    make_runner(tmp_path, options(tmp_path, steps=150, validate_every=50)).run()
    found = [row for row in rows(tmp_path / "run") if "val/psnr" in row]
    assert [row["step"] for row in found] == [50, 100, 150]
    assert found[-1]["val/psnr"] > found[0]["val/psnr"] + 1 and found[-1]["val/ema_loss"] < found[0]["val/ema_loss"]


def test_the_validated_psnr_is_that_of_all_held_out_images_together(tmp_path):
    runner = make_runner(tmp_path, options(tmp_path))
    runner.run()
    row = [r for r in rows(tmp_path / "run") if "val/psnr" in r][-1]
    data, net = runner.validator.data, runner.trainer.denoiser.net.eval()
    x0, _ = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        out = net.decode(net.moments(x0)[0])
    mse = ((out.clamp(-1, 1) - x0) / 2).double().pow(2).mean().item()
    assert len(data) == 10 and row["val/psnr"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-5)


def test_the_grid_shows_originals_above_reconstructions(tmp_path):
    runner = make_runner(tmp_path, options(tmp_path, sample_every=12))
    runner.run()
    drawn = runner.pictures(4, None)
    held_out = runner.validator.data.x[:4].float() / 127.5 - 1
    assert_close(drawn[:4], held_out, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(drawn[4:], runner.trainer.denoiser.net.eval()(held_out), rtol=1e-5, atol=1e-6)
    with Image.open(tmp_path / "run/samples/step-00000012-ema.png") as grid:
        assert grid.width > grid.height  # four columns, two rows


# -- the codec -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 3])
def trained(request, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("codec")
    runner = make_runner(folder, options(folder, data=squares(folder, c=request.param), steps=30))
    runner.run()
    return runner


def test_latents_have_mean_0_and_deviation_1_over_the_training_data(trained):
    from nanodiffusion.pretrained import load_codec

    codec = load_codec(trained.folder / "codec", device="cpu").eval()
    x0, _ = trained.data.batch(torch.arange(len(trained.data)))
    with torch.no_grad():
        z = codec.encode(x0, torch.randn(len(x0), 2, 4, 4, generator=torch.Generator().manual_seed(3)))
    assert codec.config.shift != 0 and codec.config.scale != 1
    assert z.mean().item() == pytest.approx(0, abs=0.1) and z.std().item() == pytest.approx(1, abs=0.1)


def test_the_codec_is_the_averaged_weights(trained):
    from nanodiffusion.tensors import load_tensors

    found, _ = load_tensors(trained.folder / "codec/diffusion_pytorch_model.safetensors")
    average = trained.trainer.emas[0].tensors
    assert found.keys() == average.keys() and all(torch.equal(v, average[k]) for k, v in found.items())


def test_diffusers_reads_the_codec_and_computes_the_same(trained):
    diffusers = pytest.importorskip("diffusers")
    from nanodiffusion.pretrained import load_codec

    folder = trained.folder / "codec"
    theirs, ours = diffusers.AutoencoderKL.from_pretrained(folder).eval(), load_codec(folder, device="cpu").eval()
    image, _ = trained.data.batch(torch.arange(5))
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        x0 = (posterior.mean - theirs.config.shift_factor) * theirs.config.scaling_factor
        assert_close(ours.encode(image), x0, rtol=1e-5, atol=1e-5)
        z = x0 / theirs.config.scaling_factor + theirs.config.shift_factor
        assert_close(ours.decode(x0), theirs.decode(z).sample, rtol=1e-5, atol=1e-5)


def test_the_measured_scale_depends_on_the_seed_and_the_data_alone(trained):
    net = trained.trainer.denoiser.net
    first = latent_statistics(net, trained.data, 0)
    torch.manual_seed(9)
    assert latent_statistics(net, trained.data, 0) == first


# -- what is said to try next ----------------------------------------------------------------------------------------


def pictures(folder: Path, *parts: str) -> Path:
    """Eight pictures of 12 pixels in each of the parts of a folder."""
    random = np.random.default_rng(0)
    for part in parts:
        (folder / part).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / part / f"{i}.png")
    return folder


TINY = "net.widths=[8,8] steps=1 batch_size=4 validate_every=0 sample_every=0 validation=0.2 device=cpu".split()


@pytest.mark.parametrize("parts", [("",), ("train", "test")], ids=["whole", "parted"])
def test_the_command_that_is_said_next_encodes_the_pictures_trained_on(tmp_path, monkeypatch, capsys, parts):
    from nanodiffusion.cli import main

    monkeypatch.chdir(tmp_path)
    source = pictures(tmp_path / "my pictures", *parts)
    data = ["data.name=folder", f"data.path='{source}'", "data.size=8"]
    assert main(["train", "autoencoder", *TINY, *data, f"out={tmp_path}"]) == 0
    said = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "nanodiffusion encode" in line]
    assert main([*said[0][1:], "device=cpu"]) == 0
    manifest = json.loads((tmp_path / "data/autoencoder/manifest.json").read_text())
    assert (manifest["count"], manifest["shape"]) == (8, [4, 4, 4])


def test_pictures_that_encode_cannot_read_are_asked_for(tmp_path, capsys):
    from nanodiffusion.cli import main

    array = [f"data={{name:array,path:'{squares(tmp_path)['path']}',key:x}}"]
    assert main(["train", "autoencoder", *TINY, *array, f"out={tmp_path}"]) == 0
    assert "nanodiffusion encode FOLDER codec=" in capsys.readouterr().out


# -- what it refuses -------------------------------------------------------------------------------------------------


def test_an_autoencoder_is_not_sampled(trained):
    with pytest.raises(UserError, match="an autoencoder, which draws nothing") as e:
        load_run(trained.folder)
    assert "codec=" in str(e.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": {"name": "autoencod"}}, "did you mean 'autoencode'"),
        ({"task": {"name": "autoencode", "kl": -1.0}}, "key task.kl"),
        ({"task": {"name": "autoencode", "kl": "much"}}, "key task.kl"),
        ({"task": {"name": "autoencode", "beta": 1.0}}, "unknown key task.beta"),
        ({"net": {"name": "unet"}}, "unknown net 'unet'"),
        ({"net": {**NET, "width": [8]}}, "did you mean 'widths'"),
        ({"net": {**NET, "widths": [8, 6]}}, "widths"),
        ({"net": {**NET, "widths": [8] * 5}}, "multiples of 16"),
        ({"net": {**NET, "in_size": [16, 16]}}, "does not fit the data"),
        ({"data": {"name": "swiss-roll"}}, "an autoencoder is for images"),
        ({"weight": {"name": "edm"}}, "no noise levels to weigh"),
        ({"loss": "l3"}, "loss"),
        ({"sample": {"prompts": ["a cat"]}}, "takes no text"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_one_message_before_training(tmp_path, change, said):
    with pytest.raises(UserError, match=said.replace("'", ".")) as e:
        make_runner(tmp_path, options(tmp_path), change)
    assert len(str(e.value).splitlines()) <= 6 and not (tmp_path / "run/checkpoint").exists()
