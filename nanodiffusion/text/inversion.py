"""Textual inversion (Gal et al. 2022): learned vectors as tokens of a prompt, from A1111's, diffusers' and SDXL's files."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.tensors import load_tensors
from nanodiffusion.text.encoder import CLIPText
from nanodiffusion.text.prompts import NAMES, TextEncoder, TextPart

M = TypeVar("M", bound=nn.Module)
PICKLES = {".pt", ".bin", ".ckpt", ".pth", ".pkl"}
NAMELESS = (
    "emb_params",
    "*",
    "string_to_param.*",
)  # A1111's, and what is left of its pickles: the file's name is the token
ONE = "text_encoder"  # the encoder of a checkpoint that has one


@dataclass(frozen=True)
class Inversion:
    """A token and its vectors (n d) per text encoder: {"text_encoder": ...}, or {"clip_l": ..., "clip_g": ...} of SDXL."""

    token: str
    vectors: Mapping[str, Tensor]


def read_inversion(path: str | Path, token: str | None = None) -> Inversion:
    """A textual-inversion .safetensors: A1111's `emb_params`, diffusers' `<token>`, or SDXL's `clip_l` and `clip_g`.

    token: the name to give it; None: that in the file, else the file's own. UserError: a pickle, another kind of file,
    vectors that are none.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        fix = f"nanodiffusion convert {path} {path.with_suffix('.safetensors')}"
        raise UserError("a pickle can run code, so it is not opened", file=path, expected=".safetensors", fix=fix)
    tensors, _ = load_tensors(path)
    if tensors.keys() <= set(NAMES) and tensors:
        name, found = path.stem, tensors
    elif len(tensors) == 1:
        ((key, tensor),) = tensors.items()
        name, found = path.stem if key in NAMELESS else key, {ONE: tensor}
    else:
        expected = "one tensor, or clip_l and clip_g"
        few = ", ".join(list(tensors)[:3])
        raise UserError("not a textual inversion", file=path, expected=expected, found=f"{len(tensors)} tensors: {few}")
    return Inversion(token or name, {key: _vectors(tensor, key, path) for key, tensor in found.items()})


def load_inversion(encoder: TextEncoder, path: str | Path, token: str | None = None) -> TextEncoder:
    """The encoder with the token of a file: read_inversion, then add. UserError: as they."""
    found = read_inversion(path, token)
    return add(encoder, found.token, found.vectors)


def add(encoder: TextEncoder, token: str, vectors: Tensor | Mapping[str, Tensor]) -> TextEncoder:
    """A TextEncoder in whose prompts `token` stands for the vectors (n d) or (d); the one given stays as it is.

    Of two encoders each needs its own: {"clip_l": ..., "clip_g": ...}. All weights but the token tables are shared. UserError:
    a token that there is already, vectors of another width, missing or too many.
    """
    given = _by_encoder(encoder, vectors)
    parts = [_extended(part, name, token, given[name]) for name, part in zip(encoder.names, encoder.parts)]
    return TextEncoder(parts, encoder.check_added)


def _vectors(tensor: Tensor, key: str, file: object = None) -> Tensor:
    """A vector or several, (d) or (n d), as (n d)."""
    if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise UserError("not the vectors of a token", file=file, key=key, expected="floats (d) or (n, d)", found=found)
    if not tensor.isfinite().all():
        raise UserError("this embedding is damaged", file=file, key=key, found="NaN or infinite numbers")
    return tensor if tensor.ndim == 2 else tensor[None]


def _by_encoder(encoder: TextEncoder, vectors: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors under the encoder's own names; one tensor, or a file's only one, belongs to the only encoder."""
    given = dict(vectors) if isinstance(vectors, Mapping) else {ONE: vectors}
    if len(given) == len(encoder.names) == 1:
        given = dict(zip(encoder.names, given.values()))
    if given.keys() != set(encoder.names):
        expected, found = (", ".join(sorted(names)) for names in (encoder.names, given))
        what = "this embedding was made for another family of checkpoints"
        raise UserError(what, expected=f"vectors for {expected}", found=f"for {found}")
    return {name: _vectors(tensor, name) for name, tensor in given.items()}


def _extended(part: TextPart, name: str, token: str, vectors: Tensor) -> TextPart:
    width, most = part.net.config.width, part.net.config.positions - 2
    if vectors.shape[1] != width:
        what = "the vectors have another width than the text encoder"
        raise UserError(
            what, key=name, expected=f"(n, {width})", found=tuple(vectors.shape), fix="use one made for this family"
        )
    if len(vectors) > most:
        raise UserError(
            "more vectors than a prompt has places", key=name, expected=f"at most {most}", found=len(vectors)
        )
    first = part.net.config.vocab
    tokenizer = part.tokenizer.with_token(token, tuple(range(first, first + len(vectors))))
    return replace(part, tokenizer=tokenizer, net=_with_rows(part.net, vectors))


def _with_rows(net: CLIPText, vectors: Tensor) -> CLIPText:
    """A CLIPText that shares every module but the token table, which has the vectors as further rows."""
    old = net.text_model.embeddings.token_embedding
    rows = torch.cat([old.weight.detach(), vectors.to(old.weight)])
    table = nn.Embedding(len(rows), rows.shape[1], _weight=rows)
    table.weight.requires_grad_(old.weight.requires_grad)
    embeddings = _shallow(net.text_model.embeddings, token_embedding=table)
    other = _shallow(net, text_model=_shallow(net.text_model, embeddings=embeddings))
    other.config = replace(net.config, vocab=len(rows))
    return other


def _shallow(module: M, **modules: nn.Module) -> M:
    """A module that shares what another has, but for the modules given."""
    other = copy.copy(module)
    other._modules = {**module._modules, **modules}
    return other
