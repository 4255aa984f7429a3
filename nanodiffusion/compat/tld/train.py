"""tld.train's main: a net fitted to arrays of latents and texts by the core's Runner, in processes of any launcher.

    notebook_launcher(main, (model_config, data_config), num_processes=2)      # accelerate's
    torchrun --nproc-per-node=2 script.py                                      # with main(model_config, data_config) in it

The run lies in runs/NAME, as the core's do: NAME is run_id, or made from the configuration, and what was stopped goes on.
"""

import hashlib
import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanodiffusion.compat.tld import configs
from nanodiffusion.compat.tld.configs import DataConfig, DenoiserConfig, TrainConfig, VaeConfig
from nanodiffusion.compat.tld.data import download_and_process_data
from nanodiffusion.compat.tld.denoiser import read_state
from nanodiffusion.compat.tld.diffusion import CLIPS
from nanodiffusion.config import Config, read_config
from nanodiffusion.data.encoded import read_array
from nanodiffusion.distributed import World, pick_device, world
from nanodiffusion.errors import UserError
from nanodiffusion.nets.tld import LEGACY
from nanodiffusion.runner import Runner
from nanodiffusion.tensors import save_tensors

__all__ = ["DataConfig", "ModelConfig", "download_and_process_data", "main", "run_config"]

DROPPED = 0.15  # share of texts that are zeros
EVAL: dict[str, Any] = {"n": 16, "steps": 40, "guidance": 4.5}  # of a run's pictures


@dataclass
class ModelConfig(configs._Config):
    """The options of the system's first versions, which `main` takes beside a DataConfig."""

    embed_dim: int = 512
    n_layers: int = 6
    clip_embed_size: int = 768
    scaling_factor: float = 8
    patch_size: int = 2
    image_size: int = 32
    n_channels: int = 4
    dropout: float = 0
    mlp_multiplier: int = 4
    batch_size: int = 128
    class_guidance: float = 3
    lr: float = 3e-4
    n_epoch: int = 100
    alpha: float = 0.999
    noise_embed_dims: int = 128
    diffusion_n_iter: int = 35
    from_scratch: bool = True
    run_id: str = ""
    model_name: str = ""
    beta_a: float = 0.75
    beta_b: float = 0.75
    save_and_eval_every_iters: int = 1000
    compile: bool = False
    vae_name: str = configs.SDXL_VAE

    def nested(self, data: DataConfig) -> configs.ModelConfig:
        """The same as the later versions have it."""
        same = lambda cls: {name: getattr(self, name) for name in cls.__dataclass_fields__ if hasattr(self, name)}
        net = DenoiserConfig(**same(DenoiserConfig), text_emb_size=self.clip_embed_size)
        return configs.ModelConfig(
            data, net, TrainConfig(**same(TrainConfig)), VaeConfig(self.scaling_factor, self.vae_name)
        )


def run_config(config: configs.ModelConfig, processes: int = 1, cuda: bool = False) -> Config:
    """The core's recipe. batch_size is each process's, as accelerate has it; on a GPU products are in float16.

    UserError: no latents, or values out of range.
    """
    train, data = config.train_config, config.data_config
    count, batch = len(read_array(Path(data.latent_path))), train.batch_size * processes
    steps = train.n_epoch * -(-count // max(batch, 1))
    every = train.save_and_eval_every_iters
    options: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch,
        "lr": train.lr,
        "optimizer": {"name": "Adam"},
        "ema": [{"name": "constant", "decay": train.alpha}],
        "cond_dropout": DROPPED,
        "compile": train.compile and cuda,
        "precision": "fp16" if cuda else "fp32",
        "data": _data(config),
        "codec": config.vae_cfg.vae_name,
        "text": CLIPS.get(config.clip_cfg.clip_model_name, config.clip_cfg.clip_model_name),
        "net": _net(config.denoiser_config),
        "prediction": "x0_linear",
        "clock": "flow",
        "schedule": {"name": "flow"},
        "density": {"name": "beta", "a": train.beta_a, "b": train.beta_b},
        "log_every": min(100, steps),
        "sample_every": every,
        "checkpoint_every": every,
        "trackers": ["wandb"] if train.use_wandb and importlib.util.find_spec("wandb") else [],
        "sample": {"sampler": {"name": "dpmpp_2m"}, "ladder": {"name": "power"}, **EVAL},
    }
    return read_config(options | {"name": train.run_id or _name(config, processes)})


def _data(config: configs.ModelConfig) -> dict[str, Any]:
    data = config.data_config
    paths = {"path": data.latent_path, "text_path": data.text_emb_path, "val_path": data.val_path}
    return {"name": "latents", **paths, "scale": 1 / config.vae_cfg.vae_scale_factor}


def _net(config: DenoiserConfig) -> dict[str, Any]:
    sizes = {"in_size": config.image_size, "channels_in": config.n_channels, "patch": config.patch_size}
    widths = {"dim": config.embed_dim, "depth": config.n_layers, "ffn_ratio": config.mlp_multiplier}
    inputs = {"noise_features": config.noise_embed_dims, "text_dim": config.text_emb_size}
    return {"name": "tld", **sizes, **widths, **inputs, "dropout": config.dropout, **(LEGACY if config.legacy else {})}


def _name(config: configs.ModelConfig, processes: int) -> str:
    return "tld-" + hashlib.sha256(f"{processes} {config.json()}".encode()).hexdigest()[:8]


def main(config: Any, data_config: DataConfig | None = None) -> None:
    """Train: main(configs.ModelConfig), or main(ModelConfig, DataConfig) as in the first versions.

    Every process of a launcher calls it. With model_name the averaged weights are also written there, as safetensors.
    UserError: no data, latents of another size than the net, values out of range.
    """
    if data_config is not None:
        config = config.nested(data_config)
    if not hasattr(config, "data_config"):
        raise UserError("a run needs data", key="data_config", fix="main(model_config, data_config)")
    cuda = pick_device().type == "cuda"
    with world() as here:
        recipe = run_config(config, here.size, cuda)
        _train(replace(recipe, init_from=_start(config.train_config, recipe, here)), config.train_config, here)


def _train(recipe: Config, train: TrainConfig, here: World) -> None:
    runner = Runner(recipe, here, print if here.first else lambda line: None)
    runner.run()
    if train.save_model and train.model_name and here.first:
        file = Path(train.model_name).with_suffix(".safetensors")
        save_tensors(file, runner.trainer.emas[0].tensors, {"config": asdict(recipe)})
        print(f"wrote {file}")


def _start(train: TrainConfig, recipe: Config, here: World) -> str:
    """A file of the weights to start from, by the net's own names; "" for fresh ones."""
    if train.from_scratch:
        return ""
    if not train.model_name:
        raise UserError(
            "no weights to go on from", key="model_name", fix="model_name=FILE.safetensors or a run's folder"
        )
    file = Path(recipe.out) / f"{recipe.name}.start.safetensors"
    if here.first:
        save_tensors(file, read_state(train.model_name), {})
    here.barrier()
    return str(file)
