"""A bundle, or one network, back to disk: the folder that diffusers loads, or one file in the original layout."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanodiffusion.codec import AutoencoderKL
from nanodiffusion.errors import UserError, few, lookup
from nanodiffusion.nets.adapter import Adapter
from nanodiffusion.nets.controlnet import ControlNet, ControlNetConfig
from nanodiffusion.nets.sd_unet import SDUNet, SDUNetConfig
from nanodiffusion.noise import ldm, zero_terminal_snr
from nanodiffusion.pretrained import architecture as arch
from nanodiffusion.pretrained.layouts import join, originals
from nanodiffusion.pretrained.load import FAMILIES, TEXTS, Bundle, family_of, usually_v
from nanodiffusion.pretrained.scheduler_config import same_levels, scheduler_json
from nanodiffusion.pretrained.weights import (
    DTYPES,
    PICKLES,
    STEMS,
    Source,
    check_names,
    disk_errors,
    save,
)
from nanodiffusion.tensors import sync
from nanodiffusion.text import CLIPText, CLIPTokenizer

# -- a bundle ------------------------------------------------------------------------------------------------------------


def save_diffusers(bundle: Bundle, folder: str | Path) -> Path:
    """Write a bundle as the folder that diffusers loads; it is there whole or not at all.

    UserError: the folder is there already, full or unwritable disk, a network that diffusers has not.
    """
    folder = Path(folder)
    with _new_folder(folder) as beside:
        _write_components(bundle, beside)
    return folder


@contextmanager
def _new_folder(folder: Path, over: bool = False) -> Iterator[Path]:
    """An empty folder that takes its place when the block ends well, and else is gone. UserError: there already, the disk's."""
    if folder.exists() and not over:
        raise UserError("this is there already, and is not written over", file=folder, fix="give a new folder's name")
    beside, before = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".old-{folder.name}")
    with disk_errors(folder):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            sync(beside)
            _take_place(beside, folder, before)
            sync(folder.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _take_place(new: Path, folder: Path, before: Path) -> None:
    """The folder is the new one; the one before is aside for a moment, since no folder can be written over at one stroke."""
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    try:
        os.replace(new, folder)
    except OSError:
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _write_components(bundle: Bundle, folder: Path) -> None:
    net, codec = bundle.denoiser.net, bundle.codec
    unet = arch.unet_json(bundle.config, bundle.family.size // codec.factor)
    _write_component(folder / "unet", STEMS[0], unet, net)
    _write_component(folder / "vae", STEMS[0], arch.vae_json(codec.config), codec)
    for part, (name, tokenizer) in zip(bundle.text.parts, TEXTS):
        _write_component(folder / name, STEMS[1], arch.text_json(part.net.config), part.net)
        _write_tokenizer(folder / tokenizer, part.tokenizer)
    save_scheduler(_scheduler(bundle), folder)
    _write_json(folder / "model_index.json", _index_json(bundle))


def save_scheduler(config: Mapping[str, Any], folder: Path) -> None:
    """Write `scheduler/scheduler_config.json` in a folder."""
    (folder / "scheduler").mkdir(exist_ok=True)
    sync(folder)
    _write_json(folder / "scheduler" / "scheduler_config.json", config)


def _write_component(folder: Path, stem: str, config: dict[str, Any], net: nn.Module) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config)
    save(folder / f"{stem}.safetensors", net.state_dict())


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
    sync(path.parent)


def _write_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """vocab.json, merges.txt and what is added to them, learned tokens included: one of several vectors is <a>, <a>_1, ..."""
    folder.mkdir()
    whole = json.loads(tokenizer.backend.to_str())
    names = {i: token for token, i in whole["model"]["vocab"].items()}
    rules = (rule if isinstance(rule, str) else " ".join(rule) for rule in whole["model"]["merges"])
    _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *rules, ""]))
    _write_json(folder / "vocab.json", whole["model"]["vocab"])
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    learned = {
        i: {"content": f"{token}_{k}" if k else token, "special": False, **flags}
        for token, ids in tokenizer.added.items()
        for k, i in enumerate(ids)
    }
    special = {token["id"]: token for token in whole["added_tokens"] if token["content"] not in tokenizer.added}
    added = {
        str(i): {k: v for k, v in token.items() if k != "id"} for i, token in sorted({**special, **learned}.items())
    }
    ends = {
        "bos_token": tokenizer.start,
        "eos_token": tokenizer.end,
        "unk_token": tokenizer.end,
        "pad_token": tokenizer.pad,
    }
    kind = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    config = {"added_tokens_decoder": added, **{key: names[i] for key, i in ends.items()}, **kind, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", config)


def _scheduler(bundle: Bundle) -> dict[str, Any]:
    return scheduler_json(bundle.schedule, bundle.denoiser.prediction.name, bundle.scheduler)


def _index_json(bundle: Bundle) -> dict[str, Any]:
    family, inpaint = bundle.family, bundle.config.channels_in == 9
    name = f"StableDiffusion{'XL' * family.sizes}{'Inpaint' * inpaint}Pipeline"
    parts: dict[str, Any] = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part, (text, tokenizer) in zip(bundle.text.parts, TEXTS):
        parts[text] = ["transformers", "CLIPTextModel" + "WithProjection" * bool(part.net.config.projection)]
        parts[tokenizer] = ["transformers", "CLIPTokenizer"]
    parts["scheduler"] = ["diffusers", _scheduler(bundle)["_class_name"]]
    if family.sizes:
        parts["force_zeros_for_empty_prompt"] = family.zero_uncond
    else:  # there is none here, and diffusers asks
        parts |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {"_class_name": name, "_diffusers_version": "0.20.0", **parts}


def save_single(bundle: Bundle, file: str | Path) -> Path:
    """Write a bundle as one .safetensors in the original layout, which has no place for configs and tokenizers.

    One that predicts v where files usually do not gets the mark `v_pred`, a terminal SNR of zero `ztsnr`, by which other
    programs know them. UserError: learned tokens, or anything else that such a file cannot say; full or unwritable disk.
    """
    file, family = Path(file), bundle.family
    if learned := [token for part in bundle.text.parts for token in part.tokenizer.added]:
        raise UserError("a single file cannot hold learned tokens", key=learned[0], fix="save as a diffusers folder")
    names = ("text", "text_2")
    nets: dict[str, Any] = {"unet": bundle.denoiser.net, "vae": bundle.codec}
    nets |= dict(zip(names, (part.net for part in bundle.text.parts)))
    told: dict[str, dict[str, Any]] = {"vae": {"scale": family.scale}}  # what a loader knows beside the shapes
    told |= {name: {"activation": row.activation} for name, row in zip(names, family.texts)}
    states = {component: net.state_dict() for component, net in nets.items()}
    for component, net in nets.items():
        form, shapes = FORMS[_kind(net)], {name: tuple(t.shape) for name, t in states[component].items()}
        _check_said(form, net.config, form.reread(shapes, replace(net.config, **told.get(component, {}))), file)
    return save(file, join(states, family.name, _marks(bundle, file)))


def _marks(bundle: Bundle, file: Path) -> dict[str, Tensor]:
    """Empty tensors that say in a single file how its U-Net is to be read. UserError: no such file can say it."""
    prediction, schedule, family = bundle.denoiser.prediction.name, bundle.schedule, bundle.family
    plain, terminal = (same_levels(schedule, known) for known in (ldm(), zero_terminal_snr(ldm())))
    usual = FAMILIES[family.name].zero_uncond
    for key, fine, expected, found in (
        ("prediction", prediction in ("eps", "v"), "eps or v", prediction),
        ("schedule", plain or terminal, "the published levels", f"sigma up to {schedule.sigmas[-1]:.5g}"),
        ("force_zeros_for_empty_prompt", family.zero_uncond == usual, usual, family.zero_uncond),
    ):
        if not fine:
            what, fix = "one file cannot say this of the checkpoint", "a folder's name, which has a place for it"
            raise UserError(what, file=file, key=key, expected=expected, found=found, fix=fix)
    marks = {"ztsnr": terminal, "v_pred": prediction == "v" and not usually_v(family, bundle.config.channels_in)}
    return {mark: torch.zeros(0) for mark, needed in marks.items() if needed}


# -- one network ---------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a network is written."""

    component: str  # as layouts calls it
    json: Callable[[Any], dict[str, Any]]  # config -> config.json
    reread: Callable[[dict[str, tuple[int, ...]], Any], Any]  # what one file is read as: shapes, what is told -> config
    said: Callable[[Any], dict[str, Any]] | None = (
        None  # config -> what must then be the same; None: all of config.json
    )
    config: str = "config"  # the net's attribute
    stem: str = STEMS[0]
    original: Callable[[Any], bool] = lambda _: True  # config -> whether one file has the original layout, or ours
    bare: str = ""  # prefix of the original layout that a file of this alone goes without


def _unet_json(c: SDUNetConfig) -> dict[str, Any]:
    return arch.unet_json(c, family_of(c).size // 8)


def _encoder_said(c: ControlNetConfig) -> dict[str, Any]:
    """Of a ControlNet: its stem is as its tensors are, and what the U-Net gives out is not its own."""
    return arch.unet_json(replace(c.encoder, channels_out=SDUNetConfig.channels_out))


FORMS: dict[type[nn.Module], Form] = {
    SDUNet: Form("unet", _unet_json, lambda shapes, c: arch.unet_of_shapes(shapes, c.pooled_dim)),
    ControlNet: Form(
        "controlnet",
        arch.controlnet_json,
        lambda shapes, _: arch.controlnet_of_shapes(shapes),
        _encoder_said,
        "control",
        original=lambda c: not c.encoder.added_dim,
    ),
    Adapter: Form("adapter", arch.adapter_json, lambda shapes, _: arch.adapter_of_shapes(shapes)),
    AutoencoderKL: Form(
        "vae", arch.vae_json, lambda shapes, c: arch.vae_of_shapes(shapes, c.scale), bare="first_stage_model."
    ),
    CLIPText: Form(
        "text",
        arch.text_json,
        lambda shapes, c: arch.text_of_shapes(shapes, c.activation),
        stem=STEMS[1],
        original=lambda _: False,
    ),
}


def save_part(
    net: nn.Module,
    where: str | Path,
    dtype: str | torch.dtype = "keep",
    over: bool = False,
    size: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    shard_gb: float | None = None,
) -> Path:
    """Write a U-Net, ControlNet, T2I-Adapter, KL autoencoder or CLIP text encoder; it is there whole or not at all.

    where: a new folder, which diffusers or transformers loads, or a .safetensors in the layout that single files of the kind
    are published in: the original one, but the folder's for text encoders and SDXL's ControlNets. dtype: "keep", "fp32",
    "bf16" or "fp16", of floating-point weights. over: may take the place of such a folder or file. size: a U-Net's natural
    side of a picture in pixels; None: its family's. weights: in place of the net's own, such as their moving average, by the
    same names. shard_gb: a folder's files have at most so many 10^9 bytes. UserError: something is there, another network,
    one whose layers were joined or changed, one of which a single file cannot say all, full or unwritable disk.
    """
    where, kind = Path(where), _kind(net)
    form = FORMS[kind]
    config = getattr(net, form.config)
    to_file = where.suffix == ".safetensors"
    _check_target(where, to_file, over)
    if shard_gb is not None:
        _check_shards(where, to_file, shard_gb)
    chosen = dtype if isinstance(dtype, torch.dtype) else lookup(DTYPES, dtype, "dtype")
    with torch.device("meta"):
        fresh = kind(config)
    tensors = cast(_whole(fresh, net.state_dict() if weights is None else weights, where), chosen)
    if to_file:
        return save(where, _alone(form, config, tensors, where))
    described = form.json(config)
    if size is not None and "sample_size" in described:
        described["sample_size"] = size // 8
    with _new_folder(where, over) as beside:
        _write_json(beside / "config.json", described)
        _write_shards(beside, form.stem, tensors, shard_gb)
    return where


def _kind(net: nn.Module) -> type[nn.Module]:
    found = next((kind for kind in type(net).__mro__ if kind in FORMS), None)  # fully_shard makes a class of its own
    if found is None:
        names = ", ".join(kind.__name__ for kind in FORMS)
        raise UserError("nothing here saves such a network", expected=names, found=type(net).__name__)
    return found


def _check_target(where: Path, to_file: bool, over: bool) -> None:
    if where.suffix in (*PICKLES, ".json"):
        expected = "a name that ends in .safetensors, or a folder's"
        raise UserError("save as what?", file=where, expected=expected, found=where.suffix)
    if where.exists() and not over:
        raise UserError("this is there already, and is not written over", file=where, fix="a new name, or over=True")
    if where.exists() and not (where.is_file() if to_file else _is_part(where)):
        what = "this is something else, and is not written over"
        raise UserError(what, file=where, expected="a file" if to_file else "a folder with a config.json")


def _is_part(folder: Path) -> bool:
    """Whether it may be what `save_part` wrote, or is empty."""
    return (folder / "config.json").is_file() or (folder.is_dir() and not any(folder.iterdir()))


def _check_shards(where: Path, to_file: bool, shard_gb: float) -> None:
    if to_file:
        raise UserError("one file has no shards", file=where, key="shard_gb", fix="a folder's name")
    if not (math.isfinite(shard_gb) and shard_gb > 0):
        raise UserError("not a positive number", key="shard_gb", found=shard_gb)


def _whole(fresh: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors in the order of a new network of the config. UserError: other names or shapes, or no values."""
    wanted = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    check_names(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, Source((where,)))
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise UserError("a network without values cannot be saved", file=where, key=few(empty), fix="load its weights")
    return {name: tensors[name] for name in wanted}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors, those of floating point in that dtype; None keeps each its own."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _alone(form: Form, config: Any, tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """What a file of this network alone holds. UserError: it would be read as another network."""
    _check_said(form, config, form.reread({name: tuple(t.shape) for name, t in tensors.items()}, config), where)
    if not form.original(config):
        return dict(tensors)
    plan = originals(form.component, tensors, family="sdxl")  # these kinds lie in the same place in every family
    return {
        name.removeprefix(form.bare): whole.write(*(tensors[source] for source in whole.sources))
        for name, whole in plan.items()
    }


def _check_said(form: Form, config: Any, reread: Any, where: Path) -> None:
    """UserError unless the config that one file is read as says the same as the network's own."""
    said = form.said or form.json
    wanted, found = said(config), said(reread)
    if lost := next((key for key, value in wanted.items() if found.get(key) != value), None):
        fix, read = "a folder's name, where config.json says it", f"{found.get(lost)}, as such files are read"
        what = "one file cannot say this of the network"
        raise UserError(what, file=where, key=lost, expected=read, found=wanted[lost], fix=fix)


def _write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], most: float | None) -> None:
    """The weights in one file, or where that is more than `most` 10^9 bytes in several and an index, a tensor never split."""
    shards: list[dict[str, Tensor]] = [{}]
    size, limit = 0, math.inf if most is None else most * 1e9
    for name, tensor in tensors.items():
        if size + tensor.nbytes > limit and shards[-1]:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save(folder / f"{stem}.safetensors", tensors)
        return
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        save(folder / file, shard)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    places = {name: file for file, shard in zip(files, shards) for name in shard}
    _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": places})
