"""The Stable Diffusion family on both sides: ours, and diffusers and transformers as they are and at their best.

Weights are random, never zero, and the same on both sides: each tensor is drawn from a seed made of its name, and our names
are theirs. `python -m benchmarks.sd` writes the accuracy that must hold before any time counts; `tiny` stands for
networks of the same structure that a test can afford.
"""

import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.worker import Case
from nanodiffusion.codec import SD_VAE, SDXL_VAE, AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.fast import adapt, tune
from nanodiffusion.nets.sd_unet import SD15, SDXL, SDUNet, SDUNetConfig
from nanodiffusion.noise import ldm
from nanodiffusion.pretrained import FAMILIES, Bundle, architecture, load_pretrained
from nanodiffusion.tasks import generate, pictures
from nanodiffusion.text import CLIP_L, CLIPText, TextConfig

Net = SDUNetConfig | AutoencoderKLConfig | TextConfig
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
FILES = Path(tempfile.gettempdir()) / "nanodiffusion-bench"  # large files that the loading benchmarks write once
TINY: dict[Net, Net] = {
    SD15: replace(SD15, widths=(32, 64), depths=(1, 0), heads=(4, 4), context_dim=32),
    SDXL: replace(SDXL, widths=(32, 64), depths=(0, 1), depth_mid=1, heads=(1, 2), context_dim=32, added_dim=1568),
    SD_VAE: replace(SD_VAE, widths=(32, 32), blocks=1),
    SDXL_VAE: replace(SDXL_VAE, widths=(32, 32), blocks=1),
    CLIP_L: replace(CLIP_L, width=32, layers=2, heads=2, mlp=64),
}

# -- networks ----------------------------------------------------------------------------------------------------------


def draw(name: str, shape: torch.Size) -> Tensor:
    """A weight's random values: He's for matrices and kernels, about 1 for a norm's scale, small for the rest."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return values * (shape[1:].numel() ** -0.5)
    return 0.1 * values + (1 if name.endswith("weight") else 0)


def fill(net: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """A network built on meta, with its random weights."""
    drawn = {name: draw(name, p.shape).to(device, dtype) for name, p in net.state_dict().items()}
    net.load_state_dict(drawn, assign=True)
    return net.eval().requires_grad_(False)


def ours(config: Net, dtype: torch.dtype, device: str) -> Any:
    """Our network."""
    kinds: dict[type, Callable[[Any], nn.Module]] = {
        SDUNetConfig: SDUNet,
        AutoencoderKLConfig: AutoencoderKL,
        TextConfig: CLIPText,
    }
    with torch.device("meta"):
        net = kinds[type(config)](config)
    return fill(net, dtype, device)


def theirs(config: Net, dtype: torch.dtype, device: str) -> Any:
    """diffusers' or transformers' network of the same architecture."""
    if isinstance(config, TextConfig):
        return clip(config, dtype, device)
    import diffusers

    if isinstance(config, SDUNetConfig):
        cls, options = diffusers.UNet2DConditionModel, architecture.unet_json(config, 64)
    else:
        cls, options = diffusers.AutoencoderKL, architecture.vae_json(config)
    with torch.device("meta"):
        net = cls.from_config({k: v for k, v in options.items() if not k.startswith("_")})
    return fill(net, dtype, device)


def clip(config: TextConfig, dtype: torch.dtype, device: str) -> Any:
    """transformers' text encoder; its own names lack a prefix, so the weights come from ours."""
    from transformers import CLIPTextConfig, CLIPTextModel

    options = {k: v for k, v in architecture.text_json(config).items() if k not in ("architectures", "torch_dtype")}
    net = CLIPTextModel(CLIPTextConfig(**options))
    weights = {k.removeprefix("text_model."): v for k, v in ours(config, dtype, device).state_dict().items()}
    prefix = "text_model." if any(k.startswith("text_model.") for k in net.state_dict()) else ""
    net.to(dtype=dtype, device=device).load_state_dict({prefix + k: v for k, v in weights.items()})
    return net.eval().requires_grad_(False)


# -- settings of a side ------------------------------------------------------------------------------------------------


def best(net: Any, device: str) -> Any:
    """What diffusers' documentation advises: channels-last convolutions, and on a CPU oneDNN's products."""
    if device == "cpu":
        torch.set_float32_matmul_precision("medium")
    return net.to(memory_format=torch.channels_last)


def made(side: str, config: Net, precision: str, device: str, tiny: bool) -> Any:
    """The network of a side: ours, ours untuned, diffusers, diffusers best; `compiled` after it compiles it."""
    config = TINY[config] if tiny else config
    build = ours if side.startswith("ours") else theirs
    net = build(config, PRECISIONS[precision], device)
    if side.startswith("ours") and "untuned" not in side:
        tune(torch.device(device))
        net = adapt(net) if device == "cpu" else best(net, device)
    if "best" in side:
        net = best(net, device)
    return torch.compile(net) if "compiled" in side else net


# -- cases -------------------------------------------------------------------------------------------------------------


