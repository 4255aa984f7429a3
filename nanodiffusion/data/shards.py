"""Pictures with captions in tar files, the layout of webdataset: read without trust, and written the same to the byte.

A sample is the run of members whose names share what comes before the first dot of the last part: 0007.jpg, 0007.txt,
0007.json, 0007.cls. Only png, jpg, jpeg, webp, txt, json and cls are opened, and 0.png, 1.png, ... with clip_scores.txt, of
which the best is the picture; other members are not even read.
"""

import glob
import http.client
import io
import json
import os
import re
import tarfile
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nanodiffusion.data.files import FORMATS, MAX_PIXELS, opaque
from nanodiffusion.errors import UserError, few, need
from nanodiffusion.show import atomic

PICTURES = ("png", "jpg", "jpeg", "webp")
TEXTS = ("txt", "json", "cls")
SCORES = "clip_scores.txt"
PICTURE = "|".join(PICTURES)
NUMBERED = re.compile(rf"(\d{{1,4}})\.(?:{PICTURE})")
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, ending: webdataset's rule
MAX_BYTES = 256 * 2**20  # of a picture: 64 megapixels of RGB, uncompressed, are 183 MiB
MAX_TEXT = 2**20  # bytes of a txt, json or cls
MAX_HEADER = 2**14  # bytes of a long name: some versions of tarfile take time with the square of it (CVE-2024-6232)
MAX_SHARDS = 100_000
CAPTION_KEYS = ("caption", "text", "prompt")
TIMEOUT, ATTEMPTS = 30, 4  # seconds without a byte; how often a shard is asked for

Faults = list[str] | Callable[[str], object]


class Sample(NamedTuple):
    """One picture (RGB, upright) and what is said of it; `where` is "shard.tar:key", meta the sample's json."""

    key: str
    image: Image.Image
    caption: str
    label: int | None
    meta: dict[str, Any]
    where: str


class Fault(ValueError):
    """Why one sample is left out; never a reason to stop."""


# ---- which shards


def expand_shards(spec: str | os.PathLike[str], pipes: bool = False) -> list[str]:
    """The shards of a folder, a pattern, or names with braces ("a-{000..012}.tar", several joined by "::"), in order.

    Files and http(s) addresses, and with `pipes` also "pipe:COMMAND", whose output is the shard.
    UserError: a file that is not there, another scheme, a pipe without `pipes`, above 100,000 names.
    """
    text = os.fspath(spec)
    if os.path.isdir(text):
        names = sorted(str(file) for file in Path(text).glob("*.tar") if not file.name.startswith("."))
        if not names:
            raise UserError("there is no shard here", file=text, expected="files that end in .tar")
        return names
    names = [name for part in text.split("::") for name in _globbed(part, pipes)]
    missing = [name for name in names if not is_remote(name) and not os.path.isfile(name)]
    if missing or not names:
        found = f"{len(missing)} of {len(names)} are missing: {few(missing)}" if missing else "no file"
        raise UserError("a shard is not there", file=text, expected="files, as in data/{00000..00012}.tar", found=found)
    return names


def _globbed(part: str, pipes: bool) -> list[str]:
    scheme, colon, _ = part.partition(":")
    known = is_url(part) or (pipes and scheme == "pipe")
    if colon and len(scheme) > 1 and not known and "/" not in scheme and not os.path.exists(part):
        fix = "download them first, and give the files"
        raise UserError("this is no place for shards", found=part, expected="files, or http(s) addresses", fix=fix)
    names = _braces(part) if "{" in part else [part]
    return [match for name in names for match in ([name] if known else _matches(name))]


def _matches(name: str) -> list[str]:
    return sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]


def _braces(part: str) -> list[str]:
    ranges = re.findall(r"\{(-?\d{1,15})\.\.(-?\d{1,15})", part)
    long = re.search(r"\{-?\d{16}|\.\.-?\d{16}", part)
    names: list[str] = []
    # the count comes first: braceexpand makes a whole range at once, however long
    if not long and sum(abs(int(last) - int(first)) for first, last in ranges) < MAX_SHARDS:
        try:
            names = list(islice(need("braceexpand", extra="data").braceexpand(part), MAX_SHARDS + 1))
        except ValueError as e:
            raise UserError("the braces do not close", found=part, expected="as in data/{00000..00012}.tar") from e
    if not names or len(names) > MAX_SHARDS:
        raise UserError("these are too many shards", found=part, expected=f"at most {MAX_SHARDS:,}")
    return names


