"""Write nanodiffusion/pretrained/keys/*.json: every tensor of the published checkpoints, from the references on `meta`.

    python tests/make_keys.py            # writes; a diff shows what changed
    python tests/make_keys.py sdxl-unet  # only these

One line per family of tensors: {0..9} and {0,2} stand for the numbers a name takes.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Shape = tuple[int, ...]
FOLDER = Path(__file__).parents[1] / "nanodiffusion" / "pretrained" / "keys"

DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
XL_DOWN = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2
XL_UP = ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",)
SD1: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": DOWN,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD2 = SD1 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": XL_DOWN,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _unet(**config: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def _controlnet(**config: Any) -> torch.nn.Module:
    from diffusers import ControlNetModel

    return ControlNetModel(**config)


def _adapter(**config: Any) -> torch.nn.Module:
    from diffusers import T2IAdapter

    return T2IAdapter(**config)


def _vae(widths: Any, latent_channels: int) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    levels: dict[str, Any] = {f"{way}_block_types": (f"{name}Block2D",) * 4 for way, name in VAE_BLOCKS}
    return AutoencoderKL(block_out_channels=widths, latent_channels=latent_channels, layers_per_block=2, **levels)


VAE_BLOCKS = (("down", "DownEncoder"), ("up", "UpDecoder"))


def _clip(width: int, layers: int, heads: int, act: str, projection: int | None = None) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=projection or 512,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


BUILD: dict[str, Callable[[], torch.nn.Module]] = {
    "sd15-unet": lambda: _unet(up_block_types=UP, **SD1),
    "sd15-inpaint-unet": lambda: _unet(up_block_types=UP, in_channels=9, **SD1),
    "sd21-unet": lambda: _unet(up_block_types=UP, **SD2),
    "sdxl-unet": lambda: _unet(up_block_types=XL_UP, **SDXL),
    "sdxl-inpaint-unet": lambda: _unet(up_block_types=XL_UP, in_channels=9, **SDXL),
    "sd15-controlnet": lambda: _controlnet(**SD1),
    "sdxl-controlnet": lambda: _controlnet(**SDXL),
    "sdxl-adapter": lambda: _adapter(adapter_type="full_adapter_xl", downscale_factor=16),
    "sd-vae": lambda: _vae((128, 256, 512, 512), latent_channels=4),
    "vae-16": lambda: _vae((128, 128, 256, 512), latent_channels=16),
    "clip-l": lambda: _clip(768, 12, 12, "quick_gelu"),
    "clip-h": lambda: _clip(1024, 23, 16, "gelu"),
    "clip-bigg": lambda: _clip(1280, 32, 20, "gelu", projection=1280),
}


def shapes(name: str) -> dict[str, Shape]:
    """Tensor name -> shape of a published checkpoint, as its file has them."""
    with torch.device("meta"):
        state = BUILD[name]().state_dict()
    # transformers 5.6 dropped the level `text_model.` from the class; the published files have it
    flat = name.startswith("clip") and not any(k.startswith("text_model.") for k in state)
    return {("text_model." if flat else "") + k: tuple(v.shape) for k, v in state.items()}


def compact(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The same with braces: names that differ in one number only, and agree in shape, become one."""
    rows = {tuple(re.split(r"(?<=\.)(\d+)(?=\.)", name)): shape for name, shape in shapes.items()}
    for place in range(1, max(map(len, rows)), 2):
        rows = _merged(rows, place)
    return {"".join(parts): shape for parts, shape in rows.items()}


def _merged(rows: Mapping[tuple[str, ...], Shape], place: int) -> dict[tuple[str, ...], Shape]:
    found: dict[tuple[tuple[str, ...], tuple[str, ...], Shape], list[str]] = {}
    for parts, shape in rows.items():
        found.setdefault((parts[:place], parts[place + 1 :], shape), []).extend(parts[place : place + 1])
    return {
        (*head, *([_braces(numbers)] if numbers else []), *tail): shape
        for (head, tail, shape), numbers in found.items()
    }


def _braces(numbers: list[str]) -> str:
    """["0", "1", "2"] -> "{0..2}", ["0", "2"] -> "{0,2}", ["7"] -> "7"."""
    if len(numbers) == 1:
        return numbers[0]
    first, last = int(numbers[0]), int(numbers[-1])
    run = len(numbers) > 2 and numbers == [str(i) for i in range(first, last + 1)]
    return f"{{{first}..{last}}}" if run else "{" + ",".join(numbers) + "}"


def main(names: list[str]) -> None:
    """Write the lists named, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or BUILD:
        rows = compact(shapes(name))
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(shape)}" for key, shape in sorted(rows.items()))
        (FOLDER / f"{name}.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
