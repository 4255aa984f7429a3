"""T2I-Adapter (Mou et al. 2023): a control image as one feature map per level of the U-Net, the same at every step.

It produces conditioning rather than wrap a net: `cond["features"] = adapter(image)`, once per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nanodiffusion.errors import UserError, lookup
from nanodiffusion.nets.layers import check_positive

Stages = list[tuple[int, int, bool]]  # channels in, channels out, whether it halves the size


def _halving(c: int, widths: tuple[int, ...]) -> Stages:
    return [(a, b, i > 0) for i, (a, b) in enumerate(zip((c, *widths), widths))]


def _full(c: int, widths: tuple[int, ...]) -> Stages:
    return _halving(widths[0], widths)


def _full_xl(c: int, widths: tuple[int, ...]) -> Stages:
    # SDXL's levels: the first two maps are of one size (the factor is 16, not 8), the last two belong to the lowest level
    return [(a, b, i == 2) for i, (a, b) in enumerate(zip((widths[0], *widths), widths))]


def _light(c: int, widths: tuple[int, ...]) -> Stages:
    return _halving(c, (*widths, widths[-1]))


KINDS: dict[str, Callable[[int, tuple[int, ...]], Stages]] = {"full": _full, "full_xl": _full_xl, "light": _light}


@dataclass(frozen=True)
class AdapterConfig:
    """kind: "full" (SD 1.x), "full_xl" (SDXL), or "light", which gives one map more than it has widths."""

    kind: str = "full"
    channels_in: int = 3  # 1 for the Canny and sketch adapters of SD 1.x
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    downscale: int = 8  # pixels of the image per pixel of the first map, along each side

    def __post_init__(self) -> None:
        lookup(KINDS, self.kind, "kind")
        check_positive(self, "channels_in", "widths", "blocks", "downscale")
        if not self.widths:
            raise UserError("an adapter needs a level", key="widths", expected="e.g. (320, 640)", found=())
        if self.kind == "full_xl" and len(set(self.widths[2:])) > 1:
            raise UserError("from the third on, these are of one level", key="widths", found=self.widths)
        if self.kind == "light" and min(self.widths) < 4:
            raise UserError(
                "a light stage works at a quarter of its width", key="widths", expected=4, found=self.widths
            )

    @property
    def stages(self) -> Stages:
        """Channels in, channels out and whether the size is halved, of the stage that makes each map."""
        return KINDS[self.kind](self.channels_in * self.downscale**2, self.widths)


ADAPTER_SD15 = AdapterConfig()
ADAPTER_SD15_LIGHT = AdapterConfig("light", widths=(320, 640, 1280), blocks=4)
ADAPTER_SDXL = AdapterConfig("full_xl", downscale=16)


class Residual(nn.Module):
    """Two convolutions, the second 3x3 or 1x1, beside a shortcut: (b c h w) -> (b c h w)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(self.block1(x).relu())


class Stage(nn.Module):
    """What makes one feature map of the one before it: (b c h w) -> (b c' h w), or half the size, rounded up."""

    def __init__(self, channels_in: int, channels_out: int, down: bool, blocks: int, light: bool) -> None:
        super().__init__()
        inner = channels_out // 4 if light else channels_out
        self.downsample = nn.AvgPool2d(2, ceil_mode=True) if down else nn.Identity()
        same = channels_in == channels_out and not light
        self.in_conv = nn.Identity() if same else nn.Conv2d(channels_in, inner, 1)
        self.resnets = nn.Sequential(*[Residual(inner, 3 if light else 1) for _ in range(blocks)])
        self.out_conv = nn.Conv2d(inner, channels_out, 1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.resnets(self.in_conv(self.downsample(x))))


class Trunk(nn.Module):
    """The stages on the pixels of the image, `downscale`**2 of them stacked into channels: (b c H W) -> maps."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        light, pixels = config.kind == "light", config.channels_in * config.downscale**2
        self.unshuffle = nn.PixelUnshuffle(config.downscale)
        self.conv_in = nn.Identity() if light else nn.Conv2d(pixels, config.widths[0], 3, padding=1)
        self.body = nn.ModuleList([Stage(*stage, config.blocks, light) for stage in config.stages])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.conv_in(self.unshuffle(image)), []
        for stage in self.body:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


class Adapter(nn.Module):
    """Feature maps of a control image: image (b c H W) in [0, 1] -> one (b c' h w) per level of the U-Net.

    H and W are the picture's, multiples of `config.downscale`; the image is rounded to the adapter's own precision.
    Raises UserError on an image of other channels or size. State-dict keys are those of the published adapters.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = Trunk(config)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        check_image("adapter", image, self.config.channels_in, self.config.downscale)
        return self.adapter(image.to(next(self.parameters()).dtype))


def check_image(name: str, image: Tensor, channels: int, factor: int) -> None:
    """UserError, which names the extension, unless the image is (b channels H W) with `factor` dividing H and W."""
    if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % factor or image.shape[3] % factor:
        expected = f"(b, {channels}, H, W), where {factor} divides H and W"
        raise UserError(f"the {name} cannot take this image", key="image", expected=expected, found=tuple(image.shape))


def sum_features(features: Sequence[tuple[Tensor, ...]], strengths: Sequence[float]) -> tuple[Tensor, ...]:
    """What several adapters (or one) give together: their maps (b c h w), each times its adapter's strength, summed.

    Raises UserError unless there is one strength per adapter and their maps agree in number and shape.
    """
    if not features or len(features) != len(strengths):
        raise UserError("one strength per adapter", key="strengths", expected=len(features), found=len(strengths))
    shapes = [[tuple(f.shape) for f in maps] for maps in features]
    if any(s != shapes[0] for s in shapes):
        raise UserError("the adapters' maps differ in shape", key="features", expected=shapes[0], found=shapes[1:])
    scaled = ([f * strength for f in maps] for maps, strength in zip(features, strengths))
    total = next(scaled)
    for maps in scaled:
        total = [a + b for a, b in zip(total, maps)]
    return tuple(total)
