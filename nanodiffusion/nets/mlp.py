"""A multi-layer perceptron for points in a few dimensions: the net of the toy data sets."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from nanodiffusion.nets.layers import LabelEmbedding, check_count, check_positive, check_sample


@dataclass(frozen=True)
class MLPConfig:
    """A point's dimension, the hidden widths, and what is told beside the point: time, and perhaps a class."""

    dim: int = 2
    hidden: tuple[int, ...] = (16, 128, 256, 128, 16)
    num_classes: int = 0  # 0: unconditional
    label_dim: int = 4
    time_scale: float = 2.0  # on the log clock, t = ln(sigma)/4, the angle is ln(sigma)/2

    def __post_init__(self) -> None:
        check_positive(self, "dim", "hidden", "label_dim")
        check_count(self, "num_classes")


class MLP(nn.Module):
    """F of a point, its time and its class: x (b d), t (b), label (b) int64 -> (b d).

    The input is [x, sin(time_scale t), cos(time_scale t), label embedding]; Linear and GELU alternate. An
    unconditional net ignores labels. Raises UserError on inputs of another shape, and on a missing label.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        c = self.config = config
        self.sample_shape = (c.dim,)
        self.null_label = c.num_classes or None
        self.takes = ("label",) if c.num_classes else ()
        self.y_embedder = LabelEmbedding(c.num_classes, c.label_dim) if c.num_classes else None
        widths = (c.dim + 2 + (c.label_dim if c.num_classes else 0), *c.hidden)
        hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], c.dim))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_sample(x, t, self.sample_shape)
        angle = self.config.time_scale * t[:, None]
        features = [x, angle.sin().to(x.dtype), angle.cos().to(x.dtype)]
        if self.y_embedder is not None:
            features.append(self.y_embedder(label))
        return self.layers(torch.cat(features, dim=1))
