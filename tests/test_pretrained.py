"""Whole checkpoints, as diffusers and transformers write them, into bundles and back."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import sd_files  # noqa: E402

from nanodiffusion.codec import F8C16, SD3_VAE, SD_VAE, SDXL_VAE  # noqa: E402
from nanodiffusion.errors import UserError  # noqa: E402
from nanodiffusion.nets.adapter import ADAPTER_SDXL, AdapterConfig  # noqa: E402
from nanodiffusion.nets.controlnet import ControlNetConfig  # noqa: E402
from nanodiffusion.nets.sd_unet import SD15, SD21, SDXL  # noqa: E402
from nanodiffusion.noise import SIGMA_CAP, ldm, zero_terminal_snr  # noqa: E402
from nanodiffusion.pretrained import (  # noqa: E402
    Bundle,
    load_adapter,
    load_codec,
    load_controlnet,
    load_pretrained,
    load_text,
    load_tiny,
    load_unet,
    publish,
    replace_part,
    save_part,
    scheduler_beside,
)
from nanodiffusion.pretrained import architecture as arch  # noqa: E402
from nanodiffusion.pretrained import load as pretrained  # noqa: E402
from nanodiffusion.pretrained.hub import Place, cached, locate, needed, split_name  # noqa: E402
from nanodiffusion.pretrained.layouts import join  # noqa: E402
from nanodiffusion.pretrained.publish import save_diffusers, save_single  # noqa: E402
from nanodiffusion.pretrained.recognise import published  # noqa: E402
from nanodiffusion.pretrained.scheduler_config import read_scheduler  # noqa: E402
from nanodiffusion.pretrained.weights import save  # noqa: E402
from nanodiffusion.text import CLIP_BIGG, CLIP_H, CLIP_L, CLIPText, TextConfig  # noqa: E402
from nanodiffusion.text.inversion import add  # noqa: E402
from nanodiffusion.text.prompts import TextEncoder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("sd1", "sd2", "sdxl")
TEXTS = ("text_encoder", "text_encoder_2")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No socket, and a cache of the hub that is empty."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Equal bit for bit, after transformers' flattening of names."""
    found, wanted = ({k.removeprefix("text_model."): v for k, v in d.items()} for d in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor.to(dtype or tensor.dtype), rtol=0, atol=0)


def nets(bundle: Bundle) -> dict[str, nn.Module]:
    """The networks by the names of their folders."""
    parts = {name: part.net for name, part in zip(TEXTS, bundle.text.parts)}
    return {"unet": bundle.denoiser.net, "vae": bundle.codec, **parts}


def equal_bundles(a: Bundle, b: Bundle) -> None:
    for mine, other in zip(nets(a).values(), nets(b).values(), strict=True):
        assert mine.config == other.config
        same(mine.state_dict(), other.state_dict())
    assert a.denoiser.prediction == b.denoiser.prediction
    assert_close(a.schedule.sigmas, b.schedule.sigmas, rtol=0, atol=0)
    for words in ("a cat! of   Éé", "!!! red house"):
        assert [p.tokenizer.encode(words) for p in a.text.parts] == [p.tokenizer.encode(words) for p in b.text.parts]


def copy_of(family: str, folder: Path, **options: Any) -> Path:
    """A tree of its own, whose small files are to be changed; its weights are links."""
    return Path(shutil.copytree(sd_files.tree(family, **options), folder / family, copy_function=link_weights))


def link_weights(source: str, target: str) -> None:
    (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)


