"""How much memory a picture takes, and plans that take less: what lies on the device, and how much is done at once.

The expected peak is counted, not guessed: the same calls on the meta device, which allocates nothing, with every
tensor's birth and death in the ledger. `Peak` measures what it was.
"""

import copy
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nanodiffusion.errors import lookup

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """How memory is spent. `low` also asks the loader for half precision, where the caller names none."""

    name: str
    offload: bool = False  # a component is on the device only while it works
    slices: bool = False  # pictures are decoded one at a time
    tile: int | None = None  # side, in latent pixels, of the tiles a picture is decoded in
    half: bool = False  # weights in bf16 unless told otherwise
    expected: int = 0  # bytes on the device at the peak, counted
    free: int = 0  # bytes that were free when the plan was made, or held by its own weights

    def __str__(self) -> str:
        means = {"offload": self.offload, "one picture at a time": self.slices, f"tiles of {self.tile}": self.tile}
        how = ", ".join(name for name, used in means.items() if used) or "everything at once"
        return f"memory {self.name} ({how}): expected peak {self.expected / GIB:.2f} GiB of {self.free / GIB:.1f} free"


PLANS = {
    "fast": Plan("fast"),
    "balanced": Plan("balanced", offload=True, slices=True),
    "low": Plan("low", offload=True, slices=True, tile=64, half=True),
}


@dataclass(frozen=True)
class Stage:
    """A component at work: `call` runs a copy of it once, on meta tensors of the largest shape it will see."""

    module: nn.Module
    call: Callable[[Any], Any]

    @property
    def weights(self) -> int:
        """Bytes of its parameters and buffers."""
        return sum(t.nbytes for t in tensors_of(self.module))


def choose(name: str, stages: Callable[[Plan], dict[str, Stage]], device: torch.device) -> Plan:
    """The plan of that name with its expected peak; `auto` is the first of `PLANS` that fits in 90 % of what is free.

    stages: what happens under a plan, in order. UserError when the name is unknown. On the CPU nothing can be moved
    away: there a plan saves by smaller pieces and half precision only.
    """
    wanted = list(PLANS.values()) if name == "auto" else [lookup(PLANS, name, "memory")]
    for plan in wanted:
        parts = stages(plan)
        free = free_memory(device) + held(parts, device)
        counted = replace(plan, expected=expected_peak(parts, plan.offload, device), free=free)
        if counted.expected <= 0.9 * free or plan is wanted[-1]:  # counting takes a second: stop at the first that fits
            break
    return counted


def expected_peak(stages: dict[str, Stage], offload: bool, device: torch.device) -> int:
    """Bytes at the worst moment: the weights that are there then, and what the stage allocates meanwhile."""
    together = sum({id(s.module): s.weights for s in stages.values()}.values())
    moved = offload and device.type != "cpu"
    return max((s.weights if moved else together) + allocated(s) for s in stages.values())


def held(stages: dict[str, Stage], device: torch.device) -> int:
    """Bytes of the stages' weights that lie on the device already; 0 on a CPU, where they are mostly mapped files."""
    tensors = {id(t): t for stage in stages.values() for t in tensors_of(stage.module) if t.device == device}
    return 0 if device.type == "cpu" else sum(t.nbytes for t in tensors.values())


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return chain(module.parameters(), module.buffers())


# -- counting ----------------------------------------------------------------------------------------------------------


class _Ledger(TorchDispatchMode):
    """Bytes of the storages that live, and the most there were, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage for nothing: it was there before."""
        self.known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: Any) -> None:
        if storage in self.known:
            return
        size = self.known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it: nothing but the result. On meta, torch would count its scores."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return f(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Shapes of attention and of its gradients, which need what was given and what came out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def allocated(stage: Stage) -> int:
    """Bytes that a stage allocates at its peak beyond its weights."""
    ghost, ledger = on_meta(stage.module), _Ledger()
    for tensor in tensors_of(ghost):
        ledger.hold(tensor)
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), ledger:
        stage.call(ghost)
    return ledger.peak


def training_peak(model: nn.Module, loss: Callable[[Any], Tensor], half: bool = False, averages: int = 0) -> int:
    """Bytes at the worst moment of an update: weights, Adam's two moments, averages, gradients and activations.

    loss: the loss of a batch by a copy of the model, on meta tensors. half: products in half precision by autocast, which
    keeps a copy of float32 weights in it; the copy given to `loss` is then in half precision throughout.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wide = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    kept = sum(t.nbytes for t in tensors_of(model)) + 4 * trained * (2 + averages)
    ghost, ledger = on_meta(model), _Ledger()
    ghost = ghost.bfloat16() if half else ghost
    for layer in ghost.modules():
        if hasattr(layer, "attend"):  # a mode would not be there when activations are computed again
            layer.attend = lambda q, k, v, **_: _Fused.apply(q, k, v)  # type: ignore[assignment]
    for tensor in tensors_of(ghost):
        ledger.hold(tensor)
    with torch.device("meta"), ledger:
        loss(ghost).backward()
    return kept + ledger.peak + (2 * trained + 2 * wide if half else 0)  # gradients are float32 all the same


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module whose tensors have shapes and dtypes, and no numbers."""
    shape_of = lambda t: t.detach().to("meta").requires_grad_(t.requires_grad)
    ghosts = {id(t): nn.Parameter(shape_of(t), t.requires_grad) for t in module.parameters()}
    return copy.deepcopy(module, ghosts | {id(t): shape_of(t) for t in module.buffers()})


# -- moving ------------------------------------------------------------------------------------------------------------


@dataclass
class _Away:
    """A tensor that is at work: its numbers at home and there, and how many blocks want it there."""

    tensor: Tensor
    home: Tensor
    there: Tensor
    users: int = 0

    def end(self) -> None:
        """Back home; what was put in its place meanwhile, such as a fused weight, is brought along."""
        kept = self.tensor.data_ptr() == self.there.data_ptr()
        self.tensor.data = self.home if kept else self.tensor.data.to(self.home.device)


_AWAY: dict[int, _Away] = {}  # by the tensors' id


@contextmanager
def at_work(module: nn.Module, device: torch.device, offload: bool) -> Iterator[None]:
    """The module on the device; with `offload` only inside the block. Its tensors on the CPU stay, so leaving is free.

    Blocks may overlap, as those of runs that take turns do: what they share goes home with the last of them.
    """
    borrowed: list[_Away] = []
    try:
        for tensor in tensors_of(module):
            if offload and tensor.device != device and id(tensor) not in _AWAY:
                _AWAY[id(tensor)] = _Away(tensor, tensor.data, tensor.data.to(device))
                tensor.data = _AWAY[id(tensor)].there
            if away := _AWAY.get(id(tensor)):
                away.users += 1
                borrowed.append(away)
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        yield
    finally:
        for away in borrowed:
            away.users -= 1
            if not away.users:
                _AWAY.pop(id(away.tensor)).end()


def free_memory(device: torch.device) -> int:
    """Bytes that could still be allocated on a device."""
    if device.type == "cuda":  # what torch has reserved and does not use is free too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _proc("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory in use inside a `with` block, in `.bytes`: a GPU's allocator's, or what this process grew by on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self.before = device, 0, 0

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # "5" forgets the high-water mark: proc_pid_clear_refs(5)
                Path("/proc/self/clear_refs").write_text("5")
            self.before = _proc("/proc/self/status", "VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = max(0, _proc("/proc/self/status", "VmHWM") - self.before)


def _proc(file: str, key: str) -> int:
    """A line "Key:  123 kB" of a file of /proc, in bytes; 0 where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