def inputs(config: SDUNetConfig, latent: int, precision: str, device: str) -> dict[str, Tensor]:
    """One guided step: two rows of x (2 4 h w), t (2), context (2 77 d) and, for SDXL, pooled and sizes."""
    g = torch.Generator().manual_seed(1)
    new = lambda *shape: torch.randn(shape, generator=g).to(device, PRECISIONS[precision])
    side = 8 * latent
    x = {"x": new(2, 4, latent, latent), "t": torch.full((2,), 500.0, device=device)}
    x["context"] = new(2, 77, config.context_dim)
    if config.added_dim:
        x["pooled"] = new(2, config.pooled_dim)
        x["sizes"] = torch.tensor([[side, side, 0, 0, side, side]] * 2, device=device)
    return x


def call(side: str, net: Any, x: dict[str, Tensor]) -> Tensor:
    """The U-Net's output in either library's call."""
    if side.startswith("ours"):
        return net(**x)
    added = {"text_embeds": x["pooled"], "time_ids": x["sizes"]} if "pooled" in x else None
    return net(x["x"], x["t"], x["context"], added_cond_kwargs=added, return_dict=False)[0]


def unet(
    device: str, side: str, precision: str, config: SDUNetConfig = SD15, latent: int = 64, tiny: bool = False
) -> Case:
    """One step with guidance of a U-Net: SD 1.5 at 512², SDXL at 1024²."""
    net = made(side, config, precision, device, tiny)
    x = inputs(TINY[config] if tiny else config, latent, precision, device)  # type: ignore[arg-type]
    return Case(torch.no_grad()(lambda: call(side, net, x)))


def decode(device: str, side: str, precision: str, size: int = 256, tiny: bool = False) -> Case:
    """One picture decoded by SD's autoencoder."""
    net = made(side, SD_VAE, precision, device, tiny)
    z = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(2)).to(device)
    if side.startswith("ours"):
        return Case(torch.no_grad()(lambda: net.decode(z)))
    z = z.to(PRECISIONS[precision]) / SD_VAE.scale
    return Case(torch.no_grad()(lambda: net.decode(z, return_dict=False)[0]))


def text(device: str, side: str, precision: str, tiny: bool = False) -> Case:
    """Two prompts of 77 tokens through CLIP-L."""
    net = made(side, CLIP_L, precision, device, tiny)
    ids = torch.randint(49405, (2, 77), generator=torch.Generator().manual_seed(3)).to(device)
    ids[:, 0], ids[:, -1] = 49406, 49407
    if side.startswith("ours"):
        return Case(torch.no_grad()(lambda: net(ids).last))
    return Case(torch.no_grad()(lambda: net(ids).last_hidden_state))


def small_run(device: str, side: str, size: int = 256, steps: int = 20) -> Case:
    """Prompt to pixels by a tiny checkpoint of SD 1.x' structure; ours as `nanodiffusion generate` sets it up, or untuned."""
    from tests import sd_files

    folder = sd_files.tree("sd1")
    if side.startswith("ours"):
        bundle = load_pretrained(folder, device=device)
        if "untuned" not in side:
            tune(torch.device(device))
            adapt(bundle.denoiser.net), adapt(bundle.codec)
        options: dict[str, Any] = {"steps": steps, "width": size, "height": size, "sampler": "euler", "seed": 1}
        last = lambda: list(generate(bundle, "a cat", ladder="leading", **options))[-1]
        return Case(lambda: pictures(bundle, last().x))
    import diffusers

    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device)
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": steps, "width": size, "height": size, "generator": generator}
    return Case(lambda: pipe("a cat", **options).images)


def sdxl_run(device: str, side: str, size: int = 1024, steps: int = 30, tiny: bool = False) -> Case:
    """SDXL from embeddings to pixels: 30 guided steps and the decoding, in bf16."""
    net = made(side, SDXL, "bf16", device, tiny)
    vae = made(side, SDXL_VAE, "bf16", device, tiny)
    x = inputs(TINY[SDXL] if tiny else SDXL, 8, "bf16", device)  # type: ignore[arg-type]
    row = lambda i: {k: x[k][i : i + 1] for k in ("context", "pooled")}
    if side.startswith("ours"):
        denoiser, here = Denoiser(net, "eps", "table", ldm()), torch.device(device)
        bundle = Bundle(FAMILIES["sdxl"], denoiser, vae, None, ldm(), {}, device=here)  # type: ignore[arg-type]
        options: dict[str, Any] = {"embeddings": (row(0), row(1)), "width": size, "height": size, "steps": steps}
        return Case(lambda: pictures(bundle, list(generate(bundle, sampler="euler", **options))[-1].x))
    import diffusers

    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe: Any = diffusers.StableDiffusionXLPipeline(
        vae, None, None, None, None, net, diffusers.EulerDiscreteScheduler(**beta), add_watermarker=False
    )  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": row(0)["context"], "pooled_prompt_embeds": row(0)["pooled"]}
    embeds |= {"negative_prompt_embeds": row(1)["context"], "negative_pooled_prompt_embeds": row(1)["pooled"]}
    return Case(lambda: pipe(**embeds, width=size, height=size, num_inference_steps=steps).images)


