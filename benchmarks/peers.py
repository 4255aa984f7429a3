"""The other sides: smalldiffusion's own loop, nets and sampler, and diffusers' schedulers, used as their authors say."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.worker import Case
from tests.reference import smalldiffusion

STEPS, SHAPE = 50, (4, 4, 8, 8)  # of a sampler run without a network


def loop(model: Any, data: Any, schedule: Any, batch: int, lr: float, device: str, drop_last: bool = False) -> Case:
    """smalldiffusion's training loop; it yields before the update, so a call ends one step and begins the next."""
    from accelerate import Accelerator

    loader = DataLoader(data, batch_size=batch, shuffle=drop_last, drop_last=drop_last)
    accelerator = Accelerator(cpu=device == "cpu")
    steps = smalldiffusion().training_loop(loader, model, schedule, accelerator=accelerator, epochs=10**9, lr=lr)
    return Case(lambda: next(steps).loss.item())


def swissroll_model() -> Any:
    """The network of smalldiffusion's README."""
    return smalldiffusion().TimeInputMLP(hidden_dims=(16, 128, 128, 128, 128, 16))


def swissroll(device: str, points: int = 100) -> Case:
    """The README's training: its loader of 2,048 holds as many points as the set has."""
    sd = smalldiffusion()
    data = sd.Swissroll(np.pi / 2, 5 * np.pi, points)
    return loop(swissroll_model(), data, sd.ScheduleLogLinear(N=200), 2048, 1e-3, device)


def swissroll_sample(device: str) -> Case:
    """20 accelerated steps of 2,000 points."""
    sd = smalldiffusion()
    model, sigmas = swissroll_model().to(device), sd.ScheduleLogLinear(N=200).sample_sigmas(20)
    return Case(lambda: list(sd.samples(model, sigmas, gam=2, batchsize=2000)))


def in_bfloat16(base: type) -> type:
    """A model class whose forward pass runs under autocast, as accelerate's mixed precision does."""

    def forward(self: Any, x: torch.Tensor, sigma: torch.Tensor, cond: Any = None) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return base.forward(self, x, sigma, cond=cond).float()

    return type(f"{base.__name__}Bf16", (base,), {"forward": forward})


def fashion_model(net: str, bf16: bool = False) -> Any:
    """The U-Net (4,424,833 parameters) or DiT (4,149,700) of smalldiffusion's Fashion-MNIST examples."""
    sd = smalldiffusion()
    from smalldiffusion.model_dit import DiT
    from smalldiffusion.model_unet import Unet

    cls = sd.Scaled(Unet if net == "unet" else DiT)
    cls = in_bfloat16(cls) if bf16 else cls
    if net == "unet":
        return cls(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
    return cls(in_dim=28, channels=1, patch_size=2, depth=6, head_dim=32, num_heads=6)


def fashion(device: str, net: str, batch: int, bf16: bool = False) -> Case:
    """Training on noise of the pictures' shape: one call is one step of `batch` images."""
    images, schedule = torch.randn(6000, 1, 28, 28), smalldiffusion().ScheduleLogLinear(N=200)
    case = loop(fashion_model(net, bf16), images, schedule, batch, 3e-4, device, drop_last=True)
    return Case(case.run, batch)


def scheduler(device: str, name: str, **options: Any) -> Case:
    """A scheduler of diffusers, stepped without a network."""
    import diffusers

    schedule, x = getattr(diffusers, name)(**options), torch.randn(*SHAPE, device=device)

    def run() -> None:
        schedule.set_timesteps(STEPS)
        state = x * schedule.init_noise_sigma
        for t in schedule.timesteps:
            state = schedule.step(schedule.scale_model_input(state, t), t, state).prev_sample

    schedule.set_timesteps(STEPS)
    return Case(torch.no_grad()(run), len(schedule.timesteps))


SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddpm": {"name": "DDPMScheduler"},
    "ddim": {"name": "DDIMScheduler"},
    "euler": {"name": "EulerDiscreteScheduler"},
    "euler_ancestral": {"name": "EulerAncestralDiscreteScheduler"},
    "heun": {"name": "HeunDiscreteScheduler"},
    "lms": {"name": "LMSDiscreteScheduler"},
    "dpmpp_2m": {"name": "DPMSolverMultistepScheduler"},
    "unipc": {"name": "UniPCMultistepScheduler"},
}

CASES: dict[str, Callable[[str], Case]] = {
    "swissroll": swissroll,
    "swissroll-2048": partial(swissroll, points=2048),
    "swissroll-sample": swissroll_sample,
    "unet-fp32": partial(fashion, net="unet", batch=32),
    "unet-bf16": partial(fashion, net="unet", batch=32, bf16=True),
    "dit-fp32": partial(fashion, net="dit", batch=64),
    "dit-bf16": partial(fashion, net="dit", batch=64, bf16=True),
    **{f"sampler-{key}": partial(scheduler, **options) for key, options in SCHEDULERS.items()},
}
