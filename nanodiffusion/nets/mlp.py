"""A multi-layer perceptron for points in a few dimensions: the net of the toy data sets."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.nets.layers import LabelEmbedding, check_positive, check_sample


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


class _Chain(torch.autograd.Function):
    """Linear, GELU, ..., Linear as one node of the graph, its backward pass written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_biases: Tensor) -> Tensor:
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        inputs, sums = [x], []
        for weight, bias in zip(weights, biases):
            sums.append(torch.addmm(bias, inputs[-1], weight.t()))
            inputs.append(F.gelu(sums[-1]) if len(sums) < len(weights) else sums[-1])
        ctx.save_for_backward(*inputs[:-1], *sums[:-1], *weights)
        return inputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n = (len(ctx.saved_tensors) + 1) // 3
        inputs, sums, weights = (ctx.saved_tensors[i:j] for i, j in ((0, n), (n, 2 * n - 1), (2 * n - 1, 3 * n - 1)))
        out: list[Tensor | None] = []
        for i in reversed(range(n)):
            out += [grad.sum(0), grad.t() @ inputs[i]]
            if i or ctx.needs_input_grad[0]:
                grad = grad @ weights[i]
            if i:
                grad = torch.ops.aten.gelu_backward(grad, sums[i - 1])
        return grad if ctx.needs_input_grad[0] else None, *reversed(out)


class Chain(nn.Sequential):
    """Linear and GELU in turn, computed as one node: in a small net the bookkeeping between kernels is half the time."""

    def __init__(self, *widths: int) -> None:
        hidden = [layer for a, b in pairwise(widths[:-1]) for layer in (nn.Linear(a, b), nn.GELU())]
        super().__init__(*hidden, nn.Linear(widths[-2], widths[-1]))

    def forward(self, x: Tensor) -> Tensor:  # (n widths[0]) -> (n widths[-1])
        if x.is_meta or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        linears = [*self._modules.values()][::2]
        return _Chain.apply(x, *(p for linear in linears for p in linear._parameters.values()))  # type: ignore


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
        self.y_embedder = LabelEmbedding(c.num_classes, c.label_dim) if c.num_classes else None
        widths = (c.dim + 2 + (c.label_dim if c.num_classes else 0), *c.hidden)
        self.layers = Chain(*widths, c.dim)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_sample(x, t, self.sample_shape)
        angle = self.config.time_scale * t[:, None]
        features = [x, angle.sin().to(x.dtype), angle.cos().to(x.dtype)]
        if self.y_embedder is not None:
            features.append(self.y_embedder(label))
        return self.layers(torch.cat(features, dim=1))
