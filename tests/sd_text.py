"""What the tests of text share: tokenizer folders, small text encoders of transformers and ours with their weights."""

import importlib.util
import random
import types
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import sd_files
import torch
from torch import Tensor, nn

from nanodiffusion.text import CLIPText, TextConfig
from nanodiffusion.text.prompts import TextEncoder, TextPart
from nanodiffusion.text.tokenizer import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SIZES = {
    "l": TextConfig(width=32, layers=3, heads=4, mlp=48),
    "h": TextConfig(width=24, layers=2, heads=1, mlp=96, activation="gelu"),
    "bigg": TextConfig(width=40, layers=4, heads=5, mlp=80, activation="gelu", projection=16),
}


@cache
def folder(vocabulary: str = "tiny", pad: str = END) -> Path:
    """A published tokenizer folder, written once."""
    return sd_files.write_tokenizer(sd_files._place() / f"text-{vocabulary}-{len(pad)}", vocabulary, pad)


@cache
def tokenizers(vocabulary: str = "tiny", pad: str = END) -> tuple[CLIPTokenizer, Any]:
    """(ours, transformers') of one folder."""
    from transformers import CLIPTokenizer as Reference

    place = folder(vocabulary, pad)
    return CLIPTokenizer.from_folder(place), Reference.from_pretrained(place)


@cache
def openai_tokenizer() -> types.ModuleType:
    """OpenAI's own tokenizer, from clip-anytorch; the package itself cannot be imported without torchvision."""
    place = importlib.util.find_spec("clip").submodule_search_locations[0]  # type: ignore[union-attr,index]
    spec = importlib.util.spec_from_file_location("simple_tokenizer", Path(place) / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def reference_net(kind: str, vocab: int, seed: int = 0, eos: int | None = None) -> Any:
    """transformers' CLIPTextModel, of bigg CLIPTextModelWithProjection, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    c = SIZES[kind]
    ends = {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1 if eos is None else eos, "pad_token_id": 1}
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=c.width,
        intermediate_size=c.mlp,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        hidden_act=c.activation,
        projection_dim=c.projection or 512,
        **ends,
    )
    net = (CLIPTextModelWithProjection if c.projection else CLIPTextModel)(config)
    return sd_files.randomised(net, seed)


def ours_of(net: Any) -> CLIPText:
    """Our encoder with the configuration, weights and dtype of transformers'."""
    c = net.config
    projection = c.projection_dim if "WithProjection" in type(net).__name__ else None
    sizes = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size)
    config = TextConfig(*sizes, c.hidden_act, projection, c.vocab_size, c.max_position_embeddings, c.eos_token_id)
    ours = CLIPText(config).to(next(net.parameters()).dtype).eval()
    ours.load_state_dict(published(net.state_dict()), strict=True)
    return ours


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of published files: transformers 5.6 and later keep CLIPTextModel without `text_model.`."""
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in state.items()}


@cache
def pipeline(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' pipeline of a family with text encoders only; never change it."""
    return new_pipeline(family, dtype)


def new_pipeline(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """As `pipeline`, of one's own."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer as Reference

    kinds = {"sd1": ["l"], "sd2": ["h"], "sdxl": ["l", "bigg"]}[family]
    toks = [Reference.from_pretrained(folder(pad=END if kind == "l" else "!")) for kind in kinds]
    nets = [reference_net(kind, len(toks[0]), seed).to(dtype) for seed, kind in enumerate(kinds)]
    shared = {"vae": None, "unet": None, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    shared |= {"text_encoder": nets[0], "tokenizer": toks[0]}
    if family == "sdxl":
        second = {"text_encoder_2": nets[1], "tokenizer_2": toks[1], "add_watermarker": False}
        return StableDiffusionXLPipeline(**shared, **second, force_zeros_for_empty_prompt=False)
    if not hasattr(nets[0], "text_model"):  # clip_skip of diffusers 0.42 looks for it; transformers 5.6 took it away
        nets[0].__dict__["text_model"] = nets[0]
    return StableDiffusionPipeline(**shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def ours_like(pipe: Any) -> TextEncoder:
    """Our TextEncoder with a pipeline's weights and tokenizer files."""
    first = CLIPTokenizer.from_folder(folder(pad=pipe.tokenizer.pad_token))
    if "text_encoder_2" not in pipe.components:
        return TextEncoder([TextPart(first, ours_of(pipe.text_encoder))])
    second = CLIPTokenizer.from_folder(folder(pad=pipe.tokenizer_2.pad_token))
    return TextEncoder(
        [
            TextPart(first, ours_of(pipe.text_encoder), -2, norm=False),
            TextPart(second, ours_of(pipe.text_encoder_2), -2, norm=False, pooled=True),
        ]
    )


def reference_cond(pipe: Any, prompts: list[str], negative: list[str] | None = None, **more: Any) -> list[Any]:
    """[cond, uncond] by a pipeline's encode_prompt."""
    with torch.no_grad():
        asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": negative is not None}
        found = pipe.encode_prompt(prompts, **asked, negative_prompt=negative, **more)
    rows = [found[:2]] if len(found) == 2 else [found[:2], found[2:]]
    conds = [dict(zip(("context", "pooled"), tensors)) for tensors in zip(*rows)]
    return conds if negative is not None else [conds[0], None]


def relative(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def same_cond(ours: Any, reference: Any, most: float = 1e-5) -> None:
    """Both conds have the same keys and, up to `most`, the same tensors."""
    assert ours.keys() == reference.keys()
    for key in ours:
        assert relative(ours[key], reference[key]) <= most, key


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@cache
def letters() -> tuple[list[str], ...]:
    """All assigned characters but surrogates, by the class (letter, mark, number, ...) they belong to."""
    classes: dict[str, list[str]] = {}
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))
        if kind not in ("Cn", "Cs"):
            classes.setdefault(kind[0], []).append(chr(code))
    return tuple(classes.values())


PIECES = (
    "a cat it's don't I'll we've he'd photo, 1234 !! ! hello! ... :) x</w> Ġ naïve İ ß ﬁ ǅ e\u0301 🙂 👨‍👩‍👧 <|endoftext|> "
    "<|startoftext|> <|ENDOFTEXT|> <|endof"
).split(" ")
SPACES = ("", " ", "  ", "\t", "\n", "\u3000", "\u0085", "\u200b")


def random_text(r: random.Random) -> str:
    """Characters of every class, code points whatever they be, Latin ones, or words and marks between odd spaces."""
    n, kind = r.randint(0, 30), r.randrange(4)
    if kind == 0:
        return "".join(r.choice(r.choice(letters())) for _ in range(n))
    if kind == 1:
        return "".join(chr(code) for code in (r.randrange(0x110000) for _ in range(n)) if not 0xD800 <= code < 0xE000)
    if kind == 2:
        return "".join(chr(r.randint(0, 0x2FF)) for _ in range(n))
    space = r.choice(SPACES)
    return space.join(r.choice(PIECES) if r.random() < 0.8 else r.choice(r.choice(letters())) for _ in range(n))
