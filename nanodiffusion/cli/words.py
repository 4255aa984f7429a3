"""key=value words, as all commands but `train` read them (that one has Hydra's grammar, of which this is a part)."""

import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from nanodiffusion.config import SampleConfig, check_options, from_dict
from nanodiffusion.errors import UserError, nearest

C = TypeVar("C", bound=SampleConfig)

SHORT = {"rescale": "guidance_rescale", "interval": "guidance_interval"}
COMPONENTS = ("sampler", "ladder")
PAIR = re.compile(r"[A-Za-z_][\w.]*=")  # how a key=value word begins
ITEM = re.compile(r"""\s*(?:'[^']*'|"[^"]*")\s*(?=,|$)|[^,]+""")  # of a list; what is quoted may hold commas
ZEROS = re.compile(r"[+-]?0[\d_].*")  # a text, as 007; the grammar has no such number


def take_first(words: Sequence[str], missing: UserError) -> tuple[str, list[str]]:
    """The path or name that a command is about, which is its first word, and the other words.

    It may have "=" in it, as the runs of a sweep do: runs/digits,lr=0.001. UserError `missing`: none, or it is key=value.
    """
    if not words or (PAIR.match(words[0]) and not Path(words[0]).exists()):
        raise missing
    return words[0], list(words[1:])


def parse_value(text: str, texts: bool = False) -> Any:
    """A number, true, false, null, [a,b,...] or a text, quoted or not, as Hydra's grammar reads them.

    texts: what is neither null nor a list stays the text that it is: 007, 1_000, true.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part, texts) for part in ITEM.findall(text[1:-1]) if part.strip()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    words = {"null": None, "none": None} | ({} if texts else {"true": True, "false": False})
    if text.lower() in words:
        return words[text.lower()]
    for kind in () if texts or ZEROS.fullmatch(text) else (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def is_known(key: str, known: Iterable[str]) -> bool:
    """Whether a key is one of those, or an option of a component of those: sampler.order."""
    home, dot, _ = key.partition(".")
    return home in known and (not dot or home in COMPONENTS)


def read_pairs(words: Iterable[str], known: Mapping[str, Any]) -> dict[str, str]:
    """key=value words as key -> text. UserError: no pair, a key that is not known (but for SHORT ones), or one given twice."""
    given: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = SHORT.get(key, key)
        if not equals:
            raise UserError(f"what is {word!r}?", expected="key=value")
        if key in given:
            raise UserError("a key is given twice", key=key, found=word)
        if not is_known(key, known):
            raise UserError(f"unknown key {key}", fix=nearest(key, {*known, *SHORT}))
        given[key] = text
    return given


def read_options(words: Sequence[str], kinds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """key=value words as (options of a command, of these types; changes of the SampleConfig by dotted key), checked."""
    ours = {k: v for k, v in typing.get_type_hints(SampleConfig).items() if k not in (*kinds, "prompts")}
    pairs = read_pairs(words, {**kinds, **ours})
    given = {key: text if kinds.get(key) is str else _parsed(text, kinds.get(key)) for key, text in pairs.items()}
    options = {k: v for k, v in given.items() if k in kinds}
    check_options(options, kinds, "")
    return options, {k: v for k, v in given.items() if k not in options}


def _parsed(text: str, kind: Any) -> Any:
    """The value of a key of this type: where that allows texts and no numbers, a number is a text too."""
    allowed = typing.get_args(kind)
    return parse_value(text, texts=str in allowed and int not in allowed)


def changed(config: C, changes: Mapping[str, Any]) -> C:
    """The config with changes by dotted key; a component of another name starts without the options of the old one."""
    values = asdict(config)
    for key in COMPONENTS:
        named = changes.get(f"{key}.name", changes.get(key))
        if isinstance(named, str) and named != values[key].get("name"):
            values[key] = {"name": named}
    for key, value in changes.items():
        home, _, option = key.partition(".")
        if option:
            values[home][option] = value
        elif home not in COMPONENTS or not isinstance(value, str):
            values[home] = value
    return from_dict(type(config), values)
