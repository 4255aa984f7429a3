"""A bundle back to disk: the folder that diffusers loads, or one file in the original layout."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.noise import SIGMA_CAP
from nanodiffusion.pretrained import architecture as arch
from nanodiffusion.pretrained.layouts import originals
from nanodiffusion.pretrained.load import TEXTS, Bundle
from nanodiffusion.pretrained.scheduler_config import scheduler_json
from nanodiffusion.pretrained.weights import STEMS, disk_errors, save, sync
from nanodiffusion.text import CLIPTokenizer


def save_diffusers(bundle: Bundle, folder: str | Path) -> Path:
    """Write a bundle as the folder that diffusers loads; it is there whole or not at all.

    UserError: the folder is there already, full or unwritable disk, a network that diffusers has not.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError("this is there already, and is not written over", file=folder, fix="give a new folder's name")
    beside = folder.with_name(f".tmp-{folder.name}")
    with disk_errors(folder):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            _write_components(bundle, beside)
            os.replace(beside, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write_components(bundle: Bundle, folder: Path) -> None:
    net, codec = bundle.denoiser.net, bundle.codec
    unet = arch.unet_json(bundle.config, bundle.family.size // codec.factor)
    _write_component(folder / "unet", STEMS[0], unet, net)
    _write_component(folder / "vae", STEMS[0], arch.vae_json(codec.config), codec)
    for part, (name, tokenizer) in zip(bundle.text.parts, TEXTS):
        _write_component(folder / name, STEMS[1], arch.text_json(part.net.config), part.net)
        _write_tokenizer(folder / tokenizer, part.tokenizer)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(bundle))
    _write_json(folder / "model_index.json", _index_json(bundle))


def _write_component(folder: Path, stem: str, config: dict[str, Any], net: nn.Module) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config)
    save(folder / f"{stem}.safetensors", net.state_dict())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """vocab.json, merges.txt and what is added to them, learned tokens included: one of several vectors is <a>, <a>_1, ..."""
    folder.mkdir()
    whole = json.loads(tokenizer.backend.to_str())
    names = {i: token for token, i in whole["model"]["vocab"].items()}
    rules = (rule if isinstance(rule, str) else " ".join(rule) for rule in whole["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *rules, ""]), encoding="utf-8")
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

    A v-predicting SDXL gets the mark `v_pred`, a terminal SNR of zero `ztsnr`, by which other programs know them. UserError:
    learned tokens, full or unwritable disk.
    """
    file, family = Path(file), bundle.family.name
    if learned := [token for part in bundle.text.parts for token in part.tokenizer.added]:
        raise UserError("a single file cannot hold learned tokens", key=learned[0], fix="save as a diffusers folder")
    names = ("text", "text_2")
    parts = {"unet": bundle.denoiser.net, "vae": bundle.codec, **dict(zip(names, (p.net for p in bundle.text.parts)))}
    tensors: dict[str, Tensor] = {}
    for component, net in parts.items():
        own = net.state_dict()
        for name, whole in originals(component, own, family).items():
            tensors[name] = whole.write(*(own[source] for source in whole.sources))
    if bundle.denoiser.prediction.name == "v" and not bundle.family.predicts_v:
        tensors["v_pred"] = torch.zeros(0)
    if float(bundle.schedule.sigmas[-1]) == SIGMA_CAP:
        tensors["ztsnr"] = torch.zeros(0)
    return save(file, tensors)
