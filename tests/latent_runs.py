"""Runs on latents that were never trained: a small transformer with random weights that takes the conditions it is told to."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanodiffusion.checkpoint import save_checkpoint
from nanodiffusion.codec import AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.config import read_config
from nanodiffusion.draw import draw
from nanodiffusion.objective import make_denoiser
from nanodiffusion.tensors import save_tensors

SMALL = {"name": "dit", "patch": 2, "dim": 8, "depth": 1, "heads": 2, "time_features": 8}


def write_codec(folder: Path) -> Path:
    """A VAE of factor 2 with 4 latent channels and random weights, as a folder in diffusers' layout."""
    torch.manual_seed(5)
    net = AutoencoderKL(AutoencoderKLConfig(widths=(8, 8), blocks=1, groups=4))
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215, "in_channels": 3, "out_channels": 3}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", net.state_dict(), {})
    (folder / "config.json").write_text(json.dumps({**config, **sizes, **kinds}))
    return folder


def write_run(folder: Path, classes: Sequence[str] = (), shape: tuple[int, ...] = (4, 4, 4), **changes: Any) -> Path:
    """A run that draws samples of `shape`; changes: of its config, and what its net takes (pooled_dim, concat_channels)."""
    takes = {k: changes.pop(k) for k in ("pooled_dim", "concat_channels") if k in changes}
    net = {**SMALL, "channels_in": shape[0], "in_size": list(shape[1:]), "num_classes": len(classes), **takes}
    sample = {
        "sampler": {"name": "euler"},
        "ladder": {"name": "karras"},
        "steps": 3,
        "n": 4,
        **changes.pop("sample", {}),
    }
    config = read_config({"name": folder.name, "device": "cpu", "net": net, "sample": sample, **changes})
    meta = {"config": asdict(config), "shape": list(shape), "classes": list(classes)}
    g = torch.Generator().manual_seed(1)
    weights = make_denoiser(config).net.state_dict()
    weights = {k: v if k == "pos_embed" else 0.3 * torch.randn(v.shape, generator=g) for k, v in weights.items()}
    save_checkpoint(folder / "checkpoint", 1, {"model": (weights, meta)}, {"step": 1})
    return folder


def expected(run: Any, seed: int, cond: dict[str, Tensor], **changes: Any) -> Tensor:
    """What the sampler makes of one seed and its conditions (1 ...), by way of `draw` alone: (c h w)."""
    config = replace(run.config.sample, **changes)
    *_, last = draw(run.denoiser, run.shape, run.schedule, config, [seed], cond)
    return last.x[0]
