"""Single trained networks, saved: what diffusers and transformers then load, and checkpoints with one of them put in."""

import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import sd_files  # noqa: E402
from sd import options, randomise  # noqa: E402

from nanodiffusion import save_part  # noqa: E402
from nanodiffusion.cli import main  # noqa: E402
from nanodiffusion.codec import F8C16, SD_VAE, SDXL_VAE, AutoencoderKL, TinyAutoencoder, TinyConfig  # noqa: E402
from nanodiffusion.errors import UserError  # noqa: E402
from nanodiffusion.fast import fuse_projections  # noqa: E402
from nanodiffusion.lora import add_lora, new_lora, read_lora, save_lora  # noqa: E402
from nanodiffusion.nets.adapter import ADAPTER_SD15, ADAPTER_SD15_LIGHT, ADAPTER_SDXL, Adapter, AdapterConfig  # noqa: E402
from nanodiffusion.nets.controlnet import ControlNet, ControlNetConfig  # noqa: E402
from nanodiffusion.nets.sd_unet import SD15, SD21, SDXL, SDUNet, SDUNetConfig  # noqa: E402
from nanodiffusion.pretrained import (  # noqa: E402
    Bundle,
    load_adapter,
    load_codec,
    load_controlnet,
    load_pretrained,
    load_text,
    load_unet,
    publish,
)
from nanodiffusion.pretrained.layouts import rename  # noqa: E402
from nanodiffusion.text import CLIP_BIGG, CLIP_H, CLIP_L, CLIPText, TextConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
slow = partial(pytest.param, marks=pytest.mark.slow)

# -- the networks, ours and theirs with the same weights -----------------------------------------------------------------

# Heads as published, so that a file without config.json says them too.
SD1 = SDUNetConfig(widths=(32, 64), depths=(1, 0), heads=(8, 8), context_dim=24, blocks=1)
SD2 = SDUNetConfig(widths=(32, 64), depths=(1, 1), heads=(1, 1), context_dim=24, linear_projection=True, blocks=1)
XL = replace(SD2, depths=(0, 2), depth_mid=2, added_dim=1280 + 6 * 4, size_features=4)
CLIP = TextConfig(64, 2, 1, 96, vocab=60, eos=59)


