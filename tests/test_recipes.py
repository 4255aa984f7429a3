"""The recipes of latent models: what they promise, three steps of each on a tiny encoded set, pictures and prompts."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_runner, rows
from torch.testing import assert_close

from nanodiffusion.autoencode import Autoencoder, AutoencoderConfig, save_codec
from nanodiffusion.cli.train import plan
from nanodiffusion.codec import AutoencoderKLConfig
from nanodiffusion.config import Config, read_config
from nanodiffusion.data.encoded import FORMAT, MANIFEST, manifest_bytes
from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.nets import net_size
from nanodiffusion.objective import make_task
from nanodiffusion.run import Run, load_run
from nanodiffusion.runner import Runner

pytest.importorskip("hydra")

CAPTIONS = ["a red cat", "a blue dog", "two green birds"]


def one(recipe: str, *words: str) -> Config:
    ((config, _),) = plan(recipe, words)
    return config


def codec(folder: Path, latent_channels: int = 4) -> Path:
    """A tiny autoencoder with fresh weights: latents of half the size."""
    torch.manual_seed(0)
    net = Autoencoder(AutoencoderConfig(3, latent_channels, widths=(8, 8), groups=4, in_size=(8, 8)))
    config = AutoencoderKLConfig(3, latent_channels, (8, 8), 1, 4, scale=0.5, shift=0.1, attention=False)
    return save_codec(net, config, folder / "codec")


def encoded(
    folder: Path, n: int = 24, shape: tuple[int, ...] = (4, 4, 4), labels: bool = False, text: str = "", **more: Any
) -> Path:
    """A folder as `nanodiffusion encode` writes it, of noise, written by hand."""
    random, root = np.random.default_rng(0), folder / "encoded"
    root.mkdir()
    arrays = {"latents": random.standard_normal((n, *shape)).astype(np.float16)}
    arrays |= {"labels": np.arange(n) % 3} if labels else {}
    arrays |= {"pooled": random.standard_normal((n, 16)).astype(np.float16)} if text else {}
    arrays |= {"flipped": arrays["latents"][..., ::-1].copy()}
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    lines = [json.dumps({"key": str(i), "caption": CAPTIONS[i % 3]}) for i in range(n)]
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")
    files = {p.name: {"size": p.stat().st_size, "sha256": ""} for p in root.iterdir()}
    named = lambda name: f"{name}.npy" if name in arrays else None
    manifest = {
        "format": FORMAT,
        "count": n,
        "shape": list(shape),
        "latents": {"file": "latents.npy", "dtype": "float16", "limit": None},
        "flipped": named("flipped"),
        "labels": named("labels"),
        "classes": ["x", "y", "z"] if labels else [],
        "pooled": {"file": "pooled.npy"} if text else None,
        "captions": "captions.jsonl",
        "codec": {"where": str(codec(folder, shape[0]))},
        "text": {"where": text} if text else None,
        "files": files,
    } | more
    (root / MANIFEST).write_bytes(manifest_bytes(manifest))
    return root


TINY = {
    "batch_size": 6,
    "steps": 3,
    "lr_schedule": {"name": "constant"},
    "log_every": 1,
    "validate_every": 2,
    "sample_every": 3,
    "snapshot_every": 0,
    "checkpoint_every": 0,
    "validation": 0.25,
    "precision": "fp32",
    "compile": False,
}


def shrunk(
    recipe: str, out: Path, data: Path, net: dict[str, Any], say: Any = lambda text: None, **more: Any
) -> Runner:
    """The Runner of a recipe with a net and a run made tiny, and everything else as it says."""
    config = one(recipe)
    small = {**asdict(config), **TINY, "out": str(out), "device": "cpu", "init_from": ""}
    small["net"] = {
        k: v
        for k, v in config.net.items()
        if k not in ("in_size", "channels_in", "concat_channels", "num_classes", "text_dim")
    }
    small["net"] |= net
    small["data"] = {**config.data, "path": str(data)}
    small["sample"] = {**asdict(config.sample), "n": 6, "steps": 4}
    return Runner(read_config({**small, **more}), World(), say)


# -- what they promise -----------------------------------------------------------------------------------------------


def test_seed_001_is_a_recipe_its_two_configs_and_an_override():
    config = one("cifar10-latent")
    with torch.device("meta"):
        net = make_task(config).net(config)
    assert net_size(net) == 88_733_248 + 768  # nano-diffusion's, and the null class
    assert (config.batch_size, config.prediction, config.optimizer["name"]) == (256, "eps", "AdamW")
    assert config.sample.sampler["name"] == "ddim" and config.sample.steps == 50
    assert one("cifar10-latent", "batch_size=128").batch_size == 128
    debug = one("config_debug")
    with torch.device("meta"):
        assert net_size(make_task(debug).net(debug)) < 22_248_256  # nano-diffusion's debug net
    assert debug.batch_size * debug.steps < 1000 and debug.data == config.data


def test_config_full_explains_every_setting_of_cifar10_latent_and_changes_none():
    full, config = one("config_full"), one("cifar10-latent")
    known = {"ffn_ratio": 4.0, "activation": "silu", "norm": "rms", "dropout": 0.0}
    assert full == replace(config, name="config_full", net={**config.net, **known})
    from nanodiffusion.cli.recipes import CONFIGS
    from nanodiffusion.nets import PixArtConfig

    assert all(getattr(PixArtConfig(), k) == v for k, v in known.items())
    text = (CONFIGS / "config_full.yaml").read_text()
    base = (CONFIGS / "cifar10-latent.yaml").read_text()
    keys = [line.split(":")[0] for line in base.splitlines() if line[:1].isalpha() and ":" in line]
    assert [k for k in keys if f"\n{k}:" not in text] == []


def test_seed_004_is_a_recipe():
    config = one("tld")
    with torch.device("meta"):
        assert net_size(make_task(config).net(config)) == 101_164_352
    assert (config.batch_size, config.lr, config.cond_dropout) == (256, 3e-4, 0.15)
    assert config.lr_schedule["warmup"] == 1000 and config.density == {"name": "beta", "a": 1.0, "b": 2.5}
    assert (config.prediction, config.clock, config.ema[0]["decay"]) == ("x0_linear", "flow", 0.999)
    outpaint = one("tld-outpaint")
    assert outpaint.init_from == "runs/tld" and outpaint.net == {**config.net, "concat_channels": 4}
    assert one("tld-outpaint", "net.channels_in=16").net["concat_channels"] == 16


# -- three steps of each ---------------------------------------------------------------------------------------------

SMALL = {
    "cifar10-latent": ({"dim": 32, "depth": 1, "heads": 2}, True, ""),
    "config_debug": ({"dim": 32, "depth": 1, "heads": 2}, True, ""),
    "latent-dit": ({"dim": 32, "depth": 1, "heads": 2}, True, ""),
    "tld": ({"dim": 64, "depth": 1, "noise_features": 16}, False, "words:16"),
    "tld-outpaint": ({"dim": 64, "depth": 1, "noise_features": 16}, False, "words:16"),
}


@pytest.mark.parametrize("recipe", SMALL)
def test_three_steps_leave_rows_pictures_and_a_run_that_reads_back(tmp_path, recipe):
    net, labels, text = SMALL[recipe]
    runner = shrunk(recipe, tmp_path, encoded(tmp_path, labels=labels, text=text), net)
    assert runner.run() == "done"
    found = rows(runner.folder)
    assert [r["step"] for r in found if "val/loss" in r] == [2, 3] and [r["step"] for r in found if "loss" in r] == [
        1,
        2,
        3,
    ]
    run = load_run(runner.folder)
    assert run.config.codec.endswith("codec") and run.config.text == text
    (grid,) = runner.folder.glob("samples/step-00000003-ema.png")
    with Image.open(grid) as image:
        assert image.mode == "RGB"  # decoded: 3 channels of 8 pixels
    assert run.images(torch.zeros(2, 4, 4, 4)).shape == (2, 3, 8, 8)
    assert set(run.conditions(5)) == set(run.denoiser.net.takes)


def test_a_modern_transformer_takes_text_where_there_are_no_classes(tmp_path):
    runner = shrunk("latent-dit", tmp_path, encoded(tmp_path, text="words:16"), SMALL["latent-dit"][0])
    assert runner.config.net["pooled_dim"] == 16 and runner.trainer.takes == ("pooled",)


# -- pictures --------------------------------------------------------------------------------------------------------


def test_latents_are_decoded_with_the_codecs_own_scale_and_shift(tmp_path):
    folder = codec(tmp_path)
    run = Run(torch.nn.Linear(1, 1), Config(codec=str(folder)), (4, 4, 4), (), 0, tmp_path)  # type: ignore[arg-type]
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    x0 = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(x0 / 0.5 + 0.1).sample.clamp(-1, 1)
    assert_close(run.images(x0), expected, rtol=1e-5, atol=1e-5)


def text_runner(tmp_path: Path, **more: Any) -> Runner:
    return shrunk("tld", tmp_path / "out", tmp_path / "encoded", SMALL["tld"][0], **more)


def test_the_first_captions_are_the_columns_of_a_grid(tmp_path):
    encoded(tmp_path, text="words:16")
    runner = text_runner(tmp_path)
    runner.run()
    run = load_run(runner.folder)
    assert len(run.prompts) == 6 == run.columns(64) and set(run.prompts) <= set(CAPTIONS)  # all that are held out
    table = torch.from_numpy(np.load(tmp_path / "encoded/pooled.npy")).float()
    found = [int((table == row).all(1).nonzero()) for row in run.fixed["pooled"]]
    assert run.prompts == [CAPTIONS[i % 3] for i in found]
    cond = run.conditions(8)["pooled"]
    assert_close(cond[6:], cond[:2], rtol=0, atol=0)
    assert_close(runner.pictures(4), runner.pictures(8)[:4], rtol=1e-5, atol=1e-5)  # fixed noise


def test_prompts_of_the_recipe_are_embedded_by_the_datas_encoder(tmp_path):
    from nanodiffusion.text.pooled import open_text

    encoded(tmp_path, text="words:16")
    sample = {"n": 4, "steps": 2, "prompts": ["a red bird", "nothing at all"]}
    runner = text_runner(tmp_path, sample=sample)
    runner.run()
    run = load_run(runner.folder)
    assert run.prompts == sample["prompts"] and run.columns(4) == 2
    assert_close(run.fixed["pooled"], open_text("words:16").encode(sample["prompts"]), rtol=0, atol=0)


def test_outpainted_pictures_keep_what_was_known(tmp_path):
    data = encoded(tmp_path, text="words:16")
    runner = shrunk("tld-outpaint", tmp_path, data, SMALL["tld-outpaint"][0])
    x = runner.pictures(6)
    mask, x0 = (runner.fixed[name][:6] for name in ("mask", "x0"))
    assert 0 < mask.mean() < 1
    assert_close(x * (1 - mask), x0 * (1 - mask), rtol=0, atol=0)


def test_a_codec_that_is_not_there_is_said_once_and_training_goes_on(tmp_path):
    data = encoded(tmp_path, labels=True, codec={"where": str(tmp_path / "gone")})
    said: list[str] = []
    runner = shrunk("cifar10-latent", tmp_path, data, SMALL["cifar10-latent"][0], sample_every=1)
    runner.say = said.append
    assert runner.run() == "done"
    assert len(said) == 1 and "no pictures" in said[0] and "gone" in said[0] and "\n" not in said[0]
    assert list((runner.folder / "samples").iterdir()) == []


def test_the_known_part_has_the_channels_of_the_data(tmp_path):
    data = encoded(tmp_path, text="words:16", shape=(6, 4, 4))
    runner = shrunk("tld-outpaint", tmp_path, data, SMALL["tld-outpaint"][0])
    assert runner.config.net["channels_in"] == runner.config.net["concat_channels"] == 6
    assert runner.trainer.denoiser.net.takes == ("pooled", "concat")


@pytest.mark.parametrize(
    ("net", "takes", "line"),
    [
        (
            {},
            ("label",),
            "conditioned by class (3); the data's text is not used:"
            " net.pooled_dim=16 adds it, net.num_classes=0 takes it instead",
        ),
        (
            {"num_classes": 0},
            ("pooled",),
            "conditioned by text (16); the data's class is not used: net.num_classes=3 adds it",
        ),
        ({"pooled_dim": 16}, ("label", "pooled"), "conditioned by class (3), text (16)"),
    ],
    ids=["as the recipe is", "text", "both"],
)
def test_a_run_says_which_of_the_data_s_conditions_it_learns_by(tmp_path, net, takes, line):
    said: list[str] = []
    data = encoded(tmp_path, labels=True, text="words:16")
    runner = shrunk("latent-dit", tmp_path, data, SMALL["latent-dit"][0] | net, said.append)
    assert said == [line] and runner.trainer.denoiser.net.takes == takes


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("tld", "conditioned by text (16); the data's class is not used"),
        ("cifar10-latent", "conditioned by class (3); the data's text is not used"),
    ],
)
def test_a_net_that_has_no_place_for_a_condition_is_offered_none(tmp_path, recipe, line):
    said: list[str] = []
    shrunk(recipe, tmp_path, encoded(tmp_path, labels=True, text="words:16"), SMALL[recipe][0], said.append)
    assert said == [line]


def test_class_counts_are_those_of_the_training_part(tmp_path):
    runner = shrunk("cifar10-latent", tmp_path, encoded(tmp_path, labels=True), SMALL["cifar10-latent"][0])
    told = json.loads((runner.folder / "data.json").read_text())
    assert told["classes"] == {"x": 6, "y": 6, "z": 6} and told["n"] == 18


def test_early_stopping_and_the_best_weights_work_on_encoded_data(tmp_path):
    runner = shrunk(
        "cifar10-latent",
        tmp_path,
        encoded(tmp_path, labels=True),
        SMALL["cifar10-latent"][0],
        **{"steps": 9, "validate_every": 1, "patience": 2, "sample_every": 0},
    )
    losses = iter([3.0, 1.0, 2.0, 2.0])
    runner.validator.row = lambda: {"val/loss": next(losses)}
    assert runner.run() == "patience" and runner.trainer.step == 4
    assert load_run(runner.folder, best=True).step == 2


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, recipe: str, data: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as e:
        shrunk(recipe, tmp_path, encoded(tmp_path, **data), SMALL[recipe][0], **more)
    assert not (tmp_path / recipe / "checkpoint").exists() and len(str(e.value).splitlines()) <= 6
    return str(e.value)


def test_prompts_for_a_net_of_classes_are_refused(tmp_path):
    said = refused(tmp_path, "cifar10-latent", {"labels": True}, sample={"prompts": ["a cat"]})
    assert "takes no text" in said and "sample.prompts" in said


def test_a_text_net_without_texts_is_refused(tmp_path):
    assert "key pooled" in refused(tmp_path, "tld", {})


def test_prompts_without_an_encoder_are_refused(tmp_path):
    pooled = {"text": "words:16"}
    root = encoded(tmp_path, **pooled)
    manifest = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_bytes(manifest_bytes({**manifest, "text": None}))
    with pytest.raises(UserError, match="how prompts become vectors"):
        text_runner(tmp_path, sample={"prompts": ["a cat"]})


def test_prompts_of_another_length_are_refused(tmp_path):
    said = refused(tmp_path, "tld", {"text": "words:16"}, text="words:8", sample={"prompts": ["a cat"]})
    assert "pooled" in said and "16" in said and "8" in said


@pytest.mark.parametrize("prompts", ["a cat", [3], [["a cat"]]])
def test_prompts_that_are_no_list_of_texts_are_refused(prompts):
    with pytest.raises(UserError, match=r"sample\.prompts"):
        read_config({"sample": {"prompts": prompts}})


def test_a_missing_encoded_folder_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="nanodiffusion encode"):
        make_runner(tmp_path, {"data": {"name": "encoded", "path": str(tmp_path / "none")}})
