"""What a picture is made of, off the disk: the model and all that is put on it, the pictures, and the SHA-256 of every file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn

from nanodiffusion.cli.asked import Asked, Helper, Named
from nanodiffusion.cli.digest import digest
from nanodiffusion.data.conditioning import canny, outpaint
from nanodiffusion.data.files import open_image
from nanodiffusion.errors import UserError, lookup, need
from nanodiffusion.fast import adapt
from nanodiffusion.lora import add_lora, read_lora
from nanodiffusion.memory import PLANS
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.pretrained import (
    Bundle,
    load_adapter,
    load_controlnet,
    load_pretrained,
    load_tokens,
    replace_part,
    scheduler_beside,
)
from nanodiffusion.pretrained.hub import at_hand
from nanodiffusion.pretrained.weights import DTYPES, source_of
from nanodiffusion.tasks import AdapterInput, Control, GenerateConfig, Inputs, plan
from nanodiffusion.text.inversion import load_inversion

PRECISIONS = {name: dtype for name, dtype in DTYPES.items() if dtype}


@dataclass(frozen=True)
class Loaded:
    """A bundle with everything on it, its inputs, and what was asked with the SHA-256 of every file and no "auto" left."""

    bundle: Bundle
    inputs: Inputs
    asked: Asked


def load_parts(asked: Asked, config: GenerateConfig, device: torch.device) -> Loaded:
    """Everything that is asked for. UserError: what is not there, is of another kind, or is not what it was."""
    lookup({**PLANS, "auto": None}, asked.memory, "memory")
    lookup({**PRECISIONS, "auto": None}, asked.precision, "precision")
    check_pictures(asked)
    seen, asked = open_pictures(asked)
    bundle, asked = load_model(asked, device)
    bundle, asked = with_files(bundle, asked)
    seen = drawn(seen, asked, config, bundle.family.size)
    controls, asked = load_controls(bundle, asked, seen.controls)
    adapters, asked = load_adapters(bundle, asked, seen.adapters)
    tokens, asked = load_inpainting(bundle, asked)
    inputs = Inputs(image=seen.image, mask=seen.mask, controls=controls, adapters=adapters, tokens=tokens)
    count = min(asked.batch, config.frames or config.n * len(config.prompt))
    one_batch = replace(config, prompt=config.prompt and [""], prompt_2=[], negative=[], seeds=[], n=count, frames=0)
    chosen = plan(bundle, one_batch, inputs, asked.memory)
    if device.type == "cpu":  # after the LoRAs, which look for plain layers, and after counting, which takes less so
        for net in (bundle.denoiser.net, bundle.codec, *(c.net for c in controls)):
            adapt(net)
    precision = {v: k for k, v in PRECISIONS.items()}[dtype_of(bundle.denoiser)]
    asked = replace(asked, precision=precision, device=device.type, memory=chosen.name)
    return Loaded(bundle, inputs, asked)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights."""
    return next(module.parameters()).dtype


