"""Prompts to cond: attention weights and BREAK, chunks of 75 tokens, and the text encoders of a checkpoint side by side."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanodiffusion.errors import UserError, lookup
from nanodiffusion.text.encoder import CLIPText, Encoded
from nanodiffusion.text.tokenizer import CLIPTokenizer, Group

Cond = dict[str, Tensor]
Section = list[tuple[str, float]]

# -- the grammar ---------------------------------------------------------------------------------------------------------

NUMBER = r"[+-]?(?:\d{1,4}(?:\.\d*+)?|\.\d++)"  # each digit is looked at once, however long the prompt
SYMBOLS = re.compile(
    rf"\\(?P<escaped>[()\[\]\\])|:\s*(?P<weight>{NUMBER})\s*\)|(?P<bracket>[()\[\]])|[^\\()\[\]:]+|.", re.S
)
FACTORS = {"(": 1.1, "[": 1 / 1.1}
PARTNER = {")": "(", "]": "["}
BREAK = re.compile(r"\bBREAK\b")


def parse(prompt: str) -> list[Section]:
    """A prompt in A1111's grammar as sections, cut at each word BREAK, of (text, weight).

    (text) weighs 1.1, (text:1.3) 1.3, [text] 1/1.1, and nested ones multiply. A backslash makes the bracket or backslash
    after it plain; so is a bracket without its partner, which A1111 takes to reach to the end. UserError: an infinite weight.
    """
    texts: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}  # of the bracket that opens at a text's place
    ends: Counter[int] = Counter()  # how many brackets end before it
    for match in SYMBOLS.finditer(prompt):
        symbol = match["bracket"] or (")" if match["weight"] else "")
        start = _close(opened, PARTNER.get(symbol))
        if start is not None:
            factors[start] = float(match["weight"] or FACTORS[PARTNER[symbol]])
            texts[start] = ""
            ends[len(texts)] += 1
            continue
        if symbol in opened:
            opened[symbol].append(len(texts))
        texts.append(match["escaped"] or match[0])
    return _sections(_merged(_weighted(texts, factors, ends)))


def _close(opened: dict[str, list[int]], kind: str | None) -> int | None:
    """Where the last bracket of a kind was opened, forgetting it and all opened since. None: there is none."""
    if kind is None or not opened[kind]:
        return None
    start = opened[kind].pop()
    for places in opened.values():
        while places and places[-1] > start:
            places.pop()
    return start


def _weighted(texts: list[str], factors: Mapping[int, float], ends: Counter[int]) -> Iterator[tuple[str, float]]:
    weights = [1.0]
    for i, text in enumerate(texts):
        del weights[len(weights) - ends[i] :]
        if i in factors:
            weights.append(weights[-1] * factors[i])
            if not math.isfinite(weights[-1]):
                fix = "use fewer brackets, or write them as \\("
                raise UserError("the weights multiply to infinity", key="prompt", fix=fix)
        if text:
            yield text, weights[-1]


def _merged(parts: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight as one text, so that their letters are tokenised together."""
    by_weight = groupby(parts, key=lambda part: part[1])
    return [("".join(text for text, _ in group), weight) for weight, group in by_weight]


def _sections(parts: list[tuple[str, float]]) -> list[Section]:
    sections: list[Section] = [[]]
    for text, weight in parts:
        first, *others = BREAK.split(text)
        sections[-1].append((first, weight))
        sections.extend([(other, weight)] for other in others)
    return [[(text, weight) for text, weight in section if text.strip()] for section in sections]


