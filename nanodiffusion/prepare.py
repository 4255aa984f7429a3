"""From what people have (URLs in a table, captioned folders, data sets by name) to shards, with a census of what is in them.

What lies in the output is a function of the source alone: shard i holds the sound pictures among items i per_shard to
(i + 1) per_shard - 1 of the sorted source. A shard is whole or not there, so a killed preparation goes on where it was.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from nanodiffusion.data import load_data
from nanodiffusion.data.captions import Captioned, check_template, class_names, picture_bytes, read_captioned
from nanodiffusion.data.census import json_beside, reasons
from nanodiffusion.data.judge import ORIGINAL, original
from nanodiffusion.data.shards import (
    Fault,
    Sample,
    ahead,
    decode_image,
    json_bytes,
    shard_name,
    write_shard,
)
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.resume import check_same, parse_settings
from nanodiffusion.show import atomic

SETS = ("fashion-mnist", "mnist", "cifar10", "digits")
RESIZES = ("center_crop", "keep_ratio")
ENCODINGS = {"png": ("PNG", {}), "jpg": ("JPEG", {"quality": 95}), "webp": ("WEBP", {"quality": 95, "method": 4})}
ALIASES = {"jpeg": "jpg"}  # of endings
PLAN = "prepare.plan"  # no .json: img2dataset takes every .json of a folder for a shard's
PART = re.compile(r"\..+\.[0-9a-f]{8}")  # as show.atomic names what is not whole yet
BINS = (64, 128, 256, 512, 1024, 2048)


class Picture(NamedTuple):
    """One item of a source, read: the bytes for each ending of its sample, and what the census counts."""

    parts: dict[str, bytes]
    size: tuple[int, int]  # width, height
    caption: str
    label: int | None
    resized: bool = False  # by us or by somebody before; then the json says from what


class Source(NamedTuple):
    """A source as a list: the name of each item, a reader of item i (Fault where it is none), what identifies it all."""

    names: Sequence[str]
    read: Callable[[int], Picture]
    classes: tuple[str, ...]
    identity: str
    faults: tuple[str, ...] = ()  # found before any was read


@dataclass(frozen=True)
class Form:
    """How pictures are stored: size 0 = as they are; encode "" = as they are, PNG where they change."""

    size: int = 0
    resize: str = "center_crop"
    encode: str = ""


# ---- sources


def folder_source(path: str | Path, template: str, form: Form) -> Source:
    """A captioned folder, as `read_captioned` reads it."""
    root, faults = Path(path), list[str]()
    rows = read_captioned(root, template, faults)
    names = [row.file.relative_to(root).as_posix() for row in rows]
    classes = class_names(names) if any(row.label is not None for row in rows) else ()
    known = [(name, row.file.stat().st_size, row.caption, row.label) for name, row in zip(names, rows)]
    return Source(names, partial(_read_file, rows, names, classes, form), classes, _digest(known), tuple(faults))


def _read_file(rows: Sequence[Captioned], names: Sequence[str], classes: Sequence[str], form: Form, i: int) -> Picture:
    row = rows[i]
    raw = picture_bytes(row.file)
    image = decode_image(raw)
    before = original(json_beside(row.file), image.height, image.width)
    meta = {"file": names[i]} | ({} if row.label is None else {"class": classes[row.label]})
    return _picture(image, raw, row.file.suffix.lower()[1:], form, row.caption, row.label, meta, before)


def set_source(name: str, split: str, template: str, n: int, form: Form) -> Source:
    """The first `n` pictures (0: all) of a published data set, the class's name as the caption."""
    check_template(template)
    data = load_data(name, split)
    count = min(n, len(data)) if n else len(data)
    labels = [] if data.labels is None else data.labels[:count].tolist()
    names = [f"{name}/{split}/{i:06d}" for i in range(count)]

    def read(i: int) -> Picture:
        pixels = data.x[i].permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        said = data.classes[labels[i]]
        meta = {"file": names[i], "class": said}
        before = image.height, image.width
        return _picture(image, b"", "", form, template.format(said), labels[i], meta, before)

    identity = _digest([name, split, template, hashlib.sha256(data.x[:count].numpy().tobytes()).hexdigest(), labels])
    return Source(names, read, data.classes, identity)


