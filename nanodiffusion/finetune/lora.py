"""LoRA trained on a checkpoint: low-rank factors beside frozen layers of the U-Net and the text encoders."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanodiffusion.config import Config
from nanodiffusion.errors import UserError
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.lora import PROJECTIONS, Applied, new_lora, save_lora
from nanodiffusion.lora.files import TARGETS
from nanodiffusion.pretrained.load import Bundle


class Factored(nn.Module):
    """The factors of a LoRA as a module, so that they are moved, averaged and saved; the layers use these very tensors."""

    def __init__(self, applied: Applied) -> None:
        super().__init__()
        self.applied = applied
        for target, layer, factors in applied.lora:
            name = f"{target}.{layer}".replace(".", "/")
            for part in ("down", "up"):
                self.register_parameter(f"{name}/{part}", getattr(factors, part))


@dataclass(frozen=True)
class LoRA(Finetune):
    """Factors of `rank` on every layer whose name ends in one of `match` (Hu et al. 2021). It makes `lora.safetensors`.

    targets: unet, text, text_2. alpha: the strength is alpha / rank; 0 = the rank. layout: of the file, see `save_lora`.
    """

    rank: int = 16
    alpha: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["unet"])
    match: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    layout: str = "diffusers"

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The frozen checkpoint with factors that change nothing yet."""
        nets: dict[str, Any] = dict(zip(TARGETS, (bundle.denoiser.net, *(part.net for part in bundle.text.parts))))
        odd = [name for name in self.targets if name not in nets]
        if odd or not self.targets:
            raise UserError("this checkpoint has no such part", key="task.targets", expected=", ".join(nets), found=odd)
        for part in bundle.text.parts:
            part.net.requires_grad_(False)
        draw = torch.Generator().manual_seed(config.seed)
        chosen = {name: nets[name] for name in self.targets}
        applied = new_lora(chosen, self.rank, self.alpha or None, tuple(self.match), draw)
        return Tuned(bundle, config, Factored(applied))

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `lora.safetensors`."""
        net: Any = model.net
        save_lora(net.applied.lora, folder / "lora.safetensors", self.layout)
