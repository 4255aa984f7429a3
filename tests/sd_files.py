"""Tiny random checkpoints laid out as the hub's, written by diffusers and transformers: the files that tests load.

write_sd1(folder), write_sd2(folder), write_sdxl(folder)   a whole pipeline folder
write_controlnet(folder, family), write_adapter(folder, family), write_vae(folder, family), write_tiny(folder)
    family: "sd1", "sd2", "sdxl"
tree("sd1", **options) -> Path                             the same, written once per test session; never write into it
part("controlnet"|"adapter"|"vae"|"tiny", family) -> Path  the same of one component
single(family, **options) -> Path                          one original-layout file of that tree, written once

Options of a pipeline: variant="fp16" (half-precision weights, files named so), max_shard_size="300KB" (sharded with an
index), inpaint=True (9 channels), prediction="epsilon"|"v_prediction", scheduler={key: value, ...}, seed=0,
vocabulary="tiny"|"clip" (the real one, from the package clip-anytorch), safe=False (pickles, as of old), flat=True (text
encoders' names without `text_model.`, as transformers writes them since 5.6).
Sizes: latents of 4 channels and factor 8; a U-Net of factor 8 (SDXL 4); pictures of 64 x 64 unless told; context of 64
(SD 2.x 128, SDXL 192).
"""

import atexit
import contextlib
import gzip
import importlib.util
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    "a an the of in on and photo picture cat dog castle puppy red blue by house room sea with hat watercolor".split()
)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}),
    "sd2": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}),
    "sdxl": ("EulerDiscreteScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}),
}
# As published, SD 1.x has 8 heads and the others heads of 64 features: a single file is told apart by its shapes alone.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 64},
    "sd2": {
        "block_out_channels": (64, 64, 64, 128),
        "attention_head_dim": (1, 1, 1, 2),
        "cross_attention_dim": 128,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 64 + 128,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 128 + 6 * 8,
    },
}
BLOCKS = {"sd1": "CCCD", "sd2": "CCCD", "sdxl": "DCC"}
TEXTS: dict[str, dict[str, Any]] = {
    "l": {"hidden_act": "quick_gelu", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 1},
    "h": {"hidden_act": "gelu", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2},
    "bigg": {"hidden_act": "gelu", "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 2},
}
PADS = {"l": END, "h": "!", "bigg": "!"}

# -- the vocabulary ------------------------------------------------------------------------------------------------------


def byte_letters() -> list[str]:
    """The 256 letters that CLIP's byte-level BPE writes bytes with, in the order of its vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]


def merges(vocabulary: str) -> list[str]:
    """The merge rules, in order: those that spell WORDS, or the 48,894 of CLIP."""
    if vocabulary == "clip":
        folder = importlib.util.find_spec("clip").submodule_search_locations[0]  # type: ignore[union-attr]
        text = gzip.decompress((Path(folder) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
        return text.split("\n")[1 : 49152 - 256 - 2 + 1]
    rules: dict[str, None] = {}
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for letter in rest:
            rules[f"{left} {letter}"] = None
            left += letter
    return list(rules)


def vocabulary_of(vocabulary: str) -> dict[str, int]:
    """Token -> id; the end of text is the last."""
    letters, rules = byte_letters(), merges(vocabulary)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(r.split()) for r in rules), START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder: Path, vocabulary: str = "tiny", pad: str = END) -> Path:
    """A tokenizer folder as published: vocab.json, merges.txt, special_tokens_map.json, tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = "\n".join(["#version: 0.2", *merges(vocabulary), ""])
    (folder / "vocab.json").write_text(json.dumps(vocabulary_of(vocabulary)), encoding="utf-8")
    (folder / "merges.txt").write_text(rules, encoding="utf-8")
    special = {name: _token(text) for name, text in (("bos_token", START), ("eos_token", END), ("unk_token", END))}
    _json(folder / "special_tokens_map.json", {**special, "pad_token": pad})
    limits = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer", "errors": "replace"}
    typed = {name: {"__type": "AddedToken", **token} for name, token in special.items()}
    _json(folder / "tokenizer_config.json", {**typed, "pad_token": pad, "add_prefix_space": False, **limits})
    return folder


def _token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


# -- the modules, of diffusers and transformers --------------------------------------------------------------------------


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module in eval mode with every weight drawn from `seed`: none is left 0 or 1, so that no test passes by it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            flat = p.ndim < 2
            noise = torch.randn(p.shape, generator=g)
            p.copy_(flat * p.round() + 0.1 * noise if flat else noise * p[0].numel() ** -0.5)
    return module.eval()


def unet(family: str, channels_in: int = 4, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny UNet2DConditionModel."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return randomised(
        UNet2DConditionModel(sample_size=8, in_channels=channels_in, **_unet(family, up=True), **options), seed
    )


def _unet(family: str, up: bool = False) -> dict[str, Any]:
    down = {"C": "CrossAttnDownBlock2D", "D": "DownBlock2D"}
    config = {**UNETS[family], "down_block_types": tuple(down[k] for k in BLOCKS[family])}
    if up:
        config["up_block_types"] = tuple(down[k].replace("DownBlock", "UpBlock") for k in reversed(BLOCKS[family]))
    return config


def controlnet(family: str, seed: int = 7) -> nn.Module:
    """A tiny ControlNetModel whose zero convolutions are not zero."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    return randomised(ControlNetModel(**_unet(family), conditioning_embedding_out_channels=(8, 8, 16, 16)), seed)


def adapter(family: str, seed: int = 8, kind: str | None = None) -> nn.Module:
    """A tiny T2IAdapter: of SDXL full_adapter_xl, else full_adapter, or the kind named."""
    from diffusers.models.adapter import T2IAdapter

    xl = family == "sdxl"
    kind, factor = kind or ("full_adapter_xl" if xl else "full_adapter"), 16 if xl else 8
    channels = [32, 32, 64, 64] if xl or kind != "light_adapter" else [32, 32, 64]
    return randomised(T2IAdapter(3, channels, 2, factor, kind), seed)


def vae(family: str, seed: int = 3, **options: Any) -> nn.Module:
    """A tiny AutoencoderKL of factor 8."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths = (32, 32, 64, 64)
    scale = 0.13025 if family == "sdxl" else 0.18215
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    fields = {"block_out_channels": widths, "layers_per_block": 2, "scaling_factor": scale, "sample_size": 64}
    return randomised(AutoencoderKL(**{**blocks, **fields, **options}), seed)


def tiny_vae(seed: int = 4) -> nn.Module:
    """A tiny AutoencoderTiny of factor 8 (TAESD's layout)."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    widths = {f"{half}_block_out_channels": (16, 16, 16, 16) for half in ("encoder", "decoder")}
    return randomised(AutoencoderTiny(**widths), seed)


def text_encoder(kind: str, vocabulary: str = "tiny", seed: int = 1) -> nn.Module:
    """A tiny CLIPTextModel of kind "l" or "h", or CLIPTextModelWithProjection of kind "bigg"."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(vocabulary_of(vocabulary))
    size_of = {"intermediate_size": 4 * TEXTS[kind]["hidden_size"], "projection_dim": TEXTS[kind]["hidden_size"]}
    ends = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 1}
    config = CLIPTextConfig(**TEXTS[kind], **size_of, **ends, max_position_embeddings=77)
    return randomised((CLIPTextModelWithProjection if kind == "bigg" else CLIPTextModel)(config), seed)


