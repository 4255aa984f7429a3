"""A folder of pictures with captions, in the layouts that people keep them in."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nanodiffusion.data.files import SIDECARS, SUFFIXES
from nanodiffusion.data.shards import (
    MAX_BYTES,
    MAX_TEXT,
    Fault,
    caption_of,
    checked_caption,
    decode_json,
    decode_text,
)
from nanodiffusion.errors import UserError

TEMPLATE = "a photo of a {}"
TABLES = ("metadata.jsonl", "metadata.csv")
MAPPING = "captions.json"
MAX_TABLE = 1 << 30  # bytes of a whole table


class Captioned(NamedTuple):
    """One picture's file, what is said of it, and the number of its class folder."""

    file: Path
    caption: str
    label: int | None


def read_captioned(path: str | Path, template: str = TEMPLATE, faults: list[str] | None = None) -> list[Captioned]:
    """The pictures below `path` with their captions, sorted by path. The caption is the first of these that there is:

    metadata.jsonl or metadata.csv with file_name and text (or caption, prompt); captions.json, name -> caption;
    x.txt, x.caption or x.json beside x.png; `template` with the name of the class folder. The label is the class
    folder's number where every picture lies in a sub-folder. Without `faults` a picture that has no caption, or an
    unreadable one, is a UserError; with it, it is left out and named, "cats/x.png: reason". Hidden files are not seen.
    """
    root = Path(path)
    judged, _ = judge_captioned(root, template)
    rows = [row for row in judged.values() if not isinstance(row, Fault)]
    found = [f"{name}: {row}" for name, row in judged.items() if isinstance(row, Fault)]
    if found and faults is None:
        fix = "mend or remove them" if rows else "x.txt beside x.png, metadata.jsonl, captions.json or class folders"
        raise UserError(
            f"{len(found)} pictures cannot be used, first:",
            file=root,
            found=found[0],
            expected="a caption each",
            fix=fix,
        )
    if faults is not None:
        faults += found
    return rows


def judge_captioned(
    root: Path, template: str = TEMPLATE, need_caption: bool = True
) -> tuple[dict[str, Captioned | Fault], tuple[str, ...]]:
    """What `read_captioned` finds by relative path, pictures, sorted, then names that only a table knows; the classes.

    Where `need_caption` is false a picture without a caption, or with an empty one, is sound, and its caption "".
    """
    check_template(template)
    pictures = _pictures(root)
    classes = class_names(pictures)
    said = _said(root)
    judged = {name: _captioned(root, name, said, classes, template, need_caption) for name in pictures}
    alone = {name: said[name] for name in sorted(said.keys() - judged.keys())}
    missing = Fault("it has a caption, but there is no such picture")
    judged |= {name: caption if isinstance(caption, Fault) else missing for name, caption in alone.items()}
    return judged, classes


def check_template(template: str) -> str:
    """A caption with one {} for the name of the class, or a UserError."""
    if template.count("{}") != 1 or re.search(r"[{}]", template.replace("{}", "")):
        expected = "a text with one {} for the class's name"
        raise UserError("this is no template", key="template", expected=expected, found=template)
    return template


def class_names(names: Iterable[str]) -> tuple[str, ...]:
    """The top folders of relative paths, sorted: the classes; () where a file lies in none."""
    parts = [PurePosixPath(name).parts for name in names]
    return () if any(len(p) == 1 for p in parts) else tuple(sorted({p[0] for p in parts}))


def spoken(folder: str) -> str:
    """A class folder's name as one says it: without underscores."""
    return folder.replace("_", " ").strip()


