"""Pictures to latents, captions to vectors, once and for all: counted first, encoded in parts, joined at the end.

A part is written whole or not at all and is a function of the settings and its number alone, so that a killed run goes
on where it was and several processes share the work, to the same bytes. What is written is `data.encoded`'s folder.
"""

import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from nanodiffusion.checkpoint import content_hash, load_meta, load_tensors, save_tensors, write_whole
from nanodiffusion.codec import PixelCodec
from nanodiffusion.data import load_data
from nanodiffusion.data.encoded import FORMAT, MANIFEST, manifest_bytes, quantise, read_manifest
from nanodiffusion.data.files import MODES, SPLITS
from nanodiffusion.data.tensors import at_least
from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.resume import check_same, parse_settings
from nanodiffusion.text.pooled import PooledText, open_text
from nanodiffusion.train import mix

SETS = ("digits", "mnist", "fashion-mnist", "cifar10")  # sources by name
PICTURE = 256  # pixels, where nothing says the size
MAX_CLASSES = 100_000  # that are named one by one
FILES, SAMPLES = 1000, 4096  # of a folder, and of a set by name, that are counted at a time
FLOATS = {"float16": torch.float16, "float32": torch.float32}
PRECISIONS = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLING = {"mean": False, "posterior": True}
WORK = ".work"  # in the folder that is made: settings, counts and parts, until all is there


@dataclass(frozen=True)
class EncodeConfig:
    """What decides the bytes of an encoding; codec and text: paths, or "" for pixels and for no text."""

    source: str
    codec: str = ""
    text: str = ""
    size: int = 0  # pixels; 0: the set's own, or 256
    batch: int = 16
    n: int = 0  # the first n samples; 0: all
    split: str = "train"  # of a set by name
    flip: bool = False
    quantise: bool = True
    dtype: str = "float16"  # of what is not quantised
    limit: float = 0.0  # of the quantised range; 0: the largest value there is
    sample: str = "mean"
    seed: int = 0
    precision: str = "auto"
    part: int = 1024  # samples per part, rounded up to whole batches

    def __post_init__(self) -> None:
        for table, key in ((FLOATS, "dtype"), (SAMPLING, "sample"), (PRECISIONS, "precision"), (SPLITS, "split")):
            lookup(table, getattr(self, key), key)
        for key, least in {"batch": 1, "part": 1, "size": 0, "n": 0, "seed": 0}.items():
            at_least(getattr(self, key), least, key)
        if not 0 <= self.limit < math.inf:
            expected = "a positive number, such as 20, or 0 for the largest value there is"
            raise UserError("the range must be positive", key="limit", expected=expected, found=self.limit)
        if self.limit and not self.quantise:
            raise UserError(
                "only bytes have a range", key="limit", found=self.limit, fix="leave it out, or quantise=true"
            )


# -- where samples are from --------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A sound sample: a PIL image or uint8 (c h w), "" without a caption, None without a label; name: of its class, or ""."""

    key: str
    caption: str
    label: int | None
    image: Any
    name: str = ""


@dataclass(frozen=True)
class Source:
    """Samples in units that can be read on their own, each in the same order every time."""

    units: tuple[str, ...]
    read: Callable[
        [int, list[str]], Iterator[Found]
    ]  # the samples of a unit; what is wrong with others goes to the list
    classes: tuple[str, ...] = ()
    size: int = PICTURE
    channels: int = 3


def open_source(where: str, split: str = "train") -> Source:
    """The samples of a set by name, of a folder of captioned pictures, or of shards (a folder of them or a pattern)."""
    if where in SETS:
        return _by_name(where, split)
    folder = Path(where)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return _folder(folder)
    from nanodiffusion.data.shards import expand_shards, read_shards, shard_names

    shards = tuple(expand_shards(where))
    names = shard_names(shards)

    def read(unit: int, faults: list[str]) -> Iterator[Found]:
        for s in read_shards([shards[unit]], faults, need_caption=False, workers=2, names=[names[unit]]):
            name = s.meta.get("class")  # as `prepare` writes it
            yield Found(
                s.key, s.caption, s.label, s.image, name if isinstance(name, str) and name.isprintable() else ""
            )

    return Source(shards, read)


def _by_name(name: str, split: str) -> Source:
    """A set of DATASETS; the name of its class is a sample's caption."""
    data = load_data(name, split)
    labels = data.labels.tolist()

    def read(unit: int, faults: list[str]) -> Iterator[Found]:
        for i in range(unit * SAMPLES, min(len(data), (unit + 1) * SAMPLES)):
            yield Found(f"{i:08d}", data.classes[labels[i]], labels[i], data.x[i].numpy())

    units = tuple(str(i) for i in range(0, len(data), SAMPLES))
    return Source(units, read, data.classes, data.shape[1], data.shape[0])


