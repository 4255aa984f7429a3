"""What the tests of Stable Diffusion's parts share: small reference models of diffusers, and ours with their weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.nets.sd_unet import SDUNet, SDUNetConfig

SD1 = SDUNetConfig(widths=(8, 16, 16), depths=(1, 1, 0), heads=(2, 2, 2), context_dim=12, groups=4)
SD2 = replace(SD1, heads=(1, 2, 4), context_dim=20, linear_projection=True)
XL = SDUNetConfig(
    widths=(8, 16, 32),
    depths=(0, 1, 2),
    depth_mid=2,
    heads=(1, 2, 4),
    context_dim=24,
    linear_projection=True,
    added_dim=10 + 6 * 4,
    size_features=4,
    groups=4,
)
INPAINT = replace(XL, channels_in=9)
ONE_LEVEL = replace(SD1, widths=(8,), depths=(1,), heads=(2,), blocks=1)
DEEP = replace(SD2, widths=(4, 8, 12, 16), depths=(0, 1, 0, 2), depth_mid=2, heads=(1, 4, 2, 1), blocks=3)
BARE_MIDDLE = replace(SD1, depth_mid=0, blocks=1)
CONFIGS = {
    "sd1": SD1,
    "sd2": SD2,
    "xl": XL,
    "inpaint": INPAINT,
    "one_level": ONE_LEVEL,
    "deep": DEEP,
    "bare_middle": BARE_MIDDLE,
}


def options(c: SDUNetConfig) -> dict[str, Any]:
    """The arguments with which diffusers' UNet2DConditionModel (or ControlNetModel) has the same layers."""
    attention = [depth > 0 for depth in c.depths]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": c.size_features,
        "projection_class_embeddings_input_dim": c.added_dim,
    }
    return {
        "in_channels": c.channels_in,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if c.depth_mid else "UNetMidBlock2D",
        "block_out_channels": c.widths,
        "layers_per_block": c.blocks,
        "norm_num_groups": c.groups,
        "cross_attention_dim": c.context_dim,
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in c.depths),
        "attention_head_dim": c.heads,
        "use_linear_projection": c.linear_projection,
        **(added if c.added_dim else {}),
    }


def reference_unet(c: SDUNetConfig) -> Any:
    """diffusers' U-Net with the layers of a config, its weights random."""
    from diffusers import UNet2DConditionModel

    attention = [depth > 0 for depth in reversed(c.depths)]
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention)
    return randomise(UNet2DConditionModel(**options(c), out_channels=c.channels_out, up_block_types=up))


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with seeded random weights, none of them zero: also biases, norms and layers that start at zero."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.device.type != "meta":
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            one = 1.0 if p.ndim == 1 and float(p.detach().mean()) > 0.5 else 0.0  # a norm's scale
            p.data = one + scale * torch.randn(p.shape, generator=g).to(p)
    return net


def same_weights(ours: nn.Module, reference: nn.Module) -> nn.Module:
    """Our net with the reference's weights and dtype; every key has to fit."""
    ours.to(next(reference.parameters()).dtype).load_state_dict(reference.state_dict(), strict=True)
    return ours


def pair_of_unets(c: SDUNetConfig, dtype: torch.dtype = torch.float32) -> tuple[SDUNet, Any]:
    """(ours, diffusers') with the same weights."""
    reference = nn.Module.to(reference_unet(c), dtype)  # diffusers' own .to warns
    ours = same_weights(SDUNet(c), reference)
    assert isinstance(ours, SDUNet)
    return ours, reference


def inputs(
    c: SDUNetConfig, size: tuple[int, int] = (8, 8), b: int = 2, m: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random arguments of a net: x (b c h w), t (b), context (b m d) and, where it takes them, pooled and sizes.

    t is in float32 whatever dtype is, since diffusers computes its sinusoids in that.
    """
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    found = {"x": normal(b, c.channels_in, *size), "t": 999 * torch.rand(b, generator=g)}
    found["context"] = normal(b, m, c.context_dim)
    if c.added_dim:
        found["pooled"] = normal(b, c.pooled_dim)
        found["sizes"] = torch.randint(0, 1500, (b, 6), generator=g)
    return found


def call_reference(net: Any, given: dict[str, Tensor], **more: Any) -> Tensor:
    """F by diffusers' U-Net of what `inputs` returns, and of more arguments under its own names."""
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if "pooled" in given else None
    args = (given["x"], given["t"], given["context"])
    return net(*args, added_cond_kwargs=added, return_dict=False, **more)[0]


def relative(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())
