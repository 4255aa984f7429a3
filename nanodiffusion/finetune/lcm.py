"""Checkpoints of Stable Diffusion distilled to few steps: a latent consistency model or its LoRA (Luo et al. 2023a, b)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nanodiffusion.config import Config
from nanodiffusion.denoiser import Cond, Denoiser
from nanodiffusion.ema import EMA
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.finetune.distill import Distilled, Walk, twin
from nanodiffusion.finetune.unet import save_unet
from nanodiffusion.lora import PROJECTIONS, save_lora
from nanodiffusion.objective import make_schedule
from nanodiffusion.pretrained.load import Bundle


class Teacher(nn.Module):
    """A frozen denoiser, given what `Tuned.condition` made; nothing: `Tuned.nothing`, what it is told of no text."""

    takes = ("context",)

    def __init__(self, denoiser: Denoiser, nothing: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.denoiser, self.nothing = denoiser, nothing

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.denoiser(x, sigma, cond)

    def unconditional(self, cond: Cond) -> dict[str, Any]:
        """The same with the features of no text."""
        nothing = self.nothing()
        return {name: nothing[name].to(v).expand_as(v) if name in nothing else v for name, v in cond.items()}


class FewSteps(Tuned):
    """A checkpoint and its student: trained as a `Distilled`, fed and pictured as a `Tuned`."""

    def __init__(self, bundle: Bundle, config: Config, student: Denoiser, net: nn.Module, **options: Any) -> None:
        super().__init__(bundle, config, net, student.net)
        teacher = Denoiser(bundle.denoiser.net, config.prediction, config.clock, make_schedule(config), self.precision)
        self.known_nothing = self.nothing()  # which every step asks for
        self.distilled = Distilled(Teacher(teacher, self.nothing), self.denoiser, net, **options)

    def averages(self) -> list[EMA]:
        """The average that says the target; see `Distilled.averages`."""
        return self.distilled.averages()

    def loss(self, x0: Tensor, sigma: Tensor, eps: Tensor, cond: Cond, *options: Any) -> Tensor:
        """`Distilled.loss` of latents x0 (b c h w) -> (b)."""
        return self.distilled.loss(x0, sigma, eps, self.conditioned(cond), *options)

    def train(self, mode: bool = True) -> "FewSteps":
        """In eval mode, whatever is asked for."""
        return super().train(False)


@dataclass(frozen=True)
class LCM(Walk, Finetune):
    """A student that needs 1 to 8 steps and no guidance: sampler=lcm guidance=1. It makes `unet/`, or `lora.safetensors`."""

    rank: int = 64
    match: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    w_min: float = 7.5
    w_max: float = 7.5

    @property
    def from_base(self) -> bool:
        """Unless factors are trained."""
        return not self.rank

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The frozen checkpoint as the teacher, and a student that starts as it is."""
        teacher = bundle.denoiser
        student = twin(teacher) if self.rank else copy.deepcopy(teacher).float()
        net = self.factors(student.net, config.seed) if self.rank else student.net
        return FewSteps(bundle, config, student, net, **self.walk(config))

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `lora.safetensors`, or `unet/`."""
        net: Any = model.net
        if self.rank:
            save_lora(net.applied.lora, folder / "lora.safetensors")
        else:
            save_unet(model, net, folder)
