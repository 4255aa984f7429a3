"""CLIP's tokenizer: the BPE of vocab.json and merges.txt, by the package tokenizers, equal to transformers' id for id."""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodiffusion.errors import UserError, need

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: the two marks, English contractions, runs of letters, single digits, runs of anything else but spaces.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Group = tuple[int, ...]  # the ids of one token: one, or as many as an added token has vectors


class CLIPTokenizer:
    """Text to CLIP's ids: NFC, white space collapsed, lower case, words, byte-level BPE with `</w>` at a word's end.

    Special tokens are found in the text too, as transformers does: where "!" pads (OpenCLIP-H, bigG as published), a "!" in
    the text is the padding's id 0 and not the word's 256. `special` lists them as tokenizer_config.json does.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: Sequence[Mapping[str, Any]] = (),
        pad: str = END,
    ) -> None:
        self.backend = _backend(vocab, merges)
        library = need("tokenizers", "sd")
        for token in special:
            flags = {name: bool(token[name]) for name in FLAGS if name in token}
            self.backend.add_tokens([library.AddedToken(token["content"], **flags)])
        self.start, self.end, self.pad = (self._id(token) for token in (START, END, pad))
        self.added: dict[str, Group] = {}  # tokens of textual inversion and the ids they stand for
        self._groups: dict[int, Group] = _multi_vector(self.backend, len(vocab))

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, pad: int | None = None, special_pad: bool = True
    ) -> "CLIPTokenizer":
        """From vocab.json and merges.txt; pad: the id that fills up, None for the end token (CLIP-L), 0 ("!") for the others.

        special_pad=False leaves the padding's token an ordinary one in a text. UserError: missing or damaged files.
        """
        words = _vocab(_json(Path(vocab)), vocab)
        names = {i: token for token, i in words.items()}
        if pad is not None and pad not in names:
            raise UserError("no token has this id", file=vocab, key="pad", expected=f"below {len(names)}", found=pad)
        text = END if pad is None else names[pad]
        special = [_special(t) for t in dict.fromkeys([START, END, text] if special_pad else [START, END])]
        return cls(words, _merges(_text(Path(merges)), merges), special, text)

    @classmethod
    def from_folder(cls, path: str | Path) -> "CLIPTokenizer":
        """From a checkpoint's tokenizer folder: vocab.json and merges.txt, else tokenizer.json, and the special tokens beside.

        UserError: a folder without them, or damaged files.
        """
        folder = Path(path)
        whole = {} if (folder / "vocab.json").is_file() else _whole(folder)
        if whole:
            model = whole["model"]
            vocab, merges = _vocab(model["vocab"], folder), _pairs(model["merges"], folder)
        else:
            vocab = _vocab(_json(folder / "vocab.json"), folder / "vocab.json")
            merges = _merges(_text(folder / "merges.txt"), folder / "merges.txt")
        special, pad = _special_tokens(folder, whole.get("added_tokens", []))
        return cls(vocab, merges, special, pad)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __call__(self, texts: str | Sequence[str], length: int = 77) -> Tensor:
        """Ids between the start and the end token, cut or padded to `length`: b texts -> (b length) int64."""
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([self.row([i for g in self.groups(t) for i in g], length) for t in texts])

    def encode(self, text: str) -> list[int]:
        """All ids of a text, the start and the end token included."""
        return [self.start, *(i for group in self.groups(text) for i in group), self.end]

    def groups(self, text: str) -> list[Group]:
        """The tokens of a text, without start and end: each the ids it stands for. UserError: not Unicode text."""
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as e:  # tokenizers raises the first for half of a surrogate pair as well
            raise UserError("this is no text", key="prompt", expected="Unicode text", found=ascii(text)[:80]) from e
        return [self._groups.get(i, (i,)) for i in ids]

    def row(self, ids: Sequence[int], length: int = 77) -> Group:
        """Start, ids, end and padding, `length` of them; what does not fit is cut."""
        row = (self.start, *ids[: length - 2], self.end)
        return row + (self.pad,) * (length - len(row))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, in lower case and one space between words."""
        first = {group[0]: i for i, group in self._groups.items()}
        rest = {row for group in self._groups.values() for row in group[1:]}
        known = [first.get(i, i) for i in ids if i not in rest]
        return self.backend.decode(known, skip_special_tokens=False).replace("</w>", " ").strip()

    def with_token(self, token: str, ids: Group) -> "CLIPTokenizer":
        """A copy to which `token` stands for `ids`, in any case of letters; this one stays as it is.

        A token that begins and ends with a letter or digit is only found as a whole word. UserError: a token that there is
        already, or that no prompt could spell.
        """
        self._check_new(token)
        library = need("tokenizers", "sd")
        other = object.__new__(CLIPTokenizer)
        other.backend = library.Tokenizer.from_str(self.backend.to_str())
        whole = token[0].isalnum() and token[-1].isalnum()
        other.backend.add_tokens([library.AddedToken(token, single_word=whole, normalized=True)])
        other.start, other.end, other.pad = self.start, self.end, self.pad
        other.added = {**self.added, token: ids}
        other._groups = {**self._groups, other._id(token): ids}
        return other

    def _check_new(self, token: str) -> None:
        fix = "give it another name: token='<my-style>'"
        if not token or any(letter.isspace() or letter in "()[]\\" for letter in token):
            expected = "one word without spaces, brackets and backslashes"
            raise UserError("no prompt can name this token", key="token", expected=expected, found=repr(token), fix=fix)
        lower = unicodedata.normalize("NFC", token).lower()
        names = (token, lower, lower + "</w>")
        taken = any(self.backend.token_to_id(name) is not None for name in names)
        if taken or lower in (name.lower() for name in self.added):
            raise UserError("the vocabulary has this token already", key="token", found=repr(token), fix=fix)

    def _id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError("not a vocabulary of CLIP", key="vocab", expected=f"one with {token!r}", found="none")
        return found


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    library = need("tokenizers", "sd")
    try:
        bpe = library.models.BPE(dict(vocab), list(merges), unk_token=END, end_of_word_suffix="</w>")
    except Exception as e:  # the package raises nothing narrower
        raise UserError("vocabulary and merges do not belong together", key="merges", found=str(e)) from e
    backend = library.Tokenizer(bpe)
    n, p = library.normalizers, library.pre_tokenizers
    backend.normalizer = n.Sequence([n.NFC(), n.Replace(library.Regex(r"\s+"), " "), n.Lowercase()])
    words = p.Split(library.Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = p.Sequence([words, p.ByteLevel(add_prefix_space=False)])
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _multi_vector(backend: Any, size: int) -> dict[int, Group]:
    """A saved tokenizer's added tokens of several vectors, which diffusers writes as <a>, <a>_1, <a>_2: id of <a> -> all."""
    added = {backend.id_to_token(i): i for i in range(size, backend.get_vocab_size())}
    groups = {}
    for token, first in added.items():
        group = [first]
        while (following := added.get(f"{token}_{len(group)}")) is not None:
            group.append(following)
        if len(group) > 1:
            groups[first] = tuple(group)
    return groups


# -- files ---------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        fix = "a tokenizer folder holds vocab.json and merges.txt, or tokenizer.json"
        raise UserError("cannot read the tokenizer", file=path, found=str(e), fix=fix) from e


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError("cannot read the tokenizer", file=path, expected="JSON", found=str(e)) from e


def _vocab(words: Any, file: object) -> dict[str, int]:
    if not isinstance(words, dict) or any(type(i) is not int for i in words.values()):
        raise UserError(
            "not a vocabulary", file=file, expected="a JSON object: token -> id", found=type(words).__name__
        )
    return words


def _merges(text: str, file: object) -> list[tuple[str, str]]:
    # Not splitlines(): some tokens are made of what Unicode counts as line breaks.
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line and not line.startswith("#version")]
    return _pairs(lines, file)


