"""What reads a control image beside a frozen U-Net: a ControlNet, or a T2I-Adapter."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodiffusion.config import Config
from nanodiffusion.denoiser import Cond
from nanodiffusion.errors import UserError
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.memory import on_meta
from nanodiffusion.nets.adapter import Adapter, AdapterConfig
from nanodiffusion.nets.controlnet import Controlled, ControlNet, ControlNetConfig, control_strengths
from nanodiffusion.nets.sd_unet import feature_shapes
from nanodiffusion.pretrained.load import Bundle
from nanodiffusion.pretrained.publish import save_part


class WithControl(Tuned):
    """A U-Net with a ControlNet, which reads control (b 3 H W) in [0, 1]."""

    takes = ("ids", "control")

    def condition(self, cond: Cond) -> dict[str, Any]:
        """As `Tuned.condition`, and control -> what `read` makes of it."""
        known = super().condition(cond)
        control = known.pop("control")
        return known | self.read(control)

    def read(self, control: Tensor) -> dict[str, Any]:
        """control (b 3 H W) -> hints and strengths."""
        net: Any = self.net
        hint = net.embed(control)
        return {"hints": (hint,), "strengths": (control_strengths(1.0, len(hint), net.count).to(hint.device),)}


@dataclass(frozen=True)
class ControlNets(Finetune):
    """A ControlNet from the U-Net (Zhang et al. 2023), or from an earlier one. It makes `controlnet/`.

    data.control says what it reads: canny, inpainting, or a picture of the user's own. start: a folder, file or name.
    """

    start: str = ""

    @property
    def from_base(self) -> bool:
        """Unless `start` says other weights."""
        return not self.start

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The frozen U-Net and the ControlNet about it."""
        from nanodiffusion.pretrained.load import load_controlnet

        unet: Any = bundle.denoiser.net
        if self.frozen_in(config) != "fp32" and config.precision == "fp32":
            fix = "precision=bf16, or task.frozen=fp32"
            what = "a ControlNet in float32 cannot be trained beside a U-Net in half precision"
            raise UserError(what, key="task.frozen", found=self.frozen, fix=fix)
        torch.manual_seed(config.seed)  # of the stem
        net = (
            load_controlnet(self.start, "fp32", "cpu")
            if self.start
            else ControlNet.from_unet(unet, control_for(unet, bundle.codec.factor)).float()
        )
        net.checkpointing = self.checkpointing
        return WithControl(bundle, config, net, Controlled(unet, [net]))

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `controlnet/`."""
        save_part(model.net, folder / "controlnet", over=True)


class WithAdapter(WithControl):
    """The same with a T2I-Adapter."""

    def read(self, control: Tensor) -> dict[str, Any]:
        """control (b 3 H W) -> features."""
        return {"features": self.net(control)}


@dataclass(frozen=True)
class Adapters(Finetune):
    """A T2I-Adapter (Mou et al. 2023), from nothing or from an earlier one. It makes `adapter/`.

    kind: full or light; SDXL has a full one of its own. data.control says what it reads.
    """

    start: str = ""
    kind: str = "full"

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The frozen U-Net and the adapter."""
        from nanodiffusion.pretrained.load import load_adapter

        torch.manual_seed(config.seed)
        net = (
            load_adapter(self.start, "fp32", "cpu")
            if self.start
            else Adapter(adapter_for(bundle.denoiser.net, self.kind, bundle.codec.factor))
        )
        check_maps(net, bundle.denoiser.net, bundle.codec.factor, "task.start" if self.start else "task.kind")
        return WithAdapter(bundle, config, net)

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `adapter/`."""
        save_part(model.net, folder / "adapter", over=True)


def control_for(unet: Any, factor: int = 8) -> ControlNetConfig:
    """The ControlNet that fits a U-Net whose codec halves pictures to one `factor`-th: its stem does as often."""
    first, halvings = ControlNetConfig.hint_widths, factor.bit_length() - 1
    widths = (*first, *first[-1:] * halvings)[: halvings + 1]
    c = replace(unet.config, channels_in=unet.config.channels_out, pass_through=0, pass_residual=False)
    return ControlNetConfig(c, hint_widths=widths)


def adapter_for(unet: Any, kind: str = "full", factor: int = 8) -> AdapterConfig:
    """The adapter that fits a U-Net, as those published do: SDXL's has a map more than the U-Net has levels.

    factor: how many times smaller than pictures the latents are.
    """
    widths = tuple(unet.config.widths)
    if kind == "full" and unet.config.added_dim:
        return AdapterConfig("full_xl", widths=(*widths, widths[-1]), downscale=2 * factor)
    light = kind == "light"
    return AdapterConfig(kind, widths=widths[:-1] if light else widths, blocks=4 if light else 2, downscale=factor)


def check_maps(net: Adapter, unet: Any, factor: int, key: str) -> None:
    """UserError, which names the option `key`, unless an adapter gives the maps that a U-Net takes."""
    side = 64  # of a latent, which is halved without a rest
    image = torch.empty(1, net.config.channels_in, side * factor, side * factor, device="meta")
    own = feature_shapes(unet.config, side, side)
    found = tuple(tuple(map_.shape[1:]) for map_ in on_meta(net)(image))
    if found != own[: len(found)]:
        expected = f"maps of {own}, at a latent's side of {side}"
        raise UserError("this adapter does not fit the U-Net", key=key, expected=expected, found=found)
