"""The U-Net of Stable Diffusion 1.x, 2.x (Rombach et al. 2022) and SDXL (Podell et al. 2023): one class, three presets.

State-dict keys are those of the published weights in diffusers' layout. `Encoder`, its first half, is ControlNet's too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import check_multiple, check_positive, timestep_embedding
from nanodiffusion.nets.sd_layers import (
    Downsample,
    ResnetBlock,
    Run,
    TimeMLP,
    Transformer2D,
    Upsample,
    add,
    call,
    check_shape,
    conv3,
    recompute,
)

SIZES = (
    6  # SDXL is told the height and width an image had, the top and left of its crop, and the height and width wanted
)


@dataclass(frozen=True)
class SDUNetConfig:
    """The sizes of a Stable Diffusion U-Net, one entry of each tuple per level; the default is SD 1.x's."""

    channels_in: int = 4  # 9 for an inpainting net: latent, mask, latent of the masked image
    channels_out: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each resnet; 0: no attention at that level
    depth_mid: int = 1  # 0: one resnet and no attention in the middle
    blocks: int = 2  # resnets per level on the way down; one more on the way up
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False  # linear layers, not 1x1 convolutions, about the transformer blocks
    added_dim: int = 0  # features of pooled and the sinusoids of sizes together; 0: neither is taken
    size_features: int = 256  # sinusoids for each of the 6 sizes
    groups: int = 32
    pass_through: int = 0  # channels of concat that a last layer reads beside the output, instead of conv_in
    pass_residual: bool = False  # that layer's output is added to the U-Net's, and starts as nothing

    def __post_init__(self) -> None:
        check_positive(self, "channels_in", "channels_out", "widths", "blocks", "heads", "context_dim", "groups")
        levels = len(self.widths)
        for name in ("depths", "heads"):
            if len(getattr(self, name)) != levels or not levels:
                expected = f"{levels or 'one or more'}, one per level"
                raise UserError("every level needs an entry", key=name, expected=expected, found=getattr(self, name))
        for width, heads in zip(self.widths, self.heads):
            check_multiple("widths", width, self.groups, "the groups of a norm share the channels")
            check_multiple("widths", width, heads, "the heads share the channels")
        if self.added_dim and self.pooled_dim < 1:
            expected = f"more than {SIZES * self.size_features}, the sinusoids of the sizes"
            raise UserError("no features are left for pooled", key="added_dim", expected=expected, found=self.added_dim)

    @property
    def factor(self) -> int:
        """How many times smaller the lowest level is."""
        return 2 ** (len(self.widths) - 1)

    @property
    def emb_dim(self) -> int:
        """Features of the embedding that every resnet reads."""
        return 4 * self.widths[0]

    @property
    def pooled_dim(self) -> int:
        """Features of cond["pooled"], where there is one."""
        return self.added_dim - SIZES * self.size_features if self.added_dim else 0

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of each output of the way down: conv_in, then of every level its resnets and its halving."""
        last = len(self.widths) - 1
        levels = ([w] * (self.blocks + (level < last)) for level, w in enumerate(self.widths))
        return (self.widths[0], *(w for level in levels for w in level))


SD15 = SDUNetConfig()
SD21 = SDUNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
SDXL = SDUNetConfig(
    widths=(320, 640, 1280),
    depths=(0, 2, 10),
    depth_mid=10,
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    added_dim=2816,
)


class Level(nn.Module):
    """Resnets and, unless depth is 0, a transformer for each of them but the first `bare` ones."""

    def __init__(
        self, c: SDUNetConfig, level: int, channels: Sequence[tuple[int, int]], depth: int, bare: int = 0
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, c.emb_dim, c.groups) for a, b in channels)
        self.attentions = nn.ModuleList(
            Transformer2D(b, c.heads[level], depth, c.context_dim, c.groups, c.linear_projection)
            for _, b in (channels[bare:] if depth else ())
        )

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor, run: Run) -> Tensor:
        """The i-th resnet and, if there is one, the transformer after it."""
        x = run(self.resnets[i], x, emb)
        return self.attentions[i](x, context, run) if self.attentions else x


class DownBlock(Level):
    """A level on the way down: x (b c h w), emb (b d), context (b m e), feature as x or None -> every output, in turn.

    A T2I-Adapter's feature is added at the end of the level: before the halving where there is attention, after it
    where there is none (Mou et al. 2023, as diffusers has it). The output it is added to is a skip with it.
    """

    def __init__(self, c: SDUNetConfig, level: int) -> None:
        width = c.widths[level]
        inputs = [c.widths[max(level - 1, 0)], *[width] * (c.blocks - 1)]
        super().__init__(c, level, [(a, width) for a in inputs], c.depths[level])
        halves = level < len(c.widths) - 1
        self.downsamplers = nn.ModuleList([Downsample(width)] if halves else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, feature: Tensor | None, run: Run) -> list[Tensor]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, context, run)
            skips.append(x)
        if self.attentions:
            x = skips[-1] = add(x, feature)
        for halve in self.downsamplers:
            x = halve(x)
            skips.append(x)
        if not self.attentions:
            skips[-1] = add(x, feature)
        return skips


class MidBlock(Level):
    """Resnet, transformer, resnet; or one resnet alone: x (b c h w), emb (b d), context (b m e) -> (b c h w)."""

    def __init__(self, c: SDUNetConfig) -> None:
        width = c.widths[-1]
        super().__init__(c, -1, [(width, width)] * (2 if c.depth_mid else 1), c.depth_mid, bare=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, run: Run) -> Tensor:
        x = run(self.resnets[0], x, emb)
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:]):
            x = run(resnet, attention(x, context, run), emb)
        return x


class UpBlock(Level):
    """A level on the way up, which takes its skips from the end of the list: x (b c h w) -> (b c' h' w').

    It ends at the size of the skip that the next level reads first, so that any height and width will do.
    """

    def __init__(self, c: SDUNetConfig, level: int, skips: list[int]) -> None:
        width = c.widths[level]
        below = [c.widths[min(level + 1, len(c.widths) - 1)], *[width] * c.blocks]
        super().__init__(c, level, [(b + skips.pop(), width) for b in below], c.depths[level])
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], run: Run) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, context, run)
        for enlarge in self.upsamplers:
            x = enlarge(x, skips[-1].shape[2:])
        return x


class Encoder(nn.Module):
    """The way down and the middle of the U-Net, with its embeddings: what SDUNet and ControlNet have in common.

    `checkpointing` trades time for memory in training: a third more time, activations of resnets and transformer blocks
    are not kept.
    """

    def __init__(self, config: SDUNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.checkpointing, self.null_label = False, None
        self.conv_in = conv3(c.channels_in, c.widths[0])
        self.time_embedding = TimeMLP(c.widths[0], c.emb_dim)
        self.add_embedding = TimeMLP(c.added_dim, c.emb_dim) if c.added_dim else None
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in range(len(c.widths)))
        self.mid_block = MidBlock(c)

    @property
    def run(self) -> Run:
        """How a resnet or transformer block is called: with its activations kept, or computed again."""
        return recompute if self.checkpointing and torch.is_grad_enabled() else call

    def embed(self, t: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """What every resnet is told, past its SiLU: t (b), pooled (b p), sizes (b 6) in pixels -> (b d).

        sizes: height and width before any cropping, top and left of the crop, height and width wanted (Podell et al.
        2023, section 2.2). Give them as integers: a Denoiser rounds what floats to its net's half precision, and 1,023 to
        1,024. The sinusoids are computed in float32 or better, whatever the weights are.
        """
        emb = self.time_embedding(timestep_embedding(t, self.config.widths[0]))
        if self.add_embedding is not None and pooled is not None and sizes is not None:
            waves = timestep_embedding(sizes.flatten(), self.config.size_features).view(len(sizes), -1)
            emb = emb + self.add_embedding(torch.cat([pooled, waves], dim=1))
        return F.silu(emb)

    def down(self, x: Tensor, emb: Tensor, context: Tensor, features: Sequence[Tensor] = ()) -> list[Tensor]:
        """Every output of the way down, the last being the middle's input: x (b c h w), the output of conv_in, is the first.

        features: what a T2I-Adapter adds to each level, from the first.
        """
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            feature = features[level] if level < len(features) else None
            skips += block(skips[-1], emb, context, feature, self.run)
        return skips

    def middle(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """The middle block: x (b c h w) -> (b c h w)."""
        return self.mid_block(x, emb, context, self.run)

    def check(
        self, x: Tensor, t: Tensor, context: Tensor | None, pooled: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        """The context, if all inputs have the shapes the net was built for (x: conv_in's); reads shapes only, so no sync.

        Raises UserError naming the tensor that is missing, not wanted or of another shape.
        """
        c, b = self.config, len(x)
        check_shape("x", x, (b, c.channels_in, None, None))
        check_shape("t", t, (b,))
        check_shape("pooled", pooled, (b, c.pooled_dim) if c.added_dim else None)
        check_shape("sizes", sizes, (b, SIZES) if c.added_dim else None)
        check_shape("context", context, (b, None, c.context_dim))
        assert context is not None
        return context


class SDUNet(Encoder):
    """F of a latent, its time and what it shall show: x (b c h w), t (b) in [0, 999], context (b m d) -> (b c h w).

    pooled (b p), sizes (b 6): SDXL's, see `embed`. concat (b c' h w): appended to x where it is (inpainting), or read by
    the last layer (config.pass_through). features: a T2I-Adapter's, one per level (b c h w), and perhaps one for the
    middle. residuals: a ControlNet's, one per output of the way down, then the middle's. Any height and width will do.
    Raises UserError naming the tensor that is missing, superfluous or of another shape.
    """

    def __init__(self, config: SDUNetConfig) -> None:
        super().__init__(config)
        c, skips = config, list(config.skip_channels)
        self.up_blocks = nn.ModuleList(UpBlock(c, level, skips) for level in reversed(range(len(c.widths))))
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[0], eps=1e-5)
        self.conv_out = conv3(c.widths[0], c.channels_out)
        if c.pass_through:
            self.conv_norm_out_1 = nn.GroupNorm(1, c.channels_out + c.pass_through, eps=1e-5)
            self.conv_out_1 = conv3(c.channels_out + c.pass_through, c.channels_out)
        if c.pass_through and c.pass_residual:
            nn.init.zeros_(self.conv_norm_out_1.weight)
            nn.init.zeros_(self.conv_out_1.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        concat: Tensor | None = None,
        features: Sequence[Tensor] = (),
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        x = self._join(x, concat)
        context = self.check(x, t, context, pooled, sizes)
        emb = self.embed(t, pooled, sizes)
        skips = self.down(self.conv_in(x), emb, context, features)
        x = self.middle(skips[-1], emb, context)
        x = self._add_rest(x, features)
        if residuals:
            x, skips = add_residuals(x, skips, residuals)
        for block in self.up_blocks:
            x = block(x, emb, context, skips, self.run)
        return self._finish(self.conv_out(F.silu(self.conv_norm_out(x))), concat)

    def _join(self, x: Tensor, concat: Tensor | None) -> Tensor:
        """What conv_in reads: x, or x and concat."""
        c = self.config
        check_shape("x", x, (None,) * 4)
        b, channels, h, w = x.shape
        read_last = (b, c.pass_through, h, w) if c.pass_through else None
        appended = (b, c.channels_in - channels, h, w) if channels == c.channels_out < c.channels_in else None
        check_shape("concat", concat, read_last or appended)
        return x if concat is None or c.pass_through else torch.cat([x, concat], dim=1)

    def _add_rest(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The middle's output and the feature that no level has taken."""
        rest = features[len(self.down_blocks) :]
        if len(rest) > 1:
            expected = f"at most {len(self.down_blocks) + 1}: one per level, one for the middle"
            raise UserError("too many features", key="features", expected=expected, found=len(features))
        return add(x, rest[0]) if rest else x

    def _finish(self, out: Tensor, concat: Tensor | None) -> Tensor:
        """The output itself, or what a last layer makes of it and concat."""
        c = self.config
        if not c.pass_through or concat is None:
            return out
        last = self.conv_out_1(F.silu(self.conv_norm_out_1(torch.cat([out, concat], dim=1))))
        return out + last if c.pass_residual else last


def feature_shapes(config: SDUNetConfig, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """Shapes (c h w) of the maps that the U-Net takes from a T2I-Adapter for a latent: one per level, one for the middle."""
    shapes, last = [], len(config.widths) - 1
    h, w = height, width
    for level, (channels, depth) in enumerate(zip(config.widths, config.depths)):
        below = ((h + 1) // 2, (w + 1) // 2) if level < last else (h, w)
        shapes.append((channels, *((h, w) if depth else below)))  # before the halving where there is attention
        h, w = below
    return (*shapes, (config.widths[-1], h, w))


def add_residuals(x: Tensor, skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The middle's output x and the skips, each with its ControlNet residual, of which the middle's is the last."""
    if len(residuals) != len(skips) + 1:
        expected = f"{len(skips) + 1}: one per output of the way down, one for the middle"
        raise UserError("another number of residuals", key="residuals", expected=expected, found=len(residuals))
    *per_skip, middle = residuals
    return add(x, middle, "residuals"), [add(s, r, "residuals") for s, r in zip(skips, per_skip)]