def is_url(name: str) -> bool:
    """Whether a name is an http(s) address."""
    return name.startswith(("http://", "https://"))


def is_remote(name: str) -> bool:
    """Whether a shard is an address or a command's output: no file here yet."""
    return is_url(name) or name.startswith("pipe:")


# ---- reading


def read_shards(
    shards: Iterable[str], faults: Faults, *, need_caption: bool = True, workers: int = 0, names: Sequence[str] = ()
) -> Iterator[Sample]:
    """The sound samples of shards, in their order; each other one is left out and named, "shard.tar:key: reason".

    The caption is the txt, else the json's caption, text or prompt. Without one a sample needs a cls (then ""), unless
    `need_caption` is false. `workers` threads decode ahead; order and faults do not depend on it.
    names: what faults call the shards; left out, `shard_names` of them.
    UserError: a shard that cannot be had at all.
    """
    shards = [os.fspath(shard) for shard in shards]
    names = names or shard_names(shards)
    tell = faults.append if isinstance(faults, list) else faults
    found = (item for shard, name in zip(shards, names) for item in groups(shard, name, is_choice))
    for item in ahead(lambda item: _judge(item, need_caption), found, workers):
        if isinstance(item, str):
            tell(item)
        else:
            yield item


def shard_names(shards: Sequence[str]) -> list[str]:
    """How shards are called: by the file's name, or in full where two have the same."""
    names = [shard.rstrip("/").rsplit("/", 1)[-1] for shard in shards]
    return names if len(set(names)) == len(set(shards)) else list(shards)


def ahead(function: Callable[[Any], Any], items: Iterator[Any], workers: int) -> Iterator[Any]:
    """map(function, items) with some items worked on ahead, in order."""
    if workers < 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class Group:
    """The members of one sample, undecoded."""

    key: str
    shard: str
    parts: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # of parts: first byte, how many
    bad: str = ""  # the first reason to leave it out

    def refuse(self, why: str) -> None:
        """Leave the sample out; the first reason stays."""
        self.bad = self.bad or why


def _judge(item: Group | str, need_caption: bool) -> Sample | str:
    """A sample, or its fault in words."""
    if isinstance(item, str):
        return item
    try:
        return decode_group(item, need_caption)
    except Fault as e:
        return f"{item.shard}:{plain(item.key)}: {e}"


def decode_group(group: Group, need_caption: bool = True) -> Sample:
    """The sample that a group holds; Fault where it is not one."""
    if group.bad:
        raise Fault(group.bad)
    ending = choose_picture(group.parts)
    meta = decode_json(group.parts["json"]) if "json" in group.parts else {}
    label = decode_label(group.parts["cls"]) if "cls" in group.parts else None
    caption = group_caption(group, meta, need_caption and label is None)
    image = decode_image(group.parts[ending])
    return Sample(group.key, image, caption, label, meta, f"{group.shard}:{group.key}")


def is_choice(ending: str) -> bool:
    """Whether a member is one of several pictures of a sample, or their scores: see `choose_picture`."""
    return ending == SCORES or bool(NUMBERED.fullmatch(ending))


def choose_picture(parts: Mapping[str, bytes]) -> str:
    """The ending of a sample's picture: its only one, or where scores lie beside 0.png, 1.png, ... the first of the best.

    Fault: no picture or several, or not one finite score a picture.
    """
    single = [ending for ending in parts if ending in PICTURES]
    numbered = {int(match[1]): ending for ending in parts if (match := NUMBERED.fullmatch(ending))}
    if SCORES not in parts and (single or not numbered):
        if len(single) != 1:
            raise Fault(f"more than one picture: {', '.join(single)}" if single else "no picture")
        return single[0]
    if single:
        raise Fault(f"more than one picture: {', '.join(single)} beside {SCORES}")
    if SCORES not in parts:
        raise Fault(f"no {SCORES}")
    try:
        scores = np.array([float(score) for score in decode_text(parts[SCORES]).split(",")])
    except ValueError:
        scores = np.array(np.nan)
    if not np.isfinite(scores).all() or sorted(numbered) != list(range(scores.size)):
        raise Fault(f"{SCORES} is not one number for each of 0.png, 1.png, ...")
    return numbered[int(scores.argmax())]


