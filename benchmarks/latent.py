"""Latent transformers on both sides: ours through the library's loop, and plain ones as a student would write them.

The plain nets have the shapes of the two seed systems (88.7 and 101.2 million parameters) in the most direct PyTorch: eager,
fp32, torch's defaults, a loop of a dozen lines. `tld-36` is the headline of the second: 36 pictures in 15 guided steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ours import PRECISIONS
from benchmarks.worker import Case
from nanodiffusion.config import SampleConfig, TrainConfig
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.distributed import World
from nanodiffusion.draw import draw
from nanodiffusion.fast import adapt, tune
from nanodiffusion.nets import build_net
from nanodiffusion.noise import beta_density, flow, gamma_cosine, table_density
from nanodiffusion.train import Trainer

Net = dict[str, Any]
PIXART: Net = {"name": "pixart", "in_size": 4, "channels_in": 16, "num_classes": 10}
TLD: Net = {"name": "tld", "in_size": 32, "channels_in": 4, "dim": 768, "depth": 12}
TINY: dict[str, Net] = {
    "pixart": PIXART | {"dim": 64, "depth": 2, "heads": 2},
    "tld": TLD | {"in_size": 8, "dim": 64, "depth": 2},
}

# -- plain nets ----------------------------------------------------------------------------------------------------------


class PlainPixArt(nn.Module):
    """Tokens of a latent beside one class token, adaLN-single: x (b c h w), t (b), label (b) -> (b c h w)."""

    def __init__(self, channels: int = 16, size: int = 4, dim: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patch = nn.Linear(4 * channels, dim)
        self.position = nn.Parameter(torch.randn(1, (size // 2) ** 2, dim) * 0.02)
        self.modulate, self.label = nn.Linear(dim, 6 * dim), nn.Embedding(10, dim)
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(6, dim)) for _ in range(depth))
        self.attention = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(depth))
        wide = lambda: nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.ffn, self.norms = (
            nn.ModuleList(make() for _ in range(depth)) for make in (wide, lambda: nn.LayerNorm(dim))
        )
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, 4 * channels)
        self.size, self.dim = size, dim

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = self.patch(F.unfold(x, 2, stride=2).transpose(1, 2)) + self.position
        shared = self.modulate(sinusoid(t * 1000, self.dim)).unflatten(1, (6, -1))
        token = self.label(label)[:, None]
        for table, attention, ffn, norm in zip(self.tables, self.attention, self.ffn, self.norms):
            b1, b2, g1, g2, a1, a2 = (shared + table)[:, :, None].unbind(1)
            y = g1 * norm(h) + b1
            context = torch.cat([y, token], 1)
            h = h + a1 * attention(y, context, context)[0]
            h = h + a2 * ffn(g2 * norm(h) + b2)
        return F.fold(self.out(self.norm(h)).transpose(1, 2), self.size, 2, stride=2)


class PlainBlock(nn.Module):
    """Self-attention, cross-attention to two tokens, a feed-forward layer with a depthwise convolution: (b n d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.q, self.kv = (nn.Linear(dim, k * dim, bias=False) for k in (3, 1, 2))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.up, self.down = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)
        self.depthwise = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cut = lambda x: x.unflatten(2, (-1, 64)).transpose(1, 2)
        return F.scaled_dot_product_attention(cut(q), cut(k), cut(v)).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attend(*self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.attend(self.q(self.norm2(x)), *self.kv(context).chunk(2, 2))
        side = math.isqrt(x.shape[1])
        pixels = self.norm3(x).transpose(1, 2).unflatten(2, (side, side))
        return x + self.down(F.gelu(self.depthwise(self.up(pixels)))).flatten(2).transpose(1, 2)


class PlainTLD(nn.Module):
    """Tokens of a latent that look at the noise level and a pooled text: x (b c h w), t (b), pooled (b 768) -> x0."""

    def __init__(self, channels: int = 4, size: int = 32, dim: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, 4 * channels, 2, stride=2)
        self.tokens = nn.Sequential(nn.LayerNorm(4 * channels), nn.Linear(4 * channels, dim), nn.LayerNorm(dim))
        self.position = nn.Parameter(torch.randn(1, (size // 2) ** 2, dim) * 0.02)
        self.noise = nn.Sequential(nn.Linear(256, dim), nn.GELU(), nn.Linear(dim, dim))
        self.text, self.norm = nn.Linear(768, dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(PlainBlock(dim) for _ in range(depth))
        self.out = nn.Linear(dim, 4 * channels)
        self.size = size

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
        context = self.norm(torch.stack([self.noise(sinusoid(t * 1000, 256)), self.text(pooled)], 1))
        h = self.tokens(self.patch(x).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            h = block(h, context)
        return F.fold(self.out(h).transpose(1, 2), self.size, 2, stride=2)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(b) -> (b dim)."""
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()], 1)


PLAIN: dict[str, type[nn.Module]] = {"pixart": PlainPixArt, "tld": PlainTLD}

# -- cases ---------------------------------------------------------------------------------------------------------------


def samples(net: Net, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Random latents (n c h w) and what each net is conditioned on."""
    x = torch.randn(n, net["channels_in"], net["in_size"], net["in_size"])
    return x, {"label": torch.randint(10, (n,))} if net["name"] == "pixart" else {"pooled": torch.randn(n, 768)}


@dataclass(frozen=True)
class Latents:
    """A resident set as the loop takes it, whose condition may be an embedding: x (n c h w), cond (n ...)."""

    x: Tensor
    cond: dict[str, Tensor]
    draws: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        index = index.to(self.x.device)
        return self.x[index], {name: value[index] for name, value in self.cond.items()}

    def to(self, device: torch.device | str) -> "Latents":
        return Latents(self.x.to(device), {name: value.to(device) for name, value in self.cond.items()})


def ours_train(device: str, net: Net, batch: int, precision: str) -> Case:
    """The library's loop: one call is one step of `batch` images, the average of the weights included."""
    tune(torch.device(device))
    model = adapt(build_net(**net).to(device))
    prediction, clock = ("eps", "table") if net["name"] == "pixart" else ("x0_linear", "flow")
    schedule = gamma_cosine() if net["name"] == "pixart" else flow()
    denoiser = Denoiser(model, prediction, clock, schedule, PRECISIONS[precision])
    density = table_density(schedule) if net["name"] == "pixart" else beta_density()
    config = TrainConfig(steps=10**9, batch_size=batch, lr=1e-4)
    fit = Trainer(denoiser, Latents(*samples(net, 1024)), density, config, World(device=torch.device(device)))
    return Case(lambda: fit.update().loss.item(), batch)


def plain_train(device: str, net: Net, batch: int) -> Case:
    """A dozen lines around a plain net: draw, noise, loss, AdamW, an average of the weights."""
    options = {key: net[key] for key in ("dim", "depth", "heads") if key in net}
    model = PLAIN[net["name"]](net["channels_in"], net["in_size"], **options).to(device)
    x0, cond = samples(net, 1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    averages = [p.detach().clone() for p in model.parameters()]

    def step() -> float:
        index = torch.randint(len(x0), (batch,))
        x, given = x0[index].to(device), {name: value[index].to(device) for name, value in cond.items()}
        eps, t = torch.randn_like(x), torch.rand(batch, device=device)
        s = t[:, None, None, None]
        if net["name"] == "pixart":
            out, target = model(torch.sqrt(1 - s) * x + torch.sqrt(s) * eps, t, **given), eps
        else:
            out, target = model((1 - s) * x + s * eps, t, **given), x
        loss = F.mse_loss(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, p in zip(averages, model.parameters()):
                average.lerp_(p, 1e-3)
        return loss.item()

    return Case(step, batch)


def ours_sample(device: str, precision: str, n: int = 36, steps: int = 15, net: Net = TLD) -> Case:
    """n pictures' latents in `steps` guided steps of DPM-Solver++(2M)."""
    tune(torch.device(device))
    model = adapt(build_net(**net).to(device, PRECISIONS[precision]).requires_grad_(False))
    denoiser, seeds = Denoiser(model, "x0_linear", "flow"), count(step=n)
    config = SampleConfig(ladder={"name": "power"}, steps=steps, guidance=6.0)
    cond = {"pooled": torch.randn(n, 768, device=device)}

    def run() -> None:
        first = next(seeds)
        list(draw(denoiser, model.sample_shape, flow(), config, range(first, first + n), cond))  # type: ignore[arg-type]

    return Case(run)


def plain_sample(device: str, n: int = 36, steps: int = 15, net: Net = TLD) -> Case:
    """The same with the weighted average of the seed's README: x = ((s - s') x0 + s' x) / s."""
    options = {key: net[key] for key in ("dim", "depth") if key in net}
    model = PlainTLD(net["channels_in"], net["in_size"], **options).to(device).eval()
    text = torch.cat([torch.randn(n, 768, device=device), torch.zeros(n, 768, device=device)])

    @torch.no_grad()
    def run() -> None:
        x = torch.randn(n, net["channels_in"], net["in_size"], net["in_size"], device=device)
        levels = [0.99, *(1 - k / steps for k in range(1, steps + 1))]
        for s, following in pairwise(levels):
            t = torch.full((2 * n,), s, device=device)
            wanted, nothing = model(torch.cat([x, x]), t, text).chunk(2)
            x = ((s - following) * (6 * wanted - 5 * nothing) + following * x) / s

    return Case(run)


def train_cases(name: str, net: Net, batch: int) -> dict[str, Callable[[str], Case]]:
    """Ours in both precisions and the plain one."""
    ours = {f"{name}-{p}": partial(ours_train, net=net, batch=batch, precision=p) for p in ("fp32", "bf16")}
    return ours | {f"{name}-plain": partial(plain_train, net=net, batch=batch)}


CASES: dict[str, Callable[[str], Case]] = {
    **train_cases("pixart", PIXART, 256),
    **train_cases("tld", TLD, 8),
    "tld-36-fp32": partial(ours_sample, precision="fp32"),
    "tld-36-bf16": partial(ours_sample, precision="bf16"),
    "tld-36-plain": plain_sample,
}
