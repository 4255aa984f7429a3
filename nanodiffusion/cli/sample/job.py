"""What `sample` was asked for, made ready: everything that decides the samples, in a Job."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodiffusion import __version__
from nanodiffusion.cli.pictures import drawn
from nanodiffusion.cli.sample.conditions import Wanted, about, choose
from nanodiffusion.cli.words import changed
from nanodiffusion.config import SampleConfig
from nanodiffusion.data.files import MAX_PIXELS, MODES, load_image
from nanodiffusion.distributed import World
from nanodiffusion.draw import check_sampling, shifted
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.fast import adapt
from nanodiffusion.outpaint import SIDES, panorama
from nanodiffusion.run import Run, load_run
from nanodiffusion.sampler import ImageNoise, State
from nanodiffusion.tensors import content_hash, file_sha256

NOISES = ("seed", "slerp")  # of frames: one seed's for all, or on the way from seed to seed
ROWS = 20  # of a picture of trajectories, at most
PICTURES = ("grid", "strip", "gif", "mp4", "trajectories")
FILES = ("out", "npz")  # these hold pictures too
ENDINGS = {"gif": (".gif",), "mp4": (".mp4",), "npz": (".npz",), "latents": (".npz", ".safetensors")}  # else .png
STRENGTH = 0.6  # of image to image: the last 60 % of the steps


@dataclass(frozen=True)
class Job:
    """Everything that decides the samples, and the settings that are written into what is made of them."""

    run: Run
    config: SampleConfig
    seeds: Sequence[int]  # n
    wanted: Wanted
    noise: Tensor | None  # (n *shape), instead of the seeds' own
    other: tuple[dict[str, Tensor], Tensor] | None  # each (n ...): see `draw`
    x0: Tensor | None  # (1 *shape)
    strength: float
    batch: int
    shifts: tuple[float, float] = (0.0, 0.0)  # brightness and sharpness
    tiles: int = 0  # of a panorama; 0 = none
    toward: str = "right"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many."""
        return len(self.seeds)

    @property
    def labels(self) -> Tensor | None:
        """The class of each (n), where there are classes."""
        return self.wanted.cond.get("label")

    @property
    def latent(self) -> bool:
        """Whether a codec makes pictures of the samples."""
        return bool(self.run.config.codec)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """What tells the weights that draw, and those that decode."""
        codec = {"codec_sha256": content_hash(self.run.codec.state_dict())} if self.latent else {}
        return {"weights_sha256": content_hash(self.run.denoiser.net.state_dict())} | codec

    def pick(self, index: Sequence[int] | slice) -> "Job":
        """The same for some of the samples."""
        cut = lambda given: {name: value[index] for name, value in given.items()}
        chosen = lambda items: items[index] if isinstance(index, slice) else [items[i] for i in index]
        w, seeds = self.wanted, chosen(self.seeds)
        return replace(
            self,
            seeds=seeds,
            wanted=replace(
                w,
                n=len(seeds),
                cond=cut(w.cond),
                negative=cut(w.negative),
                texts=tuple(chosen(w.texts)) if w.texts else (),
            ),
            noise=None if self.noise is None else self.noise[index],
            other=None if self.other is None else (cut(self.other[0]), self.other[1][index]),
        )

    def states(self, start: int = 0, stop: int | None = None) -> Iterator[list[State]]:
        """The states of samples start..stop-1, batch after batch."""
        stop = self.n if stop is None else stop
        for first in range(start, stop, self.batch):
            part = self.pick(slice(first, min(stop, first + self.batch)))
            x0 = None if part.x0 is None else part.x0.expand(part.n, *part.x0.shape[1:])
            options = {"negative": part.wanted.negative, "noise": part.noise, "other": part.other}
            states = drawn(part.run, part.config, part.seeds, part.wanted.cond, x0, part.strength, **options)
            yield [s if s.sigma_next else s._replace(x=shifted(s.x, *self.shifts)) for s in states]

    def last(self, start: int, stop: int) -> Tensor:
        """Samples start..stop-1, of at most a batch: (b *shape), or panoramas."""
        if not self.tiles:
            return next(self.states(start, stop))[-1].x
        part, run = self.pick(slice(start, stop)), self.run
        first = None if self.x0 is None else self.x0.expand(part.n, *run.shape)
        cond, how = part.wanted.cond, (self.tiles, self.toward)
        x = panorama(
            run.denoiser, run.shape, run.schedule, self.config, part.seeds, *how, cond, part.wanted.negative, first
        )
        return shifted(x, *self.shifts)

    def rows(self) -> list[int]:
        """The first sample of each condition, of the first twenty; of a model without conditions the first ten."""
        values = {name: v for name, v in self.wanted.cond.items() if name != "concat"}
        if not values:
            return list(range(min(self.n, 10)))
        seen: dict[bytes, int] = {}
        for i in range(self.n):
            seen.setdefault(b"".join(v[i].numpy().tobytes() for v in values.values()), i)
        return list(seen.values())[:ROWS]


# -- from words --------------------------------------------------------------------------------------------------------


