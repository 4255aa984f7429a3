"""LoRA (Hu et al. 2021): read in every dialect of the community, applied to a net from outside, written, and made anew."""

from nanodiffusion.lora.apply import PROJECTIONS, Applied, add_lora, block_of, lbw, new_lora
from nanodiffusion.lora.files import Factors, Lora, lora_tensors, read_lora, save_lora
from nanodiffusion.lora.names import resolve

__all__ = [
    "PROJECTIONS",
    "Applied",
    "Factors",
    "Lora",
    "add_lora",
    "block_of",
    "lbw",
    "lora_tensors",
    "new_lora",
    "read_lora",
    "resolve",
    "save_lora",
]