def _pictures(root: Path) -> list[str]:
    """The pictures below `root` by relative path, sorted the same on every system."""
    if not root.is_dir():
        raise UserError("there is no such folder", file=root, expected="a folder of pictures with captions")
    names: list[str] = []
    for home, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(home).relative_to(root)
        names += [(here / f).as_posix() for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    if not names:
        raise UserError("there is no picture here", file=root, expected=" ".join(SUFFIXES))
    return sorted(names)


def _captioned(
    root: Path, name: str, said: Mapping[str, Any], classes: tuple[str, ...], template: str, needed: bool
) -> Captioned | Fault:
    top = PurePosixPath(name).parts[0]
    try:
        caption = said[name] if name in said else _beside(root / name)
        if isinstance(caption, Fault):
            raise caption
        if caption is None and classes:
            caption = template.format(spoken(top))
        caption = "" if caption is None and not needed else checked_caption(caption, needed)
        return Captioned(root / name, caption, classes.index(top) if classes else None)
    except Fault as e:
        return e


def _beside(picture: Path) -> Any:
    """The caption in the file beside a picture, or None."""
    for suffix in SIDECARS:
        file = picture.with_suffix(suffix)
        if file.is_file():
            raw = _raw(file)
            if suffix != ".json":
                return decode_text(raw)
            return caption_of(decode_json(raw))
    return None


def _raw(file: Path) -> bytes:
    try:
        with open(file, "rb") as f:
            raw = f.read(MAX_TEXT + 1)
    except OSError as e:
        raise Fault(f"{file.name} cannot be read: {e.strerror}") from None
    if len(raw) > MAX_TEXT:
        raise Fault(f"{file.name} has more than {MAX_TEXT} bytes")
    return raw


def picture_bytes(file: Path) -> bytes:
    """A picture's file, undecoded; Fault where it cannot be read, is empty or is too large."""
    try:
        with open(file, "rb") as f:
            raw = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise Fault(f"the file cannot be read: {e.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise Fault(f"more than {MAX_BYTES} bytes")
    if not raw:
        raise Fault("the file is empty")
    return raw


# ---- one file that speaks of many pictures


def _said(root: Path) -> dict[str, Any]:
    """Relative path -> caption or Fault, from every table at or below `root`."""
    said: dict[str, Any] = {}
    for file in sorted(root.rglob("*")):
        home = file.parent.relative_to(root)
        hidden = any(part.startswith(".") for part in home.parts)
        if file.name in (*TABLES, MAPPING) and file.is_file() and not hidden:
            rows = _mapping(file) if file.name == MAPPING else _rows(file)
            for name, caption in rows:
                key, bad = _place(home.as_posix(), name)
                if bad or (key in said):
                    caption = Fault(bad or "it has two captions")
                said[key] = caption
    return said


def _place(home: str, name: str) -> tuple[str, str]:
    """A picture's path from the root, and what is wrong with it."""
    path = PurePosixPath(home) / name.replace("\\", "/")
    outside = path.is_absolute() or ".." in path.parts
    return path.as_posix(), "the path leaves the folder" if outside else ""


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(file_name, caption) of a metadata table."""
    rows = _json_lines(file) if file.suffix == ".jsonl" else csv.DictReader(io.StringIO(_table(file), newline=""))
    try:
        for number, row in enumerate(rows, 1):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                expected = "file_name, and text or caption, in every row"
                fix = f"the columns are {', '.join(map(str, row))}"
                raise UserError(
                    "a row names no picture", file=file, expected=expected, found=f"row {number}", fix=fix[:300]
                )
            yield name, caption_of(row)
    except csv.Error as e:
        raise UserError("the table cannot be read", file=file, expected="comma separated values", found=e) from e


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_table(file).split("\n"), 1):
        if line.strip():
            try:
                yield decode_json(line.encode())
            except Fault as e:
                raise UserError(
                    f"line {number} cannot be read", file=file, found=e, expected="a JSON object a line"
                ) from e


def _mapping(file: Path) -> Iterator[tuple[str, Any]]:
    """captions.json: {"x.png": caption, ...}, or a list of objects with file_name."""
    expected = '{"x.png": "a caption", ...}'
    try:
        value = json.loads(_table(file), object_pairs_hook=partial(_once, file))
    except (ValueError, RecursionError) as e:
        raise UserError("the captions cannot be read", file=file, expected=expected, found=str(e)[:200]) from e
    if isinstance(value, list) and all(
        isinstance(row, Mapping) and isinstance(row.get("file_name"), str) for row in value
    ):
        return ((row["file_name"], caption_of(row)) for row in value)
    if not isinstance(value, Mapping):
        raise UserError("these are no captions by name", file=file, expected=expected, found=type(value).__name__)
    return ((name, caption_of(caption)) for name, caption in value.items())


def _once(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = len(pairs) - len(dict(pairs))
    if twice:
        raise UserError("a name is there twice", file=file, found=f"{twice} of {len(pairs)} names")
    return dict(pairs)


def _table(file: Path) -> str:
    """A whole table as text."""
    try:
        if file.stat().st_size > MAX_TABLE:
            raise UserError("the table is too large", file=file, expected=f"at most {MAX_TABLE} bytes")
        return decode_text(file.read_bytes())
    except OSError as e:
        raise UserError("the table cannot be read", file=file, found=e.strerror) from e
    except Fault as e:
        raise UserError("the table cannot be read", file=file, expected="UTF-8", found=e) from e
