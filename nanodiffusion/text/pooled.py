"""One vector per text, what a net takes as cond["pooled"]: CLIP's, or sums of random words that need no download."""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.errors import UserError
from nanodiffusion.tensors import content_hash
from nanodiffusion.text.encoder import CLIPText
from nanodiffusion.text.tokenizer import CLIPTokenizer

DIM = 768  # of "words": CLIP ViT-L/14's
LARGEST = 65536
WORD = re.compile(r"[^\W_]+")
PAIR = 0.5  # weight of a pair of neighbours beside a word's 1
MADE = "shake-256 signs, NFC lower case, pairs 0.5"  # goes into the hash: another way of making them is another encoder


class PooledText(Protocol):
    """What turns texts into vectors: `dim` of them, `sha256` of the weights, `where` it came from."""

    where: str
    dim: int
    sha256: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """b texts -> (b d) float32 on the CPU; a text without a word is zeros, which stand for nothing."""
        ...


def open_text(where: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto") -> PooledText:
    """The text encoder at `where`: "words" or "words:256", else a CLIP's folder or name on the hub, tokenizer included.

    A folder is a text encoder's own, a whole CLIP's, or a pipeline's with text_encoder/ and tokenizer/. The vector is
    the projected one where the checkpoint has a projection. UserError: not such a folder, or a wrong number of features.
    """
    name, _, size = str(where).partition(":")
    return Words(_dim(size, where), str(where)) if name == "words" else open_clip(where, device, dtype)


def _dim(text: str, where: object) -> int:
    if text and not (text.isdecimal() and 0 < int(text) <= LARGEST):
        expected = f"words, or words:N with N from 1 to {LARGEST}"
        raise UserError("not a number of features", key="text", expected=expected, found=where)
    return int(text or DIM)


# -- words -------------------------------------------------------------------------------------------------------------


class Words:
    """Bags of words by random projection (Achlioptas 2003): deterministic everywhere, and learnt from nothing.

    A word (letters and digits, lower case, NFC) is `dim` signs, the first bits of SHAKE-256 of its UTF-8. A text is the
    sum of its words and, with half the weight, of its pairs of neighbours, scaled so that its components have a mean
    square of 1: texts with words in common are near each other, and the order counts a little.
    """

    def __init__(self, dim: int = DIM, where: str = "words") -> None:
        self.dim, self.where = dim, where
        self.sha256 = hashlib.sha256(f"words {dim} {MADE}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """b texts -> (b d) float32; a text without a word is zeros."""
        rows = [self._row(text) for text in texts]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, self.dim)

    def _row(self, text: str) -> np.ndarray:
        words = WORD.findall(unicodedata.normalize("NFC", text).lower())
        total = np.zeros(self.dim)
        for word in words:
            total += _signs(word, self.dim)
        for pair in itertools.pairwise(words):
            total += PAIR * _signs(" ".join(pair), self.dim)
        size = np.sqrt(np.mean(total**2))
        return (total / size if size else total).astype(np.float32)


@lru_cache(maxsize=4096)
def _signs(word: str, dim: int) -> np.ndarray:
    """dim signs (d) int8: 1 where a bit is set, -1 elsewhere."""
    stream = hashlib.shake_256(word.encode("utf-8", "surrogatepass")).digest((dim + 7) // 8)
    return np.unpackbits(np.frombuffer(stream, np.uint8))[:dim].astype(np.int8) * 2 - 1


# -- CLIP --------------------------------------------------------------------------------------------------------------


class CLIPPooled:
    """CLIP's vector of a text (Radford et al. 2021, section 2.4): the end token's state, projected where there is a projection.

    A text of white space alone is zeros here, as for every encoder, and not CLIP's vector of "".
    """

    def __init__(self, net: CLIPText, tokenizer: CLIPTokenizer, where: str) -> None:
        self.net, self.tokenizer, self.where = net, tokenizer, where
        self.dim = net.config.projection or net.config.width
        self.sha256 = content_hash(net.state_dict())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """b texts, cut to the tokens that CLIP has places for -> (b d) float32 on the CPU."""
        if not texts:
            return torch.zeros(0, self.dim)
        ids = self.tokenizer(texts, self.net.config.positions)
        pooled = self.net(ids.to(next(self.net.parameters()).device)).pooled.float().cpu()
        blank = torch.tensor([not text.strip() for text in texts])
        return pooled.masked_fill(blank[:, None], 0.0)


def open_clip(where: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto") -> CLIPPooled:
    """CLIP's text half with its tokenizer: a folder in transformers' layout, a pipeline's, or a name on the hub."""
    from nanodiffusion.pretrained.hub import locate, needed  # both import this package
    from nanodiffusion.pretrained.load import load_text

    folder = locate(where, partial(needed, variant=None, folders=("text_encoder", "tokenizer"))).path
    if not folder.is_dir():
        fix = "the folder that holds config.json, the weights and the tokenizer's files"
        raise UserError("a text encoder is a folder", file=where, key="text", found="a file", fix=fix)
    net = load_text(folder, dtype, device)
    tokenizer = CLIPTokenizer.from_folder(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    return CLIPPooled(net, tokenizer, str(where))