# -- chunks --------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Up to 75 tokens of a prompt, those of one added token together, and the weight of each group."""

    groups: tuple[Group, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def ids(self) -> Group:
        """The ids, without start, end and padding."""
        return tuple(i for group in self.groups for i in group)

    def row(self, length: int) -> list[float]:
        """The weight of each place between and with start, end and padding, which weigh 1."""
        spread = [w for group, w in zip(self.groups, self.weights) for _ in group][: length - 2]
        return [1.0, *spread, *[1.0] * (length - 1 - len(spread))]


def chunks(tokenizer: CLIPTokenizer, sections: Sequence[Section], size: int = 75) -> list[Chunk]:
    """The tokens of each section in chunks of at most `size`; a section ends its chunk, an empty last one adds none."""
    found: list[Chunk] = []
    for section in sections:
        tokens = [(group, weight) for text, weight in section for group in tokenizer.groups(text)]
        cuts = _cuts([len(group) for group, _ in tokens], size)
        found += [Chunk(*zip(*tokens[a:b])) for a, b in pairwise(cuts)]
        if not tokens and not (found and section is sections[-1]):
            found.append(Chunk())
    return found


def _cuts(lengths: list[int], size: int) -> list[int]:
    """Where chunks begin and end, so that none is longer than `size` unless one group is."""
    cuts, room = [0], size
    for i, length in enumerate(lengths):
        if length > room and i > cuts[-1]:
            cuts.append(i)
            room = size
        room -= length
    return [*cuts, len(lengths)] if lengths else cuts


def _limited(found: list[Chunk], tokenizer: CLIPTokenizer, most: int | None) -> list[Chunk]:
    if most is not None and len(found) > most:
        words = " ".join(tokenizer.decode(chunk.ids) for chunk in found[most:])
        warnings.warn(f"the prompt is longer than {most} x 75 tokens, so this is left out: {words!r}", stacklevel=4)
    return found[:most]


# -- weights -------------------------------------------------------------------------------------------------------------

EMPHASIS: dict[str, bool | None] = {"restore": True, "scale": False, "off": None}


def emphasise(context: Tensor, weights: Tensor, restore: bool = True) -> Tensor:
    """Context (b n d) with each token times its weight (b n), and each row's mean then as it was, as A1111 does.

    A row of weights 1 stays bit for bit. restore=False leaves the mean as it falls.
    """
    exact = context.to(torch.promote_types(context.dtype, torch.float32))
    scaled = exact * weights.to(exact)[..., None]
    if restore:
        before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (exact, scaled))
        scaled = scaled * torch.where(after == 0, 1, before / after)
    plain = (weights == 1).all(1)[:, None, None].to(context.device)
    return torch.where(plain, context, scaled.to(context.dtype))


# -- the encoders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    """One tokenizer and encoder, and what it gives: which layer (-1 the last), through the final norm or not, and `pooled`."""

    tokenizer: CLIPTokenizer
    net: CLIPText
    layer: int = -1
    norm: bool = True
    pooled: bool = False


NAMES = ("clip_l", "clip_g")  # the encoders of a pair, as files of textual inversion call them


