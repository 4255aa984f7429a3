"""Published files: found locally or downloaded once, and believed only when their SHA-256 is the published one."""

import gzip
import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from nanodiffusion.errors import UserError

TIMEOUT = 30  # seconds without a byte
LIMIT = 1 << 30  # bytes: no set here is larger, and a compressed bomb stops here


@dataclass(frozen=True)
class Published:
    """A public file: its address and the SHA-256 of its content.

    With `unpack` the content is what lies inside the gzip, which is the same whoever compressed it.
    """

    url: str
    sha256: str
    unpack: bool = False

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def cache_dir() -> Path:
    """Where downloads are kept: $NANODIFFUSION_CACHE, else ~/.cache/nanodiffusion."""
    return Path(os.environ.get("NANODIFFUSION_CACHE") or Path.home() / ".cache" / "nanodiffusion")


def content(file: Published, folder: str, *elsewhere: Path) -> bytes:
    """The verified content of `file`: from the cache's `folder`, from `elsewhere`, or else downloaded into the cache.

    UserError when it is damaged, is not the published file, or cannot be had.
    """
    home = cache_dir() / folder
    for path in (home / file.name, home / file.name.removesuffix(".gz"), *elsewhere):
        if path.is_file():
            return _verified(path, file, path, fix="delete the file: it is then fetched again")
    return download(file, home / file.name)


def download(file: Published, target: Path) -> bytes:
    """Fetch, verify, then rename into place: `target` appears whole or not at all. Returns the content."""
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as out:
            part = Path(out.name)
            _transfer(file.url, out)
            out.flush()
            os.fsync(out.fileno())
        raw = _verified(part, file, file.url, fix=f"try again, or put the file at {target} by hand")
        part.replace(target)
        return raw
    except (OSError, http.client.HTTPException) as e:
        fix = "connect to the network, or put the file there by hand; NANODIFFUSION_CACHE chooses the folder"
        raise UserError("the download failed", file=file.url, expected=f"a copy at {target}", found=e, fix=fix) from e
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _transfer(url: str, out: IO[bytes]) -> None:
    """Copy the answer to `out`, with a progress bar where a person can see one."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm.wrapattr(answer, "read", total=size, desc=url.rsplit("/", 1)[-1], disable=None) as source:
            shutil.copyfileobj(source, out, 1 << 20)


def _verified(path: Path, file: Published, shown: object, fix: str) -> bytes:
    raw = read(path, file.unpack, shown, fix)
    found = hashlib.sha256(raw).hexdigest()
    if found != file.sha256:
        expected = f"SHA-256 {file.sha256}"
        raise UserError("this is not the published file", file=shown, expected=expected, found=found, fix=fix)
    return raw


def read(path: Path, unpack: bool = True, shown: object = None, fix: str | None = None) -> bytes:
    """The bytes of a file, with `unpack` those inside a gzip; UserError when it is damaged or too large."""
    shown = shown or path
    try:
        with open(path, "rb") as plain:
            packed = unpack and plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            raw = (gzip.GzipFile(fileobj=plain) if packed else plain).read(LIMIT + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError("the file cannot be read", file=shown, expected="a whole file", found=e, fix=fix) from e
    if len(raw) > LIMIT:
        raise UserError("the file is too large", file=shown, expected=f"at most {LIMIT} bytes", fix=fix)
    return raw