def group_caption(group: Group, meta: Mapping[str, Any], needed: bool) -> str:
    """The caption of a group, "" where it has none and none is `needed`; Fault where it is not one."""
    if "txt" in group.parts:
        caption: Any = decode_text(group.parts["txt"])
    else:
        caption = caption_of(meta)
    if caption is None and not needed:
        return ""
    return checked_caption(caption, needed)


def caption_of(value: Any) -> Any:
    """The caption in a text, a list of texts (its first), or an object with caption, text or prompt; else None."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in CAPTION_KEYS if value.get(key) is not None), None)
    return value[0] if isinstance(value, list) and value else value


def checked_caption(caption: Any, needed: bool = True) -> str:
    """A caption without the spaces around it; Fault where it is none, not a text, or (if `needed`) empty."""
    if caption is None:
        raise Fault("no caption")
    if not isinstance(caption, str) or any("\ud800" <= c <= "\udfff" for c in caption):
        raise Fault("the caption is not a text")
    if needed and not caption.strip():
        raise Fault("an empty caption")
    return caption.strip()


# ---- the members of an archive


class _Bounded(io.FileIO):
    """A file that is never asked for more bytes than it has, nor for long headers: tarfile believes the size they state."""

    limit: int | None = MAX_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, at most what is left."""
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        if size is not None and size < -1:
            raise tarfile.ReadError("a negative size")
        if self.limit is not None and (size or 0) > self.limit:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(left if size is None or size < 0 else min(size, left)) or b""


def groups(shard: str, shown: str, also: Callable[[str], bool] | None = None) -> Iterator[Group | str]:
    """The samples of one shard, undecoded, and the faults of the archive itself.

    also: which endings are read besides those of PICTURES and TEXTS, like "control.png".

    Plain tarfile, not webdataset's iterator: that one ends silently where a header is damaged or the end is missing,
    reads members of any size, drops names without a key unsaid, and its default decoders open pickles.
    """
    with _fetched(shard) as path, _Bounded(path) as file:
        seen: set[str] = set()
        group: Group | None = None
        told = False
        for key, add in _members(file, shown, also):
            if key is None:
                told = True
                yield add
                continue
            if group is None or key != group.key:
                if group is not None:
                    yield group
                group = Group(key, shown)
                if key in seen:
                    group.refuse("the key is there twice, the first was taken")
                seen.add(key)
            add(group)
        if group is not None:
            yield group
        elif not told:
            yield f"{shown}: the archive holds no sample"


def member_names(shard: str | Path) -> tuple[list[str], str]:
    """The names of an archive's members, none of them opened, and the first fault of the archive itself, or ""."""
    names: list[str] = []
    with _Bounded(os.fspath(shard)) as file:
        for key, add in _members(file, os.path.basename(shard)):
            if key is None:
                return names, add.partition(": ")[2]
            names.append(f"{key}.{add.ending}")
    return names, ""


def _members(file: _Bounded, shown: str, also: Callable[[str], bool] | None = None) -> Iterator[tuple[Any, Any]]:
    """(key, what adds the member to its group) of each member, or (None, fault) of the archive."""
    size, end = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _headers(archive, file):
                if archive.offset <= end or member.size < 0:
                    raise tarfile.ReadError("a member's size is negative")
                end = archive.offset
                whole = member.offset_data + member.size <= size or member.issparse()
                name = plain(member.name)
                if match := MEMBER.fullmatch(member.name.removeprefix("./")):
                    yield match[1], _Adder(archive, member, match[2].lower(), whole, also)
                elif not member.isdir():
                    yield None, f"{shown}:{name}: the name has no key and ending"
                if not whole:
                    yield None, f"{shown}: the archive ends inside {name}"
                    return
            if lack := _lacks_end(file, archive.offset, size):
                yield None, f"{shown}: {lack}"
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as e:
        why = f"the archive is damaged after byte {min(end, size)}: {_why(e)}" if end else "not a tar archive"
        yield None, f"{shown}: {why}"


