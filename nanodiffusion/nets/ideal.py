"""The ideal denoiser: E[x0 | x] in closed form when the data distribution is a finite set of points."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.nets.layers import check_sample

CHUNK_NUMBERS = 2**22  # numbers of the data set held in float64 at a time: 32 MiB


class IdealDenoiser(nn.Module):
    """The exact posterior mean over a data set, a D and not a net: x (b ...), sigma (b) -> E[x0 | x] (b ...).

        E[x0 | x] = sum_i w_i d_i,   w = softmax_i(-|x - d_i|^2 / 2 sigma^2)     Karras et al. 2022, appendix B.3

    data (n ...); labels (n) int64 or None; chunk points at a time, by default as many as fit in 32 MiB. With
    cond["label"] (b) the sum runs over the points of that class, and over all for the null class, max(labels) + 1.
    sigma = 0 gives the nearest point (the mean of the nearest, in a tie). A class without points gives NaN. It is
    computed in float64, which the device has to know (MPS does not), and returned in x's dtype. Raises UserError
    on an empty data set, on samples of another shape, and on a label when none are known.
    """

    def __init__(self, data: Tensor, labels: Tensor | None = None, chunk: int | None = None) -> None:
        super().__init__()
        if data.numel() == 0 or (labels is not None and labels.shape != data.shape[:1]):
            found = (tuple(data.shape), None if labels is None else tuple(labels.shape))
            raise UserError("an ideal denoiser needs points", expected="data (n, ...), labels (n,)", found=found)
        self.sample_shape = tuple(data.shape[1:])
        self.null_label = None if labels is None else int(labels.max()) + 1
        self.chunk = chunk or max(1, CHUNK_NUMBERS // data[0].numel())
        self.data: Tensor
        self.labels: Tensor | None
        self.register_buffer("data", data)
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        check_sample(x, sigma, self.sample_shape)
        flat = x.flatten(1).double()
        lowest, tiny = torch.finfo(flat.dtype).min, torch.finfo(flat.dtype).tiny
        variance = sigma.to(x.device, torch.float64).square().clamp(min=tiny)[:, None]
        best = flat.new_full((len(x), 1), lowest)
        total, mean = torch.zeros_like(best), torch.zeros_like(flat)
        for points, wanted in self._chunks((cond or {}).get("label")):
            # -|x - d|^2 / 2 = x.d - |d|^2 / 2 - |x|^2 / 2, whose last term is the same for all d. In float64 the
            # difference is safe: an error of 1e-13 in x.d is one of 1e-7 in the exponent at sigma = 0.001.
            score = flat @ points.T - points.square().sum(1) / 2  # (b k)
            if wanted is not None:
                score = score.masked_fill(~wanted, -torch.inf)
            # Online softmax (Milakov & Gimelshein 2018): what was summed so far is rescaled to the new maximum.
            # The maximum cancels in mean / total, so no gradient has to go through it.
            top = torch.maximum(best, score.detach().amax(1, keepdim=True))
            weight, keep = ((score - top) / variance).exp(), ((best - top) / variance).exp()
            total, mean, best = total * keep + weight.sum(1, keepdim=True), mean * keep + weight @ points, top
        return (mean / total).reshape(x.shape).to(x.dtype)

    def _chunks(self, label: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The points, in float64, (k d); with labels, which sample wants which of them, (b k) bool."""
        if label is not None and self.labels is None:
            raise UserError("this ideal denoiser knows no labels", key="label", fix="IdealDenoiser(data, labels)")
        for start in range(0, len(self.data), self.chunk):
            here = slice(start, start + self.chunk)
            wanted = None
            if label is not None and self.labels is not None:
                wanted = (label[:, None] == self.labels[here]) | (label[:, None] == self.null_label)
            yield self.data[here].flatten(1).double(), wanted
