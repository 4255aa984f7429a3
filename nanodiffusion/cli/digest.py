"""SHA-256 of the files that a picture is made of; those of large files are remembered in the user's cache folder."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nanodiffusion.data.download import cache_dir
from nanodiffusion.errors import UserError
from nanodiffusion.show import atomic
from nanodiffusion.tensors import file_sha256

REMEMBERED = 16 << 20  # bytes; smaller files are read faster than looked up
MOST = 1000  # files remembered


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal. UserError: it cannot be read."""
    path = Path(path)
    try:
        size, when = path.stat().st_size, path.stat().st_mtime_ns
        if size < REMEMBERED:
            return file_sha256(path)
        name, known = str(path.resolve()), _remembered()
        if known.get(name, [])[:2] != [size, when]:
            known[name] = [size, when, file_sha256(path)]
            _remember(known)
        return known[name][2]
    except OSError as e:
        raise UserError("this file cannot be read", file=path, found=e.strerror or str(e)) from None


def digest(files: Sequence[str | Path]) -> str:
    """The SHA-256 of a file, or of the SHA-256s of several joined, as `Bundle.sha256` has it."""
    digests = [file_digest(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _store() -> Path:
    return cache_dir() / "sha256.json"


def _remembered() -> dict[str, list]:
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(_store().read_text())
        return {str(k): v for k, v in known.items() if isinstance(v, list) and len(v) == 3 and isinstance(v[2], str)}
    return {}


def _remember(known: dict[str, list]) -> None:
    newest = dict(list(known.items())[-MOST:])
    with suppress(OSError, UserError), atomic(_store()) as part:
        part.write_text(json.dumps(newest))
        os.chmod(part, 0o600)
