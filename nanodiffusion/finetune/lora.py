"""LoRA trained on a checkpoint: low-rank factors beside frozen layers of the U-Net and the text encoders."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanodiffusion.config import Config
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.finetune.base import Finetune, Tuned
from nanodiffusion.lora import PROJECTIONS, Applied, Lora, new_lora, read_lora, resolve, save_lora
from nanodiffusion.lora.files import LAYOUTS, TARGETS, Parts, lora_tensors
from nanodiffusion.lora.names import Targets, layers_of
from nanodiffusion.pretrained.load import Bundle
from nanodiffusion.text.prompts import TextEncoder, TextPart


class Factored(nn.Module):
    """The factors of a LoRA as a module, so that they are moved, averaged and saved; the layers use these very tensors."""

    def __init__(self, applied: Applied) -> None:
        super().__init__()
        self.applied = applied
        for target, layer, factors in applied.lora:
            name = f"{target}.{layer}".replace(".", "/")
            for part in ("down", "up"):
                self.register_parameter(f"{name}/{part}", getattr(factors, part))


def only_read(part: TextPart) -> TextPart:
    """An encoder, in place, without the layers behind the one that is read: they would never have a gradient."""
    if part.pooled:
        return part
    layers: Any = part.net.text_model.encoder.layers
    del layers[len(layers) + 1 + part.layer :]
    part.net.text_projection = None
    return replace(part, layer=-1)


def to_train(lora: Lora, nets: Targets) -> Lora:
    """A resolved LoRA's factors as float32 parameters, those of layers that the nets have."""
    parts: Parts = {}
    for target, name, factors in lora:
        if name in layers_of(nets[target]):
            pair = factors.without_mid().map(lambda t: nn.Parameter(t.float().clone()))
            parts.setdefault(target, {})[name] = pair
    return Lora(parts)


@dataclass(frozen=True)
class LoRA(Finetune):
    """Factors of `rank` on every layer whose name ends in one of `match` (Hu et al. 2021). It makes `lora.safetensors`.

    targets: unet, text, text_2. alpha: the strength is alpha / rank; 0 = the rank. layout: of the file, see `save_lora`.
    start: the file of an earlier LoRA, in any dialect, which then says targets, layers, ranks and alphas. Layers of a text
    encoder that nothing is read of are left out.
    """

    rank: int = 16
    alpha: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["unet"])
    match: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    layout: str = "diffusers"
    start: str = ""

    def __post_init__(self) -> None:
        lookup(LAYOUTS, self.layout, "task.layout")

    def tuned(self, bundle: Bundle, config: Config) -> Tuned:
        """The frozen checkpoint with factors that change nothing yet, or as those at `start` do."""
        nets: dict[str, Any] = dict(zip(TARGETS, (bundle.denoiser.net, *(part.net for part in bundle.text.parts))))
        started = resolve(read_lora(self.start), nets) if self.start else None
        text = TextEncoder([only_read(part) for part in bundle.text.parts], bundle.text.check_added)
        odd = [name for name in self.targets if name not in nets]
        if odd or not self.targets:
            raise UserError("this checkpoint has no such part", key="task.targets", expected=", ".join(nets), found=odd)
        for part in bundle.text.parts:
            part.net.requires_grad_(False)
        if started:
            applied = Applied(to_train(started, nets), nets, 1.0, {})
        else:
            draw = torch.Generator().manual_seed(config.seed)
            chosen = {name: nets[name] for name in self.targets}
            applied = new_lora(chosen, self.rank, self.alpha or None, tuple(self.match), draw)
        return Tuned(replace(bundle, text=text), config, Factored(applied))

    def check(self, model: Tuned, config: Config, shape: tuple[int, ...]) -> None:
        """As `Finetune.check`, and whether the layout has a place for every layer."""
        super().check(model, config, shape)
        net: Any = model.net
        lora_tensors(net.applied.lora, self.layout)

    def publish(self, model: Tuned, data: Any, seed: int, folder: Path) -> None:
        """Write `lora.safetensors`."""
        net: Any = model.net
        save_lora(net.applied.lora, folder / "lora.safetensors", self.layout)
