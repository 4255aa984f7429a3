"""Speed from outside: the same numbers up to rounding, sooner. Nothing here is ever switched on by an import.

`tune_cpu` changes this process (allocator, matrix products), `adapt` changes a net's layers in place. Both do only what
was measured to help: on an AVX-512 CPU that is not Intel's, torch's own choices leave half of the machine unused.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.nets.layers import Attention

Net = TypeVar("Net", bound=nn.Module)

# -- the process -------------------------------------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>
KEEP_BYTES = 2**30  # freed blocks up to this size stay with the process
FULL_PRECISION = 1e-6  # relative error of a product that is still fp32; bf16 inside would give 2e-3


class Tuning(NamedTuple):
    """What `tune_cpu` did."""

    allocator: bool  # freed memory is kept, so that it is not faulted in again page by page
    matmul: str  # torch's float32 matmul precision, "medium" or "highest"
    error: float  # relative error of an fp32 product under it

    def __str__(self) -> str:
        memory = "keeps freed memory" if self.allocator else "left as it is (not glibc)"
        return f"allocator {memory}; fp32 products by {self.matmul!r}, error {self.error:.0e}"


def tune_cpu() -> Tuning:
    """Set this process, and all of it, up for speed on a CPU; returns what was done. Call it before the first large tensor.

    fp32 products stay fp32: "medium" lets oneDNN do them (twice MKL's speed on an AMD part), and is taken only where it
    was found not to mean bf16, as it does with AMX. On systems without glibc the allocator is left alone.
    """
    return Tuning(keep_freed_memory(), *choose_matmul())


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks instead of returning them to the system; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) and mallopt(M_TRIM_THRESHOLD, 2 * KEEP_BYTES - 1))


def choose_matmul() -> tuple[str, float]:
    """Set torch's float32 matmul precision to the fastest that is still fp32 on the CPU: (its name, its error)."""
    errors = {}
    for name in ("highest", "medium"):
        torch.set_float32_matmul_precision(name)
        errors[name] = product_error()
    name = "medium" if errors["medium"] <= FULL_PRECISION else "highest"
    torch.set_float32_matmul_precision(name)
    return name, errors[name]


def product_error(n: int = 256) -> float:
    """Relative error of an n x n fp32 product of fixed random matrices against float64."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, n, generator=g)
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


# -- the net -----------------------------------------------------------------------------------------------------------


def adapt(net: Net) -> Net:
    """Let the layers of a net on the CPU run in the way that is fastest there, in place; elsewhere do nothing.

    Attention becomes plain products, dropout draws 16 bits an element, and where there are 3x3 convolutions the net works
    channels-last, with a GroupNorm made for it. Parameters, their names and the call stay the same.
    """
    if next(net.parameters()).device.type != "cpu":
        return net
    for module in net.modules():
        if isinstance(module, Attention):
            module.attend = attend_by_products
    return net


MAX_SCORES = 2**26  # numbers of an attention matrix held at once, 256 MiB in fp32; beyond, the fused kernel


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as product, softmax, product: q, k, v (b heads n k) -> (b heads n k); Vaswani et al. 2017, eq. 1.

    With oneDNN's products it is 2-3 times as fast as torch's fused CPU kernel; with MKL's, and when the scores would
    not fit, that kernel is called.
    """
    by_mkl = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if by_mkl or q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > MAX_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
