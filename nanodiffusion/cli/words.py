"""key=value words, as all commands but `train` read them (that one has Hydra's grammar, of which this is a part)."""

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from nanodiffusion.config import SampleConfig, check_options, from_dict
from nanodiffusion.errors import UserError, nearest

C = TypeVar("C", bound=SampleConfig)

SHORT = {"rescale": "guidance_rescale", "interval": "guidance_interval"}
COMPONENTS = ("sampler", "ladder")


def parse_value(text: str) -> Any:
    """A number, true, false, null, [a,b,...] or a text, quoted or not, as Hydra's grammar reads them."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part) for part in text[1:-1].split(",") if part.strip()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
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
    given = {key: text if kinds.get(key) is str else parse_value(text) for key, text in pairs.items()}
    options = {k: v for k, v in given.items() if k in kinds}
    check_options(options, kinds, "")
    return options, {k: v for k, v in given.items() if k not in options}


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
