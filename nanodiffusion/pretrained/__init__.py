"""Published checkpoints of Stable Diffusion 1.x, 2.x and SDXL: from the hub, a folder or a single file, and back.

load: the families, and everything of one as a Bundle. weights: files into a network. architecture, scheduler_config: what
config files say. layouts: names in the original layout. recognise: what a file is. hub: the cache. publish: writing, of one
network too. replace: another network in a bundle.
"""

from nanodiffusion.pretrained.load import (
    FAMILIES,
    Bundle,
    Family,
    Part,
    load_adapter,
    load_codec,
    load_controlnet,
    load_pretrained,
    load_text,
    load_tiny,
    load_tokens,
    load_unet,
)
from nanodiffusion.pretrained.publish import save_diffusers, save_part, save_single
from nanodiffusion.pretrained.replace import replace_part, scheduler_beside

__all__ = [
    "FAMILIES",
    "Bundle",
    "Family",
    "Part",
    "load_adapter",
    "load_codec",
    "load_controlnet",
    "load_pretrained",
    "load_text",
    "load_tiny",
    "load_tokens",
    "load_unet",
    "replace_part",
    "save_diffusers",
    "save_part",
    "save_single",
    "scheduler_beside",
]
