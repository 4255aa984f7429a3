"""The engine of `nanodiffusion encode`: parts that are written whole or not at all, joined when all are there."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanodiffusion.codec import PixelCodec
from nanodiffusion.data.encoded import FORMAT, MANIFEST, manifest_bytes, quantise, read_manifest
from nanodiffusion.data.files import MODES, SPLITS
from nanodiffusion.data.tensors import at_least
from nanodiffusion.distributed import World
from nanodiffusion.encode.census import Census, count_unit, join_census
from nanodiffusion.encode.files import as_json, write, write_npy
from nanodiffusion.encode.sources import open_source, square
from nanodiffusion.encode.texts import Texts, open_texts
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.resume import check_same, parse_settings
from nanodiffusion.tensors import content_hash, load_meta, load_tensors, save_tensors
from nanodiffusion.train import mix

FLOATS = {"float16": torch.float16, "float32": torch.float32}
PRECISIONS = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLING = {"mean": False, "posterior": True}
PICTURES = {"x", "flipped"}  # the names of latents
PICTURE = 256  # pixels, where nothing says the size
WORK = ".work"  # in the folder that is made: settings, counts and parts, until all is there


@dataclass(frozen=True)
class EncodeConfig:
    """What decides the bytes of an encoding; codec and text: paths, or "" for pixels and for no text; see `open_texts`."""

    source: str
    codec: str = ""
    text: str = ""
    size: int = 0  # pixels; 0: the set's own, that of the checkpoint of `text`, or 256
    batch: int = 16
    n: int = 0  # the first n samples; 0: all
    split: str = "train"  # of a set by name
    flip: bool = False
    quantise: bool | None = None  # None: unless it is for a checkpoint, and without a limit
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
        if self.limit and self.quantise is False:
            raise UserError(
                "only bytes have a range", key="limit", found=self.limit, fix="leave it out, or quantise=true"
            )


class Encoder:
    """One process's share of an encoding into the folder `out`."""

    def __init__(self, config: EncodeConfig, out: str | Path, world: World, say: Callable[[str], None] = print) -> None:
        self.config, self.out, self.world, self.say = config, Path(out), world, say
        self.work = self.out / WORK
        self.source = open_source(config.source, config.split)
        self.codec: Any = self._open_codec()
        self.channels = self.codec.channels
        lookup(MODES, self.channels, "channels of the codec")
        self.texts = self._open_texts() if config.text else None
        natural = self.texts.natural if self.texts else 0
        quantised = config.quantise if config.quantise is not None else not natural or config.limit > 0
        self.size = config.size or self.source.size or natural or PICTURE
        self.config = replace(config, size=self.size, quantise=quantised)
        if self.size % self.codec.factor:
            expected = f"a multiple of {self.codec.factor}"
            raise UserError("the codec works in whole latent pixels", key="size", expected=expected, found=self.size)

    def _open_codec(self) -> Any:
        if not self.config.codec:
            return PixelCodec(self.source.channels)
        from nanodiffusion.pretrained import load_codec  # slow to import

        return load_codec(self.config.codec, PRECISIONS[self.config.precision], str(self.world.device)).eval()

    def _open_texts(self) -> Texts:
        given = self.config
        texts = open_texts(given.text, str(self.world.device), PRECISIONS[given.precision], given.dtype)
        if given.quantise is not False and texts.written != given.dtype:
            fix = "quantise=false, or text= a whole checkpoint"
            raise UserError("only what is not quantised has a dtype", key="dtype", found=given.dtype, fix=fix)
        return texts

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
            "device": self.world.device.type,
            "units": self.source.identity,
            "codec": {
                "where": self.config.codec,
                "sha256": content_hash(self.codec.state_dict()),
                "factor": self.codec.factor,
                "scale": config.scale if config else 1.0,
                "shift": config.shift if config else 0.0,
            },
            "text": {"where": self.config.text, "sha256": self.texts.sha256} if self.texts else None,
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
        now = json.loads(as_json(self.settings))
        if old != now == {**old, "units": now["units"]}:
            fix = f"out=ANOTHER, or delete {where}"
            raise UserError("the source has changed since it was encoded", file=self.config.source, fix=fix)
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
        if self.texts and not census.captioned:
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
            for name, x in self._encode_batch(self._stack(stream, len(index)), index).items():
                rows.setdefault(name, []).append(x)
            if self.texts:
                for name, x in self.texts.encode([census.records[i].caption for i in index]).items():
                    rows.setdefault(name, []).append(x)
        tensors = {name: torch.cat(parts) for name, parts in rows.items()}
        return self._stored(tensors, census, start)

    def _stack(self, stream: Iterator[np.ndarray], count: int) -> np.ndarray:
        """The next pictures: uint8 (count c h w). UserError: there are fewer."""
        pixels = list(islice(stream, count))
        if len(pixels) != count:
            raise UserError("the source has changed", file=self.config.source, found="fewer samples than were counted")
        return np.stack(pixels)

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
        for name, x in tensors.items():
            if not bool(x.isfinite().all()):
                row = int((~x.isfinite().flatten(1).all(1)).nonzero()[0])
                who = "the codec gives no numbers for a picture" if name in PICTURES else "a caption's are no numbers"
                raise UserError(who, key=name, found=census.records[start + row].key, fix="precision=fp32")
        for name in PICTURES & tensors.keys():
            x = tensors[name]
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
                arrays = (_final(x, limit) for x in _of_parts(parts, name))
                files[file] = write_npy(self.out / file, kind, (count, *self.shape), arrays, self.work)
        files |= self._join_texts(parts, census) if self.texts else {}
        files |= self._write_census(census)
        clipped = sum(m["clipped"] for m in metas)
        manifest = self._manifest(census, files, {"limit": limit, "dtype": np.dtype(kind).name, "clipped": clipped})
        write(self.out / MANIFEST, [manifest_bytes(manifest)], self.work)
        return manifest

    def _join_texts(self, parts: list[Path], census: Census) -> dict[str, Any]:
        assert self.texts is not None
        count, whole = len(census.records), {f"empty-{name}": x.numpy() for name, x in self.texts.empty.items()}
        whole |= {"sizes": census.sizes(self.size)} if self.texts.sizes else {}
        made: dict[str, tuple[Any, Sequence[int], Iterable[np.ndarray]]]
        made = {name: (x.dtype, x.shape, [x]) for name, x in whole.items()}
        for name, shape in self.texts.shapes.items():
            made[name] = self.texts.written, (count, *shape), _of_parts(parts, name)
        return {f"{name}.npy": write_npy(self.out / f"{name}.npy", *how, self.work) for name, how in made.items()}

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
        shapes, empty = (self.texts.shapes, self.texts.empty) if self.texts else ({}, {})
        return {
            "format": FORMAT,
            "count": len(census.records),
            "shape": list(self.shape),
            "latents": {"file": "latents.npy", **latents},
            "flipped": there("flipped.npy"),
            "pooled": {"file": "pooled.npy", "dim": shapes["pooled"][0]} if "pooled" in shapes else None,
            "context": {"file": "context.npy", "shape": list(shapes["context"])} if "context" in shapes else None,
            "empty": {name: f"empty-{name}.npy" for name in empty},
            "sizes": there("sizes.npy"),
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


def _of_parts(parts: list[Path], name: str) -> Iterator[np.ndarray]:
    return (load_tensors(part)[0][name].numpy() for part in parts)


def _final(x: np.ndarray, limit: float | None) -> np.ndarray:
    return quantise(torch.from_numpy(x), limit).numpy() if limit and x.dtype != np.uint8 else x


def _share(parts: range, world: World) -> range:
    """This process's parts, next to each other, so that each unit is read by few."""
    each, more = divmod(len(parts), world.size)
    start = world.rank * each + min(world.rank, more)
    return parts[start : start + each + (world.rank < more)]


def wait_for(path: Path) -> Path:
    """The path, once another process has put the file there; if that fails, torchrun ends this one too."""
    while not path.is_file():
        time.sleep(0.05)
    return path