def _headers(archive: tarfile.TarFile, file: _Bounded) -> Iterator[tarfile.TarInfo]:
    """Member after member; only while a header is read is there a limit to what is read at once."""
    while True:
        file.limit = MAX_HEADER
        member = archive.next()
        file.limit = None
        if member is None:
            return
        cast(Any, archive).members = []  # else it keeps them all
        yield member


def _lacks_end(file: _Bounded, offset: int, size: int) -> str:
    """What is wrong where tarfile stopped: it stops as quietly at a broken header as at the block of zeros that ends."""
    file.seek(min(offset, size))
    block = file.read(512)
    if len(block) < 512:
        return f"the archive has no end, it is cut off at byte {size}"
    return f"a broken header at byte {offset}" if any(block) else ""


class _Adder(NamedTuple):
    """One member on its way into its group."""

    archive: tarfile.TarFile
    member: tarfile.TarInfo
    ending: str
    whole: bool  # all of it is in the file
    also: Callable[[str], bool] | None  # what else is read

    def __call__(self, group: Group) -> None:
        name = plain(self.member.name.rsplit("/", 1)[-1])
        read = self.ending in PICTURES or self.ending in TEXTS or (self.also and self.also(self.ending))
        if why := _improper(self.member, self.ending, group, read):
            group.refuse(why.format(name))
        elif not self.whole:
            group.refuse(f"the archive ends inside {name}")
        elif read:
            group.parts[self.ending] = self.archive.extractfile(self.member).read()  # type: ignore[union-attr]
            group.places[self.ending] = self.member.offset_data, self.member.size


def _improper(member: tarfile.TarInfo, ending: str, group: Group, read: Any) -> str:
    """Why a member cannot belong to a sample."""
    path = member.name.split("/")
    if member.name.startswith("/") or ".." in path or "\\" in member.name or "\0" in member.name:
        return "the name leaves the archive"
    if not member.name.isprintable():
        return "the name is not a printable text"
    if not member.isreg() or member.issparse():
        return "{} is a link, a device or a sparse file"
    if not read:
        return ""
    if ending in group.parts:
        return "{} is there twice"
    most = MAX_BYTES if ending.rpartition(".")[2] in PICTURES else MAX_TEXT
    if member.size > most:
        return f"{{}} has {member.size} bytes, above {most}"
    return "" if member.size else "{} is empty"


@contextmanager
def _fetched(shard: str) -> Iterator[str]:
    """A shard as a file here; one with an address is downloaded whole first, and gone afterwards."""
    if not is_url(shard):
        try:
            open(shard, "rb").close()
        except OSError as e:
            raise UserError("a shard cannot be read", file=shard, found=e.strerror) from e
        yield shard
        return
    with tempfile.TemporaryDirectory(prefix="nanodiffusion-") as place:
        file = f"{place}/shard.tar"
        fetch(shard, file)
        yield file


def fetch(shard: str, file: str | Path) -> None:
    """Download an address whole into `file`, asking up to four times. UserError: it cannot be had."""
    for attempt in range(ATTEMPTS):
        try:
            return _download(shard, file)
        except (OSError, http.client.HTTPException) as e:
            if attempt == ATTEMPTS - 1 or getattr(e, "code", 500) in (401, 403, 404, 410):
                raise UserError("this address cannot be had", file=shard, found=e, fix="try again") from e
            time.sleep(0.2 * 4**attempt)