# -- folders -------------------------------------------------------------------------------------------------------------


def write_sd1(folder: str | Path, **options: Any) -> Path:
    """Stable Diffusion 1.x: eps, CLIP-L."""
    return _write_pipeline(Path(folder), "sd1", {"text_encoder": "l"}, **options)


def write_sd2(folder: str | Path, **options: Any) -> Path:
    """Stable Diffusion 2.x: v, OpenCLIP-H without its last layer."""
    return _write_pipeline(Path(folder), "sd2", {"text_encoder": "h"}, **{"prediction": "v_prediction", **options})


def write_sdxl(folder: str | Path, **options: Any) -> Path:
    """SDXL: eps, CLIP-L and OpenCLIP-bigG, added size and pooled conditioning."""
    return _write_pipeline(Path(folder), "sdxl", {"text_encoder": "l", "text_encoder_2": "bigg"}, **options)


def write_controlnet(folder: str | Path, family: str, **options: Any) -> Path:
    """A ControlNet's folder."""
    return _save(controlnet(family), Path(folder), **options)


def write_adapter(folder: str | Path, family: str, kind: str | None = None, **options: Any) -> Path:
    """A T2I-Adapter's folder."""
    return _save(adapter(family, kind=kind), Path(folder), **options)


def write_vae(folder: str | Path, family: str, **options: Any) -> Path:
    """A VAE's own folder."""
    return _save(vae(family), Path(folder), **options)


def write_tiny(folder: str | Path, **options: Any) -> Path:
    """A TAESD folder."""
    return _save(tiny_vae(), Path(folder), **options)


def _write_pipeline(
    folder: Path,
    family: str,
    texts: dict[str, str],
    *,
    prediction: str = "epsilon",
    inpaint: bool = False,
    scheduler: dict[str, Any] | None = None,
    vocabulary: str = "tiny",
    seed: int = 0,
    **saving: Any,
) -> Path:
    _save(unet(family, 9 if inpaint else 4, seed), folder / "unet", **saving)
    _save(vae(family), folder / "vae", **saving)
    for i, (name, kind) in enumerate(texts.items()):
        _save(text_encoder(kind, vocabulary, 1 + i), folder / name, **saving)
        write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), vocabulary, PADS[kind])
    _write_scheduler(folder / "scheduler", family, prediction, scheduler or {})
    _json(folder / "model_index.json", _index(family, texts, inpaint))
    return folder


def _write_scheduler(folder: Path, family: str, prediction: str, changes: dict[str, Any]) -> None:
    name, own = SCHEDULERS[family]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    head = {"_class_name": name, "_diffusers_version": "0.20.0"}
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "scheduler_config.json", {**head, **betas, **own, "prediction_type": prediction, **changes})