class Case(NamedTuple):
    """A network of ours, theirs, its loaders, and what both compute."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], Any]
    load: Callable[..., nn.Module]
    run: Callable[[Any, Any], tuple[Any, Any]]  # ours, theirs -> what each gives


def _unet(c: SDUNetConfig) -> Case:
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(c.depths))
    make = lambda: diffusers.UNet2DConditionModel(**options(c), out_channels=c.channels_out, up_block_types=up)
    return Case(lambda: SDUNet(c), make, load_unet, partial(_run_unet, c))


def _given(c: SDUNetConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    given = {"x": torch.randn(2, c.channels_in, 8, 8, generator=g), "t": torch.tensor([3.0, 700.0])}
    given["context"] = torch.randn(2, 5, c.context_dim, generator=g)
    added = {}
    if c.added_dim:
        given |= {"pooled": torch.randn(2, c.pooled_dim, generator=g), "sizes": torch.arange(12).reshape(2, 6)}
        added = {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": given["sizes"]}}
    return given, added


def _run_unet(c: SDUNetConfig, ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    given, added = _given(c)
    return ours(**given), theirs(given["x"], given["t"], given["context"], **added).sample


def _controlnet(encoder: SDUNetConfig) -> Case:
    c = ControlNetConfig(encoder, hint_widths=(8, 8, 16, 16))  # four, as diffusers reads one file
    kept = {k: v for k, v in options(encoder).items() if k != "mid_block_type"}
    make = lambda: diffusers.ControlNetModel(**kept, conditioning_embedding_out_channels=c.hint_widths)

    def run(ours: Any, theirs: Any) -> tuple[Any, Any]:
        given, added = _given(encoder)
        image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        down, mid = theirs(given["x"], given["t"], given["context"], image, return_dict=False, **added)
        return ours(**given, hint=ours.embed(image)), (*down, mid)

    return Case(lambda: ControlNet(c), make, load_controlnet, run)


def _adapter(kind: str, c: AdapterConfig) -> Case:
    make = lambda: diffusers.T2IAdapter(c.channels_in, list(c.widths), c.blocks, c.downscale, kind)

    def run(ours: Any, theirs: Any) -> tuple[Any, Any]:
        image = torch.rand(2, c.channels_in, 64, 96, generator=torch.Generator().manual_seed(2))
        return ours(image), tuple(theirs(image))

    return Case(lambda: Adapter(c), make, load_adapter, run)


def _vae() -> Case:
    c = replace(SD_VAE, widths=(32, 64), blocks=1, scale=0.13025)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": c.widths, "layers_per_block": 1, "scaling_factor": c.scale}

    def run(ours: Any, theirs: Any) -> tuple[Any, Any]:
        image = 2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) - 1
        z = theirs.encode(image).latent_dist.mode() * theirs.config.scaling_factor
        x0 = ours.encode(image)
        return (x0, ours.decode(z)), (z, theirs.decode(z / theirs.config.scaling_factor).sample)

    return Case(lambda: AutoencoderKL(c), lambda: diffusers.AutoencoderKL(**blocks, **sizes), load_codec, run)


def _text(c: TextConfig) -> Case:
    names = {
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "vocab_size": c.vocab,
    }
    more = {"intermediate_size": c.mlp, "hidden_act": c.activation, "projection_dim": c.projection or c.width}
    ends = {"bos_token_id": c.eos - 1, "eos_token_id": c.eos, "pad_token_id": 1, "max_position_embeddings": c.positions}
    name = "CLIPTextModel" + "WithProjection" * bool(c.projection)
    make = lambda: getattr(transformers, name)(transformers.CLIPTextConfig(**names, **more, **ends))

    def run(ours: Any, theirs: Any) -> tuple[Any, Any]:
        ids = torch.randint(0, c.eos, (2, 77), generator=torch.Generator().manual_seed(2))
        ids[:, 9:] = c.eos
        mine, found = ours.encode(ours.embed(ids), ours.end(ids)), theirs(ids)
        pooled = found.text_embeds if c.projection else found.pooler_output
        return (mine.last, mine.pooled), (found.last_hidden_state, pooled)

    return Case(lambda: CLIPText(c), make, load_text, run)


CASES = {
    "unet-sd1": _unet(SD1),
    "unet-inpaint": _unet(replace(SD2, channels_in=9)),
    "unet-sdxl": _unet(XL),
    "controlnet-sd1": _controlnet(SD1),
    "controlnet-sdxl": _controlnet(XL),
    "adapter-full": _adapter("full_adapter", AdapterConfig(widths=(16, 32, 32, 32))),
    "adapter-full-xl": _adapter("full_adapter_xl", AdapterConfig("full_xl", widths=(16, 32, 64, 64), downscale=16)),
    "adapter-light": _adapter("light_adapter", AdapterConfig("light", widths=(16, 32, 32), blocks=3)),
    "vae": _vae(),
    "text": _text(CLIP),
    "text-projected": _text(replace(CLIP, activation="gelu", projection=48)),
}
CLASSES = {"text": "CLIPTextModel", "text-projected": "CLIPTextModelWithProjection"}


def pair(name: str) -> tuple[nn.Module, Any]:
    """(ours, theirs) with the same random weights, no one of them zero."""
    case = CASES[name]
    ours, theirs = randomise(case.ours()).eval(), case.theirs().eval()
    state = ours.state_dict()
    if name.startswith("text") and not any(key.startswith("text_model.") for key in theirs.state_dict()):
        state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def loaded_by_theirs(theirs: Any, folder: Path) -> Any:
    """What their library loads, and that it found every weight and no other."""
    net, said = type(theirs).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    return net.eval()


def equal(found: nn.Module, wanted: nn.Module, dtype: torch.dtype | None = None) -> None:
    """The same config, names and numbers, bit for bit."""
    assert found.config == wanted.config and getattr(found, "control", 0) == getattr(wanted, "control", 0)
    theirs = wanted.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        assert_close(tensor, theirs[name].to(dtype or theirs[name].dtype), rtol=0, atol=0)


# -- folders -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_the_same_outputs_in_their_library_and_here(name: str, tmp_path: Path) -> None:
    case, (ours, theirs) = CASES[name], pair(name)
    folder = save_part(ours, tmp_path / "new" / "part")
    again, again_theirs = case.load(folder, "keep", "cpu"), loaded_by_theirs(theirs, folder)
    equal(again, ours)
    (mine, wanted), (mine_again, found) = case.run(ours, theirs), case.run(again, again_theirs)
    assert_close(found, wanted, rtol=0, atol=0)
    assert_close(mine_again, mine, rtol=0, atol=0)
    assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["part"]


@pytest.mark.parametrize(("dtype", "wanted"), [("fp16", torch.float16), slow(torch.bfloat16, torch.bfloat16)])
def test_a_dtype_is_given_to_what_is_written_and_not_to_the_net(
    dtype: Any, wanted: torch.dtype, tmp_path: Path
) -> None:
    for name in ("unet-sd1", "text"):
        ours = randomise(CASES[name].ours())
        folder, file = (save_part(ours, tmp_path / f"{name}{end}", dtype) for end in ("", ".safetensors"))
        (inside,) = folder.glob("*.safetensors")
        for where in (inside, file):
            assert {tensor.dtype for tensor in load_file(where).values()} == {wanted}
        equal(CASES[name].load(folder, "keep", "cpu"), ours, wanted)
        assert next(ours.parameters()).dtype == torch.float32


def test_a_folder_says_the_natural_size_and_takes_another(tmp_path: Path) -> None:
    said = lambda folder: json.loads((folder / "config.json").read_text())["sample_size"]
    sizes = {"sd1": (SD1, 64), "sd2": (SD2, 96), "sdxl": (XL, 128)}
    for family, (config, side) in sizes.items():
        assert said(save_part(SDUNet(config), tmp_path / family)) == side
    assert said(save_part(SDUNet(SD2), tmp_path / "base", size=512)) == 64


def test_other_weights_by_the_same_names_are_written_in_place_of_the_nets(tmp_path: Path) -> None:
    net, average = (randomise(SDUNet(SD1), seed) for seed in (1, 2))
    equal(load_unet(save_part(net, tmp_path / "ema", weights=average.state_dict()), "keep", "cpu"), average)


def test_a_class_made_of_one_is_saved_as_that(tmp_path: Path) -> None:
    net = randomise(SDUNet(SD1))
    net.__class__ = type("FSDPSDUNet", (SDUNet,), {})  # as fully_shard does
    equal(load_unet(save_part(net, tmp_path / "unet"), "keep", "cpu"), net)


@pytest.mark.parametrize("name", ["unet-sd1", "text"])
def test_shards_are_small_and_read_by_all(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name)
    folder, limit = save_part(ours, tmp_path / "part", shard_gb=1e-4), 100_000
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
    equal(CASES[name].load(folder, "keep", "cpu"), ours)
    found = loaded_by_theirs(theirs, folder).state_dict()
    for key, tensor in theirs.state_dict().items():
        assert_close(found[key], tensor, rtol=0, atol=0)
    (index,) = folder.glob("*.index.json")
    raw = json.loads(index.read_text())
    assert raw["metadata"]["total_size"] == sum(t.nbytes for t in ours.state_dict().values())
    whole = save_part(ours, tmp_path / "whole", shard_gb=5)
    assert len(list(whole.iterdir())) == 2  # one file suffices


# -- one file ------------------------------------------------------------------------------------------------------------

SIGNS = {  # a name of the published single files
    "unet": "model.diffusion_model.input_blocks.0.0.weight",
    "controlnet-sd1": "control_model.zero_convs.0.0.weight",
    "controlnet-sdxl": "controlnet_down_blocks.0.weight",
    "adapter": "body.0.",
    "vae": "encoder.down.0.block.0.conv1.weight",
    "text": "text_model.encoder.layers.0.self_attn.q_proj.weight",
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_one_file_has_the_published_names_and_is_read_here(name: str, tmp_path: Path) -> None:
    case, ours = CASES[name], randomise(CASES[name].ours()).eval()
    file = save_part(ours, tmp_path / "part.safetensors")
    kind = name.split("-")[0]
    assert any(key.startswith(SIGNS.get(name) or SIGNS[kind]) for key in load_file(file))
    told = {"vae": {"family": "sdxl"}, "text": {"activation": getattr(ours.config, "activation", "")}}
    equal(case.load(file, "keep", "cpu", **told.get(kind, {})), ours)


PUBLISHED: list[tuple[type[nn.Module], list[Any]]] = [
    (SDUNet, [SD15, SD21, SDXL, replace(SDXL, channels_in=9)]),
    (ControlNet, [ControlNetConfig(config) for config in (SD15, SD21, SDXL)]),
    (Adapter, [ADAPTER_SD15, ADAPTER_SD15_LIGHT, ADAPTER_SDXL, replace(ADAPTER_SD15, channels_in=1)]),
    (AutoencoderKL, [SD_VAE, SDXL_VAE, F8C16]),
    (CLIPText, [CLIP_L, CLIP_H, CLIP_BIGG]),
]


@pytest.mark.parametrize(
    ("kind", "config"), [slow(kind, c) if i else (kind, c) for kind, cs in PUBLISHED for i, c in enumerate(cs)]
)
def test_every_published_network_may_be_one_file(
    kind: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        net = kind(config)
    empty = {name: torch.empty(1).expand(tensor.shape) for name, tensor in net.state_dict().items()}
    written: dict[str, Tensor] = {}
    monkeypatch.setattr(publish, "save", lambda file, tensors: written.update(tensors) or file)
    save_part(net, tmp_path / "net.safetensors", weights=empty)
    plan = rename(written)
    (pieces,) = plan.components.values()
    assert not plan.unknown and pieces.keys() == empty.keys()
    for ours, piece in pieces.items():
        assert piece.shape(tuple(written[piece.source].shape)) == empty[ours].shape


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [slow("unet-sd1"), slow("unet-inpaint"), "unet-sdxl", "controlnet-sd1", slow("controlnet-sdxl"), "vae"]
)
def test_diffusers_reads_one_file(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name)
    file, folder = save_part(ours, tmp_path / "part.safetensors"), save_part(ours, tmp_path / "folder")
    net = type(theirs).from_single_file(str(file), config=str(folder), local_files_only=True).eval()
    for key, tensor in theirs.state_dict().items():
        assert_close(net.state_dict()[key], tensor, rtol=0, atol=0)
    wanted, found = (CASES[name].run(ours, each)[1] for each in (theirs, net))
    assert_close(found, wanted, rtol=0, atol=0)


@torch.no_grad()
def test_transformers_reads_one_file_beside_a_config(tmp_path: Path) -> None:
    ours, theirs = pair("text-projected")
    folder = save_part(ours, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    save_part(ours, folder / "model.safetensors")
    net = loaded_by_theirs(theirs, folder)
    assert_close(
        CASES["text-projected"].run(ours, theirs)[1], CASES["text-projected"].run(ours, net)[1], rtol=0, atol=0
    )


# -- whole or not there --------------------------------------------------------------------------------------------------

TARGETS = [("part", False), ("part", True), ("part.safetensors", False), ("part.safetensors", True)]


def at_moment(n: int, act: Callable[[], None]) -> Callable[[Any, str], Callable[..., Any]]:
    """Wraps functions of which the n-th call, counted over all, first acts."""
    left = [n]

    def wrap(owner: Any, name: str) -> Callable[..., Any]:
        own = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                act()
            return own(*args, **kwargs)

        return call

    return wrap


def full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("name", "over"), [slow(*TARGETS[0]), TARGETS[1], slow(*TARGETS[2]), slow(*TARGETS[3])])
def test_a_full_disk_at_any_moment_leaves_what_was_there(
    name: str, over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = (randomise(SDUNet(SD1), seed) for seed in (1, 2))
    if over:
        save_part(before, tmp_path / name)
    told = ""
    for moment in itertools.count(1):
        wrap = at_moment(moment, full)
        try:
            with monkeypatch.context() as patch:
                for owner, function in ((os, "replace"), (Path, "write_text"), (Path, "touch")):
                    patch.setattr(owner, function, wrap(owner, function))
                save_part(after, tmp_path / name, over=over)
        except UserError as e:
            told = str(e)
            assert [p.name for p in tmp_path.iterdir()] == [name] * over
            if over:
                equal(load_unet(tmp_path / name, "keep", "cpu"), before)
        else:
            break
    assert moment > 2 and "No space left" in told and name in told
    equal(load_unet(tmp_path / name, "keep", "cpu"), after)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "over"), TARGETS)
def test_killed_at_any_moment_it_leaves_one_of_both_whole(name: str, over: bool, tmp_path: Path) -> None:
    before, after = (randomise(SDUNet(SD1), seed) for seed in (1, 2))
    for moment in itertools.count(1):
        folder = tmp_path / str(moment)
        if over:
            save_part(before, folder / name)
        if not (child := os.fork()):
            wrap = at_moment(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
            for owner, function in ((os, "replace"), (os, "fsync"), (os, "rmdir"), (Path, "write_text")):
                setattr(owner, function, wrap(owner, function))
            try:
                save_part(after, folder / name, over=over)
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = [place for place in (folder / name, folder / f".old-{name}") if place.exists()]
        assert found or not over
        for i, place in enumerate(found):  # where both are, one has come and the other was to go
            net = load_unet(place, "keep", "cpu") if i == 0 else None
            assert net is None or any(same_numbers(net, each) for each in (before, after)[1 - over :])
        save_part(after, folder / name, over=True)
        equal(load_unet(folder / name, "keep", "cpu"), after)
        if not killed:
            break
    assert moment > 3


def same_numbers(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- what cannot be saved ------------------------------------------------------------------------------------------------


def _there(folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "notes.txt").write_text("mine")
    (folder / "there.safetensors").write_text("mine")


def _save(make: Callable[[], nn.Module], name: str = "new", **more: Any) -> Callable[[Path], Any]:
    return lambda folder: save_part(make(), folder / name, **more)


sd1 = lambda: SDUNet(SD1)
BAD: list[tuple[Callable[[Path], Any], str]] = [
    (_save(lambda: nn.Linear(2, 2)), "nothing here saves such a network"),
    (_save(lambda: TinyAutoencoder(TinyConfig(width=8))), "AutoencoderKL"),
    (_save(sd1, "there"), "there already"),
    (_save(sd1, "there.safetensors"), "there already"),
    (_save(sd1, "there", over=True), "something else"),
    (_save(sd1, "net.ckpt"), "save as what"),
    (_save(sd1, dtype="fp8"), "unknown dtype"),
    (_save(sd1, shard_gb=0), "not a positive number"),
    (_save(sd1, shard_gb=float("nan")), "not a positive number"),
    (_save(sd1, "new.safetensors", shard_gb=1), "one file has no shards"),
    (_save(lambda: fuse_projections(SDUNet(SD1))), "attn1.to_q"),
    (_save(sd1, weights={}), "missing"),
    (_save(sd1, weights=SDUNet(SD2).state_dict()), "of another shape"),
    (_save(lambda: SDUNet(SD1).to("meta")), "without values"),
    (_save(lambda: SDUNet(replace(SD1, heads=(2, 2))), "new.safetensors"), "attention_head_dim"),
    (_save(lambda: AutoencoderKL(replace(SD_VAE, widths=(32,), groups=8)), "new.safetensors"), "norm_num_groups"),
    (_save(lambda: AutoencoderKL(replace(SD_VAE, widths=(32,), shift=0.1)), "new.safetensors"), "shift_factor"),
    (_save(lambda: CLIPText(replace(CLIP, heads=4)), "new.safetensors"), "num_attention_heads"),
    (_save(lambda: Adapter(AdapterConfig(widths=(8,), downscale=16)), "new.safetensors"), "adapter_type"),
    (_save(lambda: ControlNet(ControlNetConfig(replace(SD1, channels_in=9), 0))), "without a stem"),
    (_save(lambda: SDUNet(replace(SD1, pass_through=2))), "pass_through"),
]


@pytest.mark.parametrize(("save", "said"), BAD)
def test_what_cannot_be_saved_is_told_and_nothing_is_written(
    save: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    _there(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        save(tmp_path)
    assert len(str(caught.value).splitlines()) <= 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there", "there.safetensors"]
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"


def test_a_file_cannot_be_written_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("part", "part.safetensors"):
        with pytest.raises(UserError, match="cannot save"):
            save_part(sd1(), tmp_path / "file" / name)


def test_a_controlnet_without_a_stem_is_saved_as_one_file(tmp_path: Path) -> None:
    net = randomise(ControlNet(ControlNetConfig(replace(SD1, channels_in=9), 0)))
    equal(load_controlnet(save_part(net, tmp_path / "net.safetensors"), "keep", "cpu"), net)


# -- in a checkpoint -----------------------------------------------------------------------------------------------------


def trained(net: nn.Module, seed: int = 5) -> nn.Module:
    """A copy of the net after steps that changed every weight."""
    other = type(net)(getattr(net, "control", net.config))
    return randomise(other, seed).eval()


def parts_of(bundle: Bundle) -> dict[str, nn.Module]:
    texts = (part.net for part in bundle.text.parts)
    return {"unet": bundle.denoiser.net, "vae": bundle.codec, **dict(zip(("text_encoder", "text_encoder_2"), texts))}


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize(
    ("family", "end"), [("sd1", ""), slow("sdxl", ".safetensors"), slow("sd1", ".safetensors"), slow("sdxl", "")]
)
def test_trained_parts_take_their_places_and_nothing_else_changes(family: str, end: str, tmp_path: Path) -> None:
    base = sd_files.tree(family)
    wanted = parts_of(load_pretrained(base, "keep"))
    for name in ("unet", list(wanted)[-1]):
        wanted[name] = trained(wanted[name])
        save_part(wanted[name], tmp_path / "run" / name)
    out = tmp_path / f"out{end}"
    assert run(base, out, *(f"{name}={tmp_path / 'run' / name}" for name in ("unet", list(wanted)[-1]))) == 0
    found = parts_of(load_pretrained(out, "keep", tokenizer=base / "tokenizer" if end else None))
    for name, net in wanted.items():
        equal(found[name], net)
    name = f"StableDiffusion{'XL' * (family == 'sdxl')}Pipeline"
    if end:
        pipe = getattr(diffusers, name).from_single_file(str(out), config=str(base), local_files_only=True)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(out)
        assert type(pipe).__name__ == name
    for name, net in wanted.items():
        theirs = {key.removeprefix("text_model."): t for key, t in getattr(pipe, name).state_dict().items()}
        for key, tensor in net.state_dict().items():
            assert_close(theirs[key.removeprefix("text_model.")], tensor, rtol=0, atol=0)


@pytest.mark.slow
def test_an_inpainting_unet_makes_an_inpainting_checkpoint_and_a_whole_one_gives_its_part(tmp_path: Path) -> None:
    base, other = sd_files.tree("sd2"), sd_files.tree("sd2", inpaint=True)
    assert run(base, tmp_path / "out", f"unet={other}", f"vae={other}", "dtype=fp16") == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == "StableDiffusionInpaintPipeline"
    found, wanted = load_pretrained(tmp_path / "out", "keep"), load_pretrained(other, "keep")
    equal(found.denoiser.net, wanted.denoiser.net, torch.float16)
    assert found.denoiser.prediction.name == "v" and found.family == load_pretrained(base).family


@pytest.mark.slow
def test_one_file_takes_a_part_from_one_file(tmp_path: Path) -> None:
    base, folder = sd_files.single("sd1"), sd_files.tree("sd1")
    vae = trained(load_codec(folder, "keep"))
    part = save_part(vae, tmp_path / "vae.safetensors")
    assert run(base, tmp_path / "out.safetensors", f"vae={part}", f"tokenizer={folder / 'tokenizer'}") == 0
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert before.keys() - {"betas", "alphas_cumprod"} == after.keys()
    for name, tensor in after.items():
        same = torch.equal(tensor, before[name])
        assert same != name.startswith("first_stage_model."), name
    equal(load_codec(tmp_path / "out.safetensors", "keep"), vae)


@pytest.mark.parametrize("name", [slow("unet-sd1"), slow("controlnet-sd1"), "adapter-light", "vae"])
def test_one_network_goes_from_folder_to_file_and_back(name: str, tmp_path: Path) -> None:
    net, load = randomise(CASES[name].ours()).eval(), CASES[name].load
    folder, file = save_part(net, tmp_path / "a"), tmp_path / "b.safetensors"
    told = ["family=sdxl"] if name == "vae" else []
    assert run(folder, file) == 0 and run(file, tmp_path / "c", *told) == 0
    equal(load(tmp_path / "c", "keep", "cpu"), net)
    assert run(folder, tmp_path / "half", "dtype=bf16") == 0
    equal(load(tmp_path / "half", "keep", "cpu"), net, torch.bfloat16)
    if name == "vae":
        assert run(file, tmp_path / "d") == 2
        assert run(file, tmp_path / "d", "family=sd9") == 2


def lora_of(base: Path, file: Path, seed: int = 0) -> Path:
    """A LoRA of the U-Net and the text encoder that is not zero."""
    bundle, g = load_pretrained(base), torch.Generator().manual_seed(seed)
    applied = new_lora({"unet": bundle.denoiser.net, "text": bundle.text.parts[0].net}, 2, generator=g)
    for p in applied.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    save_lora(applied.lora, file)
    return file


@torch.no_grad()
def test_loras_are_fused_and_act_as_they_do_live(tmp_path: Path) -> None:
    base = sd_files.tree("sd1")
    files = [lora_of(base, tmp_path / f"{i}.safetensors", i) for i in range(2)]
    assert run(base, tmp_path / "out", f"lora={files[0]}:0.7", f"lora={files[1]}") == 0
    fused, live = load_pretrained(tmp_path / "out"), load_pretrained(base)
    nets = {"unet": live.denoiser.net, "text": live.text.parts[0].net}
    plain = live.text.encode("a red cat")[0]["context"]
    for file, strength in zip(files, (0.7, 1.0)):
        add_lora(nets, read_lora(file), strength)
    contexts = [bundle.text.encode("a red cat")[0]["context"] for bundle in (fused, live)]
    assert_close(*contexts, rtol=1e-4, atol=1e-5)
    assert (contexts[0] - plain).abs().max() > 0.01
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0])
    found, wanted = (bundle.denoiser(x, sigma, {"context": contexts[0]}) for bundle in (fused, live))
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_lora_is_fused_into_a_trained_part(tmp_path: Path) -> None:
    base = sd_files.tree("sd1")
    net = trained(load_unet(base, "keep"))
    file, part = lora_of(base, tmp_path / "lora.safetensors"), save_part(net, tmp_path / "unet")
    assert run(base, tmp_path / "out", f"lora={file}:-1.5", f"unet={part}") == 0
    found, factors = load_unet(tmp_path / "out", "keep").state_dict(), read_lora(file)
    add_lora({"unet": net}, replace(factors, parts={"unet": factors.parts["unet"]}), -1.5).fuse()
    for name, tensor in net.state_dict().items():
        assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.slow
def test_a_folder_of_pickles_takes_a_part_too(tmp_path: Path) -> None:
    base = sd_files.tree("sd1", safe=False)
    net = trained(load_unet(sd_files.tree("sd1"), "keep"))
    assert run(base, tmp_path / "out", f"unet={save_part(net, tmp_path / 'unet')}") == 0
    equal(load_unet(tmp_path / "out", "keep"), net)
    equal(load_codec(tmp_path / "out", "keep"), load_codec(sd_files.tree("sd1"), "keep"))


WRONG: list[tuple[list[str], str]] = [
    (["unet=SD2/unet"], "does not belong"),
    (["unet=SDXL"], "does not belong"),
    (["vae=SDXL/vae"], "scale 0.13025"),
    (["text_encoder=SD2/text_encoder"], "does not belong"),
    (["text_encoder_2=SD1/text_encoder"], "one text encoder"),
    (["unet=SD1/vae"], "no UNet2DConditionModel"),
    (["unet=CONTROL"], "no UNet2DConditionModel"),
    (["vae=SD1/unet/diffusion_pytorch_model.safetensors"], "another kind of model|holds no"),
    (["unet=none/such/folder"], "no such model"),
    (["unet="], "which one"),
    (["unet=SD1", "unet=SD1"], "given twice"),
    (["unets=SD1"], "did you mean 'unet'"),
    (["unet=pickle.ckpt"], "nanodiffusion convert"),
    (["controlnet=CONTROL"], "unknown key"),
    (["lora=none.safetensors:0.5"], "no such LoRA"),
    (["lora="], "no such LoRA"),
    (["lora=SD1/unet"], "LoRA"),
    (["lora=XLLORA:1"], "another family"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_parts_that_do_not_fit_are_told(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1)}, "pickle.ckpt")
    made = {
        "XLLORA": lambda: lora_of(sd_files.tree("sdxl"), tmp_path / "xl.safetensors"),
        "CONTROL": lambda: sd_files.part("controlnet", "sd1"),
        **{name.upper(): partial(sd_files.tree, name) for name in ("sd1", "sd2", "sdxl")},
    }
    words = [re.sub(r"(?<==)[A-Z]+\d?\b", lambda m: str(made[m[0]]()), word) for word in words]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(sd_files.tree("sd1"), "out", *words) == 2
    message = capsys.readouterr().err
    assert re.search(said, message), message
    assert len(message.splitlines()) <= 7
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# -- what a U-Net was trained to predict, of which noise levels -----------------------------------------------------------


def told_anew(folder: Path) -> nn.Module:
    """A run's `unet/` and `scheduler/`: v on levels that end in noise alone, of a base that predicts eps."""
    net = trained(load_unet(sd_files.tree("sd1"), "keep"))
    save_part(net, folder / "unet")
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    }
    scheduler = diffusers.DDIMScheduler(**config, prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    return net


@pytest.mark.parametrize("inside", ["unet", slow(""), slow("unet/diffusion_pytorch_model.safetensors")])
def test_a_unet_brings_its_prediction_and_its_noise_levels(inside: str, tmp_path: Path) -> None:
    told_anew(tmp_path / "run")
    assert run(sd_files.tree("sd1"), tmp_path / "out", f"unet={tmp_path / 'run' / inside}") == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr is True
    pipe.scheduler.set_timesteps(10)
    assert pipe.scheduler.timesteps[0] == 999  # which is pure noise
    found = load_pretrained(tmp_path / "out")
    wanted = diffusers.DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.double()
    assert found.denoiser.prediction.name == "v"
    assert_close(1 / (1 + found.schedule.sigmas**2), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_unet_apart_from_its_run_is_read_as_the_base_s(tmp_path: Path) -> None:
    told_anew(tmp_path / "run")
    (tmp_path / "run/unet").rename(tmp_path / "apart")
    assert run(sd_files.tree("sd1"), tmp_path / "out", f"unet={tmp_path / 'apart'}") == 0
    found, base = load_pretrained(tmp_path / "out"), load_pretrained(sd_files.tree("sd1"))
    assert found.denoiser.prediction.name == "eps" and torch.equal(found.schedule.sigmas, base.schedule.sigmas)


@pytest.mark.slow
def test_a_picture_of_such_a_unet_is_the_converted_checkpoint_s_and_is_made_again(tmp_path: Path) -> None:
    told_anew(tmp_path / "run")
    assert run(sd_files.tree("sd1"), tmp_path / "out", f"unet={tmp_path / 'run/unet'}") == 0
    quick = ["a cat", "width=64", "height=64", "steps=3", "ladder=trailing"]
    words = [f"model={sd_files.tree('sd1')}", f"unet={tmp_path / 'run/unet'}", f"out={tmp_path / 'a.png'}"]
    assert main(["generate", *quick, *words]) == 0
    assert main(["generate", *quick, f"model={tmp_path / 'out'}", f"out={tmp_path / 'b.png'}"]) == 0
    assert main(["generate", *quick, words[0], f"out={tmp_path / 'c.png'}"]) == 0
    assert main(["regenerate", str(tmp_path / "a.png"), f"out={tmp_path / 'd.png'}"]) == 0
    a, b, c, d = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abcd")
    assert np.array_equal(a, b) and np.array_equal(a, d) and not np.array_equal(a, c)