def place_of(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype of a module's weights, and where they are until they work."""
    return dtype_of(module), next(module.parameters()).device


def verified(files: Sequence[str | Path], expected: str, key: str) -> str:
    """The SHA-256 of files. UserError, which names the first: they are not what they were."""
    found = digest(files)
    if expected and found != expected:
        fix = f"bring the old one back, or take what is there: {key}={files[0]}"
        what = "this is not the file that it was"
        raise UserError(what, file=files[0], key=key, expected=f"SHA-256 {expected}", found=found, fix=fix)
    return found


@contextmanager
def reading(file: str, expected: str, key: str) -> Iterator[None]:
    """What goes wrong inside is told of this key; and of a file that is not there, the SHA-256 that it must have."""
    if Path(file).exists() and not (Path(file).is_file() or Path(file).is_dir()):  # a pipe would be waited for
        raise UserError("this is neither a file nor a folder", file=file, key=key)
    try:
        yield
    except UserError as e:
        details: dict[str, Any] = {**e.details, "key": e.details["key"] or key}
        if not Path(file).exists():
            details |= {"file": file, "found": e.details["found"] or "nothing"}
            fix = f"bring it back, or give another: {key}=..."
            details |= {"expected": f"SHA-256 {expected}", "fix": fix} if expected else {}
        raise UserError(e.what, **details) from e


def weight_files(where: str, folder: str) -> Sequence[Path]:
    """The weight files of a network that has been loaded: of a path, of its folder there, or of a name in the hub's cache."""
    path = at_hand(where)
    return source_of(path / folder if (path / folder).is_dir() else path).files


# -- pictures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """The pictures, opened."""

    image: Image.Image | None
    mask: Image.Image | None
    controls: list[Image.Image | None]
    adapters: list[Image.Image | None]


def check_pictures(asked: Asked) -> None:
    """UserError for pictures that cannot go together."""
    if asked.outpaint and (asked.mask.file or asked.fit or not asked.image.file):
        what = "outpaint makes the mask and the size" if asked.image.file else "there is no picture to outpaint"
        raise UserError(what, key="outpaint", fix="image=FILE outpaint=[...], without mask and fit")
    if asked.overlap and not asked.outpaint:
        raise UserError("overlap is for outpainting", key="overlap", fix="outpaint=[left,top,right,bottom]")
    for key, given in (("canny", asked.canny), ("guess", asked.guess)):
        if given and not asked.controls:
            raise UserError("there is no control that it could be for", key=key, fix="control=NET:FILE")
    if asked.canny:
        need("cv2", "data")


def open_pictures(asked: Asked) -> tuple[Seen, Asked]:
    """All pictures, and what was asked with their SHA-256."""
    image, named_image = _open(asked.image.file, asked.image.sha256, "image")
    mask, named_mask = _open(asked.mask.file, asked.mask.sha256, "mask")
    controls = [_open(c.file, c.sha256, "control") for c in asked.controls]
    adapters = [_open(a.file, a.sha256, "adapter") for a in asked.adapters]
    digests = {
        "image": Named(asked.image.file, named_image),
        "mask": Named(asked.mask.file, named_mask),
        "controls": [replace(c, sha256=sha) for c, (_, sha) in zip(asked.controls, controls)],
        "adapters": [replace(a, sha256=sha) for a, (_, sha) in zip(asked.adapters, adapters)],
    }
    return Seen(image, mask, [c for c, _ in controls], [a for a, _ in adapters]), replace(asked, **digests)


def _open(file: str, sha256: str, key: str) -> tuple[Image.Image | None, str]:
    if not file:
        return None, ""
    with reading(file, sha256, key):
        found = verified([file], sha256, key)
        return open_image(file), found


def drawn(seen: Seen, asked: Asked, config: GenerateConfig, natural: int) -> Seen:
    """The pictures as the model is to see them: fitted, on a larger canvas, their edges."""
    size = (config.width or natural, config.height or natural)
    fit = lambda p: ImageOps.fit(p, size, Image.Resampling.LANCZOS) if p and asked.fit else p
    image, mask = fit(seen.image), fit(seen.mask)
    if asked.outpaint:
        image, mask = outpaint(image, *asked.outpaint, overlap=asked.overlap)
    controls = [canny(c, *asked.canny) if c and asked.canny else c for c in map(fit, seen.controls)]
    return Seen(image, mask, controls, [fit(a) for a in seen.adapters])


# -- the model and what is put on it -----------------------------------------------------------------------------------


def load_model(asked: Asked, device: torch.device) -> tuple[Bundle, Asked]:
    """The checkpoint, and what was asked with its SHA-256 and commit."""
    half = asked.memory in PLANS and PLANS[asked.memory].half
    precision = "bf16" if half and asked.precision == "auto" else asked.precision
    named = (asked.variant, asked.prediction, asked.revision, asked.tokenizer)
    options = [text or None for text in named]
    with reading(asked.model, asked.model_sha256, "model"):
        bundle = load_pretrained(asked.model, precision, device, *options, offload=asked.memory != "fast")  # type: ignore
    bundle.source["sha256"] = verified(bundle.source["files"], asked.model_sha256, "model")
    commit = bundle.source["commit"] or ""
    return bundle, replace(asked, model_sha256=bundle.source["sha256"], revision=commit)


def with_files(bundle: Bundle, asked: Asked) -> tuple[Bundle, Asked]:
    """The bundle with another U-Net or VAE, LoRAs and learned tokens, and what was asked with their SHA-256."""
    unet, vae = asked.unet, asked.vae
    if unet.file:
        with reading(unet.file, unet.sha256, "unet"):
            bundle = replace_part(bundle, "unet", unet.file, dtype_of(bundle.denoiser))
        read_by = [file for file in [scheduler_beside(unet.file)] if file]
        unet = Named(unet.file, verified([*weight_files(unet.file, "unet"), *read_by], unet.sha256, "unet"))
    if vae.file:
        with reading(vae.file, vae.sha256, "vae"):
            bundle = replace_part(bundle, "vae", vae.file, dtype_of(bundle.codec))
        vae = Named(vae.file, verified(weight_files(vae.file, "vae"), vae.sha256, "vae"))
    nets = {"unet": bundle.denoiser.net, **dict(zip(("text", "text_2"), (p.net for p in bundle.text.parts)))}
    loras, embeddings = [], []
    for lora in asked.loras:
        with reading(lora.file, lora.sha256, "lora"):
            read = read_lora(lora.file)
        loras.append(replace(lora, sha256=verified([str(read.file)], lora.sha256, "lora")))
        add_lora(nets, read, lora.strength)
    for token in asked.embeddings:
        with reading(token.file, token.sha256, "embedding"):
            bundle = replace(bundle, text=load_inversion(bundle.text, token.file, token.token or None))
        embeddings.append(replace(token, sha256=verified([token.file], token.sha256, "embedding")))
    return bundle, replace(asked, unet=unet, vae=vae, loras=loras, embeddings=embeddings)


def load_inpainting(bundle: Bundle, asked: Asked) -> tuple[InpaintTokens | None, Asked]:
    """The inpainting tokens in the U-Net's precision, and what was asked with their SHA-256."""
    file, sha256 = asked.tokens.file, asked.tokens.sha256
    if not file:
        return None, asked
    with reading(file, sha256, "tokens"):
        net = load_tokens(file, *place_of(bundle.denoiser))
    return net, replace(asked, tokens=Named(file, verified([file], sha256, "tokens")))


def load_controls(
    bundle: Bundle, asked: Asked, images: Sequence[Image.Image | None]
) -> tuple[tuple[Control, ...], Asked]:
    """The ControlNets in the U-Net's precision, and what was asked with their SHA-256."""
    dtype, device = place_of(bundle.denoiser)
    found = []
    for c, image in zip(asked.controls, images):
        with reading(c.net, c.net_sha256, "control"):
            net = load_controlnet(c.net, dtype, device)
        found.append(Control(net, image, c.strength, c.start, c.end, asked.guess))
    return tuple(found), replace(asked, controls=[_digested(c, "controlnet", "control") for c in asked.controls])


def load_adapters(
    bundle: Bundle, asked: Asked, images: Sequence[Image.Image | None]
) -> tuple[tuple[AdapterInput, ...], Asked]:
    """The adapters, and what was asked with their SHA-256."""
    dtype, device = place_of(bundle.denoiser)
    found = []
    for a, image in zip(asked.adapters, images):
        if image is None:
            raise UserError("an adapter needs a picture", file=a.net, key="adapter", expected="NET:FILE[:strength]")
        with reading(a.net, a.net_sha256, "adapter"):
            net = load_adapter(a.net, dtype, device)
        found.append(AdapterInput(net, image, a.strength, a.start, a.end))
    return tuple(found), replace(asked, adapters=[_digested(a, "adapter", "adapter") for a in asked.adapters])


def _digested(helper: Helper, folder: str, key: str) -> Helper:
    return replace(helper, net_sha256=verified(weight_files(helper.net, folder), helper.net_sha256, key))
