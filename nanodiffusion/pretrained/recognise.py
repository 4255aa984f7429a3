"""What a file of weights is, by its names and shapes, and what the published checkpoints hold."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanodiffusion.errors import lookup
from nanodiffusion.pretrained.layouts import Plan, Shape, groups, rename

# ---- what a file is ------------------------------------------------------------------------------

# Kinds that hold no component of ours: sign in a name, kind, note.
OTHERS: tuple[tuple[str, str, str], ...] = (
    (r"lora_controlnet$", "control_lora", "a ControlNet as a LoRA of its U-Net"),
    (r"(.*[._])?(lora[._](down|up|mid|A|B)|lora_linear_layer|to_\w+_lora|lokr_w|hada_w|oft_)", "lora", ""),
    (r"emb_params$|clip_[lg]$|string_to_param", "embedding", "textual inversion"),
    (r"(.*\.)?(joint_blocks|double_blocks|single_transformer_blocks)\.", "unknown", "a transformer of SD 3 or FLUX"),
    (r"image_proj\.|ip_adapter\.", "unknown", "an IP-Adapter"),
    (r"(.*\.)?motion_modules\.", "unknown", "an AnimateDiff motion module"),
    (r"edm_(mean|std)$", "unknown", "Playground 2.5, trained on EDM's scaling"),
)
FAMILY_OF_PREFIX: tuple[tuple[str, str], ...] = (
    ("conditioner.", "sdxl"),
    ("cond_stage_model.model.", "sd2"),
    ("cond_stage_model.transformer.", "sd1"),
    ("lora_te1_", "sdxl"),
    ("lora_te2_", "sdxl"),
    ("text_encoder_2.", "sdxl"),
    ("clip_g", "sdxl"),
)
FAMILY_OF_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl"}  # 1280: the refiner
FAMILY_OF_TEXT = {1024: "sd2", 1280: "sdxl"}  # 768 is CLIP-L, of SD 1.x and of SDXL
FAMILY_OF_ADAPTER = {192: "sd1", 768: "sdxl"}  # 3 channels unshuffled by 8 and by 16
FAMILY_OF_EMBEDDING = {768: "sd1", 1024: "sd2"}
INPUTS = {
    5: "4 latent channels and depth",
    8: "4 latent channels and an image (instruct-pix2pix)",
    9: "inpainting: 4 latent channels, mask, masked image",
}
_CONTEXT = re.compile(r".*attn2[._](processor\.)?to_[kv]([._]lora[._](down|A)(\.\w+)?)?\.weight$")
_TOKENS = "text_model.embeddings.token_embedding.weight"
_PIXELS = "conditioning_image_proj.weight"  # (d c), of inpainting tokens
_INPAINTING = {_PIXELS, "conditioning_image_proj.bias", "conditioning_image_mask_embeddings.weight"}


@dataclass(frozen=True)
class Guess:
    """What a file holds, from its names and shapes.

    kind: checkpoint (several components), unet, vae, text, controlnet, adapter, tiny_vae, inpainting_tokens, lora,
    embedding, control_lora or unknown; layout: original, diffusers or ""; family: sd1, sd2, sdxl, or None where names do
    not tell (a VAE, CLIP-L); channels_in: of the U-Net; prediction: "v" where the file says so; notes: in plain words.
    """

    kind: str
    layout: str = ""
    family: str | None = None
    channels_in: int | None = None
    components: tuple[str, ...] = ()
    prediction: str | None = None
    notes: tuple[str, ...] = ()


def detect(shapes: Mapping[str, Shape]) -> Guess:
    """Say what a file of these names and shapes is."""
    kind, note = _other(shapes)
    if kind:
        return Guess(kind, family=_family(shapes, Plan({}, {}, ())), notes=(note,) if note else ())
    plan = rename(shapes)
    components = tuple(plan.components)
    grouped = groups([name for name in shapes if name not in plan.ignored])
    channels = _width(plan, shapes, "conv_in.weight", "unet", "controlnet")
    return Guess(
        kind="checkpoint" if len(components) > 1 else "".join(components) or "unknown",
        layout="" if not components else "original" if any(p or table for p, _, table in grouped) else "diffusers",
        family=_family(shapes, plan),
        channels_in=channels,
        components=components,
        prediction="v" if "v_pred" in shapes else None,
        notes=tuple(_notes(shapes, plan, channels)),
    )


def _other(shapes: Mapping[str, Shape]) -> tuple[str, str]:
    for pattern, kind, note in OTHERS:
        if any(map(re.compile(pattern).match, shapes)):
            return kind, note
    if shapes.keys() == _INPAINTING and len(shapes[_PIXELS]) == 2:
        return "inpainting_tokens", ""
    alone = len(shapes) == 1 and all(len(shape) in (1, 2) for shape in shapes.values())
    return ("embedding", "textual inversion of " + next(iter(shapes))) if alone else ("", "")


def _width(plan: Plan, shapes: Mapping[str, Shape], name: str, *components: str) -> int | None:
    """Size along the second axis of our tensor `name` in the first of `components` that has it."""
    for component in components:
        piece = plan.components.get(component, {}).get(name)
        shape = piece.shape(shapes[piece.source]) if piece else ()
        if len(shape) > 1:
            return shape[1]
    return None


def _family(shapes: Mapping[str, Shape], plan: Plan) -> str | None:
    """By the place of the text encoder, else by published widths, else by the structure of the U-Net."""
    for prefix, family in FAMILY_OF_PREFIX:
        if any(name.startswith(prefix) for name in shapes):
            return family
    context = next((shape for name, shape in shapes.items() if _CONTEXT.match(name)), ())
    context = context or shapes.get(_PIXELS, ())[:1]
    alone = next(iter(shapes.values())) if len(shapes) == 1 else ()
    full = _width(plan, shapes, "adapter.conv_in.weight", "adapter")
    widths = (
        (FAMILY_OF_CONTEXT, context[-1] if context else 0),
        (FAMILY_OF_TEXT, _width(plan, shapes, _TOKENS, "text")),
        (FAMILY_OF_ADAPTER, full or _width(plan, shapes, "adapter.body.0.in_conv.weight", "adapter")),
        (FAMILY_OF_EMBEDDING, alone[-1] if alone else 0),
    )
    known = (table[width] for table, width in widths if width in table)
    return next(known, None) or _family_of_structure(shapes, plan)


def _family_of_structure(shapes: Mapping[str, Shape], plan: Plan) -> str | None:
    net = plan.components.get("unet") or plan.components.get("controlnet") or {}
    if "add_embedding.linear_1.weight" in net:
        return "sdxl"
    axes = next((len(shapes[piece.source]) for name, piece in net.items() if name.endswith("proj_in.weight")), 0)
    return {2: "sd2", 4: "sd1"}.get(axes)


def _notes(shapes: Mapping[str, Shape], plan: Plan, channels: int | None) -> Iterator[str]:
    if channels in INPUTS:
        yield INPUTS[channels]
    if latents := _width(plan, shapes, "decoder.conv_in.weight", "vae"):
        yield f"{latents} latent channels"
    if (
        _width(plan, shapes, "text_model.embeddings.token_embedding.weight", "text") == 768
        and len(plan.components) == 1
    ):
        yield "CLIP-L: the encoder of SD 1.x, and the first of SDXL"
    if "text_2" in plan.components and "text" not in plan.components:
        yield "the refiner of SDXL"
    if "v_pred" in shapes:
        yield "v-prediction, says the key v_pred"
    if "ztsnr" in shapes:
        yield "zero terminal SNR, says the key ztsnr"
    for reason in dict.fromkeys(plan.ignored.values()):
        yield f"{list(plan.ignored.values()).count(reason)} not used: {reason}"
    if plan.unknown:
        yield f"{len(plan.unknown)} unknown: {', '.join(plan.unknown[:3])}"


# ---- published checkpoints -----------------------------------------------------------------------

_KEYS = Path(__file__).parent / "keys"
PUBLISHED = tuple(sorted(path.stem for path in _KEYS.glob("*.json")))


def published(name: str) -> dict[str, Shape]:
    """Tensor name -> shape of a published checkpoint in our names, such as "sdxl-unet". UserError: no such list."""
    path = lookup({known: _KEYS / f"{known}.json" for known in PUBLISHED}, name, "published checkpoint")
    rows = json.loads(path.read_text())
    return {full: tuple(shape) for row, shape in rows.items() for full in _spell(row)}


def _spell(row: str) -> Iterator[str]:
    """Every name that a row stands for: {0..9} and {0,2} are the numbers it takes."""
    parts = re.split(r"\{(.*?)\}", row)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(braces: str) -> list[str]:
    first, dots, last = braces.partition("..")
    return [str(n) for n in range(int(first), int(last) + 1)] if dots else braces.split(",")
