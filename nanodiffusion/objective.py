"""What a run trains: the row of TASKS that its config's `task` names, and the objects that the config describes.

denoise     D(x, sigma, cond) -> E[x0 | x] at every noise level: a diffusion model
autoencode  an image to latents and back, one pass and no noise levels: the codec of later runs; see `autoencode`

A task makes a model (a module with `net`, `precision` and `loss`), which is all that the loop knows of it, and says
how it is validated and pictured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.autoencode import Autoencode
from nanodiffusion.codec import PixelCodec
from nanodiffusion.config import Config, make
from nanodiffusion.denoiser import PRECISIONS, Cond, Denoiser, edm
from nanodiffusion.draw import CALLED, check_sampling, cycled, draw
from nanodiffusion.errors import UserError, workable
from nanodiffusion.memory import at_work
from nanodiffusion.nets import NETS, build_net
from nanodiffusion.noise import DENSITIES, SCHEDULES, Density, Schedule
from nanodiffusion.task import Task, check_net, refuse_images
from nanodiffusion.train import VALIDATION_SEED, Trainer
from nanodiffusion.validate import Validator

SHOWN = 8  # columns of a run's grid where the data has no classes
WIDEST = 20  # columns of any grid
OPTIONS = {"label": "num_classes", "pooled": "pooled_dim"}  # of a net: how many classes it knows, how long a text is

Fixed = dict[str, Tensor]  # what the pictures of a run are always drawn from, each (k ...)


# -- from a config to objects --------------------------------------------------------------------------------------------


def make_task(config: Config) -> Any:
    """The task a config names."""
    if config.task["name"] in TASKS:
        return make(TASKS, config.task, "task")()
    from nanodiffusion.finetune import FINETUNES  # slow to import, and it imports this

    return make({**TASKS, **FINETUNES}, config.task, "task")()


def make_schedule(config: Config) -> Schedule:
    """The schedule a config names."""
    with workable("schedule"):
        return make(SCHEDULES, config.schedule, "schedule")()


def make_density(config: Config) -> Density:
    """The training density a config names."""
    row = make(DENSITIES, config.density, "density", schedule=make_schedule(config))
    with workable("density"):
        density = row()
        density(1, torch.Generator())
    return density


def make_denoiser(config: Config) -> Any:
    """The model of a config whose net is complete, with fresh weights that depend on its seed alone."""
    torch.manual_seed(config.seed)
    return make_task(config).model(config)


def make_trained(config: Config) -> Any:
    """What the weights of a trained run are read into: its model, without what only training needed."""
    return make_task(config).finished(config)


def fit_net(config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> Config:
    """The config with what the data decides (channels, size, number of classes, length of a text) filled into its net."""
    task = make_task(config)
    config = task.settled(config)
    known = task.known(config, shape, classes, data)
    return replace(config, net={**config.net, **{k: v for k, v in known.items() if k not in config.net}})


def open_codec(where: str, shape: tuple[int, ...], device: str | torch.device = "cpu") -> Any:
    """The codec at `where` (see `pretrained.load_codec`), or the one of plain pixels, checked against samples of `shape`."""
    if not where:
        return PixelCodec(shape[0])
    from nanodiffusion.pretrained import load_codec  # slow to import, and few runs need it

    codec = load_codec(where, device=device)
    if codec.latent_channels != shape[0]:
        expected = f"a codec with {shape[0]} latent channels"
        raise UserError(
            "this codec does not fit the samples", file=where, expected=expected, found=codec.latent_channels
        )
    return codec.eval()


def at_once(shape: Sequence[int], factor: int) -> int:
    """How many pictures of latents (c h w) are drawn or decoded at once: one of 1024 x 1024, and 16 at most."""
    return min(max(2**20 // (shape[-2] * shape[-1] * factor**2), 1), 16)


@torch.no_grad()
def decoded(codec: Any, x0: Tensor) -> Tensor:
    """Samples as images in [-1, 1], a few at a time: (b c h w) -> (b 3 H W); pixels and points (b d) as they are."""
    if isinstance(codec, PixelCodec):
        return x0
    batch = at_once(x0.shape[1:], codec.factor)
    device = next(codec.parameters()).device if x0.device.type == "cpu" else x0.device
    with at_work(codec, device, offload=True):  # one that stays behind on the CPU is there for as long as it is needed
        return torch.cat([codec.decode(part.to(device)).clamp(-1, 1).to(x0.device) for part in x0.split(batch)])


# -- diffusion models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoise(Task):
    """A diffusion model: the net as a `Denoiser`."""

    def known(self, config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> dict[str, Any]:
        """Options of the net that samples of `shape`, the number of classes and what else the data gives decide."""
        known: dict[str, Any] = {"num_classes": classes}
        classes = config.net.get("num_classes", classes)  # 0 of data with both chooses its texts
        if (pooled := getattr(data, "pooled", None)) is not None:
            known |= {"text_dim": pooled.shape[1]} | ({} if classes else {"pooled_dim": pooled.shape[1]})
        known |= {"concat_channels": shape[0]} if getattr(data, "outpaint", 0) else {}
        known |= {"dim": shape[0]} if len(shape) == 1 else {"channels_in": shape[0], "in_size": list(shape[1:])}
        name = config.net.get("name", "")
        taken = {f.name for f in fields(NETS[name][0])} if name in NETS else set()
        return {k: v for k, v in known.items() if k in taken and not (k == "dim" and name != "mlp")}

    def net(self, config: Config) -> nn.Module:
        """The net of a complete config, its weights fresh from torch's generator."""
        return build_net(**config.net)

    def model(self, config: Config) -> Denoiser:
        """The net as a denoiser."""
        prediction = edm(config.sigma_data) if config.prediction == "edm" else config.prediction
        return Denoiser(self.net(config), prediction, config.clock, make_schedule(config), PRECISIONS[config.precision])

    def check(self, model: Denoiser, config: Config, shape: tuple[int, ...]) -> None:
        """UserError for what would be refused only after training on samples of `shape`."""
        check_net(model.net, shape)
        check_sampling(model, config.sample, make_schedule(config))
        refuse_images(config.sample)
        if config.sample.prompts and "pooled" not in model.takes:
            fix = "leave sample.prompts out"
            raise UserError("this model takes no text", key="sample.prompts", found=config.net.get("name"), fix=fix)

    def validator(self, trainer: Trainer, data: Any, density: Density, most: int) -> Validator:
        """What measures the model on held-out data."""
        return Validator(trainer, data, density, most)

    def fixed(self, config: Config, model: Denoiser, data: Any) -> Fixed:
        """The texts' vectors and known parts that pictures are drawn from: of `sample.prompts`, else of the first samples."""
        takes = model.takes
        if not {"pooled", "concat"} & set(takes):
            return {}
        g = torch.Generator().manual_seed(VALIDATION_SEED)
        prompts = _prompts(config, data)
        k = min(len(data), SHOWN if prompts is None else len(prompts))
        u = torch.rand(k, data.draws, generator=g)
        x0, cond = data.batch(torch.arange(k), u)
        given = {**cond, "x0": x0} if "concat" in takes else cond
        if prompts is not None:
            _check_length(prompts, cond.get("pooled", prompts))
            given["pooled"] = prompts
        least = min(map(len, given.values()))
        return {name: v[:least].cpu() for name, v in given.items() if name in (*takes, "x0", "mask")}

    def pictures(self, model: Denoiser, config: Config, shape: Sequence[int], fixed: Fixed, seeds: range) -> Tensor:
        """Samples (n *shape), one a seed, conditions in turn."""
        n = len(seeds)
        *_, last = draw(model, shape, make_schedule(config), config.sample, seeds, conditions(model.net, fixed, n))
        return completed(last.x, fixed)

    def columns(self, classes: int, fixed: Fixed, n: int) -> int:
        """Columns of a grid: one a class, or one a prompt; 0 = as square as n allows."""
        wide = len(next(iter(fixed.values()))) if fixed else classes
        return wide if 1 < wide <= WIDEST else 0


