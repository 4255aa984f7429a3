"""An image autoencoder as what a run trains: one pass and no noise levels, and the folder that `codec=` reads at the end."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from nanodiffusion.codec import AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.config import Config, check_options
from nanodiffusion.data import order
from nanodiffusion.denoiser import DISTANCES, PRECISIONS, Cond
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.noise import Density
from nanodiffusion.task import Task, check_net, refuse_images
from nanodiffusion.train import Trainer
from nanodiffusion.validate import HeldOut

SHOWN = 16  # images in a run's pictures
MEASURED = 2048  # images whose latents say a codec's scale


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
class Autoencode(Task):
    """An image codec: `net` is an autoencoder, `loss` the distance of a reconstruction, `kl` the weight of the prior."""

    kl: float = 1e-6
    spread: ClassVar[bool] = False

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

    def check(self, model: Autoencoding, config: Config, shape: tuple[int, ...]) -> None:
        """UserError for a net of another size than the data's, and for keys that mean nothing here."""
        check_net(model.net, shape)
        refuse_images(config.sample)
        lookup(DISTANCES, config.loss, "loss")
        if config.weight.get("name") != "one":
            fix = "leave weight out"
            raise UserError("an autoencoder has no noise levels to weigh", key="weight", found=config.weight, fix=fix)
        if config.sample.prompts:
            fix = "leave sample.prompts out"
            raise UserError("an autoencoder takes no text", key="sample.prompts", fix=fix)

    def validator(self, trainer: Trainer, data: Any, density: Density, most: int) -> "Reconstructions":
        """What measures the model on held-out data."""
        return Reconstructions(trainer, data, most, trainer.denoiser.noise_shape)  # type: ignore[arg-type]

    def fixed(self, config: Config, model: Autoencoding, data: Any) -> dict[str, Tensor]:
        """The images that are reconstructed in pictures."""
        return {"image": data.batch(torch.arange(min(len(data), SHOWN)))[0].cpu()}

    @torch.no_grad()
    def pictures(
        self, model: Autoencoding, config: Config, shape: Sequence[int], fixed: Mapping[str, Tensor], seeds: range
    ) -> Tensor:
        """The fixed images, and after them their reconstructions: (2k c h w), whatever the seeds."""
        model.eval()
        image = fixed["image"][: len(seeds)]
        return torch.cat([image, model.net(image.to(next(model.parameters()).device)).cpu()])

    def columns(self, classes: int, fixed: Mapping[str, Tensor], n: int) -> int:
        """All originals in one row."""
        return min(n, len(fixed["image"]))

    def publish(self, model: Autoencoding, data: Any, seed: int, folder: Path) -> None:
        """Write `codec/`, its latents' mean and deviation over the training data as shift and scale."""
        net = model.net
        mean, deviation = latent_statistics(net, data, seed)
        save_codec(net, replace(net.config, scale=1 / deviation, shift=mean), folder / "codec")


class Reconstructions(HeldOut):
    """The loss of an autoencoder, and the error of its reconstructions by the latents' means."""

    def measure(self) -> dict[str, Any]:
        """Mean loss, and PSNR in dB of the mean squared error over all images on [0, 1]."""
        model = self.trainer.denoiser
        totals = torch.zeros(2, device=self.eps.device)
        for x0, eps, _, counts in self.batches():
            loss = self.trainer.plain_objective(x0, torch.zeros_like(eps[:, 0, 0, 0]), eps, {})
            error = (model.net(x0).clamp(-1, 1) - x0).div(2).square().flatten(1).mean(1)  # type: ignore[operator]
            totals += torch.stack([(loss * counts).sum(), (error * counts).sum()])
        loss, error = self.mean(totals)
        return {"loss": loss, "psnr": psnr(error)}


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
    """Write an autoencoder's weights, under another config, as the folder that `codec=` and diffusers read."""
    from nanodiffusion.pretrained.publish import save_part  # slow to import

    with torch.device("meta"):
        codec = AutoencoderKL(config)
    codec.load_state_dict(net.state_dict(), assign=True)
    return save_part(codec, folder, over=True)


AUTOENCODERS: Mapping[str, Callable[..., Autoencoder]] = {"autoencoder": Autoencoder}