def _folder(folder: Path) -> Source:
    """The pictures below a folder, by path, those without a caption too; the class folders are the classes."""
    from nanodiffusion.data.captions import judge_captioned, picture_bytes
    from nanodiffusion.data.shards import Fault, decode_image, plain

    judged, classes = judge_captioned(folder, need_caption=False)

    def read(unit: int, faults: list[str]) -> Iterator[Found]:
        for name, row in islice(judged.items(), unit * FILES, (unit + 1) * FILES):
            try:
                if isinstance(row, Fault):
                    raise row
                image = decode_image(picture_bytes(row.file))
            except Fault as e:
                faults.append(f"{plain(name)}: {e}")
                continue
            yield Found(name, row.caption, row.label, image)

    return Source(tuple(str(i) for i in range(0, len(judged), FILES)), read, classes)


def square(image: Any, size: int, channels: int) -> np.ndarray:
    """The central square of an image (PIL, or uint8 (c h w)) at `size` pixels: -> uint8 (channels size size)."""
    if isinstance(image, np.ndarray) and image.shape == (channels, size, size):
        return image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    fitted = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(fitted)).transpose(2, 0, 1)


# -- files that are there whole or not at all --------------------------------------------------------------------------


def write(path: Path, chunks: Iterable[bytes | memoryview], work: Path) -> dict[str, Any]:
    """Write a file by way of one of the same name in `work`; its entry of the manifest."""
    return write_whole(path, chunks, work / f".tmp-{path.name}")


def write_npy(path: Path, dtype: Any, shape: Sequence[int], arrays: Iterable[np.ndarray], work: Path) -> dict[str, Any]:
    """Write arrays, one after the other, as one .npy of that shape; its entry of the manifest."""

    def chunks() -> Iterator[bytes | memoryview]:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, header)  # type: ignore[arg-type]
        yield head.getvalue()
        for array in arrays:
            yield np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data

    return write(path, chunks(), work)


def as_json(value: Any) -> bytes:
    """JSON of one text per value."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


# -- counting ----------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What the census remembers of a sample."""

    key: str
    caption: str
    label: int | None
    width: int
    height: int
    name: str = ""


@dataclass(frozen=True)
class Census:
    """All sound samples in order, where each unit's begin, and what is wrong with the others."""

    records: list[Record]
    starts: list[int]  # of the units, and the end
    faults: list[str]

    @property
    def captioned(self) -> int:
        """How many have a caption."""
        return sum(bool(r.caption.strip()) for r in self.records)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return all(r.label is not None for r in self.records)

    @property
    def classes(self) -> list[str]:
        """The name of every class, its number where it has no sample; [] unless each has one name and no other's."""
        named = {r.label: r.name for r in self.records if r.label is not None}
        one = all(r.label is not None and r.name and named[r.label] == r.name for r in self.records)
        if not one or max(named) >= MAX_CLASSES:
            return []
        names = [named.get(i, str(i)) for i in range(max(named) + 1)]
        return names if len(set(names)) == len(names) else []

    def summary(self, size: int) -> dict[str, Any]:
        """The counts, as the manifest has them; smaller: how many were enlarged to `size`."""
        return {
            "samples": len(self.records),
            "faults": len(self.faults),
            "without_caption": len(self.records) - self.captioned,
            "without_label": sum(r.label is None for r in self.records),
            "widths": [f(r.width for r in self.records) for f in (min, max)],
            "heights": [f(r.height for r in self.records) for f in (min, max)],
            "smaller": sum(min(r.width, r.height) < size for r in self.records),
        }


def count_unit(source: Source, unit: int, n: int) -> dict[str, Any]:
    """The census of a unit, JSON-able; with n, of its first n samples."""
    faults: list[str] = []
    found = islice(source.read(unit, faults), n or None)
    return {"records": [[f.key, f.caption, f.label, *_size(f.image), f.name] for f in found], "faults": faults}


def _size(image: Any) -> tuple[int, int]:
    return image.shape[:0:-1] if isinstance(image, np.ndarray) else image.size


def join_census(counts: Iterator[dict[str, Any]], n: int, where: str) -> Census:
    """One census of the units' in order, of the first n samples."""
    records: list[Record] = []
    starts, faults = [0], []
    for count in counts:
        records += [Record(*row) for row in count["records"]]
        faults += count["faults"]
        starts.append(len(records))
        if n and len(records) >= n:
            break
    if not records:
        found = f"{len(faults)} faults, first {faults[0]}" if faults else "nothing"
        raise UserError("there is no sound sample here", file=where, found=found)
    return Census(records[: n or None], starts, faults)