def _prompts(config: Config, data: Any) -> Tensor | None:
    """Vectors (k d) of the prompts that pictures are to be drawn for, or None where they are the first samples' own."""
    if not config.sample.prompts:
        return getattr(data, "prompts", None)
    if not config.text:
        fix = "text=FOLDER, or the encoder that the data was encoded with"
        raise UserError("nothing says how prompts become vectors", key="text", fix=fix)
    from nanodiffusion.text.pooled import open_text  # few runs need it

    return open_text(config.text).encode(config.sample.prompts)


def _check_length(prompts: Tensor, pooled: Tensor) -> None:
    if prompts.shape[1] != pooled.shape[1]:
        what, fix = "the prompts' vectors are not of the data's kind", "text=: the encoder that encoded the data"
        raise UserError(what, key="pooled", expected=f"{pooled.shape[1]} numbers", found=prompts.shape[1], fix=fix)


def conditions(net: nn.Module, fixed: Fixed, n: int) -> dict[str, Tensor]:
    """Conditions (n ...) of n pictures, in turn: what is fixed, and every class where the net takes no more than that."""
    takes: Sequence[str] = getattr(net, "takes", ())
    if fixed:
        return {name: v[cycled(n, len(v))] for name, v in fixed.items() if name in takes}
    return {"label": cycled(n, net.null_label)} if "label" in takes else {}  # type: ignore[arg-type]


def conditioning(net: nn.Module, takes: Sequence[str], given: Cond, classes: int) -> str:
    """In a line: which of the data's conditions a net learns by, and what chooses the others; "" of a net without any."""
    sizes = {name: classes if name == "label" else given[name].shape[1] for name in OPTIONS if name in given}
    offered = {name for name in sizes if hasattr(getattr(net, "config", None), OPTIONS[name])}
    if not offered | (sizes.keys() & set(takes)):
        return ""
    said = ["conditioned by " + (", ".join(f"{CALLED[k]} ({sizes[k]})" for k in sizes if k in takes) or "nothing")]
    for name in (name for name in sizes if name not in takes):
        instead = ", net.num_classes=0 takes it instead" if "label" in takes else ""
        fix = f": net.{OPTIONS[name]}={sizes[name]} adds it{instead}" if name in offered else ""
        said.append(f"the data's {CALLED[name]} is not used{fix}")
    return "; ".join(said)


def completed(x: Tensor, fixed: Fixed) -> Tensor:
    """Outpainted samples with what was known of them in its place: (n c h w)."""
    if "mask" not in fixed or "x0" not in fixed:
        return x
    mask, x0 = (fixed[name][cycled(len(x), len(fixed[name]))].to(x) for name in ("mask", "x0"))
    return torch.lerp(x0, x, mask.expand_as(x))


TASKS: Mapping[str, Callable[..., Any]] = {"denoise": Denoise, "autoencode": Autoencode}
