"""Checkpoints of Stable Diffusion distilled to few steps: a latent consistency model or its LoRA (Luo et al. 2023a, b)."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.config import Config
from nanodiffusion.denoiser import Cond, Denoiser
from nanodiffusion.ema import EMA
from nanodiffusion.errors import UserError
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.finetune.distill import Distilled, twin
from nanodiffusion.finetune.lora import Factored
from nanodiffusion.lora import PROJECTIONS, new_lora, save_lora
from nanodiffusion.noise import LADDERS
from nanodiffusion.objective import make_schedule
from nanodiffusion.pretrained.load import Bundle
from nanodiffusion.pretrained.publish import save_part


class Teacher(nn.Module):
    """A frozen denoiser with what it is told for no text, given what `Tuned.condition` made."""

    takes = ("context",)

    def __init__(self, denoiser: Denoiser, empty: dict[str, Tensor]) -> None:
        super().__init__()
        self.denoiser, self.empty = denoiser, empty

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.denoiser(x, sigma, cond)

    def unconditional(self, cond: Cond) -> dict[str, Any]:
        """The same with the features of no text."""
        return {name: self.empty[name].to(v).expand_as(v) if name in self.empty else v for name, v in cond.items()}


class FewSteps(Tuned):
    """A checkpoint and its student: trained as a `Distilled`, fed and pictured as a `Tuned`."""

    def __init__(self, bundle: Bundle, config: Config, student: Denoiser, net: nn.Module, **options: Any) -> None:
        super().__init__(bundle, config, net, student.net)
        teacher = Denoiser(bundle.denoiser.net, config.prediction, config.clock, make_schedule(config), self.precision)
        with torch.no_grad():
            empty = self.read(self.tokens([""]))
        self.distilled = Distilled(Teacher(teacher, empty), self.denoiser, net, **options)

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
class LCM(Finetune):
    """A student that needs 1 to 8 steps and no guidance: sampler=lcm guidance=1. It makes `unet/`, or `lora.safetensors`.

    rank: of a LoRA on the layers whose names end in one of `match`; 0 = all of the U-Net. levels, skip, decay, huber: see
    `Distill`. w_min, w_max: guidance scales of the teacher, 1 = none.
    """

    rank: int = 64
    match: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    levels: int = 50
    skip: int = 1
    w_min: float = 7.5
    w_max: float = 7.5
    decay: float = 0.95
    huber: float = 1e-3

    def __post_init__(self) -> None:
        for key, fine, expected in (
            ("rank", self.rank >= 0, "0 or more"),
            ("levels", self.levels >= 1, "1 or more"),
            ("skip", 1 <= self.skip <= self.levels, f"1 to the {self.levels} levels"),
            ("w_min", 0 <= self.w_min <= self.w_max < float("inf"), f"0 to w_max, which is {self.w_max}"),
            ("decay", 0 <= self.decay < 1, "in [0, 1)"),
            ("huber", 0 <= self.huber < float("inf"), "a number from 0 up"),
        ):
            if not fine:
                what = "this cannot be distilled with"
                raise UserError(what, key=f"task.{key}", expected=expected, found=getattr(self, key))

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The frozen checkpoint as the teacher, and a student that starts as it is."""
        teacher = bundle.denoiser
        student = twin(teacher) if self.rank else copy.deepcopy(teacher).float()
        if self.rank:
            draw = torch.Generator().manual_seed(config.seed)
            net: nn.Module = Factored(
                new_lora({"unet": student.net}, self.rank, match=tuple(self.match), generator=draw)
            )
        else:
            net = student.net
        return FewSteps(
            bundle,
            config,
            student,
            net,
            levels=LADDERS["trailing"](make_schedule(config), self.levels),
            skip=self.skip,
            guidance=(float(self.w_min), float(self.w_max)),
            decay=self.decay,
            huber=self.huber,
        )

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `lora.safetensors`, or `unet/`."""
        net: Any = model.net
        if self.rank:
            save_lora(net.applied.lora, folder / "lora.safetensors")
        else:
            save_part(net, folder / "unet", over=True, size=model.natural)