def _index(family: str, texts: dict[str, str], inpaint: bool) -> dict[str, Any]:
    name = f"StableDiffusion{'XL' * (family == 'sdxl')}{'Inpaint' * inpaint}Pipeline"
    parts: dict[str, Any] = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part, kind in texts.items():
        parts[part] = ["transformers", "CLIPTextModel" + "WithProjection" * (kind == "bigg")]
        parts[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    parts["scheduler"] = ["diffusers", SCHEDULERS[family][0]]
    if family == "sdxl":
        parts["force_zeros_for_empty_prompt"] = True
    else:
        parts |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {"_class_name": name, "_diffusers_version": "0.20.0", **parts}


def _save(
    module: Any,
    folder: Path,
    variant: str | None = None,
    max_shard_size: str | None = None,
    safe: bool = True,
    flat: bool = False,
) -> Path:
    module = module.half() if variant == "fp16" else module
    limit = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if isinstance(module.config, dict):  # diffusers
        module.save_pretrained(folder, variant=variant, safe_serialization=safe, **limit)
    else:  # transformers of today writes no pickles and no variants
        module.save_pretrained(folder, **limit)
        _as_published(folder, variant, safe, flat)
    return folder


def _as_published(folder: Path, variant: str | None, safe: bool, flat: bool) -> None:
    """Rewrite what transformers wrote: names as in the published files, a variant's file names, or pickles."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        found = {_published(name, flat): tensor for name, tensor in load_file(file).items()}
        file.unlink()
        if safe:
            save_file(found, folder / _variant_name(file.name, variant), {"format": "pt"})
        else:
            torch.save(found, folder / "pytorch_model.bin")
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        places = index["weight_map"].items()
        index["weight_map"] = {_published(name, flat): _variant_name(shard, variant) for name, shard in places}
        file.unlink()
        _json(folder / _variant_name(file.name, variant), index)


def _published(name: str, flat: bool) -> str:
    """The name without or with the `text_model.` that transformers dropped from CLIPTextModel in version 5.6."""
    bare = name.removeprefix("text_model.")
    return name if flat or bare.startswith("text_projection") else f"text_model.{bare}"


def _variant_name(name: str, variant: str | None) -> str:
    """model.safetensors -> model.fp16.safetensors; model-00001-of-00002 -> model.fp16-00001-of-00002."""
    if variant and name.endswith(".index.json"):
        return name.replace(".index.json", f".index.{variant}.json")
    return name.replace("model", f"model.{variant}", 1) if variant else name


# -- written once a session ----------------------------------------------------------------------------------------------

WRITERS = {"sd1": write_sd1, "sd2": write_sd2, "sdxl": write_sdxl}
PARTS = {"controlnet": write_controlnet, "adapter": write_adapter, "vae": write_vae}


@cache
def _place() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sd-files-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tree(family: str, **options: Any) -> Path:
    """The folder of a pipeline with these options, written at the first call; read it only."""
    return _tree(family, json.dumps(options, sort_keys=True))


@cache
def _tree(family: str, options: str) -> Path:
    with _quiet():
        return WRITERS[family](_place() / f"{family}-{len(list(_place().iterdir()))}", **json.loads(options))


def part(what: str, family: str = "sd1", **options: Any) -> Path:
    """The folder of a component with these options, written at the first call; read it only."""
    return _part(what, family, json.dumps(options, sort_keys=True))


@cache
def _part(kind: str, family: str, options: str) -> Path:
    folder = _place() / f"{kind}-{family}-{len(list(_place().iterdir()))}"
    with _quiet():
        if kind == "tiny":
            return write_tiny(folder, **json.loads(options))
        return PARTS[kind](folder, family, **json.loads(options))


def single(family: str, marks: tuple[str, ...] = (), **options: Any) -> Path:
    """One .safetensors file in the original layout with the weights of tree(family, **options); read it only.

    marks: empty tensors such as "v_pred" and "ztsnr", by which files say what they predict.
    """
    return _single(family, tree(family, **options), marks)


@cache
def _single(family: str, folder: Path, marks: tuple[str, ...]) -> Path:
    from safetensors.torch import save_file

    from nanodiffusion.pretrained.layouts import join

    names = {"unet": "unet", "vae": "vae", "text_encoder": "text", "text_encoder_2": "text_2"}
    parts = {ours: tensors(folder / theirs) for theirs, ours in names.items() if (folder / theirs).is_dir()}
    schedule = {
        "betas": torch.zeros(1000),
        "alphas_cumprod": torch.ones(1000),
    }  # files carry them; no reader needs them
    whole = {**join(parts, family, schedule), **{mark: torch.zeros(0) for mark in marks}}
    file = _place() / f"{family}-{len(list(_place().iterdir()))}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, file, {"format": "pt"})
    return file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component's folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@contextlib.contextmanager
def _quiet() -> Any:
    """No progress bars and no advice from the reference libraries."""
    from diffusers.utils import logging as d
    from transformers.utils import logging as t

    for log in (d, t):
        log.disable_progress_bar()
        log.set_verbosity_error()
    yield
