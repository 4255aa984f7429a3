"""Networks: `net(x, t, **cond) -> F`. They know no sigma, ladder or guidance.

Each has a frozen config of its own and the attributes `config`, `sample_shape` (of one sample), `takes` (the names of
its conditions: label, pooled, concat) and `null_label` (the class that stands for none; None when the net knows no
classes). `IdealDenoiser` is no net but a D.
"""

from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nanodiffusion.config import check_options
from nanodiffusion.errors import lookup
from nanodiffusion.nets.dit import MODERN, DiT, DiTConfig
from nanodiffusion.nets.ideal import IdealDenoiser
from nanodiffusion.nets.mlp import MLP, MLPConfig
from nanodiffusion.nets.pixart import PixArt, PixArtConfig
from nanodiffusion.nets.sd_unet import SD15, SD21, SDXL, SDUNet, SDUNetConfig
from nanodiffusion.nets.tld import TLD, TLDConfig
from nanodiffusion.nets.transfer import fit_state, resized
from nanodiffusion.nets.unet import UNet, UNetConfig

__all__ = [
    "MLP",
    "MODERN",
    "NETS",
    "SD15",
    "SD21",
    "SDXL",
    "TLD",
    "DiT",
    "DiTConfig",
    "IdealDenoiser",
    "MLPConfig",
    "PixArt",
    "PixArtConfig",
    "SDUNet",
    "SDUNetConfig",
    "TLDConfig",
    "UNet",
    "UNetConfig",
    "build_net",
    "fit_state",
    "net_flops",
    "net_size",
    "resized",
]

NETS: dict[str, tuple[type, type[nn.Module]]] = {
    "mlp": (MLPConfig, MLP),
    "unet": (UNetConfig, UNet),
    "dit": (DiTConfig, DiT),
    "pixart": (PixArtConfig, PixArt),
    "tld": (TLDConfig, TLD),
}


def build_net(name: str, **options: Any) -> nn.Module:
    """The net of that name in NETS, its config made from options as YAML or JSON spell them (lists for tuples).

    Raises UserError on an unknown name or option, with the nearest valid one, and on a value of the wrong type.
    """
    config, net = lookup(NETS, name, "net")
    check_options(options, get_type_hints(config), "net")
    return net(config(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}))


def net_size(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def blank(net: nn.Module) -> dict[str, Tensor]:
    """Conditions of one sample (1 ...) of the kinds that a net takes, all zero."""
    config: Any = net.config
    text = getattr(config, "text_dim", 0) or getattr(config, "pooled_dim", 0)
    channels = getattr(config, "concat_channels", 0)
    known = {
        "label": lambda: torch.zeros(1, dtype=torch.int64),
        "pooled": lambda: torch.zeros(1, text),
        "concat": lambda: torch.zeros(1, channels, *net.sample_shape[1:]),  # type: ignore[index]
    }
    takes: Any = getattr(net, "takes", ())
    return {name: known[name]() for name in takes if name in known}


def net_flops(net: nn.Module, cond: Mapping[str, Tensor] | None = None) -> int:
    """FLOPs of one forward pass of one sample, two per multiply-add, of matrix products and convolutions only.

    It runs on shapes alone (the `meta` device), so it costs no memory whatever the size. cond (1 ...) is needed
    only by nets that take more than a label, a pooled text and a known part.
    """
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    meta = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
    x = torch.empty(1, *net.sample_shape, device="meta", dtype=next(net.parameters()).dtype)  # type: ignore[misc]
    inputs = {key: value.to("meta") for key, value in (blank(net) if cond is None else cond).items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(net, meta, (x, torch.empty(1, device="meta")), inputs)
    return counter.get_total_flops()
