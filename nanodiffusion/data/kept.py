"""What is kept in the cache's folder `shards`: shards from elsewhere, and what a census found in shards and folders."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nanodiffusion.data.download import cache_dir
from nanodiffusion.data.shards import fetch, plain
from nanodiffusion.errors import UserError
from nanodiffusion.show import atomic

OPERATORS = ("|", "||", "&", "&&", ";", "<", ">", ">>")


def kept_file(key: Sequence[Any]) -> Path:
    """Where what was found is kept: one file for each key."""
    return cache_dir() / "shards" / f"{_digest(json.dumps(key))}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recall(file: Path) -> dict[str, Any]:
    """What was kept, or {} where there is nothing, or damage."""
    try:
        value = json.loads(file.read_text("utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def keep(file: Path, found: Mapping[str, Any]) -> None:
    """Keep what was found; a warning where it cannot be written."""
    try:
        with atomic(file) as part:
            part.write_text(json.dumps(found), "utf-8")
    except UserError as e:
        warnings.warn(f"the census will be taken again next time: {e.what}", stacklevel=2)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """One process of this machine at a time works at `file`; all at once where there are no locks."""
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl

            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(open(file.with_suffix(".lock"), "w")), fcntl.LOCK_EX)
        yield


def local_shard(shard: str) -> Path:
    """The file of an address or a command ("pipe:COMMAND") in the cache, made whole or not at all if it is not there.

    What lies in the cache is believed: delete it to have it again. UserError: it cannot be had.
    """
    name = re.sub(r"[^\w.-]", "_", shard.partition("?")[0].rsplit("/", 1)[-1])[-60:].removesuffix(".tar")
    file = cache_dir() / "shards" / f"{name}-{_digest(shard)[:16]}.tar"
    if not file.is_file():
        with atomic(file) as part:
            if shard.startswith("pipe:"):
                _run(shard.removeprefix("pipe:"), part)
            else:
                fetch(shard, part)
    return file


def _run(command: str, file: Path) -> None:
    """A command's output as a file; no shell looks at the command, so nothing in it means more than it says."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise UserError("the command cannot be read", key="path", found=f"{command}: {e}") from e
    if not words or any(word in OPERATORS for word in words):
        fix = f"pipe:sh -c {shlex.quote(command.strip())}" if words else None
        expected = "a program and its words, as no shell runs them"
        raise UserError("this is no command", key="path", expected=expected, found=f"pipe:{command}", fix=fix)
    with open(file, "wb") as out, tempfile.TemporaryFile() as errors:
        try:
            code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, check=False).returncode
        except OSError as e:
            raise UserError("the command cannot be run", key="path", found=f"{words[0]}: {e.strerror}") from e
        errors.seek(max(os.fstat(errors.fileno()).st_size - 400, 0))
        last = plain(errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2])
    if code or not file.stat().st_size:
        found = f"{command}: exit {code}, {last or 'nothing said'}"
        raise UserError("the command brought no shard", key="path", expected="a tar file on its output", found=found)
