"""Training on published checkpoints: FINETUNES by `task.name`; the fields of a row are the options of the task."""

from nanodiffusion.finetune.base import Finetune, Prepared, Tuned
from nanodiffusion.finetune.control import Adapters, ControlNets
from nanodiffusion.finetune.distill import Distill
from nanodiffusion.finetune.inversion import TextualInversion
from nanodiffusion.finetune.lcm import LCM
from nanodiffusion.finetune.lora import LoRA
from nanodiffusion.finetune.unet import Inpaint, InpaintByTokens, TextToImage
from nanodiffusion.task import Task

__all__ = ["FINETUNES", "Finetune", "Prepared", "Tuned"]

FINETUNES: dict[str, type[Task]] = {
    "text_to_image": TextToImage,
    "inpaint": Inpaint,
    "inpaint_by_tokens": InpaintByTokens,
    "controlnet": ControlNets,
    "adapter": Adapters,
    "lora": LoRA,
    "lcm": LCM,
    "distill": Distill,
    "textual_inversion": TextualInversion,
}
