"""Our side: the same work through the library, as `nanodiffusion train` and a script would do it."""

import math
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.peers import SHAPE, STEPS
from benchmarks.worker import Case
from nanodiffusion.compat import smalldiffusion as compat
from nanodiffusion.config import SampleConfig, TrainConfig
from nanodiffusion.data import TensorData, swiss_roll
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.distributed import World
from nanodiffusion.draw import draw
from nanodiffusion.fast import adapt, tune
from nanodiffusion.nets import build_net
from nanodiffusion.noise import log_linear, table_density
from nanodiffusion.sampler import STEPS as SOLVERS
from nanodiffusion.sampler import sample
from nanodiffusion.train import Trainer

SWISSROLL = {"name": "mlp", "hidden": [16, 128, 128, 128, 128, 16]}
FASHION: dict[str, dict[str, Any]] = {
    "unet": {"in_size": 28, "channels_in": 1, "channels": 64, "multipliers": [1, 1, 2], "attention": [14]},
    "dit": {"in_size": 28, "channels_in": 1, "dim": 192, "depth": 6, "heads": 6},
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def roll(points: int) -> TensorData:
    """The README's spiral."""
    return swiss_roll(points, math.pi / 2, 5 * math.pi)


def trainer(net: torch.nn.Module, data: TensorData, batch: int, device: str, precision: str = "fp32", **options: Any):
    """The library's training loop on a net, one level of 200 per sample."""
    denoiser = Denoiser(net, precision=PRECISIONS[precision])
    config = TrainConfig(steps=10**9, batch_size=batch, **options)
    return Trainer(denoiser, data, table_density(log_linear()), config, World(device=torch.device(device)))


def swissroll(device: str, points: int = 100) -> Case:
    """The recipe `swissroll` through `Trainer`, the process set up as the command line does it; tuned for large batches."""
    tune(torch.device(device), "highest" if points < 1000 else "auto")
    fit = trainer(build_net(**SWISSROLL), roll(points), points, device, lr=1e-3, ema=[])
    return Case(lambda: fit.update().loss.item())


def swissroll_compat(device: str, points: int = 100) -> Case:
    """The same script as the peer's with its import line changed."""
    loader = DataLoader(compat.Swissroll(math.pi / 2, 5 * math.pi, points), batch_size=2048)
    model = compat.TimeInputMLP(hidden_dims=(16, 128, 128, 128, 128, 16)).to(device)
    steps = compat.training_loop(loader, model, compat.ScheduleLogLinear(N=200), epochs=10**9)
    return Case(lambda: next(steps).loss.item())


def swissroll_sample(device: str) -> Case:
    """20 accelerated steps of 2,000 points."""
    denoiser = Denoiser(build_net(**SWISSROLL)).to(device)
    solver = {"name": "gradient_estimation", "gam": 2.0, "mu": 0.0}
    config = SampleConfig(sampler=solver, ladder={"name": "trailing"}, steps=20)
    seeds = count()
    return Case(lambda: list(draw(denoiser, (2,), log_linear(), config, range(next(seeds), 2000))))


def fashion(device: str, net: str, batch: int, precision: str = "fp32", tuned: bool = True) -> Case:
    """Training on noise of the pictures' shape: one call is one step of `batch` images, average of the weights included."""
    if tuned:
        tune(torch.device(device))
    model = build_net(net, **FASHION[net])
    data = TensorData(torch.randn(6000, 1, 28, 28))
    fit = trainer(adapt(model) if tuned else model, data, batch, device, precision, lr=3e-4)
    return Case(lambda: fit.update().loss.item(), batch)


def sampler(device: str, solver: str) -> Case:
    """A solver stepped without a network."""
    x, ladder, step = torch.randn(*SHAPE, device=device), log_linear().sigmas.flip(0)[:: 200 // STEPS], SOLVERS[solver]
    ladder = torch.cat([ladder, ladder.new_zeros(1)])
    still = torch.zeros_like(x)
    calls = {"heun": 2, "rk4": 4}.get(solver, 1) * (STEPS - 1) + 1

    def run() -> None:
        for _ in sample(lambda x, sigma: still, x, ladder, step):
            pass

    return Case(run, calls)


CASES: dict[str, Callable[[str], Case]] = {
    "swissroll": swissroll,
    "swissroll-compat": swissroll_compat,
    "swissroll-2048": partial(swissroll, points=2048),
    "swissroll-2048-compat": partial(swissroll_compat, points=2048),
    "swissroll-sample": swissroll_sample,
    "unet-fp32": partial(fashion, net="unet", batch=32),
    "unet-bf16": partial(fashion, net="unet", batch=32, precision="bf16"),
    "unet-fp32-untuned": partial(fashion, net="unet", batch=32, tuned=False),
    "dit-fp32": partial(fashion, net="dit", batch=64),
    "dit-bf16": partial(fashion, net="dit", batch=64, precision="bf16"),
    "dit-fp32-untuned": partial(fashion, net="dit", batch=64, tuned=False),
    **{f"sampler-{name}": partial(sampler, solver=name) for name in SOLVERS},
}
