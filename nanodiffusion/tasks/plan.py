"""How memory is spent on a run of `generate`: its stages, and the plan that fits what is free."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.memory import Plan, Stage, choose
from nanodiffusion.nets.controlnet import Controlled
from nanodiffusion.pretrained import Bundle
from nanodiffusion.tasks.conditions import text_nets
from nanodiffusion.tasks.request import GenerateConfig, Inputs, complete, pictures_of


def plan(bundle: Bundle, config: GenerateConfig, inputs: Inputs | None = None, memory: str = "auto") -> Plan:
    """Choose how memory is spent on such pictures, by name or by what is free, and let the bundle work by it.

    UserError when the name is unknown. Moving networks away needs load_pretrained(..., offload=True).
    """
    inputs = inputs or Inputs()
    config = complete(bundle, config, inputs)
    chosen = choose(memory, partial(stages, bundle, config, inputs), bundle.device)
    bundle.plan, bundle.codec.tile, bundle.codec.slices = chosen, chosen.tile, chosen.slices
    return chosen


def stages(bundle: Bundle, config: GenerateConfig, inputs: Inputs, how: Plan) -> dict[str, Stage]:
    """What a run does, in order, with meta tensors of the shapes that it meets."""
    b = pictures_of(config, inputs)
    h, w = (side // bundle.codec.factor for side in (config.height, config.width))
    latent = (bundle.codec.latent_channels, h, w)

    def decode(codec: Any) -> Tensor:
        codec.tile, codec.slices = how.tile, how.slices
        return codec.decode(torch.empty(b, *latent))

    def read(nets: Any) -> list[Any]:
        return [net(torch.zeros(2 * b, net.config.positions, dtype=torch.int64)) for net in nets]

    controls = [c.net for c in inputs.controls]
    tokens = 77 + (0 if inputs.tokens is None else h * w)
    step = partial(_one_step, b if config.guidance == 1 else 2 * b, latent, tokens)
    return {
        "text": Stage(nn.ModuleList(text_nets(bundle)), read),
        "denoiser": Stage(nn.ModuleList([bundle.denoiser.net, *controls]), step),
        "codec": Stage(bundle.codec, decode),
    }


def _one_step(b: int, latent: tuple[int, int, int], tokens: int, nets: Any) -> Tensor:
    """The U-Net with its ControlNets on b rows of so many tokens."""
    unet, *controls = nets
    c, (_, h, w) = unet.config, latent
    dtype = unet.conv_in.weight.dtype
    new = partial(torch.empty, dtype=dtype)
    cond: dict[str, Any] = {"context": new(b, tokens, c.context_dim)}
    if c.added_dim:
        cond |= {"pooled": new(b, c.pooled_dim), "sizes": torch.zeros(b, 6, dtype=torch.int64)}
    if extra := c.channels_in - latent[0] or c.pass_through:
        cond["concat"] = new(b, extra, h, w)
    if controls:
        cond["hints"] = tuple(new(b, n.config.widths[0] if n.control.hint_channels else 5, h, w) for n in controls)
        cond["strengths"] = tuple(new(b, n.count) for n in controls)
    net = Controlled(unet, controls) if controls else unet
    return net(new(b, *latent), torch.zeros(b), **cond)
