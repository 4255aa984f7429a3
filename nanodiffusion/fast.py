"""Speed from outside: the same numbers up to rounding, sooner. Nothing here is ever switched on by an import.

`tune_cpu` changes this process (allocator, matrix products), `adapt` changes a net's layers in place. Both do only what
was measured to help: on an AVX-512 CPU that is not Intel's, torch's own choices leave half of the machine unused.
"""

import ctypes
import math
import sys
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanodiffusion.nets.autoencoder import PixelAttention, ResBlock
from nanodiffusion.nets.layers import MultiHead
from nanodiffusion.nets.sd_layers import CrossAttention, ResnetBlock, TransformerBlock

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
    """Set this whole process up for speed on a CPU; returns what was done. Call it before the first large tensor.

    fp32 products stay fp32: "medium" lets oneDNN do them (twice MKL's speed on an AMD part, at twice its rounding error),
    and is taken only where it does not mean bf16, as it may with AMX. Without glibc the allocator is left alone.
    """
    return Tuning(keep_freed_memory(), *choose_matmul())


def tune(device: torch.device, matmul: str = "auto") -> None:
    """Set the process up for a device, as the command line does: `tune_cpu` there, TF32 products on a GPU.

    matmul: a name torch.set_float32_matmul_precision takes overrides that choice.
    """
    if device.type == "cpu":
        tune_cpu()
    if matmul != "auto" or device.type != "cpu":
        torch.set_float32_matmul_precision("high" if matmul == "auto" else matmul)


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

    Attention becomes plain products, dropout draws 16 bits an element, and convolutions work channels-last, with a
    GroupNorm made for that. Parameters, their names, the call and the layers' types stay the same; so does the layout of
    weights that want gradients, while frozen convolutions' weights become channels-last in memory: a mapped file is then
    read into it. In fp32 the sums of a channels-last convolution are up to 5 times as inexact, 1e-6, as torch's others.
    """
    if next(net.parameters()).device.type != "cpu":
        return net
    for module in net.modules():
        if isinstance(module, ATTENTION):
            module.attend = attend
        elif type(module) in FASTER:
            module.__class__ = FASTER[type(module)]
        if isinstance(module, ConvLast) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.contiguous(memory_format=LAST)
    return net


ATTENTION = (MultiHead, CrossAttention, PixelAttention)  # those whose tokens see all others
MAX_SCORES = 2**26  # numbers of an attention matrix kept for the gradient, 256 MiB in fp32; beyond, the fused kernel
SCORES = 2**21  # numbers of it at work where there is none, 8 MiB: they stay in the cache
LARGE = 64.0  # 2^64 and 2^-64 are far from the ends of float32 and bfloat16


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a gradient through any of these is wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def by_mkl(x: Tensor) -> bool:
    """Whether products of such tensors are MKL's, which `tune_cpu` avoids where oneDNN's are faster."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it is fastest on this CPU: q, k, v (b heads n k) -> (b heads n k); Vaswani et al. 2017, eq. 1."""
    return attend_by_products(q, k, v) if recorded(q, k, v) else attend_in_pieces(q, k, v)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as product, softmax, product, in the dtype of q, k, v (b heads n k) -> (b heads n k).

    With oneDNN's products it is 2-3 times as fast as torch's fused CPU kernel; with MKL's, and when the scores would
    not fit, that kernel is called.
    """
    if by_mkl(q) or q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > MAX_SCORES:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def attend_in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a gradient, `SCORES` scores at a time: q (b heads n k), k, v (b heads m k) -> (b heads n k).

    The scores and their exponentials are float32 whatever q, k, v are, as in torch's fused kernel: in bf16 the error
    would double. It takes half of that kernel's time in bf16; where fp32 products are MKL's, the kernel is called.
    """
    b, h, n, d = q.shape
    m = k.shape[2]
    elsewhere = q.device.type != "cpu" or torch.compiler.is_compiling()
    if elsewhere or torch.get_float32_matmul_precision() == "highest" or not b * h * n * m:
        return F.scaled_dot_product_attention(q, k, v)
    heads = max(1, SCORES // (n * m))
    rows = max(1, SCORES // (heads * m))
    out = q.new_empty(b * h, n, d)
    with torch.autocast("cpu", enabled=False):
        for group in zip(*(x.flatten(0, 1).split(heads) for x in (q, k, v)), out.split(heads)):
            # A plain product of one head is faster than a batch of one.
            qs, ks, vs, to = (x.squeeze(0) for x in group)
            _attend(_wide(qs) * (math.log2(math.e) * d**-0.5), _wide(ks).transpose(-2, -1), vs, to, rows)
    return out.unflatten(0, (b, h))


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int) -> None:
    """softmax(ln2 q k) v into out, so many rows at once: q ([g] n k) and k ([g] k m) in float32, v ([g] m k), out as q.

    The softmax wants no shift where no score can be large: |q k| <= |q| |k|.
    """
    bound = q.norm(dim=-1).amax() * k.norm(dim=-2).amax()
    small = float(bound) <= LARGE and v.dtype != torch.float16
    for some, to in zip(q.split(rows, dim=-2), out.split(rows, dim=-2)):
        scores = some @ k
        if not small:
            scores.sub_(scores.amax(-1, keepdim=True))
        scores.exp2_()
        torch.div(scores.to(v.dtype) @ v, scores.sum(-1, keepdim=True), out=to)


LAST = torch.channels_last
FEW = 512  # pixels of all maps of a batch for which a convolution costs less than bringing its weights into shape


class ConvLast(nn.Conv2d):
    """A convolution of channels-last maps (b c h w), which oneDNN does up to twice as fast as others.

    Weights that want gradients stay as they were: torch's fused optimisers go wrong where a weight and its loaded state
    differ in layout. oneDNN packs the weights on every call; frozen and channels-last, they are the rows of a matrix as they
    are, and small maps are multiplied by that.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input.contiguous(memory_format=LAST)
        if self._as_product(x):
            return self._product(x)
        return super().forward(x).contiguous(memory_format=LAST)

    def _as_product(self, x: Tensor) -> bool:
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        frozen = self.weight.is_contiguous(memory_format=LAST) and not recorded(x, self.weight, self.bias)
        few = x.shape[0] * x.shape[2] * x.shape[3] <= FEW and self.kernel_size != (1, 1)
        return plain and frozen and few and not isinstance(self.padding, str) and not by_mkl(x)

    def _product(self, x: Tensor) -> Tensor:
        (h, w), (down, right) = cast(tuple[int, int], self.padding), self.stride
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, w, w, h, h))  # (b h w c)
        windows = padded.unfold(1, self.kernel_size[0], down).unfold(2, self.kernel_size[1], right)  # (b h w c i j)
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


HALF = (torch.bfloat16, torch.float16)
MANY = 1024  # pixels of a map from which on torch's channels-last kernel takes the mean square minus the square of the mean


class GroupNormLast(nn.GroupNorm):
    """GroupNorm of channels-last maps (b c h w), for which torch's own takes 3 to 20 times as long as for others.

    It is fast on large maps, where it cancels: in half precision that is less than x's own rounding, and is used.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 4 or not self.affine or not input.is_contiguous(memory_format=LAST):
            return super().forward(input)
        large = input.dtype in HALF and input.shape[2] * input.shape[3] >= MANY
        if large and not recorded(input, self.weight, self.bias):
            return super().forward(input)
        rows = input.permute(0, 2, 3, 1).flatten(1, 2)  # (b (h w) c), no copy
        out = cast(Tensor, _GroupNorm.apply(rows, self.weight, self.bias, self.num_groups, self.eps))
        return out.unflatten(1, input.shape[2:]).permute(0, 3, 1, 2)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group_mean(sums: Tensor, rows: int, groups: int) -> Tensor:
    """Sums over so many rows, per channel (b 1 c) -> the mean of each channel's group (b 1 c)."""
    b, _, c = sums.shape
    means = sums.view(b, groups, -1).mean(2, keepdim=True) / rows
    return means.expand(b, groups, c // groups).reshape(b, 1, c)


class _GroupNorm(torch.autograd.Function):
    """GroupNorm of rows x (b n c) by few passes over them: y = w z + bias, z = (x - mean) rstd; mean, rstd (b 1 c)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, wide = x.shape[1], _wide(x)
        mean = _group_mean(wide.sum(1, keepdim=True), n, groups)
        centred = wide - mean
        rstd = (_group_mean((centred * centred).sum(1, keepdim=True), n, groups) + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return torch.addcmul(_wide(bias), centred, rstd * _wide(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        # dx = rstd (w grad - <w grad> - z <w grad z>), <.> a group's mean.
        x, weight, mean, rstd = ctx.saved_tensors
        n, grad, w, centred = x.shape[1], _wide(grad.contiguous()), _wide(weight), _wide(x) - mean
        d = grad.sum(1, keepdim=True)
        dz = (grad * centred).sum(1, keepdim=True) * rstd
        g, gz = _group_mean(w * d, n, ctx.groups), _group_mean(w * dz, n, ctx.groups)
        dx = torch.addcmul(-rstd * g, centred, -rstd * rstd * gz).addcmul_(grad, rstd * w)
        return dx.to(x.dtype), dz.sum((0, 1)).to(weight.dtype), d.sum((0, 1)).to(weight.dtype), None, None


class Dropout16(nn.Dropout):
    """Dropout whose probability is rounded to a multiple of 2^-16, from 16 random bits an element instead of 64."""

    def forward(self, input: Tensor) -> Tensor:
        cut, n = round(self.p * 2**16), input.numel()
        if not self.training or cut in (0, 2**16) or input.device.type != "cpu":
            return super().forward(input)
        bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n]
        kept = torch.ge(bits, cut - 2**15).to(input.dtype).mul_(1 / (1 - cut / 2**16))
        if input.ndim != 4 or not input.is_contiguous(memory_format=LAST):
            return input * kept.view(input.shape)
        b, c, h, w = input.shape
        return input * kept.view(b, h, w, c).permute(0, 3, 1, 2)


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: ConvLast,
    nn.GroupNorm: GroupNormLast,
    nn.Dropout: Dropout16,
}


# -- compiling ---------------------------------------------------------------------------------------------------------

BLOCKS = (TransformerBlock, ResnetBlock, ResBlock, PixelAttention)  # what U-Nets and autoencoders are made of
KINDS = 64  # shapes of block and input that may be compiled; torch gives up after 8


def compile_blocks(net: Net, **options: Any) -> Net:
    """Compile every block of a Stable Diffusion U-Net, ControlNet or autoencoder in place: those alike share the result.

    Compiling happens at the first call with each shape, and takes a fraction of what the whole net would. Parameters and
    their names stay. options: torch.compile's, such as dynamic and mode.
    """
    import torch._dynamo as dynamo  # a second of imports

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, KINDS)
    for module in net.modules():
        if isinstance(module, BLOCKS):
            module.compile(fullgraph=True, **options)
    return net


# -- joining -----------------------------------------------------------------------------------------------------------


class JoinedAttention(CrossAttention):
    """Attention whose projections of one source are one layer: to_qkv of x, or to_kv of the context."""

    to_qkv: nn.Linear
    to_kv: nn.Linear

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            q, k, v = self.to_qkv(x).chunk(3, dim=2)
        else:
            q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=2)
        return self.split(q), self.split(k), self.split(v)


def fuse_projections(net: Net) -> Net:
    """Join the projections of every attention of a Stable Diffusion net that read the same, in place: fewer, larger products.

    The result is the same but for rounding. It is one-way: to_q, to_k and to_v are no longer there to be saved or to take a
    LoRA, so this comes last.
    """
    for block in net.modules():
        if isinstance(block, TransformerBlock) and type(block.attn1) is CrossAttention:
            _join(block.attn1, "to_qkv", ("to_q", "to_k", "to_v"))
            _join(block.attn2, "to_kv", ("to_k", "to_v"))
    return net


def _join(attention: CrossAttention, name: str, parts: tuple[str, ...]) -> None:
    """Replace bias-free linear layers of one input by one that gives all their outputs, side by side."""
    old = [cast(nn.Linear, getattr(attention, part)).weight for part in parts]
    weight = torch.cat(old).detach()
    with torch.device("meta"):
        joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    joined.weight = nn.Parameter(weight, requires_grad=old[0].requires_grad)
    for part in parts:
        delattr(attention, part)
    attention.add_module(name, joined)
    attention.__class__ = JoinedAttention
