"""What a run trains: the row of TASKS that its config's `task` names, and the objects that the config describes.

denoise     D(x, sigma, cond) -> E[x0 | x] at every noise level: a diffusion model
autoencode  an image to latents and back, one pass and no noise levels: the codec of later runs

A task makes a model (a module with `net`, `precision` and `loss`), which is all that the loop knows of it, and says
how it is validated and pictured.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from nanodiffusion.codec import AutoencoderKL, AutoencoderKLConfig, PixelCodec
from nanodiffusion.config import Config, check_options, make
from nanodiffusion.data import order
from nanodiffusion.denoiser import DISTANCES, Cond, Denoiser, edm
from nanodiffusion.draw import check_sampling, cycled, draw
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.nets import NETS, build_net
from nanodiffusion.noise import DENSITIES, SCHEDULES, Density, Schedule
from nanodiffusion.train import Trainer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VALIDATION_SEED, VALIDATION_SAMPLES, VALIDATION_LEVELS = 7, 512, 8
SHOWN = 8  # columns of a run's grid where the data has no classes
WIDEST = 20  # columns of any grid
MEASURED = 2048  # images whose latents say a codec's scale

Fixed = dict[str, Tensor]  # what the pictures of a run are always drawn from, each (k ...)


# -- from a config to objects --------------------------------------------------------------------------------------------


def make_task(config: Config) -> Any:
    """The task a config names."""
    return make(TASKS, config.task, "task")()


def make_schedule(config: Config) -> Schedule:
    """The schedule a config names."""
    return make(SCHEDULES, config.schedule, "schedule")()


def make_density(config: Config) -> Density:
    """The training density a config names."""
    return make(DENSITIES, config.density, "density", schedule=make_schedule(config))()


def make_denoiser(config: Config) -> Any:
    """The model of a config whose net is complete, with fresh weights that depend on its seed alone."""
    torch.manual_seed(config.seed)
    return make_task(config).model(config)


def fit_net(config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> Config:
    """The config with what the data decides (channels, size, number of classes, length of a text) filled into its net."""
    known = make_task(config).known(config, shape, classes, data)
    return replace(config, net={**config.net, **{k: v for k, v in known.items() if k not in config.net}})


def check_net(net: nn.Module, shape: tuple[int, ...]) -> None:
    """UserError unless a net is made for samples of `shape`."""
    if tuple(net.sample_shape) != tuple(shape):  # type: ignore[arg-type]
        raise UserError(
            "the net does not fit the data",
            key="net",
            expected=f"samples of {tuple(shape)}",
            found=f"a net for {tuple(net.sample_shape)}",  # type: ignore[arg-type]
            fix="leave the net's own size out, the data sets it; points want net.name=mlp",
        )


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


@torch.no_grad()
def decoded(codec: Any, x0: Tensor, batch: int = 16) -> Tensor:
    """Samples as images in [-1, 1], a few at a time: (b c h w) -> (b 3 H W); pixels and points (b d) as they are."""
    if isinstance(codec, PixelCodec):
        return x0
    device = next(codec.parameters()).device
    return torch.cat([codec.decode(part.to(device)).clamp(-1, 1).to(x0.device) for part in x0.split(batch)])


# -- diffusion models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoise:
    """A diffusion model: the net as a `Denoiser`."""

    def known(self, config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> dict[str, Any]:
        """Options of the net that samples of `shape`, the number of classes and what else the data gives decide."""
        known: dict[str, Any] = {"num_classes": classes}
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

    def check(self, model: Denoiser, config: Config) -> None:
        """UserError for what would be refused only after training."""
        check_sampling(model, config.sample, make_schedule(config))
        if config.sample.prompts and "pooled" not in model.net.takes:  # type: ignore[operator]
            fix = "leave sample.prompts out"
            raise UserError("this model takes no text", key="sample.prompts", found=config.net.get("name"), fix=fix)

    def validator(self, trainer: Trainer, data: Any, density: Density) -> "Validator":
        """What measures the model on held-out data."""
        return Validator(trainer, data, density)

    def fixed(self, config: Config, takes: Sequence[str], data: Any) -> Fixed:
        """The texts' vectors and known parts that pictures are drawn from: of `sample.prompts`, else of the first samples."""
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

    def publish(self, *_: Any) -> None:
        """Nothing but checkpoints comes of it."""


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


