"""One error for everything a user can get wrong, and the helpers that phrase it. Imports nothing heavy."""

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake the user can mend: what happened, where, what was expected, what was found, how to fix it (at most 6 lines)."""

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.details = {"file": file, "key": key, "expected": expected, "found": found, "fix": fix}
        place = " ".join(f"{k} {v}" for k, v in (("file", file), ("key", key)) if v is not None)
        rows = [what, place, *(f"{k}: {self.details[k]}" for k in ("expected", "found", "fix"))]
        super().__init__("\n  ".join(r for r in rows if r and not r.endswith(": None")))


@contextmanager
def workable(key: str) -> Iterator[None]:
    """Options of the component at `key` that arithmetic refuses, a level of 0 or an exponent of 0, are a UserError."""
    try:
        yield
    except (ArithmeticError, ValueError) as e:
        raise UserError("these options cannot work", key=key, found=str(e)) from None


def need(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of nanodiffusion brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise UserError(
            f"this needs the package {package.split('.')[0]!r}",
            found=str(e),
            fix=f"pip install 'nanodiffusion[{extra}]'",
        ) from e


def nearest(word: str, valid: Iterable[str]) -> str:
    """The valid names, the nearest to `word` first said."""
    names = sorted(map(str, valid))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + "valid: " + ", ".join(names)


def few(names: Iterable[str]) -> str:
    """The first three names, and a hint of more."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def lookup(table: Mapping[str, T], name: Any, key: str) -> T:
    """table[name], or a UserError that lists the nearest valid names."""
    try:
        return table[name]
    except (KeyError, TypeError):
        raise UserError(f"unknown {key} {name!r}", key=key, found=repr(name), fix=nearest(str(name), table)) from None