def _download(url: str, file: str | Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(file, "wb") as out:
        while block := answer.read(1 << 20):
            out.write(block)
        stated = answer.headers.get("Content-Length")
        if stated and int(stated) != out.tell():
            raise OSError(f"{out.tell()} of {stated} bytes came")


def plain(name: str) -> str:
    """A name that can be written and printed, whatever bytes it had."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)[:300]


# ---- decoders: bytes that nobody vouches for


def decode_image(raw: bytes) -> Image.Image:
    """A PNG, JPEG or WEBP as RGB, upright, on white where transparent, the first frame of several; else Fault.

    CMYK becomes RGB as Pillow does it (without the profile), 16-bit grey keeps its high byte. The header is read first: nothing
    above 64 megapixels is decoded.
    """
    with _opened(raw) as image:
        ImageOps.exif_transpose(image, in_place=True)
        rgb = opaque(image)
        return rgb if rgb.mode == "RGB" else rgb.convert("RGB")


def picture_size(raw: bytes) -> tuple[int, int]:
    """(height, width) of a picture once it is upright, by its header alone; Fault where that is no sound one."""
    with _opened(raw) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF 2.3, table 4: orientations that swap the sides
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(raw: bytes) -> Iterator[Image.Image]:
    """A picture whose header alone is read; whatever goes wrong inside is a Fault."""
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Fault(f"{image.width} x {image.height} pixels, above {MAX_PIXELS / 1e6:g} megapixels")
            yield image
    except Fault:
        raise
    except UnidentifiedImageError:
        raise Fault("not a PNG, JPEG or WEBP") from None
    except Image.DecompressionBombError:
        raise Fault(f"above {MAX_PIXELS / 1e6:g} megapixels") from None
    except Exception as e:  # a damaged file makes Pillow raise nearly anything
        raise Fault(f"the picture cannot be decoded: {_why(e)}") from None


def _why(e: BaseException) -> str:
    """An exception in words that are the same every time: without addresses in memory."""
    return re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(e)).strip()[:200] or type(e).__name__


def decode_text(raw: bytes) -> str:
    """UTF-8, with or without its mark; else Fault."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise Fault(f"the caption is not UTF-8 at byte {e.start}") from None


def decode_json(raw: bytes) -> dict[str, Any]:
    """A JSON object; else Fault."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise Fault("the json is nested too deeply") from None
    except ValueError as e:
        raise Fault(f"the json cannot be read: {_why(e)}") from None
    if not isinstance(value, dict):
        raise Fault("the json is not an object")
    return value


def decode_label(raw: bytes) -> int:
    """A class as a whole number from 0; else Fault."""
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", raw):
        raise Fault("the cls is not a whole number")
    return int(raw)


# ---- writing


def write_shards(samples: Iterable[Sample], folder: str | Path, per_shard: int = 10000) -> list[Path]:
    """Write folder/00000.tar, ... with `per_shard` samples each, as png, txt, json and cls: the same bytes every time."""
    samples, files = iter(samples), []
    while part := list(islice(samples, 1)):
        file = Path(folder) / shard_name(len(files))
        write_shard(file, (encode_sample(s) for s in _chain(part, islice(samples, per_shard - 1))))
        files.append(file)
    return files


def _chain(*parts: Iterable[Sample]) -> Iterator[Sample]:
    for part in parts:
        yield from part


def shard_name(number: int) -> str:
    """00000.tar, 00001.tar, ...: as img2dataset counts."""
    return f"{number:05d}.tar"


def write_shard(file: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write one shard of (key, ending -> bytes), whole or not at all; how many. A fixed time and owner make the bytes repeat."""
    count = 0
    writer = need("webdataset", extra="data").TarWriter
    with (
        atomic(file) as part,
        open(part, "wb") as out,
        writer(out, encoder=False, mtime=0, user="", group="") as archive,
    ):
        for key, parts in records:
            archive.write({"__key__": key, **parts})
            count += 1
    return count


def encode_sample(sample: Sample) -> tuple[str, dict[str, bytes]]:
    """A sample as (key, ending -> bytes), the picture as PNG."""
    parts = {"png": png_bytes(sample.image), "txt": sample.caption.encode()}
    if sample.meta:
        parts["json"] = json_bytes(sample.meta)
    if sample.label is not None:
        parts["cls"] = str(sample.label).encode()
    return sample.key, {ending: raw for ending, raw in parts.items() if raw}


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, readable in any language."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")
