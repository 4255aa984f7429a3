"""The U-Net itself trained on: text to image, inpainting by further channels, inpainting by further tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.config import Config
from nanodiffusion.errors import UserError
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.nets.sd_unet import SDUNet
from nanodiffusion.pretrained.load import Bundle
from nanodiffusion.pretrained.publish import save_part, save_scheduler
from nanodiffusion.pretrained.replace import replace_part
from nanodiffusion.tensors import save_tensors


def save_unet(model: Tuned, net: nn.Module, folder: Path) -> None:
    """Write `unet/` and, beside it, `scheduler/`: what the U-Net predicts, of which noise levels."""
    save_part(net, folder / "unet", over=True, size=model.natural)
    save_scheduler(model.scheduler, folder)


@dataclass(frozen=True)
class WholeUNet(Finetune):
    """A task that trains all of the U-Net: the base's, or that at `start`, a `unet/` of a run, a file or a name on the hub."""

    start: str = ""

    @property
    def from_base(self) -> bool:
        """Unless `start` says other weights."""
        return not self.start

    def loaded(self, dtype: str) -> Bundle:
        """The checkpoint, with the U-Net at `start` for its own."""
        bundle = super().loaded(dtype)
        return replace_part(bundle, "unet", self.start) if self.start else bundle

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `unet/` and `scheduler/`."""
        save_unet(model, model.net, folder)


@dataclass(frozen=True)
class TextToImage(WholeUNet):
    """All of the U-Net, on pictures and captions. It makes `unet/`, a folder as diffusers has it."""

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The U-Net, as it is in the checkpoint."""
        net = bundle.denoiser.net
        if net.config.channels_in != net.config.channels_out:  # type: ignore[union-attr]
            fix = "task.name=inpaint"
            raise UserError("this U-Net is for inpainting", file=self.base, key="task.base", fix=fix)
        return Tuned(bundle, config, net.float())


class Inpainting(Tuned):
    """A U-Net that reads, beside the noisy latents, a mask and the latents of what is left of the picture."""

    takes = ("ids", "concat")


@dataclass(frozen=True)
class Inpaint(WholeUNet):
    """The U-Net with 9 channels to read; of a text-to-image one the further channels begin at zero. It makes `unet/`.

    data.hole says what is to be painted anew; see Rombach et al. 2022, section 4.5.
    """

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The U-Net, widened where it must be."""
        net: Any = bundle.denoiser.net
        return Inpainting(bundle, config, widened(net, net.config.channels_out * 2 + 1).float(), None)


def widened(net: SDUNet, channels: int) -> SDUNet:
    """The U-Net, in place, reading `channels` channels, of which the new ones do nothing yet. UserError: it reads others."""
    old = net.conv_in
    if old.in_channels == channels:
        return net
    if old.in_channels != net.config.channels_out:
        raise UserError("this U-Net cannot be widened", key="task.base", expected=channels, found=old.in_channels)
    more = old.weight.new_zeros(len(old.weight), channels - old.in_channels, *old.weight.shape[2:])
    with torch.no_grad():
        old.weight = nn.Parameter(torch.cat([old.weight, more], 1), requires_grad=old.weight.requires_grad)
    old.in_channels = channels
    net.config = replace(net.config, channels_in=channels)
    return net


class Told(nn.Module):
    """A U-Net and the tokens that tell it what is known of the picture; called as the U-Net is."""

    def __init__(self, unet: SDUNet, tokens: InpaintTokens) -> None:
        super().__init__()
        self.unet, self.tokens = unet, tokens

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict by our names, of one that has the U-Net's and the tokens' side by side, as nano-diffusion's files do."""
        if any(name.startswith("unet.") for name in tensors):
            return dict(tensors)
        return {
            f"{'tokens' if name.startswith('conditioning_image_') else 'unet'}.{name}": t for name, t in tensors.items()
        }

    def forward(self, x: Tensor, t: Tensor, context: Tensor, concat: Tensor, **cond: Any) -> Tensor:
        """F of x (b c h w), t (b); concat (b 1+c h w): the hole, and the latents of what is left."""
        known = self.tokens(concat[:, 1:], concat[:, :1])
        return self.unet(x, t, context=torch.cat([context, known.to(context.dtype)], 1), **cond)


@dataclass(frozen=True)
class InpaintByTokens(Finetune):
    """The U-Net with a token for every pixel of the masked latent beside those of the text.

    positions: each of these is told its place in the picture, which nano-diffusion's are not. It makes `unet/` and
    `tokens.safetensors`.
    """

    positions: bool = False

    @property
    def from_base(self) -> bool:
        """It is the base's U-Net that is trained."""
        return True

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The U-Net and new tokens, of which the linear layer starts as torch's do."""
        net: Any = bundle.denoiser.net
        torch.manual_seed(config.seed)
        tokens = InpaintTokens(net.config.context_dim, net.config.channels_out, self.positions)
        whole = Told(net.float(), tokens)
        return Inpainting(bundle, config, whole, whole)

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `unet/`, `scheduler/` and `tokens.safetensors`."""
        net: Any = model.net
        meta = {"positions": True} if self.positions else {}
        save_tensors(folder / "tokens.safetensors", net.tokens.state_dict(), meta)
        save_unet(model, net.unet, folder)
