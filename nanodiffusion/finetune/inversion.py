"""Textual inversion trained (Gal et al. 2022): new vectors of a token, and nothing else of the checkpoint changes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.config import Config
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.pretrained.load import Bundle
from nanodiffusion.tensors import save_tensors
from nanodiffusion.text.inversion import ONE, add
from nanodiffusion.text.prompts import TextEncoder

TEMPLATES = {  # what a picture's caption is made of, {} being the token
    "object": (
        "{}",
        "a {}",
        "a photo of {}",
        "a picture of a {}",
        "a {} from near",
        "a {} from far away",
        "a bright photo of {}",
        "a dark photo of {}",
        "a sharp photo of the {}",
        "a blurred photo of the {}",
        "a photo of one {}",
        "a drawing of the {}",
        "my {}",
        "the {} by itself",
    ),
    "style": (
        "in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a picture made in the manner of {}",
        "a landscape in the style of {}",
        "a portrait in the style of {}",
        "a small picture in the style of {}",
        "a large picture in the style of {}",
    ),
    "captions": ("",),  # the data's own, which must have the token in them
}


class WithRows(nn.Module):
    """A table of token vectors whose last rows are trained, apart from the others: ids (b n) -> (b n d)."""

    def __init__(self, table: nn.Embedding, n: int) -> None:
        super().__init__()
        self.first = table.num_embeddings - n
        self.register_buffer("frozen", table.weight.detach()[: self.first], persistent=False)
        self.rows = nn.Parameter(table.weight.detach()[self.first :].float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        new = ids >= self.first
        known = nn.functional.embedding(torch.where(new, 0, ids), self.frozen)  # type: ignore[arg-type]
        rows = self.rows[torch.where(new, ids - self.first, 0)]
        return torch.where(new[..., None], rows.to(known.dtype), known)


class Inverted(Tuned):
    """A frozen checkpoint with a token more, whose vectors are trained."""

    def __init__(self, bundle: Bundle, config: Config, net: nn.Module, token: str, templates: tuple[str, ...]) -> None:
        super().__init__(bundle, config, net)
        self.token, self.templates = token, templates

    def caption(self, text: str, u: float) -> str:
        """A template with the token in it; the caption itself where there are none."""
        return self.templates[int(u * len(self.templates))].format(self.token) or text


@dataclass(frozen=True)
class TextualInversion(Finetune):
    """`vectors` vectors of a new `token`, which start as those of the word `start`. It makes `learned_embeds.safetensors`.

    templates: what captions are made of: object, style, or captions (the data's own). start "": near the mean of all words.
    """

    token: str = "<new>"
    start: str = ""
    vectors: int = 1
    templates: str = "object"

    def __post_init__(self) -> None:
        lookup(TEMPLATES, self.templates, "task.templates")
        if self.vectors < 1:
            raise UserError("a token needs a vector", key="task.vectors", expected="1 or more", found=self.vectors)

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The checkpoint with the token."""
        draw = torch.Generator().manual_seed(config.seed)
        names = bundle.text.names if len(bundle.text.parts) > 1 else (ONE,)
        first = {name: self._first(part, draw) for name, part in zip(names, bundle.text.parts)}
        text = add(bundle.text, self.token, first if len(first) > 1 else first[ONE])
        rows = nn.ParameterDict()
        for name, part in zip(names, text.parts):
            embeddings: Any = part.net.text_model.embeddings
            embeddings.token_embedding = WithRows(embeddings.token_embedding, self.vectors)
            rows[name] = embeddings.token_embedding.rows
        text = TextEncoder(text.parts, check_added=False)
        return Inverted(replace(bundle, text=text), config, rows, self.token, TEMPLATES[self.templates])

    def prepared(self, data: Any, model: Tuned) -> Any:
        """As `Finetune.prepared`. UserError: the data's own captions are taken, and the token is in none of them."""
        made = super().prepared(data, model)
        tokenizer, own = model.reader.text.parts[0].tokenizer, not TEMPLATES[self.templates][0]
        ids = tokenizer.added[self.token]
        if own and not any(ids in tokenizer.groups(str(text)) for text in data.captions):
            fix = f"write {self.token} into the captions, or task.templates=object"
            expected = f"captions with {self.token} in them"
            raise UserError("nothing would be trained", key="task.token", expected=expected, found="none", fix=fix)
        return made

    def _first(self, part: Any, draw: torch.Generator) -> Tensor:
        """Vectors (n d) to begin with."""
        table = part.net.text_model.embeddings.token_embedding.weight.detach().float()
        if not self.start:
            noise = torch.randn(self.vectors, table.shape[1], generator=draw)
            return table.mean(0) + table.std(0) * noise
        ids = [i for group in part.tokenizer.groups(self.start) for i in group]
        if not 1 <= len(ids) <= self.vectors:
            fix = f"task.vectors={len(ids)}, or another word" if ids else "a word"
            raise UserError(
                "the word is of more tokens", key="task.start", expected=self.vectors, found=len(ids), fix=fix
            )
        return table[torch.tensor([ids[i % len(ids)] for i in range(self.vectors)])].clone()

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `learned_embeds.safetensors`: under the token's name, or clip_l and clip_g of a pair of encoders."""
        rows: Any = model.net
        tensors = {self.token if name == ONE else name: value.detach() for name, value in rows.items()}
        save_tensors(folder / "learned_embeds.safetensors", tensors, {})