def completed(x: Tensor, fixed: Fixed) -> Tensor:
    """Outpainted samples with what was known of them in its place: (n c h w)."""
    if "mask" not in fixed or "x0" not in fixed:
        return x
    mask, x0 = (fixed[name][cycled(len(x), len(fixed[name]))].to(x) for name in ("mask", "x0"))
    return torch.lerp(x0, x, mask.expand_as(x))


class Validator:
    """Loss on held-out samples at fixed noise and fixed levels: the middles of equally likely parts of the density."""

    def __init__(self, trainer: Trainer, data: Any, density: Density) -> None:
        device = trainer.world.device
        g = torch.Generator(device).manual_seed(VALIDATION_SEED)
        n = min(len(data), VALIDATION_SAMPLES)
        self.trainer = trainer
        index = torch.randperm(len(data), generator=g, device=device)[:n]
        self.eps = torch.randn(n, *data.shape, generator=g, device=device)
        # to know a part of a sample is a part of the task; other augmentation is not
        u = torch.rand(n, data.draws, generator=g, device=device) if "concat" in trainer.takes else None
        self.x0, self.cond = data.to(device).batch(index, u)
        self.cond = trainer.conditions(self.cond)
        q = (torch.arange(VALIDATION_LEVELS, device=device) + 0.5) / VALIDATION_LEVELS
        self.levels = torch.quantile(density(2**14, g), q)

    @torch.no_grad()
    def _per_level(self) -> list[float]:
        self.trainer.denoiser.eval()
        objective = self.trainer.plain_objective
        size = micro_batch(self.trainer)
        totals = []
        for sigma in self.levels:
            losses = [
                objective(
                    x0, sigma.expand(len(x0)), eps, {k: v[i * size : (i + 1) * size] for k, v in self.cond.items()}
                )
                for i, (x0, eps) in enumerate(zip(self.x0.split(size), self.eps.split(size)))
            ]
            totals.append(torch.cat(losses).mean().item())
        return totals

    def row(self) -> dict[str, Any]:
        """val/loss and val/loss_per_sigma of the raw weights, and the same of the first average."""
        raw = self._per_level()
        row = {"val/loss": sum(raw) / len(raw), "val/sigma": self.levels.tolist(), "val/loss_per_sigma": raw}
        if self.trainer.emas:
            with self.trainer.emas[0].swap(self.trainer.denoiser.net):
                ema = self._per_level()
            row |= {"val/ema_loss": sum(ema) / len(ema), "val/ema_loss_per_sigma": ema}
        return row


