"""Prompts to conditioning: CLIP's tokenizer and text encoders, the grammar of prompts, textual inversion."""

from nanodiffusion.text.encoder import (
    CLIP_BIGG,
    CLIP_H,
    CLIP_L,
    CLIPText,
    Encoded,
    TextConfig,
    mix_tokens,
    replace_token,
)
from nanodiffusion.text.inversion import Inversion, add, load_inversion, read_inversion
from nanodiffusion.text.pooled import open_text
from nanodiffusion.text.prompts import TextEncoder, TextPart, mix
from nanodiffusion.text.tokenizer import CLIPTokenizer

__all__ = [
    "CLIP_BIGG",
    "CLIP_H",
    "CLIP_L",
    "CLIPText",
    "CLIPTokenizer",
    "Encoded",
    "Inversion",
    "TextConfig",
    "TextEncoder",
    "TextPart",
    "add",
    "load_inversion",
    "mix",
    "mix_tokens",
    "open_text",
    "read_inversion",
    "replace_token",
]
