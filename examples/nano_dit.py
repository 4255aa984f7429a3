"""nano256's nano-diffusion: its commands in ours, and its classes in a script, which trains, draws and shows how it drew.

    python preprocessing/encode_cifar10.py        nanodiffusion encode cifar10 codec=ostris/vae-kl-f8-d16 \\
                                                      flip=true out=data/cifar10-latents
    python train/train.py                         nanodiffusion train cifar10-latent
    mlflow server --host 127.0.0.1 --port 8080    the same, and nanodiffusion train cifar10-latent trackers=[mlflow]
                                                      with MLFLOW_TRACKING_URI=http://127.0.0.1:8080 in the environment
    python train/train.py --config-name=config_debug    nanodiffusion train --config-name=config_debug
    python train/train.py batch_size=128          nanodiffusion train cifar10-latent batch_size=128
    notebooks/model_inference.ipynb               notebooks/inference.ipynb, or
                                                      nanodiffusion sample RUN grid=grid.png trajectories=trajectories.png
    inference/generate_samples.py                 nanodiffusion sample RUN class=classes.yaml out=images

    python examples/nano_dit.py                   handwritten digits by class on a CPU, in about three minutes

It leaves grid.png (a column a class), trajectories.png (a row a class, from noise to picture) and the run in models/digits.
In the environment, EPOCHS (150) and WIDTH (96) make it longer and the model larger.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from nanodiffusion.compat.nano_dit import (
    CosineNoiseScheduler,
    DDIMSampler,
    EMAModel,
    NanoDiffusionModel,
    NanoDiffusionTrainer,
    get_available_device,
    get_kwargs,
    slugify,
)
from nanodiffusion.data import load_data
from nanodiffusion.show import evenly, grid, save_png

epochs, width = int(os.environ.get("EPOCHS", "150")), int(os.environ.get("WIDTH", "96"))
device = get_available_device()

config: dict[str, Any] = {
    "experiment_name": "Digits",
    "batch_size": 64,
    "num_timesteps": 1000,
    "model": {
        "patch_size": 2,
        "hidden_dim": width,
        "num_attention_heads": 4,
        "num_dit_blocks": 4,
        "activation": "SiLU",
        "normalization_layer": "RMSNorm",
        "num_context_classes": 10,
        "in_channels": 1,
        "device": device,
    },
    "noise_scheduler": {"type": "CosineNoiseScheduler", "num_timesteps": 1000},
    "ema_model": {"decay": 0.998, "warmup_steps": 100},
    "optimizer": {"type": "AdamW", "lr": 2e-3, "weight_decay": 1e-4},
    "trainer": {"num_sampling_steps": 50, "validation_interval": 10, "save_every_n_epochs": 10, "patience": 20},
}


def loader(split: str) -> DataLoader:
    """Batches of (images (b 1 8 8) in [-1, 1], classes (b))."""
    data = load_data("digits", split)
    images, cond = data.batch(torch.arange(len(data)))
    pairs = TensorDataset(images.to(device), cond["label"].to(device))
    return DataLoader(pairs, batch_size=config["batch_size"], shuffle=split == "train")


def main() -> None:
    """Train, then draw every class."""
    torch.manual_seed(0)
    model = NanoDiffusionModel(config["model"])
    scheduler = CosineNoiseScheduler(config["noise_scheduler"])
    ema = EMAModel(model, **config["ema_model"])
    optimizer = torch.optim.AdamW(model.parameters(), **get_kwargs(config["optimizer"]))
    train, held_out = loader("train"), loader("test")
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(train))
    folder = Path("models") / slugify(config["experiment_name"])
    trainer = NanoDiffusionTrainer(model, scheduler, folder, ema_model=ema, **config["trainer"])
    trainer.train(epochs, optimizer, lr_scheduler, train, held_out)

    sampler = DDIMSampler(ema.model, scheduler, config["num_timesteps"], 50)
    x_T = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    classes = torch.arange(10, device=device).repeat(10)
    x0, noisy = sampler.sample(x_T, classes, return_intermediates=True)
    save_png(grid(x0.cpu(), columns=10), "grid.png")
    steps = torch.stack([x[:10].cpu() for x in evenly(noisy, 11)], dim=1)  # (10 classes, 11 steps, 1 8 8)
    save_png(grid(steps.flatten(0, 1), columns=11), "trajectories.png")
    print("wrote grid.png and trajectories.png")


if __name__ == "__main__":
    main()
