"""`nanodiffusion generate "a prompt" model=... key=value ...`: pictures of a Stable Diffusion checkpoint, with their settings."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nanodiffusion import show
from nanodiffusion.cli import inert
from nanodiffusion.cli.asked import Output, asked_of, config_of, read_words, settings_of
from nanodiffusion.cli.outputs import FOLDER, Names, check_output, recorders_of, text_of, write_rest
from nanodiffusion.cli.parts import Loaded, load_parts
from nanodiffusion.denoiser import Cond
from nanodiffusion.distributed import pick_device
from nanodiffusion.draw import check_step
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.fast import tune
from nanodiffusion.memory import GIB, Peak
from nanodiffusion.nets import net_size
from nanodiffusion.noise import LADDERS
from nanodiffusion.pretrained import Bundle
from nanodiffusion.sampler import State
from nanodiffusion.tasks import GenerateConfig, Inputs, Job, between, complete, pictures, prepare
from nanodiffusion.tasks.conditions import encode
from nanodiffusion.tasks.request import check_values
from nanodiffusion.tasks.run import unit_noise
from nanodiffusion.text.prompts import TextEncoder

Watch = Callable[[Tensor, State, int], None]  # x before a step, the state after it, of how many


def main(args: Namespace) -> int:
    """Load what is asked for, and write the pictures."""
    words = read_words(args.words)
    asked, config = asked_of(words), config_of(words)
    check_output(words.output)
    check_config(config)
    with Session(asked.device) as session:
        loaded = load_parts(asked, config, session.device)
        shots = shots_of(loaded, config, check=True)
        session.told(loaded, shots)
        make(loaded, in_batches(shots, asked.batch), words.output, Names(words.output.get("out", FOLDER), len(shots)))
    return 0


def check_config(config: GenerateConfig) -> None:
    """UserError, before anything is loaded, for what needs no model to be seen."""
    if not config.prompt:
        raise UserError("there is no prompt", key="prompt", fix='nanodiffusion generate "a prompt" model=...')
    check_values(config, Inputs())
    check_step(config)
    lookup(LADDERS, config.ladder.get("name"), "ladder")


class Session:
    """A device set up for speed; at the end the seconds and the measured peak of memory are told."""

    def __init__(self, device: str) -> None:
        self.device = pick_device(device)
        tune(self.device)
        self.peak, self.began = Peak(self.device), time.monotonic()

    def __enter__(self) -> "Session":
        self.peak.__enter__()
        return self

    def told(self, loaded: Loaded, shots: Sequence["Shot"]) -> None:
        """Print what will be done."""
        bundle, config = loaded.bundle, shots[0].config
        net = bundle.denoiser.net
        size = f"{net_size(net):,} parameters in {loaded.asked.precision} on {self.device}"
        print(inert(f"{bundle.family.name} {loaded.asked.model}: U-Net of {size}"))
        name = config.sampler["name"]
        print(f"{len(shots)} of {config.width} x {config.height}, {name}, {config.steps} steps; {bundle.plan}")

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        self.peak.__exit__(kind, *rest)
        if kind is None:
            seconds = time.monotonic() - self.began
            print(f"{seconds:.1f} s, measured peak {self.peak.bytes / GIB:.2f} GiB")


# -- one picture after another -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """A picture to be made: its own config (n = 1), what the text encoders say, and its noise if that is not its seed's.

    cond, uncond: one row. Each prompt is encoded by itself, so that no picture depends on its companions' prompts.
    """

    config: GenerateConfig
    cond: Cond
    uncond: Cond | None
    noise: Tensor | None = None
    frame: int = -1


def shots_of(loaded: Loaded, config: GenerateConfig, check: bool = False) -> list[Shot]:
    """Every picture that a config asks for; with `check` each learned token must be in one of the prompts."""
    bundle = loaded.bundle
    config = complete(bundle, config, loaded.inputs)
    b = len(config.prompt) * config.n
    seeds = config.seeds or [config.seed + i for i in range(b)]
    if not all(0 <= seed < 2**63 for seed in seeds) or (not config.frames and len(seeds) != b):
        expected = f"{b} numbers from 0 up"
        raise UserError("every picture has a seed", key="seeds", expected=expected, found=seeds[:9])
    if check and loaded.asked.embeddings:
        encode(bundle, config)
    with torch.no_grad():
        bundle = replace(bundle, text=TextEncoder(bundle.text.parts, check_added=False))
        return _frames(bundle, config) if config.frames else _each(bundle, config, seeds)


def _each(bundle: Bundle, config: GenerateConfig, seeds: list[int]) -> list[Shot]:
    found, shots = {}, []
    for i, seed in enumerate(seeds):
        k = i // config.n
        row = lambda texts, k=k: texts[k : k + 1] if len(texts) > 1 else texts
        texts = {key: row(getattr(config, key)) for key in ("prompt", "prompt_2", "negative")}
        own = replace(config, n=1, seed=seed, seeds=[], **texts)
        key = str(texts)
        found[key] = found.get(key) or encode(bundle, own)
        shots.append(Shot(own, *found[key]))
    return shots


def _frames(bundle: Bundle, config: GenerateConfig) -> list[Shot]:
    n, codec = config.frames, bundle.codec
    cond, uncond = encode(bundle, config)
    cond, uncond = between(cond, n), None if uncond is None else between(uncond, n)
    shape = (n, codec.latent_channels, config.height // codec.factor, config.width // codec.factor)
    noise, seeds = unit_noise(config, None, shape)
    row = lambda c, i: {k: v[i : i + 1] for k, v in c.items()}
    return [
        Shot(replace(config, seed=seed), row(cond, i), uncond and row(uncond, i), noise[i : i + 1], i)
        for i, seed in enumerate(seeds)
    ]


def in_batches(shots: Sequence[Shot], size: int) -> list[list[Shot]]:
    """Shots in order, at most `size` at a time, those together whose texts are equally long."""
    groups = (list(g) for _, g in groupby(shots, key=lambda s: s.cond["context"].shape[1]))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def draw(loaded: Loaded, shots: Sequence[Shot], watch: Watch) -> list[Image.Image]:
    """The pictures of shots, made together; what they are is the same in any company, but for rounding."""
    job = job_of(loaded, shots)
    before = job.x
    for state in job.states():
        watch(before, state, len(job.sigmas) - 1)
        before = state.x
    return pictures(loaded.bundle, before, loaded.inputs.image, loaded.inputs.mask)


def job_of(loaded: Loaded, shots: Sequence[Shot]) -> Job:
    """The run that makes shots: prompts as embeddings, one seed each."""
    first = shots[0]
    cond = {k: torch.cat([s.cond[k] for s in shots]) for k in first.cond}
    uncond = None if first.uncond is None else {k: torch.cat([_of(s)[k] for s in shots]) for k in first.uncond}
    noise = None if first.noise is None else torch.cat([s.noise for s in shots if s.noise is not None])
    inputs = replace(loaded.inputs, embeddings=(cond, uncond), noise=noise)
    seeds = [s.config.seed for s in shots]
    config = replace(first.config, prompt=[], prompt_2=[], negative=[], frames=0, seeds=seeds)
    return prepare(loaded.bundle, config, inputs)


def _of(shot: Shot) -> Cond:
    assert shot.uncond is not None
    return shot.uncond


def make(loaded: Loaded, batches: list[list[Shot]], output: Output, names: Names, keep: int | None = None) -> None:
    """Draw batch after batch and write what is asked for; of each batch all pictures, or the one to keep."""
    images: list[Image.Image] = []
    total = sum(map(len, batches)) if keep is None else len(batches)
    recorders = recorders_of(loaded, output, total, batches[0][0].config.frames > 0)
    kept = slice(None) if keep is None else slice(keep, keep + 1)
    with torch.no_grad(), tqdm(unit="step", disable=None) as bar:

        def watch(before: Tensor, state: State, steps: int) -> None:
            bar.total = steps * len(batches)
            bar.update()
            for recorder in recorders.values():
                recorder.add(before[kept], state._replace(x=state.x[kept], x0=state.x0[kept]), steps)

        for batch in batches:
            made = draw(loaded, batch, watch)
            for place in range(len(batch))[kept]:
                text = text_of(settings(loaded, batch, place))
                tqdm.write(str(show.save_png(made[place], names.next(batch[place].config.seed), text)))
                images += [made[place]] if {"grid", "gif", "mp4"} & output.keys() else []
    for path in write_rest(recorders, images, output, settings(loaded, batches[0], keep or 0), total):
        print(path)


def settings(loaded: Loaded, batch: Sequence[Shot], place: int) -> dict[str, Any]:
    """The settings of one picture of a batch."""
    shot = batch[place]
    asked = replace(loaded.asked, batch=len(batch), place=place, frame=shot.frame)
    return settings_of(asked, shot.config, loaded.bundle.family.name)