def _pairs(rules: Iterable[Any], file: object) -> list[tuple[str, str]]:
    pairs = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in rules]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError("not a list of merges", file=file, expected="two tokens a line", found=repr(pair)[:80])
    return pairs  # type: ignore[return-value]


def _whole(folder: Path) -> dict[str, Any]:
    """tokenizer.json, the only file that transformers 5 writes; {} where there is none."""
    path = folder / "tokenizer.json"
    found = _json(path) if path.is_file() else {}
    if found and not {"vocab", "merges"} <= set(found.get("model", {})):
        raise UserError("not CLIP's tokenizer", file=path, expected="a model with vocab and merges", found=list(found))
    return found


def _special(token: Any) -> dict[str, Any]:
    """A special token as AddedToken's arguments, from its text or from such."""
    return {"normalized": False, **({"content": token} if isinstance(token, str) else token), "special": True}


def _special_tokens(folder: Path, saved: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The added tokens in transformers' order, and the text of the padding.

    tokenizer_config.json with `added_tokens_decoder` says all; in older folders special_tokens_map.json overrides it and
    added_tokens.json adds to it.
    """
    config, older, more = (
        _json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if "added_tokens_decoder" in config:
        listed = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    else:
        config = {**config, **older}
        marks = {_special(config[key])["content"] for key in NAMED if config.get(key)}
        listed = {i: {"content": t, "normalized": t not in marks, "special": t in marks} for t, i in more.items()}
        listed |= {token["id"]: token for token in saved}
    tokens = {token["content"]: token for _, token in sorted(listed.items())}
    named = [_special(config.get(key) or (START if key == "bos_token" else END)) for key in NAMED]
    # Where two roles share a text, the last one's flags hold.
    tokens |= {token["content"]: token for token in named if token["content"] not in tokens}
    return list(tokens.values()), named[-1]["content"]