def open_job(path: str, options: dict[str, Any], changes: dict[str, Any], w: World) -> Job:
    """The job that checked words describe; UserError for everything that cannot be, before anything is drawn."""
    _check_options(options)
    if "image" in options and "panorama" not in options:
        options = {"strength": STRENGTH, **options}
    run = load_run(path, options.get("weights", "ema-0"), w.device, options.get("best", False))
    config = changed(run.config.sample, changes)
    if "codec" in options:
        run = replace(run, config=replace(run.config, codec=options["codec"]))
    check_sampling(run.denoiser, config, run.schedule)
    _check_pictures(run, options)
    if "size" in options:
        run = with_size(run, read_size(options["size"]))
    seed = options.get("seed", 0)
    wanted, noise, other = _chosen(run, {**options, "guidance": config.guidance}, config.n, seed)
    _check_outpainting(run, options)
    if "concat" in getattr(run.denoiser.net, "takes", ()):
        wanted = _outpainting(run, wanted)
    x0 = read_start(options["image"], run) if "image" in options else None
    settings = settings_of(path, run, config, options, wanted)
    return Job(
        run,
        config,
        [seed] * wanted.n if "frames" in options else range(seed, seed + wanted.n),
        wanted,
        noise,
        other,
        x0,
        options.get("strength", 1.0),
        options.get("batch", 64),
        (options.get("brightness", 0.0), options.get("sharpness", 0.0)),
        options.get("panorama", 0),
        options.get("toward", "right"),
        settings,
    )


def settings_of(path: str, run: Run, config: SampleConfig, options: Mapping[str, Any], w: Wanted) -> dict[str, Any]:
    """What makes the same samples again, as it is written into files."""
    seed, best = options.get("seed", 0), options.get("best", False)
    told = {"class": None, **w.told, **{k: options[k] for k in RECORDED if k in options}}
    told |= {"image_sha256": file_sha256(Path(options["image"]))} if "image" in options else {}
    return {
        "nanodiffusion": __version__,
        "run": str(path),
        "step": run.step,
        **{"weights": options.get("weights", "ema-0"), "best": best, "n": w.n, "seed": seed, **told},
        **{"image": options.get("image"), "strength": options.get("strength", 1.0)},
        **{k: v for k, v in asdict(config).items() if k not in ("n", "prompts", "images", "masks")},
    }


RECORDED = (
    "codec",
    "size",
    "frames",
    "noise",
    "panorama",
    "toward",
    "sharpness",
    "brightness",
)  # where they were given


def _check_options(options: Mapping[str, Any]) -> None:
    for key in ("n", "batch", "frames", "panorama"):
        if options.get(key, 1) < 1:
            raise UserError("must be at least 1", key=key, found=options[key])
    if options.get("seed", 0) < 0:
        raise UserError("must not be negative", key="seed", found=options["seed"])
    for key in (*PICTURES, "npz", "latents"):
        endings = ENDINGS.get(key, (".png",))
        if not str(options.get(key, endings[0])).lower().endswith(endings):
            raise UserError("a file of another kind", key=key, expected=" or ".join(endings), found=options[key])
    if "npz" in options and options["npz"] == options.get("latents"):
        raise UserError("pictures and latents need a file each", key="latents", found=options["latents"])
    if "strength" in options and "image" not in options:
        raise UserError("strength needs a picture to start from", key="strength", fix="image=FILE strength=0.6")
    if "frames" in options and "n" in options:
        raise UserError("frames and n exclude each other", key="frames", fix="leave n out")
    if "noise" in options and "frames" not in options:
        raise UserError("noise is for frames", key="noise", fix="frames=30")
    if "toward" in options and "panorama" not in options:
        raise UserError("toward is for a panorama", key="toward", fix="panorama=4")
    lookup(dict.fromkeys(NOISES), options.get("noise", "seed"), "noise")
    lookup(SIDES, options.get("toward", "right"), "toward")


def _check_pictures(run: Run, options: Mapping[str, Any]) -> None:
    """UserError for pictures without a codec, and for what only latents have."""
    shown = any(key in options for key in (*PICTURES, *FILES, "image")) or "latents" not in options
    latent = len(run.shape) == 3 and not run.config.codec
    if latent and run.shape[0] not in MODES and shown:
        fix = "codec=FOLDER, what the data were encoded by, or latents=FILE.safetensors"
        raise UserError("the samples are latents, and nothing says what decodes them", key="codec", fix=fix)
    if shown and run.config.codec:
        with about("codec"):  # before anything is drawn
            _ = run.codec
    for key in ("sharpness", "brightness"):
        if options.get(key) and (not run.config.codec or run.shape[0] != 4):
            raise UserError("this shifts latents of 4 channels", key=key, found=run.shape, fix=f"leave {key} out")
    if len(run.shape) == 1:
        for key in ("out", "strip", "trajectories", "latents", "size"):
            if key in options:
                raise UserError("points are no images", key=key, fix="npz=FILE.npz, or grid=FILE.png")


