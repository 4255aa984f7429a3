"""A model measured on held-out samples at fixed noise, by all processes together."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nanodiffusion.denoiser import Cond
from nanodiffusion.noise import Density
from nanodiffusion.train import VALIDATION_SEED, Trainer

LEVELS = 8


class HeldOut(ABC):
    """Held-out samples, at most so many, each with noise (*shape) of its own, and what `measure` says of a model on them.

    Every process measures its part of the samples, and all ask their nets equally often, as sharded ones must be. The
    samples are made anew each time: conditions may be large pictures.
    """

    def __init__(self, trainer: Trainer, data: Any, most: int, shape: Sequence[int]) -> None:
        device = trainer.world.device
        self.generator = g = torch.Generator(device).manual_seed(VALIDATION_SEED)
        self.trainer, self.data = trainer, data.to(device)
        self.n = n = min(len(data), most)
        self.index = torch.randperm(len(data), generator=g, device=device)[:n]
        self.eps = torch.randn(n, *shape, generator=g, device=device)
        # to know a part of a sample is a part of the task; other augmentation is not
        self.u = torch.rand(n, data.draws, generator=g, device=device) if "concat" in trainer.takes else None

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Cond, Tensor]]:
        """This process's samples: x0, eps (b ...), what the net takes, and whether each counts (b)."""
        world, size = self.trainer.world, self.trainer.micro_batch
        for mine, counts in zip(*(part.to(world.device).split(size) for part in world.part(self.n))):
            x0, cond = self.data.batch(self.index[mine], None if self.u is None else self.u[mine])
            yield x0, self.eps[mine], self.trainer.conditions(cond), counts

    def mean(self, totals: Tensor) -> list[float]:
        """Sums over the samples of each process -> means over all samples."""
        return (self.trainer.world.sum(totals) / self.n).tolist()

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Figures of the weights that the model has now, in eval mode and without gradients; one of them is the loss."""

    @torch.no_grad()
    def row(self) -> dict[str, Any]:
        """val/NAME: each figure of the raw weights; val/ema_NAME: of the first average."""
        model, emas = self.trainer.denoiser.eval(), self.trainer.emas
        row = {f"val/{name}": value for name, value in self.measure().items()}
        if emas:
            with emas[0].swap(model.net):
                row |= {f"val/ema_{name}": value for name, value in self.measure().items()}
        return row


class Validator(HeldOut):
    """The loss of a denoiser at fixed levels: the middles of equally likely parts of the density."""

    def __init__(self, trainer: Trainer, data: Any, density: Density, most: int) -> None:
        super().__init__(trainer, data, most, data.shape)
        q = (torch.arange(LEVELS, device=self.eps.device) + 0.5) / LEVELS
        self.levels = torch.quantile(density(2**14, self.generator), q)

    def measure(self) -> dict[str, Any]:
        """The mean loss, and that of each level (LEVELS)."""
        totals = torch.zeros_like(self.levels)
        for x0, eps, cond, counts in self.batches():
            for i, sigma in enumerate(self.levels):
                totals[i] += (self.trainer.plain_objective(x0, sigma.expand(len(x0)), eps, cond) * counts).sum()
        each = self.mean(totals)
        return {"loss": sum(each) / len(each), "loss_per_sigma": each}

    def row(self) -> dict[str, Any]:
        """As of any held-out samples, and val/sigma: the levels."""
        return {"val/sigma": self.levels.tolist(), **super().row()}