def micro_batch(trainer: Trainer) -> int:
    """Samples that a process holds at once in training."""
    return max(1, trainer.config.batch_size // trainer.parts)


# -- autoencoders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoencoderConfig(AutoencoderKLConfig):
    """An autoencoder to be trained: a small one; its images' size; latents as they come, the scale is measured later."""

    widths: tuple[int, ...] = (32, 64, 64)
    blocks: int = 1
    groups: int = 8
    scale: float = 1.0
    attention: bool = False
    in_size: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = 2 ** (len(self.widths) - 1)
        if len(self.in_size) != 2 or any(side < 1 or side % factor for side in self.in_size):
            fix = "data.pad=2 makes 32 of 28; or fewer widths, each but the last halves the image"
            expected = f"multiples of {factor}"
            raise UserError(
                "the images do not halve often enough", key="net", expected=expected, found=self.in_size, fix=fix
            )


class Autoencoder(AutoencoderKL):
    """A KL autoencoder as a net of a run: (b c h w) -> (b c h w), by the means of the latents and without a clock."""

    takes = ()
    null_label = None

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        c = config or AutoencoderConfig()
        super().__init__(c)
        self.sample_shape = (c.channels, *c.in_size)
        self.latent_shape = (c.latent_channels, *(side // self.factor for side in c.in_size))

    def forward(self, image: Tensor, t: Tensor | None = None) -> Tensor:
        """The reconstruction of images in [-1, 1]."""
        return self.decode(self.encode(image))


class Autoencoding(nn.Module):
    """An autoencoder under its own loss, where the training loop has a denoiser.

    kl: weight of the divergence from N(0, 1), of its sum over the latents against the distance's over the image; Rombach
    et al. 2022 take 1e-6 (appendix G). There is no perceptual and no adversarial part: edges stay softer than theirs.
    """

    def __init__(self, net: Autoencoder, kl: float = 1e-6, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net, self.kl, self.precision = net, kl, precision
        self.noise_shape = net.latent_shape

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A reconstruction (b c h w) by way of a sample of the posterior, and its divergence from N(0, 1) in nats (b)."""
        with torch.autocast(image.device.type, self.precision, enabled=self.precision != torch.float32):
            mean, logvar = (m.float() for m in self.net.moments(image))
            c = self.net.config
            z = mean + (0.5 * logvar).exp() * noise
            return self.net.decode((z - c.shift) * c.scale).float(), divergence(mean, logvar)

    def loss(
        self,
        x0: Tensor,
        sigma: Tensor,
        eps: Tensor,
        cond: Cond | None = None,
        distance: str = "mse",
        weight: Callable[[Tensor, Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Minus the evidence bound, but for constants, per value of the image (Kingma & Welling 2014, eq. 10): -> (b).

        x0 (b c h w) in [-1, 1]; eps (b c' h/f w/f) is the posterior's noise; nothing else is looked at.
        """
        out, nats = self(x0, eps)
        each = lookup(DISTANCES, distance, "loss")(out, x0)
        return each.flatten(1).mean(1) + self.kl * nats / x0[0].numel()


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) in nats, summed: (b ...) -> (b) (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class Autoencode:
    """An image codec: `net` is an autoencoder, `loss` the distance of a reconstruction, `kl` the weight of the prior."""

    kl: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.kl < math.inf:
            raise UserError("must be a number from 0 up", key="task.kl", found=self.kl)

    def known(self, config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> dict[str, Any]:
        """Channels and size."""
        if len(shape) != 3:
            raise UserError("an autoencoder is for images", key="data", expected="samples (c h w)", found=shape)
        return {"channels": shape[0], "in_size": list(shape[1:])}

    def net(self, config: Config) -> Autoencoder:
        """The autoencoder of a complete config, its weights fresh from torch's generator."""
        name = config.net.get("name")
        options: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.net.items() if k != "name"
        }
        row = lookup(AUTOENCODERS, name, "net")
        check_options(options, get_type_hints(AutoencoderConfig), "net")
        return row(AutoencoderConfig(**options))

    def model(self, config: Config) -> Autoencoding:
        """It under its own loss."""
        return Autoencoding(self.net(config), self.kl, PRECISIONS[config.precision])

    def check(self, model: Autoencoding, config: Config) -> None:
        """UserError for keys that mean nothing here."""
        lookup(DISTANCES, config.loss, "loss")
        if config.weight.get("name") != "one":
            fix = "leave weight out"
            raise UserError("an autoencoder has no noise levels to weigh", key="weight", found=config.weight, fix=fix)
        if config.sample.prompts:
            fix = "leave sample.prompts out"
            raise UserError("an autoencoder takes no text", key="sample.prompts", fix=fix)

    def validator(self, trainer: Trainer, data: Any, density: Density) -> "AutoencoderValidator":
        """What measures the model on held-out data."""
        return AutoencoderValidator(trainer, data)

    def fixed(self, config: Config, takes: Sequence[str], data: Any) -> Fixed:
        """The images that are reconstructed in pictures."""
        return {"image": data.batch(torch.arange(min(len(data), 2 * SHOWN)))[0].cpu()}

    @torch.no_grad()
    def pictures(self, model: Autoencoding, config: Config, shape: Sequence[int], fixed: Fixed, seeds: range) -> Tensor:
        """The fixed images, and after them their reconstructions: (2k c h w), whatever the seeds."""
        model.eval()
        image = fixed["image"][: len(seeds)]
        return torch.cat([image, model.net(image.to(next(model.parameters()).device)).cpu()])

    def columns(self, classes: int, fixed: Fixed, n: int) -> int:
        """All originals in one row."""
        return min(n, len(fixed["image"]))

    def publish(self, net: Autoencoder, data: Any, seed: int, folder: Path) -> Path:
        """Write the codec into `folder`, its latents' mean and deviation over the training data as shift and scale."""
        mean, deviation = latent_statistics(net, data, seed)
        return save_codec(net, replace(net.config, scale=1 / deviation, shift=mean), folder)


class AutoencoderValidator:
    """The loss on all held-out images at fixed noise, and the error of their reconstructions by the latents' means."""

    def __init__(self, trainer: Trainer, data: Any) -> None:
        self.trainer, self.data = trainer, data.to(trainer.world.device)

    @torch.no_grad()
    def _measure(self) -> tuple[float, float]:
        """Mean loss, and PSNR in dB of the mean squared error over all images on [0, 1]."""
        trainer, losses, errors = self.trainer, [], []
        model, device = trainer.denoiser.eval(), trainer.world.device
        g = torch.Generator(device).manual_seed(VALIDATION_SEED)
        for index in torch.arange(len(self.data)).split(micro_batch(trainer)):
            x0, _ = self.data.batch(index.to(device))
            eps = torch.randn(len(x0), *model.noise_shape, generator=g, device=device)  # type: ignore[misc]
            losses.append(trainer.plain_objective(x0, torch.zeros_like(eps[:, 0, 0, 0]), eps, {}))
            errors.append((model.net(x0).clamp(-1, 1) - x0).div(2).square().flatten(1).mean(1))
        return torch.cat(losses).mean().item(), psnr(torch.cat(errors).double().mean().item())

    def row(self) -> dict[str, Any]:
        """val/loss and val/psnr of the raw weights, val/ema_loss and val/ema_psnr of the first average."""
        loss, db = self._measure()
        row = {"val/loss": loss, "val/psnr": db}
        if self.trainer.emas:
            with self.trainer.emas[0].swap(self.trainer.denoiser.net):
                loss, db = self._measure()
            row |= {"val/ema_loss": loss, "val/ema_psnr": db}
        return row


def psnr(mse: float) -> float:
    """Peak signal to noise ratio in dB of a mean squared error on [0, 1]."""
    return -10 * math.log10(mse) if mse > 0 else math.inf


def _parts(data: Any, seed: int, batch: int = 64) -> Iterator[Tensor]:
    """Images (b c h w) of a fixed choice from the data."""
    for index in order(len(data), min(len(data), MEASURED), seed, 0).split(batch):
        yield data.batch(index)[0]


@torch.no_grad()
def latent_statistics(net: AutoencoderKL, data: Any, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the unscaled latents, sampled from their posteriors, over images of the data."""
    net.eval()
    device, g = next(net.parameters()).device, torch.Generator().manual_seed(seed)
    latents = []
    for image in _parts(data, seed):
        mean, logvar = (m.cpu().double() for m in net.moments(image.to(device)))
        latents.append(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g))
    z = torch.cat(latents)
    return z.mean().item(), max(z.std(correction=0).item(), 1e-6)


def save_codec(net: AutoencoderKL, config: AutoencoderKLConfig, folder: Path) -> Path:
    """Write an autoencoder's weights and config as the folder that `codec=` and diffusers read, in one move."""
    from nanodiffusion.pretrained.architecture import vae_json  # slow to import
    from nanodiffusion.pretrained.weights import STEMS, disk_errors, save, sync

    beside, old = (folder.with_name(f".{kind}-{folder.name}") for kind in ("tmp", "old"))
    with disk_errors(folder):
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir(parents=True)
        save(beside / f"{STEMS[0]}.safetensors", net.state_dict())
        (beside / "config.json").write_text(json.dumps(vae_json(config), indent=2) + "\n")
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    return folder


AUTOENCODERS: Mapping[str, Callable[..., Autoencoder]] = {"autoencoder": Autoencoder}
TASKS: Mapping[str, Callable[..., Any]] = {"denoise": Denoise, "autoencode": Autoencode}
