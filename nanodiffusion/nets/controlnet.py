"""ControlNet (Zhang et al. 2023): a copy of the U-Net's first half that reads a control image too and adds to every skip.

D = Denoiser(Controlled(unet, [controlnet]), ...)
cond |= {"hints": (controlnet.embed(image),), "strengths": (control_strengths(1.0, len(image), controlnet.count),)}
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import check_positive, zero_
from nanodiffusion.nets.sd_layers import check_shape, conv3
from nanodiffusion.nets.sd_unet import Encoder, SDUNet, SDUNetConfig

FAMILY = ("widths", "blocks", "context_dim", "added_dim")  # what a ControlNet has in common with its U-Net


@dataclass(frozen=True)
class ControlNetConfig:
    """encoder: the U-Net's own config, channels_in aside; the rest is the stem's, which brings the image to latent size."""

    encoder: SDUNetConfig = SDUNetConfig()
    hint_channels: int = 3  # 0: no stem; the hint is of latent size already and appended to x before encoder.conv_in
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)  # the size is halved between them

    def __post_init__(self) -> None:
        check_positive(self, "hint_widths")
        if self.hint_channels < 0 or not self.hint_widths:
            expected = "hint_channels of 0 or more, and a hint width"
            found = (self.hint_channels, self.hint_widths)
            raise UserError("the stem cannot be built", key="hint_channels", expected=expected, found=found)

    @property
    def factor(self) -> int:
        """Pixels of the control image per pixel of the latent, along each side."""
        return 2 ** (len(self.hint_widths) - 1) if self.hint_channels else 1


class Stem(nn.Module):
    """Convolutions that bring a control image to the latent's size: (b c H W) -> (b d h w); the last starts at zero."""

    def __init__(self, channels_in: int, widths: Sequence[int], channels_out: int) -> None:
        super().__init__()
        self.conv_in = conv3(channels_in, widths[0])
        self.blocks = nn.ModuleList(conv for a, b in pairwise(widths) for conv in (conv3(a, a), conv3(a, b, stride=2)))
        self.conv_out = conv3(widths[-1], channels_out)
        zero_(self.conv_out)

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.conv_in(image))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """What a control image adds to each skip and to the middle of a U-Net; the convolutions that end it start at zero.

    State-dict keys are those of the published ControlNets in diffusers' layout.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.encoder)
        c, self.control = config.encoder, config
        self.controlnet_cond_embedding = (
            Stem(config.hint_channels, config.hint_widths, c.widths[0]) if config.hint_channels else None
        )
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in c.skip_channels)
        self.controlnet_mid_block = nn.Conv2d(c.widths[-1], c.widths[-1], 1)
        for conv in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            zero_(conv)  # type: ignore[arg-type]

    @classmethod
    def from_unet(cls, unet: SDUNet, config: ControlNetConfig | None = None) -> "ControlNet":
        """A ControlNet for training, on the U-Net's device and in its dtype: a copy of the encoder, which changes nothing yet.

        config: by default, an RGB image for the U-Net's latent. Channels of conv_in that the U-Net has not got start at
        zero. Raises UserError when config.encoder is not of the U-Net's family, or has layers that the U-Net has not got.
        """
        u, weight = unet.config, unet.conv_in.weight
        encoder = replace(u, channels_in=u.channels_out, pass_through=0, pass_residual=False)
        config = config or ControlNetConfig(encoder)
        check_family("config.encoder", config.encoder, u)
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            net = cls(config).to(weight.dtype)
        net = net.to_empty(device=weight.device)
        net._start(unet)
        return net

    @property
    def count(self) -> int:
        """How many residuals `forward` gives: one per skip, and the middle's."""
        return len(self.config.skip_channels) + 1

    def embed(self, image: Tensor) -> Tensor:
        """The hint that a control image gives, the same at every step: image (b 3 H W) in [0, 1] -> (b d h w).

        H and W are the picture's; the image is rounded to the ControlNet's precision. Without a stem the hint is what is
        given. Raises UserError on an image of other channels, or of sizes that `control.factor` does not divide.
        """
        stem, f = self.controlnet_cond_embedding, self.control.factor
        if stem is None:
            return image
        channels = self.control.hint_channels
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % f or image.shape[3] % f:
            expected = f"(b, {channels}, H, W), where {f} divides H and W"
            raise UserError(
                "the ControlNet cannot take this image", key="image", expected=expected, found=tuple(image.shape)
            )
        return stem(image.to(stem.conv_in.weight.dtype))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        hint: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Residuals of strength 1, one per skip, then the middle's: x (b c h w), t (b), hint (b d h w) -> `count` tensors.

        context, pooled and sizes are the U-Net's. Raises UserError naming the tensor that is missing, superfluous or of
        another shape; a hint of another size is told in pixels of its image.
        """
        self.check_hint("hint", hint, x)
        stemless = self.controlnet_cond_embedding is None
        x = torch.cat([x, hint], dim=1) if stemless else x
        context = self.check(x, t, context, pooled, sizes)
        emb = Encoder.embed(self, t, pooled, sizes)  # the time's: ours is the image's
        x = self.conv_in(x)
        skips = self.down(x if stemless else x + hint, emb, context)
        middle = self.controlnet_mid_block(self.middle(skips[-1], emb, context))
        return (*(conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips)), middle)

    def check_hint(self, key: str, hint: Tensor, x: Tensor) -> None:
        """UserError, which names the key, unless hint is what `embed` gives for a picture whose latent is x (b c h w)."""
        c, f = self.config, self.control.factor
        channels = c.channels_in - x.shape[1] if self.controlnet_cond_embedding is None else c.widths[0]
        check_shape(key, hint, (len(x), channels, None, None))
        if hint.shape[2:] != x.shape[2:]:
            wanted, given = (f"{f * s.shape[2]} x {f * s.shape[3]}" for s in (x, hint))
            what = "the control image must have the picture's size (height x width)"
            raise UserError(what, key=key, expected=wanted, found=given, fix="resize or crop the control image")

    @torch.no_grad()
    def _start(self, unet: SDUNet) -> None:
        """Give every weight the value it starts with; none has any yet."""
        own, theirs = self.state_dict(), unet.state_dict()
        for key in own:  # in the net's order, so that the first that is missing is named
            if key != "conv_in.weight" and not key.startswith("controlnet_"):
                check_shape(key, theirs.get(key), tuple(own[key].shape))
                own[key].copy_(theirs[key])
        shared = min(self.conv_in.in_channels, unet.conv_in.in_channels)
        self.conv_in.weight.zero_()[:, :shared] = unet.conv_in.weight[:, :shared]
        stem = self.controlnet_cond_embedding
        for conv in () if stem is None else (stem.conv_in, *stem.blocks):
            conv.reset_parameters()  # type: ignore[operator]
        last = () if stem is None else (stem.conv_out,)
        for conv in (*last, *self.controlnet_down_blocks, self.controlnet_mid_block):
            zero_(conv)  # type: ignore[arg-type]


def check_family(key: str, config: SDUNetConfig, unet: SDUNetConfig) -> None:
    """UserError, which names the key, unless an encoder of that config fits beside the U-Net's."""
    own, wanted = ({name: getattr(c, name) for name in FAMILY} for c in (config, unet))
    if own != wanted:
        raise UserError("this ControlNet is made for another family of U-Nets", key=key, expected=wanted, found=own)