SIDES = ("ours", "diffusers", "diffusers best")  # "ours untuned" is what "diffusers" is: the same products
CASES: dict[str, Callable[[str], Case]] = {
    **{f"unet-{p}-{s}".replace(" ", "-"): partial(unet, side=s, precision=p) for p in ("fp32", "bf16") for s in SIDES},
    **{
        f"decode{n}-{p}-{s}".replace(" ", "-"): partial(decode, side=s, precision=p, size=n)
        for n in (256, 512, 1024)
        for p in ("fp32", "bf16")
        for s in SIDES
    },
    **{f"text-{p}-{s}".replace(" ", "-"): partial(text, side=s, precision=p) for p in ("fp32", "bf16") for s in SIDES},
    **{f"run-{s}".replace(" ", "-"): partial(small_run, side=s) for s in ("ours", "ours untuned", "diffusers")},
    **{
        f"sdxl-{s}".replace(" ", "-"): partial(sdxl_run, side=s)
        for s in ("ours", "ours compiled", "diffusers", "diffusers best", "diffusers best compiled")
    },
}


def sides(case: str, names: tuple[str, ...] = SIDES) -> dict[str, str]:
    """The sides of a benchmark, as bench wants them: name -> "module case"."""
    return {name: f"sd {case}-{name}".replace(" ", "-").replace("sd-", "sd ", 1) for name in names}


# -- loading -----------------------------------------------------------------------------------------------------------

LOAD_OURS = """
import sys
from nanodiffusion.pretrained import load_unet
load_unet(sys.argv[1], dtype="bf16", device="cpu")
"""
LOAD_PEER = """
import sys, torch
from diffusers import UNet2DConditionModel
UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
"""


def unet_folder(name: str) -> Path:
    """A full-size U-Net on the disk, written once: "sdxl-bf16" or "sd15-fp32"."""
    from nanodiffusion.tensors import save_tensors

    config, dtype = {"sdxl-bf16": (SDXL, torch.bfloat16), "sd15-fp32": (SD15, torch.float32)}[name]
    folder = FILES / name
    file = folder / "diffusion_pytorch_model.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(architecture.unet_json(config, 128)))
        save_tensors(file, ours(config, dtype, "cpu").state_dict(), {})
    return folder


def loading(name: str) -> dict[str, list[str]]:
    """Both sides' commands that load such a U-Net in a fresh interpreter."""
    folder = str(unet_folder(name))
    return {"ours": ["-c", LOAD_OURS, folder], "diffusers": ["-c", LOAD_PEER, folder]}


IMPORTS = {
    "import torch": ["-c", "import torch"],
    "nanodiffusion: load, generate": ["-c", "from nanodiffusion import load_pretrained, generate"],
    "diffusers: SDXL pipeline": ["-c", "from diffusers import StableDiffusionXLPipeline"],
    "diffusers: U-Net": ["-c", "from diffusers import UNet2DConditionModel"],
    "transformers: CLIP": ["-c", "from transformers import CLIPTextModel"],
}


# -- accuracy ----------------------------------------------------------------------------------------------------------


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over that of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


WORSE = 1.2  # times the peer's error in the same precision that ours may be
GATES: dict[str, Callable[..., Case]] = {  # one guided step of SD 1.5 at 256², a picture of 256², two prompts
    "unet": partial(unet, latent=32),
    "decode": decode,
    "text": text,
}


def accuracy(gate: str, tiny: bool = False) -> dict[str, float]:
    """Relative error of every side against the peer in float64: "side precision" -> error."""
    run = lambda side, precision: GATES[gate]("cpu", side, precision, tiny=tiny).run()
    exact, errors = run("diffusers", "fp64"), {}
    for precision in ("fp32", "bf16"):
        for side in ("diffusers", "diffusers best", "ours"):
            torch.set_float32_matmul_precision("highest")
            errors[f"{side} {precision}"] = relative(run(side, precision), exact)  # type: ignore[arg-type]
    return errors


def passes(errors: dict[str, float]) -> bool:
    """Whether our error is at most `WORSE` times that of the peer at its best, in both precisions."""
    return all(errors[f"ours {p}"] <= WORSE * errors[f"diffusers best {p}"] for p in ("fp32", "bf16"))


def main() -> None:
    from benchmarks.bench import RESULTS, device_name, versions

    found = {gate: accuracy(gate) for gate in GATES}
    facts = {"name": "sd-accuracy", "device": device_name(False), "versions": versions()}
    facts |= {"command": "python -m benchmarks.sd", "what": " ".join((accuracy.__doc__ or "").split())}
    verdicts = {gate: {"errors": errors, "passes": passes(errors)} for gate, errors in found.items()}
    (RESULTS / "cpu-sd-accuracy.json").write_text(json.dumps({**facts, **verdicts}, indent=1) + "\n")
    for gate, errors in found.items():
        print(gate, "passes" if passes(errors) else "FAILS: its times are void")
        for side, error in errors.items():
            print(f"  {side:24} {error:.2e}")


if __name__ == "__main__":
    main()