class TextEncoder:
    """Prompts to cond by one encoder or two, whose features then lie side by side: {"context": (b m d), "pooled": (b p)}.

    SD 1.x, 2.x: [TextPart(tokenizer, net)]. SDXL: both with layer=-2, norm=False, the second with pooled=True.
    check_added: whether `encode` insists that every token that `inversion.add` brought is in some prompt, unless all are "".
    """

    def __init__(self, parts: Sequence[TextPart], check_added: bool = True) -> None:
        self.parts, self.check_added = tuple(parts), check_added
        if len(self.parts) not in (1, 2):
            raise UserError("one text encoder or two", key="parts", expected="1 or 2", found=len(self.parts))
        for name, part in zip(self.names, self.parts):
            _check_part(part, name)

    @property
    def names(self) -> tuple[str, ...]:
        """clip_l and clip_g of a pair; of one alone, text_encoder."""
        return NAMES if len(self.parts) == 2 else ("text_encoder",)

    def encode(
        self,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] | None = None,
        clip_skip: int = 0,
        prompts_2: str | Sequence[str] | None = None,
        negative_2: str | Sequence[str] | None = None,
        *,
        negative_skip: int = 0,
        emphasis: str = "restore",
        max_chunks: int | None = None,
    ) -> tuple[Cond, Cond | None]:
        """(cond, uncond) of b prompts and, if given, of as many negative ones or one for all; equal m, 77 per chunk.

        prompts_2, negative_2 are for the second encoder (default: the same). clip_skip leaves out last layers, of the prompts;
        of negative ones negative_skip does: 0 is diffusers' way, the same number A1111's. emphasis: "restore" (A1111's
        weights), "scale" (without restoring the mean), "off" (plain text, no grammar). max_chunks=1 cuts, and says what.
        UserError: no prompts, other than text, unequal numbers, a skip beyond the layers, an added token that is not used.
        """
        restore = lookup(EMPHASIS, emphasis, "emphasis")
        if max_chunks is not None and max_chunks < 1:
            raise UserError("no prompt fits", key="max_chunks", expected="1 or more, or None", found=max_chunks)
        texts = _texts(prompts, negative, prompts_2, negative_2, len(self.parts))
        b = 1 if isinstance(prompts, str) else len(prompts)
        plans = [self._plan(part, given, restore is not None, max_chunks) for part, given in zip(self.parts, texts)]
        if self.check_added and any(text for given in texts for text in given):
            self._check_added(plans)
        k = max(len(plan) for part_plans in plans for plan in part_plans)
        skips = [clip_skip] * b + [negative_skip] * (len(texts[0]) - b)
        outputs = [self._run(part, p, k, skips, restore) for part, p in zip(self.parts, plans)]
        cond = _side_by_side(outputs)
        uncond = {key: value[b:] for key, value in cond.items()} if negative is not None else None
        return {key: value[:b] for key, value in cond.items()}, uncond

    def from_embeddings(self, embeddings: Sequence[Tensor], ids: Sequence[Tensor], clip_skip: int = 0) -> Cond:
        """Cond from edited embeddings (b n d) and the ids (b n) they come from, one of each per encoder."""
        if not len(self.parts) == len(embeddings) == len(ids):
            found = f"{len(embeddings)} embeddings, {len(ids)} ids"
            raise UserError("one of each per text encoder", key="embeddings", expected=len(self.parts), found=found)
        outputs = []
        for part, x, row in zip(self.parts, embeddings, ids):
            encoded = part.net.encode(x, part.net.end(row))
            outputs.append((_output(part, encoded, clip_skip), encoded.pooled if part.pooled else None))
        return _side_by_side(outputs)

    def _plan(self, part: TextPart, texts: Sequence[str], parsed: bool, most: int | None) -> list[list[Chunk]]:
        size = part.net.config.positions - 2
        sections = [parse(text) if parsed else [[(text, 1.0)]] for text in texts]
        return [_limited(chunks(part.tokenizer, s, size), part.tokenizer, most) for s in sections]

    def _check_added(self, plans: list[list[list[Chunk]]]) -> None:
        used = set()
        for part, part_plans in zip(self.parts, plans):
            groups = {group for plan in part_plans for chunk in plan for group in chunk.groups}
            used |= {token for token, group in part.tokenizer.added.items() if group in groups}
        for token in (token for part in self.parts for token in part.tokenizer.added if token not in used):
            fix = f"write {token} in the prompt or the negative prompt, or do not load it"
            raise UserError("this embedding is loaded and in no prompt", key="token", found=repr(token), fix=fix)

    def _run(
        self, part: TextPart, plans: list[list[Chunk]], k: int, skips: list[int], restore: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """(context (b (k n) d), pooled (b p) or None) of one encoder, which sees each different chunk once."""
        padded = [chunk for plan in plans for chunk in [*plan, *[Chunk()] * (k - len(plan))]]
        different = list(dict.fromkeys(chunk.ids for chunk in padded))
        place = {ids: i for i, ids in enumerate(different)}
        length, device = part.net.config.positions, part.net.position_embedding().device
        rows = torch.tensor([part.tokenizer.row(ids, length) for ids in different], device=device)
        encoded = part.net(rows)
        where = torch.tensor([place[chunk.ids] for chunk in padded], device=device)
        layers = {skip: _output(part, encoded, skip) for skip in set(skips)}
        context = torch.cat([layers[skip][w] for skip, w in zip(skips, where.split(k))])
        if restore is not None and any(w != 1 for chunk in padded for w in chunk.weights):
            weights = torch.tensor([chunk.row(length) for chunk in padded], dtype=torch.float64)
            context = emphasise(context, weights, restore)
        return context.unflatten(0, (-1, k)).flatten(1, 2), encoded.pooled[where[::k]] if part.pooled else None


def _check_part(part: TextPart, name: str) -> None:
    tokenizer, config = part.tokenizer, part.net.config
    if len(tokenizer) > config.vocab:
        found = f"{len(tokenizer)} tokens, {config.vocab} rows"
        raise UserError("the tokenizer has more tokens than the encoder", key=name, found=found)
    if tokenizer.end != config.end:
        what = "tokenizer and encoder disagree about the end token"
        raise UserError(what, key=name, expected=f"eos={tokenizer.end}", found=config.end)


def _output(part: TextPart, encoded: Encoded, skip: int) -> Tensor:
    deepest = len(encoded.layers) + part.layer
    if type(skip) is not int or not 0 <= skip <= deepest:
        raise UserError("the encoder has not so many layers", key="clip_skip", expected=f"0 to {deepest}", found=skip)
    return part.net.output(encoded, part.layer - skip, part.norm)


def _side_by_side(outputs: Sequence[tuple[Tensor, Tensor | None]]) -> Cond:
    cond = {"context": torch.cat([context for context, _ in outputs], dim=2)}
    pooled = [pooled for _, pooled in outputs if pooled is not None]
    return {**cond, "pooled": pooled[0]} if pooled else cond


# -- what the user gives -------------------------------------------------------------------------------------------------


def _listed(texts: Any, key: str) -> list[str]:
    found = [texts] if isinstance(texts, str) else texts
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise UserError("prompts are text", key=key, expected="a text or a list of texts", found=repr(texts)[:80])
    if not found:
        raise UserError("there is no prompt", key=key, expected="at least one, which may be ''", found="an empty list")
    return list(found)


def _as_many(texts: Any, n: int, key: str) -> list[str]:
    found = _listed(texts, key)
    if len(found) not in (1, n):
        raise UserError("not as many as there are prompts", key=key, expected=f"1 or {n}", found=len(found))
    return found * n if len(found) == 1 else found


def _texts(prompts: Any, negative: Any, prompts_2: Any, negative_2: Any, parts: int) -> list[list[str]]:
    """What each encoder reads: its prompts, then its negative ones."""
    if parts == 1 and (prompts_2 is not None or negative_2 is not None):
        raise UserError("this checkpoint has one text encoder", key="prompts_2", found="a prompt for a second one")
    if negative is None and negative_2 is not None:
        raise UserError("a negative prompt for the second encoder alone", key="negative_2", fix="give negative='' too")
    first, n = _listed(prompts, "prompt"), len(_listed(prompts, "prompt"))
    second = first if prompts_2 is None else _as_many(prompts_2, n, "prompts_2")
    against = [] if negative is None else _as_many(negative, n, "negative")
    against_2 = against if negative_2 is None else _as_many(negative_2, n, "negative_2")
    return [first + against, second + against_2][:parts]


# -- mixing --------------------------------------------------------------------------------------------------------------


def mix(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> Cond:
    """(1 - share) of one cond + share of another, tensor by tensor. UserError: other keys or shapes."""
    shapes = [{key: tuple(value.shape) for key, value in cond.items()} for cond in (first, second)]
    if shapes[0] != shapes[1]:
        fix = "encode both prompts in one call, which gives them equal lengths"
        raise UserError("these conds cannot be mixed", expected=shapes[0], found=shapes[1], fix=fix)
    return {key: torch.lerp(first[key], second[key], share) for key in first}