def _picture(
    image: Image.Image,
    raw: bytes,
    ending: str,
    form: Form,
    caption: str,
    label: int | None,
    meta: Mapping[str, Any],
    before: tuple[int, int],
) -> Picture:
    """A sample's members: the bytes as they came, unless another size or encoding is asked for.

    before: (height, width) of the picture before anybody resized it; in the json where it is not the size now.
    """
    fitted = _fitted(image, form)
    same = raw and fitted is image and form.encode in ("", ALIASES.get(ending, ending))
    encode = form.encode or (ending if same else "png")
    parts = {encode: raw if same else _encoded(fitted, encode), "txt": caption.encode()}
    resized = before != (fitted.height, fitted.width)
    told = dict(zip(ORIGINAL, before)) if resized else {}
    parts["json"] = json_bytes({"caption": caption, "width": fitted.width, "height": fitted.height, **told, **meta})
    if label is not None:
        parts["cls"] = str(label).encode()
    return Picture(parts, fitted.size, caption, label, resized)


def _fitted(image: Image.Image, form: Form) -> Image.Image:
    """The picture at the size asked for: its central square, or whole with the short side that long."""
    if not form.size:
        return image
    if form.resize == "center_crop":
        if image.size == (form.size, form.size):
            return image
        return ImageOps.fit(image, (form.size, form.size), Image.Resampling.BICUBIC)
    scale = form.size / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, ending: str) -> bytes:
    kind, options = lookup(ENCODINGS, ending, "encode")
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


# ---- the census


@dataclass
class Census:
    """What is in a set: counted picture by picture, added up shard by shard."""

    samples: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)  # length of caption -> how many
    words: Counter[str] = field(default_factory=Counter)
    without_caption: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, size: tuple[int, int], caption: str, label: int | None) -> None:
        """Count one picture of (width, height)."""
        self.samples += 1
        self.sizes[f"{size[0]}x{size[1]}"] += 1
        self.without_caption += not caption
        if label is not None:
            self.labels[str(label)] += 1
        if caption:
            self.letters[str(len(caption))] += 1
            self.words[str(len(caption.split()))] += 1

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another census, as a dict, counted."""
        for key, value in other.items():
            mine = getattr(self, key)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, key, mine + value)

    def report(self, classes: Sequence[str] = ()) -> dict[str, Any]:
        """The census as it is written: whole numbers, a median and a mean, sorted."""
        whys = (fault.partition(": ")[2] for fault in self.faults)  # of "name: why"
        named = {classes[int(k)] if int(k) < len(classes) else k: n for k, n in _by_number(self.labels)}
        return {
            "samples": self.samples,
            "sizes": dict(sorted(self.sizes.items(), key=lambda row: (-row[1], row[0]))[:50]),
            "different_sizes": len(self.sizes),
            "short_side": _short_sides(self.sizes),
            "captions": {
                "missing": self.without_caption,
                "letters": _spread(self.letters),
                "words": _spread(self.words),
            },
            "classes": named,
            "faults": {"count": len(self.faults), "reasons": reasons(whys), "list": self.faults},
        }


def _by_number(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda row: int(row[0]))


def _spread(counts: Counter[str]) -> dict[str, float]:
    rows = [(int(value), n) for value, n in _by_number(counts)]
    total = sum(n for _, n in rows)
    if not total:
        return {}
    seen, median = 0, 0
    for value, n in rows:
        seen += n
        if 2 * seen >= total:
            median = value
            break
    mean = round(sum(value * n for value, n in rows) / total, 2)
    return {"min": rows[0][0], "median": median, "mean": mean, "max": rows[-1][0]}


def _short_sides(sizes: Counter[str]) -> dict[str, int]:
    """How many pictures have a short side in each octave."""
    counts: Counter[str] = Counter()
    for size, n in sizes.items():
        side = min(map(int, size.split("x")))
        above = next((b for b in BINS if side < b), None)
        low = 0 if above == BINS[0] else (above or 2 * BINS[-1]) // 2
        counts[f"{low}-{above - 1}" if above else f"{low}-"] += n
    return dict(sorted(counts.items(), key=lambda row: int(row[0].partition("-")[0])))


def census_of(samples: Iterator[Sample], faults: list[str]) -> Census:
    """Count the samples of shards; `faults` is the list that their reader fills."""
    census = Census()
    for sample in samples:
        census.add(sample.image.size, sample.caption, sample.label)
    census.faults = faults
    return census


def write_census(folder: Path, census: Census, classes: Sequence[str] = (), **more: Any) -> Path:
    """folder/census.json."""
    file = folder / "census.json"
    write_json(file, census.report(classes) | more)
    return file


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    with atomic(file) as part:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


# ---- the output folder


@contextmanager
def at_work(out: Path, plan: Mapping[str, Any]) -> Iterator[int]:
    """Hold `out` for one preparation, new or the same as before; yields the lock's descriptor, for a child to keep.

    UserError: another process is at work there, it holds something else, or another preparation.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_plan(out, plan)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _hold(lock, out)
        for part in out.rglob(".*.????????"):
            if PART.fullmatch(part.name):  # what a killed one was writing
                part.unlink(missing_ok=True)
        write_json(out / PLAN, plan)
        yield lock
    finally:
        os.close(lock)


