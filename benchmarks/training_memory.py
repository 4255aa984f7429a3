"""What fine-tuning needs of memory, counted on meta at full size, and one real step beside its count.

    python -m benchmarks.training_memory          every task, SD 1.5 at 512 and SDXL at 1024 pixels, a picture at a time
    python -m benchmarks.training_memory --real   besides, a LoRA step of a full SD 1.5 with random weights at 256 on the CPU

The expected peak is that of an update: weights (frozen ones in bf16), Adam's moments, one average, gradients, activations.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from nanodiffusion.codec import SD_VAE, SDXL_VAE, AutoencoderKL
from nanodiffusion.config import Config, make, read_config
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.memory import GIB, Peak, training_peak
from nanodiffusion.nets.sd_unet import SD15, SDXL, SDUNet
from nanodiffusion.noise import ldm
from nanodiffusion.pretrained.load import FAMILIES, Bundle
from nanodiffusion.text import CLIP_BIGG, CLIP_L, CLIPText, CLIPTokenizer
from nanodiffusion.text.prompts import TextEncoder, TextPart
from nanodiffusion.text.tokenizer import END, START

RESULTS = Path(__file__).parent / "results"
TASKS = ("text_to_image", "inpaint", "controlnet", "adapter", "lora")
ENCODED = ("text_to_image", "lora")  # those that can do without pictures
NETS = {"sd1": (SD15, SD_VAE, (CLIP_L,)), "sdxl": (SDXL, SDXL_VAE, (CLIP_L, CLIP_BIGG))}


def config_of(task: str, precision: str, checkpointing: bool) -> Config:
    """A run of that task."""
    spec = {"name": task, "base": "random", "checkpointing": checkpointing}
    ways = {"prediction": "eps", "clock": "table", "schedule": {"name": "ldm"}, "density": {"name": "table"}}
    return read_config({**ways, "task": spec, "precision": precision})


def bundle_of(family: str, dtype: torch.dtype, device: str) -> Bundle:
    """A checkpoint of full size, its weights as they come, its tokenizers without words."""
    unet, vae, texts = NETS[family]
    with torch.device(device):
        rows, tokenizer = FAMILIES[family].texts, CLIPTokenizer({START: 49406, END: 49407}, [])
        clips = [CLIPText(text).to(dtype) for text in texts]
        parts = [TextPart(tokenizer, clip, row.layer, row.norm, row.pooled) for clip, row in zip(clips, rows)]
        net, codec = SDUNet(unet).to(dtype), AutoencoderKL(vae).to(dtype)
    bundle = Bundle(FAMILIES[family], Denoiser(net, "eps", "table", ldm()), codec, TextEncoder(parts), ldm(), {})
    for part in (net, codec, *clips):
        part.requires_grad_(False)
    return bundle


def batch(family: str, task: str, size: int, dtype: torch.dtype, device: str, b: int = 1) -> tuple[Any, ...]:
    """x0, sigma, eps and cond of a step, without meaning."""
    unet = NETS[family][0]
    new = lambda *shape: torch.rand(*shape, device=device, dtype=dtype)
    latent = (b, 4, size // 8, size // 8)
    cond: dict[str, Any] = {"context": new(b, 77, unet.context_dim)}
    if unet.added_dim:
        cond |= {"pooled": new(b, unet.pooled_dim), "sizes": torch.full((b, 6), size, device=device)}
    if task == "inpaint":
        cond["concat"] = new(b, 5, *latent[2:])
    if task in ("controlnet", "adapter"):
        cond["control"] = new(b, 3, size, size)
    return new(*latent), torch.full((b,), 2.0, device=device, dtype=dtype), new(*latent), cond


def expected(
    family: str, task: str, size: int, precision: str, checkpointing: bool, averages: int = 0, encoded: bool = False
) -> float:
    """GiB of an update at its worst moment; encoded: of data for which neither codec nor text encoders are needed."""
    half = precision != "fp32"
    config = config_of(task, precision, checkpointing)
    row = make(FINETUNES, config.task, "task")()
    bundle = bundle_of(family, torch.bfloat16 if half else torch.float32, "meta")
    vars(bundle.denoiser.net)["checkpointing"] = checkpointing
    model = row.tuned(bundle, config).to("meta")
    model.net.requires_grad_(True)
    if encoded:
        model.without_encoders({})

    def loss(ghost: Any) -> torch.Tensor:
        ghost.precision = ghost.denoiser.precision = torch.float32  # its weights are in half precision already
        dtype = torch.bfloat16 if half else torch.float32
        x0, sigma, eps, cond = batch(family, task, size, dtype, "meta")
        return ghost.loss(x0, sigma, eps, cond).mean()

    return training_peak(model, loss, half, averages) / GIB


def real_step() -> dict[str, Any]:
    """Two LoRA updates of a full SD 1.5 at 256 pixels in fp32 on this CPU: seconds and the peak of memory."""
    torch.manual_seed(0)
    row = make(FINETUNES, (config := config_of("lora", "fp32", False)).task, "task")()
    with Peak(torch.device("cpu")) as peak:
        model = row.tuned(bundle_of("sd1", torch.float32, "cpu"), config)
        model.net.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.net.parameters(), 1e-4, fused=True)
        losses, seconds = [], []
        for _ in range(2):
            start = time.perf_counter()
            loss = model.loss(*batch("sd1", "lora", 256, torch.float32, "cpu")).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(round(time.perf_counter() - start, 1))
    counted = expected("sd1", "lora", 256, "fp32", False)
    return {
        "measured_gib": round(peak.bytes / GIB, 2),
        "counted_gib": round(counted, 2),
        "seconds": seconds,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true")
    args = parser.parse_args()
    table = {}
    for family, size in (("sd1", 512), ("sdxl", 1024)):
        for task in TASKS:
            averages = int(task in ("text_to_image", "inpaint"))
            for encoded in (False, True)[: 1 + (task in ENCODED)]:
                peak = lambda again: round(expected(family, task, size, "bf16", again, averages, encoded), 1)  # noqa: B023
                row = {"bf16": peak(False), "bf16, recomputed": peak(True)}
                name = f"{family} {size} {task}{', encoded' * encoded}"
                table[name] = row
                print(f"{name:31}", row, flush=True)
    result: dict[str, Any] = {"gib": table, "torch": torch.__version__, "machine": platform.machine()}
    if args.real:
        result["real"] = real_step()
        print(result["real"])
    result["command"] = "python -m benchmarks.training_memory" + " --real" * args.real
    (RESULTS / "training-memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
