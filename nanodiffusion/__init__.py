"""nanodiffusion: diffusion models on one contract, D(x, sigma, cond) -> E[x0 | x].

Names below are imported when they are first used, so `import nanodiffusion` does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "denoiser": "CLOCKS DISTANCES PREDICTIONS WEIGHTS Denoiser Prediction edm",
    "noise": (
        "DENSITIES LADDERS SCHEDULES Schedule cosine_beta ddpm exponential flow flow_uniform gamma_cosine gamma_linear "
        "gamma_sigmoid given_sigmas given_timesteps karras ldm leading linspace log_linear log_normal log_uniform "
        "logit_normal shifted_flow sigmoid_beta table_density trailing user_sigmas"
    ),
    "guidance": "autoguide bind cfg loss_guidance unconditional",
    "sampler": "STEPS ImageNoise State sample start",
    "nets": "MLP NETS DiT DiTConfig IdealDenoiser MLPConfig UNet UNetConfig build_net net_flops net_size",
    "data": "DATASETS TensorData load_data swiss_roll tree",
    "train": "Trainer fit",
    "ema": "EMA PROFILES reconstruct",
    "pretrained": (
        "Bundle load_adapter load_codec load_controlnet load_pretrained load_tiny load_tokens replace_part save_diffusers "
        "save_part save_single"
    ),
    "tasks": "AdapterInput Control GenerateConfig generate pictures",
    "lora": "add_lora new_lora read_lora save_lora",
    "config": "Config SampleConfig TrainConfig read_config",
    "run": "Run load_run",
    "runner": "Runner",
    "show": "grid point_cloud save_gif save_mp4 save_png schedule_plot strip trajectory_frames",
    "report": "write_report",
    "errors": "UserError",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted([*_MODULE_OF, "__version__"])  # type: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nanodiffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanodiffusion.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
