"""A net's parameters spread over processes (FSDP2, Zhao et al. 2023), and the way between parts and the whole.

A sharded parameter is a DTensor: process r of n holds part r of the n that `torch.chunk` cuts its first axis into; the
last ones may be empty. A net's buffers, and whatever is not trained, are whole on every process.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.fast import BLOCKS

OUTSIDE = ("embed", "encode", "decode", "moments")  # of a net, called beside forward
WHOLE = ("Adafactor", "Muon", "AdamW8bit")  # optimisers that must see a matrix whole
FUSED = ("Adam", "AdamW")  # those whose fused step takes parts


def sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is here: its part, in the same memory, or the tensor itself."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[operator]


def part(whole: Tensor, like: Any) -> Tensor:
    """Of a whole tensor what this process holds of `like`."""
    if not sharded(like):
        return whole
    parts, rank = whole.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def joined(here: Tensor, like: Tensor) -> Tensor:
    """The whole of which `here` is this process's part, as it is of `like`; all processes must ask together."""
    if not sharded(like):
        return here
    return _as_part(here, like).full_tensor()  # type: ignore[operator]


def _as_part(here: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    here = here.to(local(like).device)
    return DTensor.from_local(
        here, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def parts(tensors: Mapping[str, Tensor], first: bool, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What a process has to save: its part of what is sharded, and of the rest all, if it is the `first`.

    like: says what is sharded where `tensors` are parts already. Whoever reads puts parts of a name one behind the other.
    """
    live = like or tensors
    return {name: local(tensor) for name, tensor in tensors.items() if first or sharded(live[name])}


def load_parts(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a net its parts of whole `tensors`, by state_dict name."""
    with torch.no_grad():
        for name, tensor in net.state_dict(keep_vars=True).items():
            local(tensor).copy_(part(tensors[name], tensor))


def optimizer_parts(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state_dict of whole tensors as this one takes it: with its parts, computed in its own way."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [
        {**known, **{key: own[key] for key in ("fused", "foreach") if key in own}}
        for known, own in zip(state["param_groups"], optimizer.param_groups)
    ]
    cut = {
        i: {k: _cut(v, parameters[i]) if isinstance(v, Tensor) else v for k, v in known.items()}
        for i, known in state["state"].items()
    }
    return {"state": cut, "param_groups": groups}


def _cut(value: Tensor, parameter: Tensor) -> Tensor:
    if not sharded(parameter) or value.shape != parameter.shape:
        return value
    return _as_part(part(value, parameter).clone(), parameter)


# -- sharding ------------------------------------------------------------------------------------------------------------


def repeated(net: nn.Module) -> list[nn.Module]:
    """The blocks that a net is made of: those of U-Nets, else the outermost modules of a kind of its own that it has twice."""
    known: list[nn.Module] = [module for module in net.modules() if isinstance(module, BLOCKS)]
    if known:
        return known
    kinds = Counter(type(module) for module in net.modules() if not type(module).__module__.startswith("torch."))
    return _outermost(net, {kind for kind, n in kinds.items() if n > 1})


def _outermost(net: nn.Module, kinds: set[type]) -> list[nn.Module]:
    found = []
    for child in net.children():
        mine = type(child) in kinds and any(True for _ in child.children()) and any(True for _ in child.parameters())
        found += [child] if mine else _outermost(child, kinds)
    return found


def shard(model: nn.Module, world: World) -> None:
    """Spread model.net's parameters over all processes, in place: a block's are whole only while it is at work.

    Gradients are averaged over the processes. UserError: what is trained is not a net of its own, as LoRA's factors are not.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net: Any = model.net
    _check(model, net)
    for p in net.parameters():
        p.data = p.data.contiguous()  # it takes no channels-last ones
    # of views that are changed in place, which no net here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in [*repeated(net), net]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    _make_whole_for(net, [name for name in OUTSIDE if hasattr(net, name)])


def _make_whole_for(net: Any, names: Sequence[str]) -> None:
    """Put parameters together for these methods, unless they are called while they are together already."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    depth = [0]

    def within(by: int) -> None:
        depth[0] += by

    def guarded(plain: Callable[..., Any], gathering: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if depth[0]:
                return plain(*args, **more)
            within(1)
            try:
                return gathering(*args, **more)
            finally:
                within(-1)

        return call

    net.register_forward_pre_hook(lambda *_: within(1))
    net.register_forward_hook(lambda *_: within(-1), always_call=True)
    plain = {name: getattr(net, name) for name in names}
    for name in names:
        register_fsdp_forward_method(net, name)
        setattr(net, name, guarded(plain[name], getattr(net, name)))


def _check(model: nn.Module, net: nn.Module) -> None:
    what = "what is trained lies among what is not, so that there is nothing to shard"
    if type(net).forward is nn.Module.forward:  # parameters that others work with
        raise UserError(what, key="parallel", found=type(net).__name__, fix="parallel=ddp: it is little")
    own = {id(p) for p in net.parameters()}
    within = {id(module) for module in net.modules()}
    beside = [
        name
        for owner, module in model.named_modules()
        if id(module) not in within
        for name, p in ((f"{owner}.{k}".lstrip("."), p) for k, p in module.named_parameters(recurse=False))
        if p.requires_grad or id(p) in own
    ]
    if beside:
        raise UserError(what, key="parallel", found=beside[0], fix="parallel=ddp: it is little")
    if scalars := [name for name, p in net.named_parameters() if p.ndim == 0]:
        raise UserError(
            "a parameter that is one number cannot be cut", key="parallel", found=scalars[0], fix="parallel=ddp"
        )
