"""apapiu's transformer_latent_diffusion: its README as a script, in its names on this library.

    python examples/transformer_latent_diffusion.py arrays      shards in raw_imgs/ to arrays of latents and texts
    python examples/transformer_latent_diffusion.py train       the README's training on 2 processes
    python examples/transformer_latent_diffusion.py draw "a cute grey great owl"
    python examples/transformer_latent_diffusion.py tiny VAE    all of it in seconds on a CPU, on pictures made here

`nanodiffusion prepare urls.parquet out=raw_imgs` fetches pictures, `download_and_process_data` does both. In the environment,
VAE and TEXT name other encoders than SDXL's and CLIP's. The same with our commands: `nanodiffusion encode`,
`nanodiffusion train tld` (under torchrun for several processes) and `nanodiffusion sample RUN text="..."`.
"""

import csv
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nanodiffusion.compat.tld.configs import ClipConfig, DenoiserConfig, DenoiserLoad, LTDConfig, VaeConfig
from nanodiffusion.compat.tld.data import download_and_process_data, encode_text
from nanodiffusion.compat.tld.diffusion import DiffusionTransformer
from nanodiffusion.compat.tld.train import DataConfig, ModelConfig, main
from nanodiffusion.show import grid, save_png

VAE, TEXT = os.environ.get("VAE", "madebyollin/sdxl-vae-fp16-fix"), os.environ.get("TEXT", "ViT-L/14")
SIZES: dict[str, Any] = {"embed_dim": 512, "n_layers": 6}  # see ModelConfig for more
LOOK: dict[str, Any] = {"image_size": 256}
WEIGHTS = "tld.safetensors"
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}


def arrays() -> None:
    """Latents and texts of the shards in raw_imgs, and the first eight texts to draw pictures for."""
    download_and_process_data("latents", "raw_imgs", download_data=False, vae_name=VAE, clip_model_name=TEXT, **LOOK)
    np.save("val_encodings.npy", np.load("latents/text_encodings.npy")[:8].astype(np.float32))


def train(processes: int = 2) -> None:
    """The README's training. Without accelerate: `main(model_config, data_config)`, alone or in a script under torchrun."""
    from accelerate import notebook_launcher

    data_config = DataConfig(
        latent_path="latents/image_latents.npy",
        text_emb_path="latents/text_encodings.npy",
        val_path="val_encodings.npy",
    )
    model_config = ModelConfig(**SIZES, vae_name=VAE, model_name=WEIGHTS)
    notebook_launcher(main, (model_config, data_config), num_processes=processes)


def config() -> LTDConfig:
    """What the trained net, the VAE and the text encoder are."""
    flat = ModelConfig(**SIZES)
    net = DenoiserConfig(
        image_size=flat.image_size,
        noise_embed_dims=flat.noise_embed_dims,
        embed_dim=flat.embed_dim,
        n_layers=flat.n_layers,
        text_emb_size=flat.clip_embed_size,
    )
    load = DenoiserLoad(local_filename=WEIGHTS)
    return LTDConfig(net, load, VaeConfig(vae_name=VAE), ClipConfig(TEXT))


def draw(prompt: str, n_iter: int = 15) -> None:
    """A picture of a prompt, and a row of them on the way from its noise to another's."""
    made = DiffusionTransformer(config())
    made.generate_image_from_text(prompt, num_imgs=4, n_iter=n_iter).save("cat.png")
    side = made.diffuser.model.image_size
    ends = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(11))
    angles = torch.linspace(0, torch.pi / 2, 5).view(-1, 1, 1, 1)
    way = angles.cos() * ends[0] + angles.sin() * ends[1]  # unit noise all the way
    labels = encode_text([prompt] * 5, made.clip_model)
    images, _ = made.diffuser.generate(
        labels, n_iter, 5, class_guidance=6, img_size=side, seeds=way, sharp_f=0, bright_f=0
    )
    save_png(grid(images, columns=5), "interpolated.png")


@torch.no_grad()
def by_hand(prompt: str, n_iter: int = 15, guidance: float = 6) -> None:
    """The README's loop, each picture a weighted average of the last one and of the predicted one; and the library's."""
    made = DiffusionTransformer(config())
    net, side = made.diffuser.model, made.diffuser.model.image_size
    labels = encode_text([prompt], made.clip_model).to(made.diffuser.device)
    new_img = seeds = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(made.diffuser.device)
    noise_levels = [0.99, *(1 - i / n_iter for i in range(1, n_iter))]

    def predict_x_zero(img: torch.Tensor, label: torch.Tensor, noise: float) -> torch.Tensor:
        level = torch.full((1, 1), noise, device=img.device)
        return guidance * net(img, level, label) + (1 - guidance) * net(img, level, torch.zeros_like(label))

    for curr_noise, next_noise in pairwise(noise_levels):
        x0_pred = predict_x_zero(new_img, labels, curr_noise)
        new_img = ((curr_noise - next_noise) * x0_pred + next_noise * new_img) / curr_noise
    x0 = predict_x_zero(new_img, labels, noise_levels[-1])
    options = {"num_imgs": 1, "img_size": side, "class_guidance": guidance, "sharp_f": 0, "bright_f": 0}
    image, ours = made.diffuser.generate(labels, n_iter, seeds=seeds, use_ddpm_plus=False, **options)
    save_png(grid(image), "ddim.png")
    print(f"DDIM by hand differs by {float((ours - x0).abs().max()):.1e} from DiffusionGenerator's")


def pictures() -> None:
    """raw_imgs/: squares of three colours and captions, as shards."""
    folder = Path("pictures")
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for i, name in enumerate(list(COLOURS) * 4):
            picture = Image.new("RGB", (16, 16), "white")
            picture.paste(COLOURS[name], (i % 8, i % 5, i % 8 + 7, i % 5 + 7))
            picture.save(folder / f"{i}.png")
            rows.writerow([f"{i}.png", f"a {name} square"])


def tiny(vae: str) -> None:
    """Everything, small."""
    global VAE, TEXT, SIZES, LOOK
    VAE, TEXT, LOOK = vae, "words:16", {"image_size": 16, "bs": 4}
    SIZES = {"embed_dim": 64, "n_layers": 1, "image_size": 8, "clip_embed_size": 16, "noise_embed_dims": 16}
    pictures()
    from nanodiffusion.cli import main as command

    command(["prepare", "pictures", "out=raw_imgs"])
    arrays()
    SIZES |= {"batch_size": 6, "n_epoch": 2}
    train()
    draw("a red square", n_iter=4)
    by_hand("a red square", n_iter=5)


COMMANDS: dict[str, tuple[Any, ...]] = {  # what each does, and is told
    "arrays": (arrays,),
    "train": (train,),
    "draw": (draw, "PROMPT"),
    "tiny": (tiny, "VAE"),
}

if __name__ == "__main__":
    what, *told = sys.argv[1:] or [""]
    if what not in COMMANDS or len(told) != len(COMMANDS[what]) - 1:
        usages = (" ".join([name, *row[1:]]) for name, row in COMMANDS.items())
        sys.exit(f"usage: python {sys.argv[0]} {' | '.join(usages)}")
    COMMANDS[what][0](*told)