def read_size(given: Any) -> tuple[int, int]:
    """Height and width, in pixels, of HxW, [H,W] or one number."""
    found = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", given) if isinstance(given, str) else None
    sides = [int(side) for side in found.groups()] if found else [given] * 2 if isinstance(given, int) else given
    if isinstance(sides, str) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise UserError("this is no size", key="size", expected="HEIGHTxWIDTH in pixels, e.g. 256x384", found=given)
    if sides[0] * sides[1] > MAX_PIXELS:
        raise UserError("too large", key="size", expected=f"at most {MAX_PIXELS / 1e6:g} megapixels", found=given)
    return sides[0], sides[1]


def with_size(run: Run, size: tuple[int, int]) -> Run:
    """The run with its net at another size, in pixels of the picture. UserError: the net cannot, or it is no multiple."""
    from nanodiffusion.nets.transfer import resized

    net, unit = run.denoiser.net, run.codec.factor * getattr(run.denoiser.net.config, "patch", 1)  # type: ignore[union-attr]
    if any(side % unit for side in size):
        near = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
        found = "x".join(map(str, size))
        raise UserError(f"a multiple of {unit} is wanted", key="size", found=found, fix=f"size={near}")
    small = (size[0] // run.codec.factor, size[1] // run.codec.factor)
    if small == tuple(run.shape[1:]):
        return run
    device = next(net.parameters()).device
    with about("size"):
        run.denoiser.net = adapt(resized(net, small).to(device))
    run.denoiser.eval()
    return replace(run, shape=(run.shape[0], *small))


def read_start(file: str, run: Run) -> Tensor:
    """The picture that image to image starts from, cut, resized and encoded as the model has it: (1 c h w)."""
    shape, codec = run.shape, run.codec
    if len(shape) != 3 or shape[1] != shape[2] or codec.channels not in MODES:
        raise UserError("image to image needs a model of square images", key="image", found=shape)
    try:
        pixels = load_image(file, shape[1] * codec.factor, MODES[codec.channels])
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError("the picture cannot be read", file=file, key="image", found=str(e)) from None
    image = torch.from_numpy(np.array(pixels)).float()[None] / 127.5 - 1
    with torch.no_grad():
        return codec.encode(image.to(next(run.denoiser.parameters()).device)).float().cpu()


# -- outpainting -------------------------------------------------------------------------------------------------------


def _check_outpainting(run: Run, options: Mapping[str, Any]) -> None:
    if "panorama" not in options:
        return
    if "concat" not in getattr(run.denoiser.net, "takes", ()):
        fix = "a run trained with data.outpaint"
        raise UserError("a panorama needs a model that outpaints", key="panorama", found=run.folder, fix=fix)
    for key in ("strip", "gif", "mp4", "trajectories", "frames", "strength"):
        if key in options:
            raise UserError(f"{key} is not for a panorama", key=key, fix="grid=, out=, npz= or latents=")


def _outpainting(run: Run, wanted: Wanted) -> Wanted:
    """With nothing known of the sample, as plain samples of a model that outpaints are drawn."""
    nothing = torch.zeros(1, *run.shape).expand(wanted.n, *run.shape)
    return replace(wanted, cond=wanted.cond | {"concat": nothing})


# -- frames ------------------------------------------------------------------------------------------------------------

Chosen = tuple[Wanted, Tensor | None, tuple[dict[str, Tensor], Tensor] | None]


def _chosen(run: Run, options: Mapping[str, Any], default: int, seed: int) -> Chosen:
    """The conditions of every image; with frames, noise and conditions on the way from one to the next."""
    if "frames" not in options:
        return choose(run, options, default), None, None
    return walked(run, choose(run, options, None), options["frames"], options.get("noise") == "slerp", seed)


def walked(run: Run, keys: Wanted, frames: int, slerped: bool, seed: int) -> Chosen:
    """Frames evenly spaced on the way through the conditions `keys`: embeddings on a straight line, noise on great circles.

    slerped: from the noise of seed to that of seed + 1, ..., as many as there are conditions, or two; else all of seed.
    """
    from nanodiffusion.tasks.conditions import slerp, walk  # slow to import

    if keys.n == 1 and not slerped:
        raise UserError(
            "nothing changes from frame to frame", key="frames", fix="noise=slerp, several classes or texts"
        )
    noise = None
    if slerped:
        noise = walk(ImageNoise(range(seed, seed + max(2, keys.n))).draw(*run.shape), frames, slerp)
    straight = lambda given: {name: walk(v, frames, torch.lerp) for name, v in given.items() if v.is_floating_point()}
    at = torch.from_numpy(np.linspace(0, keys.n - 1, frames))
    low, labels = at.long().clamp(max=max(0, keys.n - 2)), keys.cond.get("label")
    texts = tuple(keys.texts[int(i.round())] for i in at) if keys.texts else ()
    wanted = replace(keys, n=frames, cond=straight(keys.cond), negative=straight(keys.negative), texts=texts, columns=0)
    if labels is None:
        return wanted, noise, None
    high = labels[(low + 1).clamp(max=keys.n - 1)]
    other = None if keys.n == 1 else ({**wanted.cond, "label": high}, (at - low).float())
    return replace(wanted, cond=wanted.cond | {"label": labels[low]}), noise, other