def _hold(lock: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: without a lock
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # EWOULDBLOCK, EACCES: held
        fix = "wait for it, or end it"
        raise UserError("another preparation is at work here", file=out, fix=fix) from e
    except OSError:  # a file system that has no locks: without one
        return


def check_plan(out: Path, plan: Mapping[str, Any]) -> None:
    """UserError where `out` holds something that another plan made, or that no plan made."""
    file = out / PLAN
    if not file.is_file():
        strange = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
        if strange:
            raise UserError("the output folder is not empty", file=out, found=strange[0], fix="out=ANOTHER")
        return
    old = parse_settings(file.read_bytes(), plan, file, "out=ANOTHER")
    check_same(old, plan, "this folder holds another preparation", out, "out=ANOTHER")


# ---- shards and folders of a source


def prepare_shards(source: Source, out: Path, per_shard: int, threads: int = 0) -> Iterator[tuple[Path, Census]]:
    """Write what is not there yet of out/00000.tar, ... with 00000_stats.json beside each; yields (shard, its census)."""
    for number, first in enumerate(range(0, len(source.names), per_shard)):
        file = out / shard_name(number)
        stats = out / f"{number:05d}_stats.json"
        census = _done(file, stats)
        if census is None:
            census = Census()
            span = range(first, min(first + per_shard, len(source.names)))
            write_shard(file, _records(source, span, threads, census))
            write_json(stats, {"bytes": file.stat().st_size, "census": vars(census)})
        yield file, census


def _done(file: Path, stats: Path) -> Census | None:
    """The census of a shard that is there whole."""
    try:
        said = json.loads(stats.read_text("utf-8"))
        if file.stat().st_size != said["bytes"]:
            return None
        census = Census()
        census.merge(said["census"])
        return census
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_items(source: Source, span: range, threads: int, census: Census) -> Iterator[tuple[int, Picture]]:
    """The sound pictures of a part of a source; the census counts them, and names the others."""

    def read(i: int) -> Picture | str:
        try:
            return source.read(i)
        except Fault as e:
            return f"{source.names[i]}: {e}"

    for i, item in zip(span, ahead(read, iter(span), threads)):
        if isinstance(item, str):
            census.faults.append(item)
        else:
            census.add(item.size, item.caption, item.label)
            yield i, item


def _records(source: Source, span: range, threads: int, census: Census) -> Iterator[tuple[str, dict[str, bytes]]]:
    for i, picture in read_items(source, span, threads, census):
        yield f"{i:09d}", picture.parts


def prepare_folder(source: Source, out: Path, threads: int = 0) -> Census:
    """Write out/CLASS/000000000.png with its caption in 000000000.txt; what is there already stays.

    Of a picture that was resized 000000000.json tells the original size too, as in shards.
    """
    census, homes = Census(), _class_folders(source.classes)
    for i, picture in read_items(source, range(len(source.names)), threads, census):
        home = out if picture.label is None else out / homes[picture.label]
        for ending, raw in picture.parts.items():
            file = home / f"{i:09d}.{ending}"
            if ending == "cls" or (ending == "json" and not picture.resized) or file.exists():
                continue
            with atomic(file) as part:
                part.write_bytes(raw)
    return census


def _class_folders(classes: Sequence[str]) -> list[str]:
    """A name that a folder may have for each class, no two the same."""
    names = [re.sub(r"[^\w .-]+", "-", name).strip(" .") or "class" for name in classes]
    folded = Counter(name.casefold() for name in names)
    return [f"{name} {i}" if folded[name.casefold()] > 1 else name for i, name in enumerate(names)]