# -- the engine --------------------------------------------------------------------------------------------------------


class Encoder:
    """One process's share of an encoding into the folder `out`."""

    def __init__(self, config: EncodeConfig, out: str | Path, world: World, say: Callable[[str], None] = print) -> None:
        self.config, self.out, self.world, self.say = config, Path(out), world, say
        self.work = self.out / WORK
        self.source = open_source(config.source, config.split)
        self.codec: Any = self._open_codec()
        self.channels = self.codec.channels
        lookup(MODES, self.channels, "channels of the codec")
        self.size = config.size or self.source.size
        if self.size % self.codec.factor:
            expected = f"a multiple of {self.codec.factor}"
            raise UserError("the codec works in whole latent pixels", key="size", expected=expected, found=self.size)
        device, dtype = str(world.device), PRECISIONS[config.precision]
        self.text: PooledText | None = open_text(config.text, device, dtype) if config.text else None

    def _open_codec(self) -> Any:
        if not self.config.codec:
            return PixelCodec(self.source.channels)
        from nanodiffusion.pretrained import load_codec  # slow to import

        return load_codec(self.config.codec, PRECISIONS[self.config.precision], str(self.world.device)).eval()

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(c h w) of a latent."""
        side = self.size // self.codec.factor
        return self.codec.latent_channels, side, side

    @cached_property
    def part(self) -> int:
        """Samples per part: whole batches, so that no batch depends on where a part ends."""
        return -(-self.config.part // self.config.batch) * self.config.batch

    @property
    def limit(self) -> float:
        """Of the quantised range, 0 where it is known only when everything is encoded."""
        return self.config.limit or (0.0 if self.config.codec else 1.0)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the bytes."""
        config = getattr(self.codec, "config", None)
        return {
            **asdict(self.config),
            "size": self.size,
            "device": self.world.device.type,
            "units": hashlib.sha256(as_json([_unit(u) for u in self.source.units])).hexdigest(),
            "codec": {
                "where": self.config.codec,
                "sha256": content_hash(self.codec.state_dict()),
                "factor": self.codec.factor,
                "scale": config.scale if config else 1.0,
                "shift": config.shift if config else 0.0,
            },
            "text": {"where": self.config.text, "sha256": self.text.sha256} if self.text else None,
        }

    def run(self) -> dict[str, Any]:
        """Encode everything, or what is left; the manifest."""
        done = self._prepare() if self.world.first else False
        self.world.barrier()
        if done or (self.out / MANIFEST).is_file():
            return read_manifest(self.out)
        census = self._census()
        self._check(census)
        if self.world.first:
            self._tell(census)
        self._encode(census)
        write(self.work / f"done-{self.world.rank}", [b""], self.work)
        if not self.world.first:
            return {}
        for rank in range(self.world.size):
            wait_for(self.work / f"done-{rank}")
        manifest = self._join(census)
        shutil.rmtree(self.work)
        return manifest

    # folder

    def _prepare(self) -> bool:
        """Whether all is there already; else the folder is ready for parts. UserError: it holds something else."""
        if (self.out / MANIFEST).is_file():
            self._check_same(read_manifest(self.out)["settings"], self.out)
            shutil.rmtree(self.work, ignore_errors=True)
            return True
        known = self.work / "settings.json"
        if known.is_file():
            old = parse_settings(known.read_bytes(), self.settings, known, f"delete {self.work}: it is encoded anew")
            if old == json.loads(as_json(self.settings)) or any(self.work.glob("part-*")):
                self._check_same(old, self.work)
                for marker in self.work.glob("done-*"):
                    marker.unlink()
                return False
        if self.out.exists() and (not self.out.is_dir() or {f.name for f in self.out.iterdir()} - {WORK}):
            fix = "out=ANOTHER, or empty it"
            raise UserError(
                "this place holds something else", file=self.out, key="out", expected="a new folder", fix=fix
            )
        shutil.rmtree(self.work, ignore_errors=True)  # counts alone, for other settings
        self.work.mkdir(parents=True)
        write(known, [as_json(self.settings)], self.work)
        return False

    def _check_same(self, old: dict[str, Any], where: Path) -> None:
        check_same(old, self.settings, "another encoding is in this folder", where, "out=ANOTHER, or delete it")

    # counting

    def _census(self) -> Census:
        path = lambda unit: self.work / f"census-{unit:06d}.json"
        own, n = 0, self.config.n
        units = range(self.world.rank, len(self.source.units), self.world.size)
        for unit in self._bar(units, "counting"):
            if n and own >= n:  # whatever the other processes find, later units are not needed
                break
            if not path(unit).is_file():
                write(path(unit), [as_json(count_unit(self.source, unit, n))], self.work)
            own += len(json.loads(path(unit).read_bytes())["records"]) if n else 0
        counts = (json.loads(wait_for(path(unit)).read_bytes()) for unit in range(len(self.source.units)))
        return join_census(counts, n, self.config.source)

    def _check(self, census: Census) -> None:
        if self.text and not census.captioned:
            found = f"{len(census.records)} samples without one"
            fix = "leave text= out, or give the pictures captions"
            raise UserError(
                "there are no captions to encode", file=self.config.source, key="text", found=found, fix=fix
            )

    def _tell(self, census: Census) -> None:
        c = census.summary(self.size)
        sizes = " by ".join(
            f"{low} to {high}" if low != high else str(low) for low, high in (c["widths"], c["heights"])
        )
        self.say(f"{c['samples']} samples of {sizes} pixels, {c['smaller']} of them smaller than {self.size}")
        for key, what in (("faults", "left out: faults.txt"), ("without_caption", "without a caption")):
            if c[key]:
                self.say(f"{c[key]} {what}")
        if 0 < c["without_label"] < c["samples"]:
            self.say(f"{c['without_label']} without a label: labels are left out")

    # encoding

    def _encode(self, census: Census) -> None:
        parts = range(math.ceil(len(census.records) / self.part))
        stream: Iterator[np.ndarray] | None = None
        for part in self._bar(_share(parts, self.world), "encoding"):
            path = self._part(part)
            if path.is_file():
                stream = None  # whoever goes on after a gap opens its unit anew
                continue
            start, stop = part * self.part, min((part + 1) * self.part, len(census.records))
            stream = stream or self._pixels(census, start)
            tensors, meta = self._encode_part(census, start, stop, stream)
            save_tensors(path, tensors, meta)

    def _part(self, part: int) -> Path:
        return self.work / f"part-{part:06d}.safetensors"

    def _pixels(self, census: Census, start: int) -> Iterator[np.ndarray]:
        """The pictures of samples start, start + 1, ...: uint8 (c h w) each."""
        for unit in range(len(self.source.units)):
            first, end = census.starts[unit], min(census.starts[unit + 1], len(census.records))
            if end <= start:
                continue
            found = self.source.read(unit, [])
            for i, sample in zip(range(first, end), found):
                if sample.key != census.records[i].key:
                    expected = f"{census.records[i].key!r}, as when it was counted"
                    raise UserError(
                        "the source has changed",
                        file=self.source.units[unit],
                        expected=expected,
                        found=repr(sample.key),
                    )
                if i >= start:
                    yield square(sample.image, self.size, self.channels)

    @torch.inference_mode()
    def _encode_part(
        self, census: Census, start: int, stop: int, stream: Iterator[np.ndarray]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows: dict[str, list[Tensor]] = {}
        for first in range(start, stop, self.config.batch):
            index = range(first, min(stop, first + self.config.batch))
            pixels = np.stack(list(islice(stream, len(index))))
            if len(pixels) != len(index):
                raise UserError(
                    "the source has changed", file=self.config.source, found="fewer samples than were counted"
                )
            for name, x in self._encode_batch(pixels, index).items():
                rows.setdefault(name, []).append(x)
            if self.text:
                captions = [census.records[i].caption for i in index]
                rows.setdefault("pooled", []).append(self.text.encode(captions).half())
        tensors = {name: torch.cat(parts) for name, parts in rows.items()}
        return self._stored(tensors, census, start)

    def _encode_batch(self, pixels: np.ndarray, index: range) -> dict[str, Tensor]:
        """x, and flipped of the mirrored pictures: uint8 (b c H W) -> (b c h w) float32."""
        views = {"x": pixels} | ({"flipped": pixels[..., ::-1].copy()} if self.config.flip else {})
        found = {}
        for number, (name, view) in enumerate(views.items()):
            image = torch.from_numpy(view).to(self.world.device).float().div_(127.5).sub_(1)
            found[name] = self.codec.encode(image, self._noise(index, number)).float().cpu()
        return found

    def _noise(self, index: range, number: int) -> Tensor | None:
        """Unit noise (b c h w), each sample's own; None for the mean."""
        if not SAMPLING[self.config.sample]:
            return None
        seeds = [mix(self.config.seed, i, number) for i in index]
        noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self.world.device)

    def _stored(
        self, tensors: dict[str, Tensor], census: Census, start: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors as a part holds them, and the largest value and how many are beyond the range."""
        largest, clipped = 0.0, 0
        for name in {"x", "flipped"} & tensors.keys():
            x = tensors[name]
            if not bool(x.isfinite().all()):
                row = int((~x.isfinite().flatten(1).all(1)).nonzero()[0])
                found = census.records[start + row].key
                raise UserError("the codec gives no numbers for a picture", key=name, found=found, fix="precision=fp32")
            largest = max(largest, float(x.abs().max()))
            if self.config.quantise and self.limit:
                clipped += int((x.abs() > self.limit).sum())
                tensors[name] = quantise(x, self.limit)
            elif not self.config.quantise:
                tensors[name] = x.to(FLOATS[self.config.dtype])
        return tensors, {"largest": largest, "clipped": clipped}

    # joining

    def _join(self, census: Census) -> dict[str, Any]:
        """The arrays in one file each, then the manifest, which says that all is there."""
        parts = [self._part(i) for i in range(math.ceil(len(census.records) / self.part))]
        metas = [load_meta(part) for part in parts]
        limit = (self.limit or max(m["largest"] for m in metas) or 1.0) if self.config.quantise else None
        count = len(census.records)
        kind = np.uint8 if limit else np.dtype(self.config.dtype)
        files: dict[str, Any] = {}
        for name, file in (("x", "latents.npy"), ("flipped", "flipped.npy")):
            if name == "x" or self.config.flip:
                arrays = (_final(load_tensors(part)[0][name], limit) for part in parts)
                files[file] = write_npy(self.out / file, kind, (count, *self.shape), arrays, self.work)
        if self.text:
            pooled = (load_tensors(part)[0]["pooled"].numpy() for part in parts)
            files["pooled.npy"] = write_npy(
                self.out / "pooled.npy", np.float16, (count, self.text.dim), pooled, self.work
            )
        files |= self._write_census(census)
        clipped = sum(m["clipped"] for m in metas)
        manifest = self._manifest(census, files, {"limit": limit, "dtype": np.dtype(kind).name, "clipped": clipped})
        write(self.out / MANIFEST, [manifest_bytes(manifest)], self.work)
        return manifest

    def _write_census(self, census: Census) -> dict[str, Any]:
        files: dict[str, Any] = {}
        if census.labelled:
            labels = np.array([r.label for r in census.records], np.int64)
            files["labels.npy"] = write_npy(self.out / "labels.npy", np.int64, labels.shape, [labels], self.work)
        if census.captioned:
            lines = (json.dumps({"key": r.key, "caption": r.caption}).encode() + b"\n" for r in census.records)
            files["captions.jsonl"] = write(self.out / "captions.jsonl", lines, self.work)
        if census.faults:
            lines = (fault.encode("utf-8", "backslashreplace") + b"\n" for fault in census.faults)
            files["faults.txt"] = write(self.out / "faults.txt", lines, self.work)
        return files

    def _manifest(self, census: Census, files: dict[str, Any], latents: dict[str, Any]) -> dict[str, Any]:
        there = lambda name: name if name in files else None
        return {
            "format": FORMAT,
            "count": len(census.records),
            "shape": list(self.shape),
            "latents": {"file": "latents.npy", **latents},
            "flipped": there("flipped.npy"),
            "pooled": {"file": "pooled.npy", "dim": self.text.dim} if self.text else None,
            "labels": there("labels.npy"),
            "classes": (list(self.source.classes) or census.classes) if census.labelled else [],
            "captions": there("captions.jsonl"),
            "codec": self.settings["codec"],
            "text": self.settings["text"],
            "source": self.config.source,
            "size": self.size,
            "census": census.summary(self.size),
            "faults": len(census.faults),
            "settings": self.settings,
            "files": files,
        }

    def _bar(self, numbers: range, what: str) -> Iterable[int]:
        return tqdm(numbers, desc=what, disable=None if self.world.first and len(numbers) > 1 else True)


def _final(x: Tensor, limit: float | None) -> np.ndarray:
    return (quantise(x, limit) if limit and x.dtype != torch.uint8 else x).numpy()


def _share(parts: range, world: World) -> range:
    """This process's parts, next to each other, so that each unit is read by few."""
    each, more = divmod(len(parts), world.size)
    start = world.rank * each + min(world.rank, more)
    return parts[start : start + each + (world.rank < more)]


def _unit(name: str) -> list[Any]:
    return [name, os.path.getsize(name) if os.path.isfile(name) else None]


def wait_for(path: Path) -> Path:
    """The path, once another process has put the file there; if that fails, torchrun ends this one too."""
    while not path.is_file():
        time.sleep(0.05)
    return path