def control_strengths(strength: float, rows: int, count: int, guess: bool = False) -> Tensor:
    """How strongly each residual acts on each row of a batch: -> (rows count) float32, for cond["strengths"].

    guess: from a tenth at the first skip to all in the middle, geometrically; the unconditional rows are then to be
    `zeros_like`, so that guidance works against the bare net (Zhang et al. 2023, section 3.4). count: `ControlNet.count`.
    """
    scale = torch.logspace(-1, 0, count) if guess else torch.ones(count)
    return (strength * scale).repeat(rows, 1)


class Controlled(nn.Module):
    """A net with ControlNets beside it, called as the net is, with two keys more: F of x (b c h w), t (b), cond.

    hints: one (b d h w) per ControlNet, see `ControlNet.embed`. strengths: one (b count) per ControlNet, see
    `control_strengths`; 0 is the bare net, exactly. The residuals of all are summed. `concat` and `features` are the
    net's alone, and so are the tokens of the context after the first `words`. A ControlNet that acts only at some noise
    levels is left out of the wrapper at the others, which is cheap: it holds no weights of its own. Raises UserError on
    a ControlNet of another family, and on hints and strengths of another number or shape.
    """

    def __init__(self, net: SDUNet, controlnets: Sequence[ControlNet], words: int | None = None) -> None:
        super().__init__()
        self.config, self.null_label, self.words = net.config, net.null_label, words
        for i, controlnet in enumerate(controlnets):
            check_family(f"controlnets[{i}]", controlnet.config, net.config)
        self.net, self.controlnets = net, nn.ModuleList(controlnets)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        hints: Sequence[Tensor] = (),
        strengths: Sequence[Tensor] = (),
        **cond: Any,
    ) -> Tensor:
        self._check(x, hints, strengths)
        residuals: list[Tensor] = []
        read = context if context is None else context[:, : self.words]
        for controlnet, hint, strength in zip(self.controlnets, hints, strengths):
            scaled = scale_residuals(controlnet(x, t, hint, read, pooled, sizes), strength)
            residuals = [a + b for a, b in zip(residuals, scaled)] if residuals else scaled
        return self.net(x, t, context=context, pooled=pooled, sizes=sizes, residuals=residuals, **cond)

    def _check(self, x: Tensor, hints: Sequence[Tensor], strengths: Sequence[Tensor]) -> None:
        n = len(self.controlnets)
        for key, given in (("hints", hints), ("strengths", strengths)):
            if len(given) != n:
                raise UserError(f"{n} ControlNets need as many {key}", key=key, expected=n, found=len(given))
        for i, (controlnet, hint, strength) in enumerate(zip(self.controlnets, hints, strengths)):
            controlnet.check_hint(f"hints[{i}]", hint, x)  # type: ignore[operator]
            shape = (len(x), controlnet.count)
            if strength.shape != shape:
                what = "every row needs a strength for every residual"
                raise UserError(what, key=f"strengths[{i}]", expected=shape, found=tuple(strength.shape))


def scale_residuals(residuals: Sequence[Tensor], strength: Tensor) -> list[Tensor]:
    """Each residual (b c h w) times its column of strength (b count), in the residual's dtype."""
    return [r * s.to(r.dtype)[:, None, None, None] for r, s in zip(residuals, strength.unbind(1))]