def change(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a key set to Ellipsis goes."""
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


# -- folders -------------------------------------------------------------------------------------------------------------

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {}),
    ("sd2", {}),
    ("sdxl", {}),
    ("sd1", {"variant": "fp16"}),
    ("sdxl", {"variant": "fp16"}),
    ("sd2", {"max_shard_size": "1MB"}),
    ("sdxl", {"max_shard_size": "1MB", "variant": "fp16"}),
    ("sd1", {"inpaint": True}),
    ("sdxl", {"inpaint": True}),
    ("sdxl", {"flat": True}),
    ("sd1", {"prediction": "v_prediction"}),
]


@pytest.mark.parametrize(("family", "options"), LAYOUTS, ids=str)
def test_a_folder_s_every_weight_is_loaded(family: str, options: dict[str, Any]) -> None:
    folder = sd_files.tree(family, **options)
    bundle = load_pretrained(folder, variant=options.get("variant"))
    for name, net in nets(bundle).items():
        same(net.state_dict(), sd_files.tensors(folder / name), torch.float32)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert bundle.family.name == family and bundle.family.size == 64
    assert bundle.config.channels_in == (9 if options.get("inpaint") else 4)
    usual = "v" if family == "sd2" else "eps"
    assert bundle.denoiser.prediction.name == ("v" if "prediction" in options else usual)
    assert_close(bundle.schedule.sigmas, ldm().sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_s_networks_compute_what_diffusers_does(family: str) -> None:
    folder = sd_files.tree(family)
    bundle, pipe = load_pretrained(folder), diffusers.DiffusionPipeline.from_pretrained(folder)
    g = torch.Generator().manual_seed(0)
    x, image = torch.randn(2, 4, 8, 8, generator=g), torch.rand(2, 3, 64, 64, generator=g) * 2 - 1
    cond, _ = bundle.text.encode(["a red cat", "the sea"])
    theirs, pooled = encode(pipe, ["a red cat", "the sea"], family)
    near(cond["context"], theirs)
    added = {}
    if family == "sdxl":
        near(cond["pooled"], pooled)
        cond["sizes"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, 6)
        added = {"added_cond_kwargs": {"text_embeds": cond["pooled"], "time_ids": cond["sizes"]}}
    t = torch.tensor([7.0, 400.0])
    with torch.no_grad():
        near(bundle.denoiser.net(x, t, **cond), pipe.unet(x, t, cond["context"], **added).sample)
        near(bundle.codec.decode(x), pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample)
        near(bundle.codec.encode(image), pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor)


def encode(pipe: Any, prompts: list[str], family: str) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        found = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return found[0], found[2] if family == "sdxl" else None


def near(a: Tensor, b: Tensor) -> None:
    assert_close(a / b.abs().max(), b / b.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "keep", "auto"])
def test_a_dtype_is_that_of_every_weight(name: str) -> None:
    dtypes = {"bf16": torch.bfloat16, "keep": torch.float16, "auto": torch.float32}
    bundle = load_pretrained(sd_files.tree("sd1", variant="fp16"), name, "cpu", variant="fp16")
    assert {p.dtype for net in nets(bundle).values() for p in net.parameters()} == {dtypes[name]}


@pytest.mark.filterwarnings("ignore:.*text_encoder has no variant")
def test_a_component_without_the_variant_gives_its_plain_weights_and_says_so(tmp_path: Path) -> None:
    folder = copy_of("sd1", tmp_path)
    half = sd_files.tree("sd1", variant="fp16") / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(half, folder / "unet")
    with pytest.warns(UserWarning, match="vae has no variant fp16"):
        bundle = load_pretrained(folder, variant="fp16")
    same(bundle.denoiser.net.state_dict(), load_file(half), torch.float32)
    same(bundle.codec.state_dict(), sd_files.tensors(folder / "vae"))


def test_a_checkpoint_says_its_size_and_its_empty_prompt(tmp_path: Path) -> None:
    folder = copy_of("sdxl", tmp_path)
    assert load_pretrained(folder).family.zero_uncond
    change(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    change(folder / "unet" / "config.json", sample_size=...)
    family = load_pretrained(folder).family
    assert not family.zero_uncond and family.size == 1024


def test_the_digest_is_of_the_files(tmp_path: Path) -> None:
    folder = copy_of("sd1", tmp_path)
    bundle = load_pretrained(folder)
    assert bundle.sha256() == load_pretrained(sd_files.tree("sd1")).sha256() == bundle.source["sha256"]
    file = next((folder / "vae").glob("*.safetensors"))
    changed = file.read_bytes()[:-1] + b"\x01"
    file.unlink()
    file.write_bytes(changed)
    assert load_pretrained(folder).sha256() != bundle.sha256()
    json.dumps(bundle.source)


# -- single components ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["controlnet", "adapter", "vae", "unet"])
def test_a_component_comes_from_its_folder_its_file_and_its_checkpoint(name: str, family: str, tmp_path: Path) -> None:
    folder = sd_files.tree(family) / "unet" if name == "unet" else sd_files.part(name, family)
    load = {"controlnet": load_controlnet, "adapter": load_adapter, "vae": load_codec, "unet": load_unet}[name]
    net, file = load(folder), next(folder.glob("*.safetensors"))
    same(net.state_dict(), load_file(file))
    same(load(file).state_dict(), load_file(file))  # its config.json lies beside it
    if name in ("vae", "unet"):
        assert load(sd_files.tree(family)).config == net.config
    if family == "sdxl" and name in ("controlnet", "unet"):
        return  # which of the added features are the text's is not to be told from a tiny one alone
    if name in ("vae", "unet"):
        same(load(sd_files.single(family)).state_dict(), net.state_dict())
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    other = load(alone, **({"family": family} if name == "vae" else {}))
    assert other.config == net.config
    same(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_controlnet_s_original_file_is_the_same_network(family: str, tmp_path: Path) -> None:
    folder = sd_files.part("controlnet", family)
    theirs = join({"controlnet": sd_files.tensors(folder)}, family)
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "control.safetensors")
    ours = load_controlnet(tmp_path / "control.safetensors")
    assert ours.control == load_controlnet(folder).control
    same(ours.state_dict(), sd_files.tensors(folder))


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
def test_every_kind_of_adapter_is_told_by_its_tensors(kind: str, tmp_path: Path) -> None:
    folder = sd_files.part("adapter", "sdxl" if kind.endswith("xl") else "sd1", kind=kind)
    net = load_adapter(folder)
    alone = shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "alone.safetensors")
    assert load_adapter(alone).config == net.config
    same(net.state_dict(), sd_files.tensors(folder))


def test_a_tiny_autoencoder_comes_from_its_folder_and_its_file(tmp_path: Path) -> None:
    folder = sd_files.part("tiny")
    net = load_tiny(folder)
    same(net.state_dict(), sd_files.tensors(folder))
    alone = shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "alone.safetensors")
    assert load_tiny(alone).config == net.config


def test_a_vae_s_file_alone_needs_its_family(tmp_path: Path) -> None:
    alone = shutil.copy(next(sd_files.part("vae", "sdxl").glob("*.safetensors")), tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="latent scale"):
        load_codec(alone)
    assert load_codec(alone, family="sdxl").config.scale == SDXL_VAE.scale
    assert load_codec(alone, family="sd2").config.scale == SD_VAE.scale


def test_a_vae_s_attention_of_old_may_be_convolutions_by_the_names_of_today(tmp_path: Path) -> None:
    folder = sd_files.part("vae", "sd1")
    wanted = sd_files.tensors(folder)
    matrix = lambda name, t: "attentions.0.to_" in name and t.ndim == 2
    old = {name: t[:, :, None, None].contiguous() if matrix(name, t) else t for name, t in wanted.items()}
    assert sum(t.ndim == 4 for t in old.values()) == sum(t.ndim == 4 for t in wanted.values()) + 8
    save_file(old, tmp_path / "old.safetensors")
    same(load_codec(tmp_path / "old.safetensors", family="sd1").state_dict(), wanted)


def test_the_family_that_a_whole_file_tells_says_the_scale_of_its_vae() -> None:
    assert load_codec(sd_files.single("sdxl"), family="sd1").config.scale == SDXL_VAE.scale


def test_a_text_encoder_s_file_alone_tells_its_activation_by_its_width(tmp_path: Path) -> None:
    for width, activation in ((768, "quick_gelu"), (1024, "gelu"), (1280, "gelu")):
        net = CLIPText(TextConfig(width, 1, width // 64, 8, activation, vocab=99, positions=7))
        file = save(tmp_path / f"{width}.safetensors", net.state_dict())
        assert load_text(file).config.activation == activation
    assert load_text(file, activation="quick_gelu").config.activation == "quick_gelu"


def test_a_text_encoder_s_file_of_another_width_asks_for_its_activation(tmp_path: Path) -> None:
    folder = sd_files.tree("sdxl") / "text_encoder_2"
    file = next(folder.glob("*.safetensors"))
    assert load_text(file).config.activation == "gelu"  # its config.json lies beside it
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="do not say its activation"):
        load_text(alone)
    assert load_text(alone, activation="gelu").config.activation == "gelu"


def test_a_single_file_gives_the_text_encoder_that_is_asked_for() -> None:
    bundle = load_pretrained(sd_files.tree("sdxl"))
    for name, part in zip(("text_encoder", "text_encoder_2"), bundle.text.parts):
        net = load_text(sd_files.single("sdxl"), name=name, activation=part.net.config.activation)
        same(net.state_dict(), part.net.state_dict())
    with pytest.raises(UserError, match="holds no CLIP text encoder"):
        load_text(sd_files.single("sd1"), name="text_encoder_2", activation="gelu")


def test_a_whole_clip_gives_its_text_half(tmp_path: Path) -> None:
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 99,
    }
    ends = {"eos_token_id": 98, "bos_token_id": 97}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=24)
    reference = transformers.CLIPModel(config).eval()
    reference.save_pretrained(tmp_path / "clip")
    ids = torch.tensor([[97, 3, 4, 98, 98], [97, 5, 98, 98, 98]])
    with torch.no_grad():
        wanted = reference.get_text_features(ids)
        near(load_text(tmp_path / "clip")(ids).pooled, wanted if isinstance(wanted, Tensor) else wanted.pooler_output)


# -- single files --------------------------------------------------------------------------------------------------------


SINGLES: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {}),
    ("sd2", {}),
    ("sdxl", {"variant": "fp16"}),
    ("sd2", {"inpaint": True, "prediction": "epsilon"}),
]


@pytest.mark.filterwarnings("ignore:.*does not say what it predicts")
@pytest.mark.parametrize(("family", "options"), SINGLES, ids=str)
def test_a_single_file_is_the_same_checkpoint(family: str, options: dict[str, Any]) -> None:
    file, folder = sd_files.single(family, **options), sd_files.tree(family, **options)
    bundle = load_pretrained(file, tokenizer=folder / "tokenizer")
    equal_bundles(bundle, load_pretrained(folder, variant=options.get("variant")))
    assert bundle.family.name == family and len(bundle.source["files"]) == 1


def test_a_single_file_finds_its_tokenizer_beside_it_or_in_the_cache(tmp_path: Path) -> None:
    file = Path(shutil.copy(sd_files.single("sdxl"), tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="no tokenizer") as error:
        load_pretrained(file)
    assert "tokenizer=FOLDER" in str(error.value)
    words = sd_files.tree("sdxl") / "tokenizer"
    commit = fake_cache(tmp_path / "hub-cache", "openai/clip-vit-large-patch14", words)
    wanted = load_pretrained(sd_files.tree("sdxl"))
    equal_bundles(load_pretrained(file), wanted)
    shutil.rmtree(commit)
    shutil.copytree(words, tmp_path / "tokenizer")
    equal_bundles(load_pretrained(file), wanted)


PREDICTS: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("sd1", {}, "v", "v"),
    ("sd2", {"prediction": "epsilon", "inpaint": True}, None, "eps"),
    ("sdxl", {}, None, "eps"),
    ("sdxl", {"marks": ("v_pred", "ztsnr")}, None, "v"),
]


@pytest.mark.parametrize(("family", "options", "given", "wanted"), PREDICTS)
def test_a_single_file_predicts_what_it_says_or_is_told(
    family: str, options: Any, given: str | None, wanted: str
) -> None:
    words = sd_files.tree(family) / "tokenizer"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = load_pretrained(sd_files.single(family, **options), prediction=given, tokenizer=words)
    assert bundle.denoiser.prediction.name == wanted
    terminal = "ztsnr" in options.get("marks", ())
    assert (float(bundle.schedule.sigmas[-1]) == SIGMA_CAP) == terminal


def test_a_file_of_sd2_that_does_not_say_is_taken_for_v_and_that_is_said() -> None:
    words = sd_files.tree("sd2") / "tokenizer"
    with pytest.warns(UserWarning, match="does not say what it predicts: v"):
        bundle = load_pretrained(sd_files.single("sd2"), tokenizer=words)
    assert bundle.denoiser.prediction.name == "v" and bundle.family.size == 768
    base = load_pretrained(sd_files.single("sd2"), tokenizer=words, prediction="eps")
    assert base.family.size == 512


# -- configs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sd15-unet", SD15),
        ("sd15-inpaint-unet", replace(SD15, channels_in=9)),
        ("sd21-unet", SD21),
        ("sdxl-unet", SDXL),
        ("sdxl-inpaint-unet", replace(SDXL, channels_in=9)),
    ],
)
def test_published_u_nets_are_told_by_their_tensors(name: str, config: Any) -> None:
    assert arch.unet_of_shapes(published(name)) == config


def test_other_published_networks_are_told_by_their_tensors() -> None:
    assert arch.controlnet_of_shapes(published("sd15-controlnet")) == ControlNetConfig(SD15)
    assert arch.controlnet_of_shapes(published("sdxl-controlnet")) == ControlNetConfig(SDXL)
    assert arch.adapter_of_shapes(published("sdxl-adapter")) == ADAPTER_SDXL
    assert arch.vae_of_shapes(published("sd-vae"), SD_VAE.scale) == SD_VAE
    assert arch.text_of_shapes(published("clip-l"), "quick_gelu") == CLIP_L
    assert arch.text_of_shapes(published("clip-h"), "gelu") == CLIP_H
    assert arch.text_of_shapes(published("clip-bigg"), "gelu") == CLIP_BIGG


@pytest.mark.parametrize(
    "config", [SD15, SD21, SDXL, replace(SDXL, channels_in=9), replace(SD15, depth_mid=0)], ids=str
)
def test_a_u_net_s_config_says_the_same_to_diffusers(config: Any) -> None:
    written = arch.unet_json(config, 64)
    assert arch.unet_config(written, Path("c")) == config
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(written)
        ours = pretrained.SDUNet(config)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert arch.unet_config(dict(theirs.config), Path("c")) == config


@pytest.mark.parametrize("config", [SD_VAE, SDXL_VAE, F8C16, SD3_VAE], ids=str)
def test_an_autoencoder_s_config_says_the_same_to_diffusers(config: Any) -> None:
    written = arch.vae_json(config)
    assert arch.vae_config(written, Path("c")) == config
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(written)
    assert arch.vae_config(dict(theirs.config), Path("c")) == config


@pytest.mark.parametrize("config", [ControlNetConfig(SD15), ControlNetConfig(SDXL, 1, (8, 16))], ids=str)
def test_a_controlnet_s_config_says_the_same_to_diffusers(config: Any) -> None:
    written = arch.controlnet_json(config)
    assert arch.controlnet_config(written, Path("c")) == config
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel.from_config(written)
    assert arch.controlnet_config(dict(theirs.config), Path("c")) == config


@pytest.mark.parametrize("config", [AdapterConfig(), ADAPTER_SDXL, AdapterConfig("light", 3, (32, 32, 64), 4)], ids=str)
def test_an_adapter_s_config_says_the_same_to_diffusers(config: Any) -> None:
    assert arch.adapter_config(arch.adapter_json(config), Path("c")) == config


@pytest.mark.parametrize("config", [CLIP_L, CLIP_H, CLIP_BIGG], ids=str)
def test_a_text_encoder_s_config_says_the_same_to_transformers(config: Any) -> None:
    shapes = {"text_projection.weight": (config.projection, 1)} if config.projection else {}
    written = arch.text_json(config)
    assert arch.text_config(written, Path("c"), shapes) == config
    theirs = transformers.CLIPTextConfig.from_dict(written).to_dict()
    assert arch.text_config(theirs, Path("c"), shapes) == config


def test_the_published_text_config_s_wrong_end_token_is_the_real_one() -> None:
    assert arch.text_config({**arch.text_json(CLIP_L), "eos_token_id": 2}, Path("c"), {}) == CLIP_L


REFUSED: list[tuple[str, str, Any]] = [
    ("unet", "act_fn", "gelu"),
    ("unet", "center_input_sample", True),
    ("unet", "only_cross_attention", [True, True, False, False]),
    ("unet", "down_block_types", ["AttnDownBlock2D"] * 4),
    ("unet", "up_block_types", ["UpBlock2D"] * 4),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("unet", "class_embed_type", "timestep"),
    ("unet", "time_cond_proj_dim", 256),
    ("unet", "encoder_hid_dim_type", "text_proj"),
    ("unet", "addition_embed_type", "image"),
    ("unet", "layers_per_block", [1, 2, 2, 2]),
    ("unet", "layers_per_block", 10**9),
    ("unet", "transformer_layers_per_block", [1, 1]),
    ("unet", "transformer_layers_per_block", [[1], [1], [1], [1]]),
    ("unet", "block_out_channels", "wide"),
    ("unet", "block_out_channels", [32] * 99),
    ("unet", "attention_head_dim", -8),
    ("unet", "in_channels", 4.5),
    ("unet", "use_linear_projection", "no"),
    ("unet", "surprise", 3),
    ("unet", "_class_name", "UNet3DConditionModel"),
    ("vae", "down_block_types", ["DownEncoderBlock2D"]),
    ("vae", "latents_mean", [0.0] * 4),
    ("vae", "scaling_factor", "1e999"),
    ("vae", "_class_name", "AutoencoderTiny"),
    ("text_encoder", "hidden_act", "relu"),
    ("text_encoder", "model_type", "t5"),
    ("text_encoder", "num_hidden_layers", 10**6),
    ("text_encoder", "layer_norm_eps", 1e-6),
    ("scheduler", "beta_schedule", "exponential"),
    ("scheduler", "beta_schedule", ...),
    ("scheduler", "prediction_type", "flow"),
    ("scheduler", "trained_betas", [0.1, 2.0]),
    ("scheduler", "num_train_timesteps", 10**12),
    ("scheduler", "use_flow_sigmas", True),
]


@pytest.mark.parametrize(("folder", "key", "value"), REFUSED, ids=str)
def test_a_setting_that_is_not_supported_is_named_with_its_file(
    tmp_path: Path, folder: str, key: str, value: Any
) -> None:
    place = copy_of("sd1", tmp_path)
    name = "scheduler_config.json" if folder == "scheduler" else "config.json"
    change(place / folder / name, **{key: value})
    with pytest.raises(UserError) as error:
        load_pretrained(place)
    message = str(error.value)
    assert key in message and str(place / folder / name) in message
    assert len(message.splitlines()) <= 6 and len(message) < 700


def test_the_controlnet_and_adapter_configs_are_as_strict(tmp_path: Path) -> None:
    control = Path(shutil.copytree(sd_files.part("controlnet", "sd1"), tmp_path / "c"))
    change(control / "config.json", global_pool_conditions=True)
    with pytest.raises(UserError, match="global_pool_conditions"):
        load_controlnet(control)
    adapter = Path(shutil.copytree(sd_files.part("adapter", "sd1"), tmp_path / "a"))
    change(adapter / "config.json", adapter_type="heavy_adapter")
    with pytest.raises(UserError, match="adapter_type"):
        load_adapter(adapter)


WEIRD = (
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e400,
    10**30,
    "",
    "x" * 300,
    [],
    [[]],
    [0],
    [1, "a"],
    {},
    {"a": 1},
    [None] * 4,
    [1] * 40,
)
READERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (arch.unet_config, arch.unet_json(SDXL)),
    "controlnet": (arch.controlnet_config, arch.controlnet_json(ControlNetConfig(SD15))),
    "vae": (arch.vae_config, arch.vae_json(SD3_VAE)),
    "adapter": (arch.adapter_config, arch.adapter_json(ADAPTER_SDXL)),
    "tiny": (
        arch.tiny_config,
        {"num_encoder_blocks": [1, 1], "encoder_block_out_channels": [64] * 4, "scaling_factor": 1.0},
    ),
    "text": (lambda raw, file: arch.text_config(raw, file, {}), {**arch.text_json(CLIP_L), "text_config": {}}),
    "scheduler": (read_scheduler, {"beta_schedule": "scaled_linear", "trained_betas": None, "num_train_timesteps": 9}),
}


@pytest.mark.parametrize("name", READERS)
def test_no_config_is_more_than_refused(name: str) -> None:
    read, sound = READERS[name]
    for key in [
        *sound,
        "beta_start",
        "rescale_betas_zero_snr",
        "prediction_type",
        "use_quant_conv",
        "eos_token_id",
        "?",
    ]:
        for value in WEIRD:
            try:
                read({**sound, key: value}, Path("config.json"))
            except UserError as e:
                assert len(str(e).splitlines()) <= 6  # noqa: PT017


# -- what is no checkpoint -----------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], Path]:
    def prepare(place: Path) -> Path:
        folder = copy_of("sdxl", place)
        target = folder / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return folder

    return prepare


def mixed(component: str, ours: str, theirs: str) -> Callable[[Path], Path]:
    def prepare(place: Path) -> Path:
        folder = copy_of(ours, place)
        shutil.rmtree(folder / component)
        shutil.copytree(sd_files.tree(theirs) / component, folder / component)
        return folder

    return prepare


def file_with(tensors: dict[str, Tensor]) -> Callable[[Path], Path]:
    def prepare(place: Path) -> Path:
        save_file(tensors, place / "file.safetensors")
        return place / "file.safetensors"

    return prepare


def single_plus(name: str) -> Callable[[Path], Path]:
    def prepare(place: Path) -> Path:
        save_file({**load_file(sd_files.single("sd1")), name: torch.zeros(1)}, place / "file.safetensors")
        return place / "file.safetensors"

    return prepare


def single_minus(name: str) -> Callable[[Path], Path]:
    def prepare(place: Path) -> Path:
        kept = {k: v for k, v in load_file(sd_files.single("sd1")).items() if not k.startswith(name)}
        return file_with(kept)(place)

    return prepare


def folder_of(*names: str) -> Callable[[Path], Path]:
    def prepare(place: Path) -> Path:
        for name in names:
            (place / name).touch()
        return place

    return prepare


LORA = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)}
NOT: list[tuple[str, Callable[[Path], Path | str], list[str]]] = [
    ("no U-Net", without("unet"), ["no Stable Diffusion checkpoint", "unet"]),
    ("no VAE", without("vae"), ["lacks a component", "vae"]),
    ("no second encoder", without("text_encoder_2"), ["lacks a component", "text_encoder_2"]),
    ("no tokenizer", without("tokenizer_2"), ["lacks a component", "tokenizer_2"]),
    ("no scheduler", without("scheduler"), ["lacks a component", "scheduler"]),
    ("no vocabulary", without("tokenizer/vocab.json"), ["tokenizer", "vocab.json"]),
    ("no weights", without("vae/diffusion_pytorch_model.safetensors"), ["no weights", "vae"]),
    ("another family's U-Net", mixed("unet", "sd1", "sd2"), ["do not belong together", "128", "64"]),
    ("another family's text", mixed("text_encoder", "sd1", "sd2"), ["do not belong together", "128"]),
    ("SDXL's U-Net alone", mixed("unet", "sd1", "sdxl"), ["lacks a component", "text_encoder_2"]),
    ("a ControlNet", lambda p: sd_files.part("controlnet", "sd1"), ["no checkpoint", "ControlNetModel"]),
    ("a folder of files", folder_of("a.safetensors"), ["no checkpoint", "give the .safetensors file itself"]),
    ("an empty folder", folder_of(), ["no checkpoint", "nothing"]),
    ("a LoRA", file_with(LORA), ["no whole checkpoint", "lora"]),
    ("anything", file_with({"x": torch.zeros(2, 2, 2)}), ["no whole checkpoint", "unknown"]),
    ("a VAE's file", lambda p: next(sd_files.part("vae", "sd1").glob("*.safetensors")), ["no whole checkpoint", "vae"]),
    ("unknown tensors", single_plus("surprise.weight"), ["something else", "surprise.weight"]),
    ("no VAE inside", single_minus("first_stage_model."), ["no whole checkpoint"]),
    ("half a VAE", single_minus("first_stage_model.decoder.conv_in"), ["KL autoencoder"]),
    ("a tensor lost", single_minus("model.diffusion_model.out.2.bias"), ["1 missing: conv_out.bias"]),
    ("pickles", lambda p: sd_files.tree("sd1", safe=False), ["pickle", "nanodiffusion convert"]),
    ("no path", lambda p: "models/none/of/it.safetensors", ["no such model", "models/none"]),
    ("no name", lambda p: "somewhere", ["no such model", "owner/name"]),
    ("an absolute path", lambda p: str(p / "not" / "here"), ["no such model"]),
]


@pytest.mark.parametrize(("prepare", "words"), [n[1:] for n in NOT], ids=[n[0] for n in NOT])
def test_what_is_no_checkpoint_is_said_in_one_message(
    tmp_path: Path, prepare: Callable[[Path], Path | str], words: list[str]
) -> None:
    where = prepare(tmp_path)
    with pytest.raises(UserError) as error:
        load_pretrained(where, tokenizer=sd_files.tree("sd1") / "tokenizer")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 6 and len(message) < 1000


@pytest.mark.parametrize(
    ("load", "where", "words"),
    [
        (load_controlnet, lambda: sd_files.part("adapter", "sd1"), ["another kind", "ControlNetModel", "T2IAdapter"]),
        (load_adapter, lambda: sd_files.single("sd1"), ["holds no T2I-Adapter", "sd1 checkpoint"]),
        (load_unet, lambda: sd_files.part("vae", "sd1"), ["another kind", "AutoencoderKL"]),
        (load_codec, lambda: sd_files.part("tiny"), ["another kind", "AutoencoderTiny"]),
        (load_controlnet, lambda: sd_files.tree("sd1"), ["lacks a component", "controlnet"]),
        (load_unet, lambda: sd_files.part("vae", "sd1") / "none.safetensors", ["no such model"]),
    ],
)
def test_a_component_of_another_kind_is_refused(load: Any, where: Callable[[], Path], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(where())
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp8"}, "unknown dtype"),
        ({"device": "tpu"}, "no device"),
        ({"prediction": "noise"}, "unknown prediction"),
        ({"revision": "main"}, "no revisions"),
        ({"variant": "bf8"}, "no such variant"),
    ],
)
def test_options_that_there_are_not_are_named(options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_pretrained(sd_files.tree("sd1"), **options)  # type: ignore[arg-type]


# -- schedules -----------------------------------------------------------------------------------------------------------

SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01 + 0.0001 * i for i in range(100)], "num_train_timesteps": 100},
    {"beta_schedule": "scaled_linear", "num_train_timesteps": 500},
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_noise_levels_are_the_scheduler_s(config: dict[str, Any]) -> None:
    theirs = diffusers.DDIMScheduler(**config)
    schedule, said = read_scheduler(dict(theirs.config), Path("c"))
    assert said == "eps"
    abar = 1 / (1 + schedule.sigmas**2)  # the reference computes in float32, where sigma itself is less exact
    assert_close(abar, theirs.alphas_cumprod.double(), rtol=1e-5, atol=1e-7)


def test_a_zero_terminal_snr_is_diffusers_but_for_the_infinite_level() -> None:
    theirs = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    )
    schedule, _ = read_scheduler(dict(theirs.config), Path("c"))
    abar = theirs.alphas_cumprod.double()[:-1]
    assert_close(schedule.sigmas[:-1], ((1 - abar) / abar).sqrt(), rtol=1e-3, atol=0)
    assert schedule.sigmas[-1] == SIGMA_CAP and len(schedule) == 1000
    a = (1 + zero_terminal_snr(ldm()).sigmas ** 2).rsqrt()
    assert_close(a[0], (1 + ldm().sigmas[0] ** 2).rsqrt(), rtol=1e-12, atol=0)


# -- a U-Net in another's place ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [("v_pred", "ztsnr"), ("v_pred",), ()])
def test_a_unet_of_a_whole_file_is_read_as_the_file_is(marks: tuple[str, ...]) -> None:
    levels = {"beta_schedule": "linear", "beta_end": 0.02}
    base = load_pretrained(sd_files.tree("sd1", scheduler=levels, prediction="epsilon" if marks else "v_prediction"))
    found = replace_part(base, "unet", sd_files.single("sd1", marks=marks))
    assert found.denoiser.prediction.name == ("v" if "v_pred" in marks else "eps")
    wanted = zero_terminal_snr(ldm()) if "ztsnr" in marks else ldm()
    assert_close(found.schedule.sigmas, wanted.sigmas, rtol=0, atol=0)


def test_a_prediction_that_is_asked_for_holds_for_a_unet_in_another_s_place() -> None:
    other = sd_files.tree("sd1", prediction="v_prediction")
    asked = load_pretrained(sd_files.tree("sd1"), prediction="eps")
    for where in (other, other / "unet", sd_files.single("sd1", marks=("v_pred",))):
        assert replace_part(asked, "unet", where).denoiser.prediction.name == "eps"
        assert replace_part(replace(asked, asked=None), "unet", where).denoiser.prediction.name == "v"


def test_a_unet_of_sd2_s_file_that_says_nothing_is_read_as_the_checkpoint_s(recwarn: pytest.WarningsRecorder) -> None:
    base = load_pretrained(sd_files.tree("sd2", prediction="epsilon"))
    assert replace_part(base, "unet", sd_files.single("sd2")).denoiser.prediction.name == "eps"
    assert not [w for w in recwarn if "predicts" in str(w.message)]


# -- the hub -------------------------------------------------------------------------------------------------------------


def fake_cache(root: Path, name: str, source: Path, commit: str = "a" * 40, branch: str = "main") -> Path:
    """A repository in the hub's cache as its package writes it: blobs, snapshots of links to them, refs."""
    repository = root / ("models--" + name.replace("/", "--"))
    for file in (file for file in source.rglob("*") if file.is_file()):
        link = repository / "snapshots" / commit / file.relative_to(source)
        blob = repository / "blobs" / f"{len(list(repository.rglob('*'))):040x}"
        for place in (link, blob):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return repository


def test_a_name_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    folder = sd_files.tree("sdxl", variant="fp16")
    fake_cache(tmp_path / "hub-cache", "owner/a-model", folder)
    bundle = load_pretrained("owner/a-model", variant="fp16")
    equal_bundles(bundle, load_pretrained(folder, variant="fp16"))
    assert bundle.source["name"] == "owner/a-model" and bundle.source["commit"] == "a" * 40
    by_commit = load_pretrained("owner/a-model", variant="fp16", revision="a" * 40)
    assert by_commit.source["commit"] == "a" * 40
    same(load_unet("owner/a-model/unet", variant="fp16").state_dict(), sd_files.tensors(folder / "unet"), torch.float32)


def test_a_file_in_a_repository_is_named_by_its_path(tmp_path: Path) -> None:
    source = tmp_path / "repository"
    source.mkdir()
    shutil.copy(sd_files.single("sd1"), source / "model.safetensors")
    shutil.copytree(sd_files.tree("sd1") / "tokenizer", source / "tokenizer")
    fake_cache(tmp_path / "hub-cache", "owner/single", source)
    equal_bundles(load_pretrained("owner/single/model.safetensors"), load_pretrained(sd_files.tree("sd1")))


def test_a_local_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cache(tmp_path / "hub-cache", "owner/model", sd_files.tree("sdxl"))
    shutil.copytree(sd_files.tree("sd1"), tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("owner/model").family.name == "sd1"


@pytest.mark.parametrize("revision", ["fp16", "../../x", "b" * 40])
def test_a_revision_that_is_not_there_is_named(tmp_path: Path, revision: str) -> None:
    fake_cache(tmp_path / "hub-cache", "owner/model", sd_files.tree("sd1"))
    with pytest.raises(UserError) as error:
        load_pretrained("owner/model", revision=revision)
    assert revision in str(error.value)


def test_a_name_that_is_nowhere_says_that_the_network_was_not_asked() -> None:
    with pytest.raises(UserError, match="owner/unknown") as error:
        load_pretrained("owner/unknown")
    assert "HF_HUB_OFFLINE" in str(error.value)


def test_a_ref_that_points_outside_the_cache_is_not_followed(tmp_path: Path) -> None:
    repository = fake_cache(tmp_path / "hub-cache", "owner/model", sd_files.tree("sd1"))
    for text in ("../blobs", "..", ".", "/etc"):
        (repository / "refs" / "main").write_text(text)
        assert cached("owner/model") is None


class Hub(types.ModuleType):
    """A stand-in for huggingface_hub with one repository, that counts what it is asked."""

    def __init__(self, root: Path, source: Path, error: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.root, self.source, self.error = root, source, error
        self.asked: list[tuple[str, str | None]] = []
        self.patterns: list[str] = []

    def HfApi(self) -> "Hub":
        return self

    def model_info(self, name: str, revision: str | None = None) -> Any:
        if self.error:
            raise self.error
        self.asked.append((name, revision))
        files = [str(f.relative_to(self.source)) for f in sorted(self.source.rglob("*")) if f.is_file()]
        return types.SimpleNamespace(sha="c" * 40, siblings=[types.SimpleNamespace(rfilename=f) for f in files])

    def snapshot_download(self, name: str, revision: str, allow_patterns: list[str]) -> str:
        assert revision == "c" * 40
        self.patterns = allow_patterns
        chosen = self.root / "chosen"
        for pattern in allow_patterns:
            (chosen / pattern).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / pattern, chosen / pattern)
        repository = fake_cache(self.root / "hub-cache", name, chosen, revision)
        shutil.rmtree(repository / "refs")
        return str(repository / "snapshots" / revision)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Hub]:
    def install(source: Path, error: Exception | None = None) -> Hub:
        hub = Hub(tmp_path, source, error)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setattr("nanodiffusion.pretrained.hub.find_spec", lambda name: object())
        return hub

    return install


def test_the_commit_is_asked_once_and_only_needed_files_are_fetched(
    online: Callable[..., Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_of("sd1", tmp_path)
    shutil.copytree(sd_files.tree("sd1", variant="fp16") / "unet", source / "unet", dirs_exist_ok=True)
    for extra in (
        "v1-5-pruned.safetensors",
        "unet/flax_model.msgpack",
        "safety_checker/model.safetensors",
        "README.md",
    ):
        (source / extra).parent.mkdir(exist_ok=True)
        (source / extra).touch()
    hub = online(source)
    with pytest.warns(UserWarning, match="has no variant fp16"):
        bundle = load_pretrained("owner/model", variant="fp16")
    assert hub.asked == [("owner/model", None)] and bundle.source["commit"] == "c" * 40
    weights = [p for p in hub.patterns if p.endswith(".safetensors")]
    assert weights == [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    assert not any("README" in p or "safety" in p or "msgpack" in p for p in hub.patterns)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = locate("owner/model", lambda files: files)  # the branch is remembered
    assert again == Place(again.path, "owner/model", "c" * 40)


def test_without_a_connection_the_cache_serves_and_that_is_said(online: Callable[..., Hub], tmp_path: Path) -> None:
    fake_cache(tmp_path / "hub-cache", "owner/model", sd_files.tree("sd1"))
    online(sd_files.tree("sd1"), ConnectionError("no route to host"))
    with pytest.warns(UserWarning, match=r"cannot be reached.*no route to host.*in the cache"):
        assert load_pretrained("owner/model").source["commit"] == "a" * 40
    with pytest.raises(UserError, match="owner/other"):
        load_pretrained("owner/other")


@pytest.mark.parametrize("inside", ["", "/unet", "/unet/"])
def test_a_unet_of_the_hub_comes_with_what_says_how_it_is_read(
    inside: str, online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, base = online(sd_files.tree("sd1", prediction="v_prediction")), load_pretrained(sd_files.tree("sd1"))
    found = replace_part(base, "unet", f"owner/model{inside}")
    assert found.denoiser.prediction.name == "v" and found.source["unet"] == f"owner/model{inside}"
    assert {p.split("/")[0] for p in hub.patterns} <= {"unet", "scheduler", "model_index.json"}
    said = scheduler_beside(f"owner/model{inside}")
    assert said and json.loads(said.read_text())["prediction_type"] == "v_prediction"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert replace_part(base, "unet", f"owner/model{inside}").denoiser.prediction.name == "v"


def test_the_hub_s_no_is_an_answer_and_not_a_broken_line(online: Callable[..., Hub], tmp_path: Path) -> None:
    class RepositoryNotFoundError(Exception):
        pass

    fake_cache(tmp_path / "hub-cache", "owner/model", sd_files.tree("sd1"))
    online(sd_files.tree("sd1"), RepositoryNotFoundError("401 Client Error"))
    with pytest.raises(UserError, match="no such model for you"):
        load_pretrained("owner/model")


def test_the_cache_works_without_the_package_and_a_download_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("nanodiffusion.pretrained.hub.find_spec", lambda name: None)
    fake_cache(tmp_path / "hub-cache", "owner/model", sd_files.tree("sd1"))
    assert load_pretrained("owner/model").source["commit"] == "a" * 40
    with pytest.raises(UserError, match=r"nanodiffusion\[hub\]"):
        load_pretrained("owner/other")


def test_needed_files_of_repositories_of_every_kind() -> None:
    both = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "x.bin"]
    assert needed(both, None, ("controlnet",)) == both[:2]
    assert needed(both, "fp16", ("controlnet",)) == [both[0], both[2]]
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert needed(["unet/config.json", index, *shards], "fp16", ("unet",)) == ["unet/config.json", index, *shards]
    with pytest.raises(UserError, match="OWNER/NAME/sd_xl_base"):
        needed(["sd_xl_base.safetensors", "README.md"], None, ("unet",))
    with pytest.raises(UserError, match="nanodiffusion convert"):
        needed(["unet/diffusion_pytorch_model.bin"], None, ("unet",))


@pytest.mark.parametrize("where", ["", "a", "/a/b", "./a/b", "~/a/b", "a/../b", "a//", "ow ner/name", "../a/b"])
def test_what_is_no_name_is_said(where: str) -> None:
    with pytest.raises(UserError, match="no such model"):
        split_name(where)


# -- saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "inpaint"), [("sd1", False), pytest.param("sd2", True, marks=pytest.mark.slow), ("sdxl", False)]
)
def test_diffusers_loads_what_is_saved_as_its_folder(family: str, inpaint: bool, tmp_path: Path) -> None:
    bundle = load_pretrained(sd_files.tree(family, inpaint=inpaint))
    folder = save_diffusers(bundle, tmp_path / "saved")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert ("Inpaint" in type(pipe).__name__) == inpaint
    for name, net in nets(bundle).items():
        same(getattr(pipe, name).state_dict(), net.state_dict())
    tokenizers = [pipe.tokenizer, *([pipe.tokenizer_2] if family == "sdxl" else [])]
    for theirs, part in zip(tokenizers, bundle.text.parts, strict=True):
        for words in ("a cat! of   Éé", "!!! red house", ""):
            assert theirs(words).input_ids == part.tokenizer.encode(words)
        assert theirs.pad_token_id == part.tokenizer.pad
    _, info = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = load_pretrained(folder)
    equal_bundles(again, bundle)
    assert again.family == bundle.family and again.scheduler == bundle.scheduler


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_what_is_saved_as_one_file(family: str, tmp_path: Path) -> None:
    folder = sd_files.tree(family, prediction="v_prediction")
    bundle = load_pretrained(folder)
    file = save_single(bundle, tmp_path / "saved.safetensors")
    name = f"StableDiffusion{'XL' * (family == 'sdxl')}Pipeline"
    pipe = getattr(diffusers, name).from_single_file(str(file), config=str(folder), local_files_only=True)
    for name, net in nets(bundle).items():
        same(getattr(pipe, name).state_dict(), net.state_dict())
    own = load_pretrained(file, tokenizer=folder / "tokenizer", prediction="v" if family == "sd2" else None)
    equal_bundles(own, bundle)


def with_config(net: nn.Module, **changes: Any) -> nn.Module:
    """The net, whose config says something else."""
    other = copy.copy(net)
    other.config = replace(net.config, **changes)  # type: ignore[arg-type,type-var]
    return other


UNSAID: dict[str, tuple[Callable[[Bundle], Bundle], str]] = {
    "heads": (
        lambda b: replace(
            b, denoiser=pretrained.Denoiser(with_config(b.denoiser.net, heads=(4,) * 4), "eps", "table", ldm())
        ),
        "attention_head_dim",
    ),
    "scale": (lambda b: replace(b, codec=with_config(b.codec, scale=0.5)), "scaling_factor"),
    "activation": (
        lambda b: replace(
            b, text=TextEncoder([replace(p, net=with_config(p.net, activation="gelu")) for p in b.text.parts])
        ),
        "hidden_act",
    ),
    "zeros": (lambda b: replace(b, family=replace(b.family, zero_uncond=True)), "force_zeros"),
}


@pytest.mark.parametrize("what", UNSAID)
def test_what_a_single_file_cannot_say_is_refused(what: str, tmp_path: Path) -> None:
    changed, said = UNSAID[what]
    with pytest.raises(UserError, match=f"one file cannot say(.|\n)*{said}"):
        save_single(changed(load_pretrained(sd_files.tree("sd1"))), tmp_path / "saved.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prediction", "levels", "said"),
    [("sample", {}, "prediction"), ("epsilon", {"beta_schedule": "linear", "beta_end": 0.02}, "schedule")],
)
def test_a_reading_that_a_single_file_cannot_say_is_refused(
    prediction: str, levels: dict[str, Any], said: str, tmp_path: Path
) -> None:
    bundle = load_pretrained(sd_files.tree("sd1", prediction=prediction, scheduler=levels))
    with pytest.raises(UserError, match=f"one file cannot say(.|\n)*key {said}"):
        save_single(bundle, tmp_path / "saved.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_inpainting_v_of_sd2_is_marked_since_files_usually_predict_eps(tmp_path: Path) -> None:
    folder = sd_files.tree("sd2", inpaint=True)
    file = save_single(load_pretrained(folder), tmp_path / "saved.safetensors")
    assert load_pretrained(file, tokenizer=folder / "tokenizer").denoiser.prediction.name == "v"


def test_original_file_to_folder_to_file_is_bit_exact(tmp_path: Path) -> None:
    for family in ("sd1", "sdxl"):
        before = sd_files.single(family)
        bundle = load_pretrained(before, "keep", prediction="eps", tokenizer=sd_files.tree(family) / "tokenizer")
        folder = save_diffusers(bundle, tmp_path / family)
        after = save_single(load_pretrained(folder, "keep"), tmp_path / f"{family}.safetensors")
        theirs = {k: v for k, v in load_file(before).items() if k not in ("betas", "alphas_cumprod")}
        same(load_file(after), theirs)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_learned_tokens_are_saved_as_diffusers_has_them(family: str, tmp_path: Path) -> None:
    bundle, g = load_pretrained(sd_files.tree(family)), torch.Generator().manual_seed(0)
    text = bundle.text
    for token, n in (("<thing>", 2), ("<other>", 1)):
        vectors = {name: torch.randn(n, p.net.config.width, generator=g) for name, p in zip(text.names, text.parts)}
        text = add(text, token, vectors)
    folder = save_diffusers(replace(bundle, text=text), tmp_path / "saved")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    words = pipe.maybe_convert_prompt("a <thing> of <other>", pipe.tokenizer)
    assert pipe.tokenizer(words).input_ids == text.parts[0].tokenizer.encode("a <thing> of <other>")
    again = load_pretrained(folder)
    found, wanted = (t.encode("a <thing> of <other>")[0] for t in (again.text, text))
    for key in wanted:
        assert_close(found[key], wanted[key], rtol=0, atol=0)
    with pytest.raises(UserError, match="<thing>"):
        save_single(replace(bundle, text=text), tmp_path / "saved.safetensors")


@pytest.mark.parametrize("schedule", [zero_terminal_snr(ldm()), ldm(200)], ids=["terminal", "trained"])
def test_another_schedule_and_prediction_are_saved(schedule: Any, tmp_path: Path) -> None:
    bundle = load_pretrained(sd_files.tree("sd1"))
    changed = replace(
        bundle, schedule=schedule, denoiser=pretrained.Denoiser(bundle.denoiser.net, "v", "table", schedule)
    )
    again = load_pretrained(save_diffusers(changed, tmp_path / "saved"))
    assert again.denoiser.prediction.name == "v"
    assert_close(again.schedule.sigmas, schedule.sigmas, rtol=1e-9, atol=0)


def test_a_folder_is_whole_or_not_there_and_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_pretrained(sd_files.tree("sd1"))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there already"):
        save_diffusers(bundle, tmp_path / "there")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanodiffusion.pretrained.publish._write_tokenizer", full)
    with pytest.raises(UserError, match="No space left"):
        save_diffusers(bundle, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, place = set(), os.fsync, publish._take_place
    missing: list[str] = []

    def noted(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def checked(new: Path, *rest: Path) -> None:
        written = {path: path.with_name(f".tmp-{path.name}") for path in (new, *new.rglob("*"))}
        missing.extend(str(path) for path, before in written.items() if synced.isdisjoint({str(path), str(before)}))
        place(new, *rest)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(publish, "_take_place", checked)
    bundle = load_pretrained(sd_files.tree("sd1"))
    save_diffusers(bundle, tmp_path / "whole")
    save_part(bundle.codec, tmp_path / "part", shard_gb=1e-4)
    assert not missing and len(synced) > 20


# -- manners -------------------------------------------------------------------------------------------------------------


def test_loading_imports_no_reference_library_and_no_hub() -> None:
    code = """
import sys
from nanodiffusion.pretrained import load_pretrained
load_pretrained(sys.argv[1])
print(*(sorted({"diffusers", "transformers", "huggingface_hub", "torchvision", "requests"} & set(sys.modules))))
"""
    command = [sys.executable, "-c", code, str(sd_files.tree("sd1"))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""
