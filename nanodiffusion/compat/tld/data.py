"""tld.data: addresses and captions to arrays of latents and texts, and the helpers that make and undo them."""

import csv
import json
import urllib.parse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodiffusion.compat import codecs
from nanodiffusion.compat.tld.configs import SDXL_VAE, DataDownloadConfig
from nanodiffusion.compat.tld.diffusion import CLIPS, download_file, encode_text
from nanodiffusion.data.encoded import dequantise, map_array, quantise, read_captions, read_manifest
from nanodiffusion.distributed import World, pick_device
from nanodiffusion.encode import EncodeConfig, Encoder
from nanodiffusion.errors import UserError
from nanodiffusion.show import atomic

__all__ = [
    "DataConfiguration",
    "DataDownloadConfig",
    "decode_latents",
    "dequantize_latents",
    "download_and_process_data",
    "encode_image",
    "encode_text",
    "main",
    "quantize_latents",
]

DataConfiguration = DataDownloadConfig
ROWS = 4096  # rows of an array that are worked on at a time
FETCH = {"processes": 8, "threads": 64}


@torch.no_grad()
def encode_image(img: Tensor, vae: Any) -> Tensor:
    """Unscaled latents, a sample of the posterior, on the CPU: img (b 3 H W) in [0, 1] -> (b c h w)."""
    return codecs.encode(vae, img * 2 - 1).cpu()


@torch.no_grad()
def decode_latents(out_latents: Tensor, vae: Any) -> Tensor:
    """Images of unscaled latents, on the CPU: (b c h w) -> (b 3 H W) in [0, 1]."""
    return ((codecs.decode(vae, out_latents) + 1) / 2).clamp(0, 1).cpu()


def quantize_latents(lat: Tensor, clip_val: float = 20) -> Tensor:
    """The nearest of 256 levels from -clip_val to clip_val: (...) -> (...) uint8."""
    return quantise(lat, _positive(clip_val))


def dequantize_latents(lat: Tensor, clip_val: float = 20) -> Tensor:
    """The values of levels: (...) uint8 -> (...) float32."""
    if lat.dtype != torch.uint8:
        raise UserError("these are no levels", key="lat", expected="uint8", found=lat.dtype)
    return dequantise(lat, _positive(clip_val))


def _positive(clip_val: float) -> float:
    if not clip_val > 0:
        raise UserError("the range must be positive", key="clip_val", found=clip_val)
    return clip_val


def download_and_process_data(
    latent_save_path: str = "latents",
    raw_imgs_save_path: str = "raw_imgs",
    csv_path: str = "imgs.csv",
    image_size: int = 256,
    bs: int = 64,
    caption_col: str = "captions",
    url_col: str = "url",
    download_data: bool = True,
    number_sample_per_shard: int = 10000,
    vae_name: str = SDXL_VAE,
    clip_model_name: str = "ViT-L/14",
) -> None:
    """A table of addresses and captions to shards in raw_imgs_save_path, and those to arrays in latent_save_path.

    image_latents.npy: unscaled latents (n c h w) float16; text_encodings.npy (n d) float16; metadata.csv: a text a row;
    encoded/: the same as the core has it. Without download_data the shards are there. UserError: they are not, or the
    table, VAE or text encoder.
    """
    if download_data:
        asked = {"url": url_col, "caption": caption_col, "size": image_size, "per_shard": number_sample_per_shard}
        _prepare(csv_path, raw_imgs_save_path, {**asked, **FETCH})
    where = Path(latent_save_path)
    config = EncodeConfig(
        str(raw_imgs_save_path),
        codec=vae_name,
        text=CLIPS.get(clip_model_name, clip_model_name),
        size=image_size,
        batch=bs,
        quantise=False,
        sample="posterior",
    )
    Encoder(config, where / "encoded", World(device=pick_device())).run()
    _export(where)


def _prepare(table: str, out: str, options: dict[str, Any]) -> None:
    """`nanodiffusion prepare TABLE out=DIR ...`."""
    from nanodiffusion.cli.prepare import main as command

    if command(Namespace(words=[str(table), f"out={out}", *(f"{key}={value}" for key, value in options.items())])):
        raise UserError("the pictures could not all be fetched", file=table, fix="the same once more goes on from here")


def _export(where: Path) -> None:
    """The arrays of where/encoded in that system's files; latents lose the scale that the core keeps them at."""
    folder = where / "encoded"
    manifest = read_manifest(folder)
    scale, shift = (manifest["codec"][key] for key in ("scale", "shift"))
    x = map_array(folder / "latents.npy")
    with atomic(where / "image_latents.npy") as part:
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=tuple(x.shape))
        for i in range(0, len(x), ROWS):
            out[i : i + ROWS] = (x[i : i + ROWS].float() / scale + shift).numpy()
        out.flush()
    with atomic(where / "text_encodings.npy") as part, open(part, "wb") as file:
        np.save(file, map_array(folder / "pooled.npy").numpy(), allow_pickle=False)
    _write_texts(where / "metadata.csv", read_captions(folder / "captions.jsonl"))


def _write_texts(path: Path, texts: Sequence[str]) -> None:
    with atomic(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])


def _table(config: DataDownloadConfig) -> str:
    """The table's file; one that has an address is fetched to initial_csv_path, with its own ending."""
    if "://" not in config.data_link:
        return config.data_link
    ending = Path(urllib.parse.urlsplit(config.data_link).path).suffix or ".csv"
    file = Path(config.initial_csv_path).with_suffix(ending)
    if not file.is_file():
        download_file(config.data_link, file)
    return str(file)


def main(config: DataDownloadConfig) -> None:
    """Everything that a DataDownloadConfig says, which is kept as config.json beside the arrays. UserError: a drive."""
    if config.use_drive:
        fix = "mount it, and give its folder as latent_save_path"
        raise UserError("no drive is mounted here", key="use_drive", expected=False, fix=fix)
    where = Path(config.latent_save_path)
    where.mkdir(parents=True, exist_ok=True)
    with atomic(where / "config.json") as part:
        part.write_text(json.dumps(asdict(config), default=str, indent=1))
    download_and_process_data(
        config.latent_save_path,
        config.raw_imgs_save_path,
        _table(config) if config.download_data else config.data_link,
        config.image_size,
        config.batch_size,
        config.caption_col,
        config.url_col,
        config.download_data,
        config.number_sample_per_shard,
        config.vae_cfg.vae_name,
        config.clip_cfg.clip_model_name,
    )
