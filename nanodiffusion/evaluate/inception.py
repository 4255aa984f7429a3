"""Inception-v3 as the Fréchet Inception distance uses it: the graph inception-2015-12-05 of Szegedy et al. (2016).

It differs from the network of that paper in common libraries: average pooling leaves out the padding, the last block pools
by the maximum, and there are 1008 classes. Names are those of the published PyTorch port (pt_inception-2015-12-05).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, FEATURES, CLASSES = 299, 2048, 1008
WIDTHS = (128, 160, 160, 192)  # inside the four blocks at 17 x 17
Pair = tuple[int, int]


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU: (b c h w) -> (b d h' w')."""

    def __init__(self, channels: int, out: int, kernel: int | Pair, stride: int = 1, padding: int | Pair = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """The mean of the 3 x 3 neighbours that exist, as TensorFlow pools."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def strongest(x: Tensor) -> Tensor:
    """The maximum of the 3 x 3 neighbours."""
    return F.max_pool2d(x, 3, 1, 1)


def halved(x: Tensor) -> Tensor:
    """The maximum of 3 x 3 neighbours at every second place."""
    return F.max_pool2d(x, 3, 2)


class Mixed5(nn.Module):
    """35 x 35: kernels of 1, 5, and 3 twice (b c h w) -> (b 224+pool h w)."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1
        )


class Shrink6(nn.Module):
    """35 x 35 to 17 x 17: (b c h w) -> (b 480+c h' w')."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halved(x)], 1)


class Mixed6(nn.Module):
    """17 x 17: kernels of 1, and of 7 as 1 x 7 and 7 x 1, `width` channels inside: (b c h w) -> (b 768 h w)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        row = lambda channels, out: Conv(channels, out, (1, 7), padding=(0, 3))
        column = lambda channels, out: Conv(channels, out, (7, 1), padding=(3, 0))
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, width, 1)
        self.branch7x7_2, self.branch7x7_3 = row(width, width), column(width, 192)
        self.branch7x7dbl_1 = Conv(channels, width, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = column(width, width), row(width, width)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = column(width, width), row(width, 192)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class Shrink7(nn.Module):
    """17 x 17 to 8 x 8: (b c h w) -> (b 512+c h' w')."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(channels, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, halved(x)], 1)


class Mixed7(nn.Module):
    """8 x 8: kernels of 1, and of 3 that end in 1 x 3 beside 3 x 1: (b c h w) -> (b 2048 h w).

    The last of them pools by the maximum, whatever the paper says.
    """

    def __init__(self, channels: int, last: bool = False) -> None:
        super().__init__()
        self.pool = strongest if last else average
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(once), self.branch3x3_2b(once)]
        forks += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Images (b 3 h w), 299 x 299 in [-1, 1], -> scores of 1008 classes (b 1008); `features` stops at the mean (b 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a = Shrink6(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (Mixed6(768, width) for width in WIDTHS)
        self.Mixed_7a = Shrink7(768)
        self.Mixed_7b, self.Mixed_7c = Mixed7(1280), Mixed7(FEATURES, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """The mean over places of the last block: (b 3 h w) -> (b 2048)."""
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))
