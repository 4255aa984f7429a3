"""Published checkpoints of Stable Diffusion 1.x, 2.x and SDXL as a Bundle: denoiser, codec, text and schedule.

What the families are is said here alone; `recognise` and `layouts` tell them by their files. A model is a name on the hub, a
folder as diffusers writes it, or a single .safetensors in the original layout. It is told by its configs and its tensors,
never by its name.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nanodiffusion.codec import SD_VAE, SDXL_VAE, AutoencoderKL, AutoencoderKLConfig, TinyAutoencoder
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.distributed import pick_device
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.memory import PLANS, Plan, at_work
from nanodiffusion.nets.adapter import Adapter
from nanodiffusion.nets.controlnet import ControlNet
from nanodiffusion.nets.inpaint import InpaintTokens
from nanodiffusion.nets.sd_unet import SDUNet, SDUNetConfig
from nanodiffusion.noise import Schedule, ldm, zero_terminal_snr
from nanodiffusion.pretrained import architecture as arch
from nanodiffusion.pretrained.hub import Place, cached, locate, needed
from nanodiffusion.pretrained.layouts import Piece, rename
from nanodiffusion.pretrained.recognise import Guess, detect
from nanodiffusion.pretrained.scheduler_config import PREDICTIONS, read_scheduler
from nanodiffusion.pretrained.weights import DTYPES, STEMS, Source, has_plain, load, read_json, source_of, variants
from nanodiffusion.tensors import file_sha256, load_meta
from nanodiffusion.text import CLIP_BIGG, CLIP_H, CLIP_L, CLIPText, CLIPTokenizer, TextConfig
from nanodiffusion.text.prompts import TextEncoder, TextPart

# -- the families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRow:
    """One text encoder of a family: what its activation is, what is read from it, and the id that pads its prompts."""

    activation: str
    layer: int = -1
    norm: bool = True
    pooled: bool = False
    pad: int | None = None  # None: the end token


@dataclass(frozen=True)
class Family:
    """What checkpoints of a family have in common and no file says."""

    name: str
    size: int  # natural side of a picture, in pixels
    guidance: float  # the usual scale
    texts: tuple[TextRow, ...]
    scale: float  # of the latents
    sizes: bool = False  # takes the picture's sizes as conditioning
    zero_uncond: bool = False  # trained with zeros, not with the encoded "", as the empty prompt
    predicts_v: bool = False  # or eps: both were published, and files do not say which


FAMILIES = {
    "sd1": Family("sd1", 512, 7.5, (TextRow("quick_gelu"),), SD_VAE.scale),
    "sd2": Family("sd2", 768, 7.5, (TextRow("gelu", pad=0),), SD_VAE.scale, predicts_v=True),
    "sdxl": Family(
        "sdxl",
        1024,
        5.0,
        (TextRow("quick_gelu", -2, False), TextRow("gelu", -2, False, True, pad=0)),
        SDXL_VAE.scale,
        sizes=True,
        zero_uncond=True,
    ),
}
TEXTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))  # their folders
# Where the vocabulary that all these families share is likely to lie in the cache, for files that bring none.
VOCABULARIES = (
    "openai/clip-vit-large-patch14",
    "stabilityai/stable-diffusion-xl-base-1.0/tokenizer",
    "stable-diffusion-v1-5/stable-diffusion-v1-5/tokenizer",
    "runwayml/stable-diffusion-v1-5/tokenizer",
    "CompVis/stable-diffusion-v1-4/tokenizer",
    "stabilityai/stable-diffusion-2-1/tokenizer",
)


def family_of(config: SDUNetConfig) -> Family:
    """The family of a U-Net: SDXL's takes sizes, SD 2.x' has linear projections about its transformers."""
    return FAMILIES["sdxl" if config.added_dim else "sd2" if config.linear_projection else "sd1"]


@dataclass
class Bundle:
    """A checkpoint ready for use. source: its name, commit (of the hub, or None) and weight files; JSON-able."""

    family: Family
    denoiser: Denoiser
    codec: AutoencoderKL
    text: TextEncoder
    schedule: Schedule
    source: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)  # scheduler_config.json as it came
    asked: str | None = None  # the prediction that was asked for instead of what files say
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where the work is done
    plan: Plan = PLANS["fast"]  # how memory is spent; see `memory.choose`

    @contextmanager
    def at_work(self, *nets: nn.Module) -> Iterator[None]:
        """The nets on `device` inside the block; afterwards too, unless the plan sends them back."""
        with ExitStack() as stack:
            for net in nets:
                stack.enter_context(at_work(net, self.device, self.plan.offload))
            yield

    @property
    def config(self) -> SDUNetConfig:
        """The U-Net's."""
        return self.denoiser.net.config  # type: ignore[return-value]

    def sha256(self) -> str:
        """SHA-256 of the file, or of all weight files' digests in order; read once, then remembered in `source`."""
        if "sha256" not in self.source:
            digests = [file_sha256(Path(file)) for file in self.source["files"]]
            whole = hashlib.sha256("".join(digests).encode()).hexdigest()
            self.source["sha256"] = digests[0] if len(digests) == 1 else whole
        return self.source["sha256"]


# -- one network ---------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How a component is found, described and built."""

    words: str
    folder: str
    model: str  # its class in diffusers
    from_json: Callable[[Mapping[str, Any], Path], Any]
    from_shapes: Callable[..., Any]
    build: Callable[[Any], nn.Module]


KINDS = {
    "unet": Kind("U-Net", "unet", "UNet2DConditionModel", arch.unet_config, arch.unet_of_shapes, SDUNet),
    "vae": Kind("KL autoencoder", "vae", "AutoencoderKL", arch.vae_config, arch.vae_of_shapes, AutoencoderKL),
    "controlnet": Kind(
        "ControlNet", "controlnet", "ControlNetModel", arch.controlnet_config, arch.controlnet_of_shapes, ControlNet
    ),
    "adapter": Kind("T2I-Adapter", "adapter", "T2IAdapter", arch.adapter_config, arch.adapter_of_shapes, Adapter),
    "tiny_vae": Kind(
        "tiny autoencoder", "vae", "AutoencoderTiny", arch.tiny_config, arch.tiny_of_shapes, TinyAutoencoder
    ),
}


@dataclass(frozen=True)
class Part:
    """Where one network's weights are, and what describes it: `component` as layouts calls it, config.json if there is one."""

    component: str
    words: str
    source: Source
    config: Path | None

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """Our names -> where they are read. UserError: another kind of file, or names that belong to nothing."""
        plan = rename(self.source.entries)
        if self.component not in plan.components:
            raise _wrong_kind(self.source, self.words)
        if plan.unknown:
            few = ", ".join(plan.unknown[:3]) + (", ..." if len(plan.unknown) > 3 else "")
            found = f"{len(plan.unknown)} that belong to nothing here: {few}"
            raise UserError("this file has tensors of something else", file=self.source.where, found=found)
        return plan.components[self.component]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names -> shapes."""
        return self.source.shapes_of(self.pieces)

    def load(self, build: Callable[[], nn.Module], dtype: torch.dtype | None, device: torch.device) -> Any:
        """The network with its weights."""
        return load(build, self.source, dtype, device, lambda _: self.pieces)

    def described(self, from_shapes: Callable[..., Any], *args: Any) -> Any:
        """A config off the tensors' shapes. UserError: tensors are missing that tell it."""
        try:
            return from_shapes(self.shapes, *args)
        except (KeyError, IndexError, ValueError) as e:
            found = f"no sound {e}"
            raise UserError(f"this is no whole {self.words}", file=self.source.where, found=found) from e


def _wrong_kind(source: Source, words: str) -> UserError:
    guess = detect(source.shapes)
    found = " ".join(filter(None, [guess.family, guess.kind.replace("_", " ")])) + "".join(
        f"; {n}" for n in guess.notes
    )
    return UserError(f"this file holds no {words}", file=source.where, expected=f"a {words}", found=found[:300])


def _in_folder(folder: Path, component: str, words: str, name: str, variant: str | None) -> Part:
    """A component in its own folder, or in the one of that name inside a pipeline's."""
    folder = folder / name if (folder / name).is_dir() else folder
    config = folder / "config.json"
    if (folder / "model_index.json").is_file():
        raise _lacks(folder, name)
    if variant and variant not in variants(folder) and has_plain(folder):
        warnings.warn(f"{folder} has no variant {variant}: its plain weights are used", stacklevel=2)
        variant = None
    return Part(component, words, source_of(folder, variant), config if config.is_file() else None)


def _lacks(folder: Path, name: str) -> UserError:
    has = ", ".join(sorted(f.name for f in folder.iterdir() if f.is_dir())) or "no folders"
    return UserError("this checkpoint lacks a component", file=folder, key=name, expected=f"a folder {name}", found=has)


def _part(path: Path, component: str, variant: str | None) -> Part:
    kind = KINDS[component]
    if path.is_dir():
        return _in_folder(path, component, kind.words, kind.folder, variant)
    beside = path.parent / "config.json"
    described = beside.is_file() and path.name.startswith(STEMS) and read_json(beside).get("_class_name") == kind.model
    return Part(component, kind.words, source_of(path), beside if described else None)


def _config(part: Part, *args: Any) -> Any:
    """The config of a part, from its config.json or, without one, from its tensors' shapes."""
    kind = KINDS[part.component]
    if part.config is None:
        return part.described(kind.from_shapes, *args)
    return kind.from_json(read_json(part.config), part.config)


class Options(NamedTuple):
    """What all loaders take."""

    dtype: torch.dtype | None  # None: as in the file
    device: torch.device


def _options(dtype: str | torch.dtype, device: str | torch.device) -> Options:
    where = pick_device(str(device))
    half = torch.bfloat16 if where.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    auto = torch.float32 if where.type == "cpu" else half
    return Options(dtype if isinstance(dtype, torch.dtype) else lookup({"auto": auto, **DTYPES}, dtype, "dtype"), where)


def _load_one(
    component: str, where: str | Path, variant: str | None, revision: str | None, options: Options, *args: Any
) -> Any:
    kind = KINDS[component]
    place = locate(where, partial(needed, variant=variant, folders=(kind.folder,)), revision)
    part = _part(place.path, component, variant)
    config = _config(part, *args)
    return part.load(lambda: kind.build(config), *options)


def load_unet(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    revision: str | None = None,
) -> SDUNet:
    """The U-Net of a checkpoint, of its own folder or file, or of a name on the hub. UserError: as load_pretrained."""
    return _load_one("unet", where, variant, revision, _options(dtype, device))


def load_controlnet(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    revision: str | None = None,
) -> ControlNet:
    """A ControlNet from its folder, its file in either layout, or a name on the hub. UserError: as load_pretrained."""
    return _load_one("controlnet", where, variant, revision, _options(dtype, device))


def load_adapter(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    revision: str | None = None,
) -> Adapter:
    """A T2I-Adapter from its folder, its file in either layout, or a name on the hub. UserError: as load_pretrained."""
    return _load_one("adapter", where, variant, revision, _options(dtype, device))


def load_tiny(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    revision: str | None = None,
) -> TinyAutoencoder:
    """A TAESD from its folder, its file, or a name on the hub. UserError: as load_pretrained."""
    return _load_one("tiny_vae", where, variant, revision, _options(dtype, device))


def load_tokens(
    where: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> InpaintTokens:
    """Inpainting tokens from the file that their training leaves. UserError: another kind of file, or a damaged one."""
    source = source_of(where)
    if detect(source.shapes).kind != "inpainting_tokens":
        raise _wrong_kind(source, "set of inpainting tokens")
    context_dim, channels = source.shapes["conditioning_image_proj.weight"]
    positions = load_meta(source.files[0]).get("positions", False)
    return load(lambda: InpaintTokens(context_dim, channels, positions), source, *_options(dtype, device))


def load_codec(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    revision: str | None = None,
    family: str | None = None,
) -> AutoencoderKL:
    """The KL autoencoder of a checkpoint, of its own folder or file, or of a name on the hub.

    family: "sd1", "sd2" or "sdxl", whose latent scale it has; only a file without a config.json needs it. UserError: it
    does, or as load_pretrained.
    """
    options = _options(dtype, device)
    place = locate(where, partial(needed, variant=variant, folders=("vae",)), revision)
    part = _part(place.path, "vae", variant)
    config = _config(part, 0.0)
    if part.config is None:
        name = detect(part.source.shapes).family or family  # a whole checkpoint's file tells it, a VAE's own does not
        if name is None:
            fix = "family=sd1, sd2 or sdxl, the family whose latents it makes"
            raise UserError("a VAE's tensors do not say its latent scale", file=place.path, key="family", fix=fix)
        config = replace(config, scale=lookup(FAMILIES, name, "family").scale)
    return part.load(lambda: AutoencoderKL(config), *options)


def load_text(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    revision: str | None = None,
    name: str = "text_encoder",
    activation: str | None = None,
) -> CLIPText:
    """A text encoder from its folder or file, or that of `name` in a checkpoint; a whole CLIP gives its text half.

    activation: "quick_gelu" or "gelu"; only a file without a config.json needs it, and those of published widths do not.
    UserError: it does, or as load_pretrained.
    """
    options = _options(dtype, device)
    place = locate(where, partial(needed, variant=variant, folders=(name,)), revision)
    part = _text_part(place.path, name, variant)
    if part.config is None and activation is None:
        width = part.described(arch.text_of_shapes, CLIP_L.activation).width
        activation = next((c.activation for c in (CLIP_L, CLIP_H, CLIP_BIGG) if c.width == width), None)
        if activation is None:
            what, fix = "a text encoder's tensors do not say its activation", "activation=quick_gelu (OpenAI's) or gelu"
            raise UserError(what, file=place.path, key="activation", found=f"{width} features", fix=fix)
    config = _text_config(part, activation or CLIP_L.activation)
    return part.load(lambda: CLIPText(config), *options)


def _text_part(path: Path, name: str, variant: str | None) -> Part:
    words = "CLIP text encoder"
    if path.is_dir():
        return _in_folder(path, "text", words, name, variant)
    source, beside = source_of(path), path.parent / "config.json"
    described = beside.is_file() and path.name.startswith(STEMS) and "vocab_size" in read_json(beside)
    names = dict(zip((folder for folder, _ in TEXTS), ("text", "text_2")))
    whole = len(rename(source.entries).components) > 1  # the second encoder's own file calls it as the first's does
    return Part(names.get(name, "text") if whole else "text", words, source, beside if described else None)


def _text_config(part: Part, activation: str) -> TextConfig:
    if part.config is None:
        return part.described(arch.text_of_shapes, activation)
    return arch.text_config(read_json(part.config), part.config, part.shapes)


# -- a whole checkpoint --------------------------------------------------------------------------------------------------


def load_pretrained(
    where: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    variant: str | None = None,
    prediction: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    offload: bool = False,
) -> Bundle:
    """The checkpoint at `where`: a diffusers folder, an original-layout .safetensors, or a name on the hub.

    dtype: "fp32", "bf16", "fp16", "keep" (the file's), or "auto": fp32 on a CPU, else bf16, or fp16 where there is none.
    variant: "fp16" reads model.fp16.safetensors. prediction: "eps" or "v" instead of what the checkpoint says. revision: a
    branch, tag or commit. tokenizer: for a single file, a folder with vocab.json and merges.txt. Nothing wants gradients until
    it is told to. UserError: not a checkpoint, missing, damaged or unknown parts, parts of different families, settings that
    we do not support.
    """
    options = _options(dtype, device)
    if prediction is not None:
        lookup(dict.fromkeys(PREDICTIONS.values()), prediction, "prediction")
    place, parts = _found(where, variant, revision, prediction, tokenizer)
    stored = options._replace(device=torch.device("cpu")) if offload else options
    return replace(_assemble(place, parts, stored), device=options.device, asked=prediction)


def load_texts(
    where: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> tuple[TextEncoder, Family]:
    """The text encoders of a whole checkpoint, and its family; no other network is read. UserError: as load_pretrained."""
    _, parts = _found(where, prediction="eps")  # whatever it predicts
    configs = [_text_config(part, row.activation) for part, row in zip(parts.texts, parts.family.texts)]
    return _text_encoder(parts, configs, _options(dtype, device)), parts.family


def is_checkpoint(where: str | Path) -> bool:
    """Whether a whole checkpoint is meant: a file, or a folder with a U-Net, here or on the hub. UserError: there is nothing."""
    path = locate(where, lambda files: [file for file in files if file.endswith(".json")]).path
    return path.is_file() or (path / "unet").is_dir()


@dataclass(frozen=True)
class Parts:
    """Everything a bundle is made of, found and described but not read yet."""

    family: Family
    unet: Part
    vae: Part
    texts: list[Part]
    tokenizers: list[CLIPTokenizer]
    schedule: Schedule
    prediction: str
    scheduler: dict[str, Any] = field(default_factory=dict)


def _found(
    where: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[Place, Parts]:
    folders = ("unet", "vae", "scheduler", *(name for pair in TEXTS for name in pair))
    place = locate(where, partial(needed, variant=variant, folders=folders), revision)
    if place.path.is_dir():
        return place, _from_folder(place.path, variant, prediction)
    return place, _from_file(place.path, prediction, None if tokenizer is None else Path(tokenizer))


def _from_folder(folder: Path, variant: str | None, prediction: str | None) -> Parts:
    index = _index(folder)
    _check_variant(folder, variant)
    unet = _in_folder(folder, "unet", KINDS["unet"].words, "unet", variant)
    family = family_of(_config(unet))
    names = TEXTS[: len(family.texts)]
    for name in ("vae", "scheduler", *(name for pair in names for name in pair)):
        if not (folder / name).is_dir():
            raise _lacks(folder, name)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    raw = read_json(scheduler)
    schedule, said = read_scheduler(raw, scheduler)
    vae = _in_folder(folder, "vae", KINDS["vae"].words, "vae", variant)
    return Parts(
        _as_told(family, index, unet, 2 ** (len(_config(vae, family.scale).widths) - 1)),
        unet,
        vae,
        [_in_folder(folder, "text", "CLIP text encoder", name, variant) for name, _ in names],
        [CLIPTokenizer.from_folder(folder / name) for _, name in names],
        schedule,
        prediction or said,
        raw,
    )


def _index(folder: Path) -> dict[str, Any]:
    """model_index.json, {} where there is none. UserError: not a checkpoint's folder."""
    file = folder / "model_index.json"
    index = read_json(file) if file.is_file() else {}
    if (folder / "unet").is_dir():
        return index
    if index:
        name = index.get("_class_name", "pipeline of another kind")
        has = ", ".join(sorted(f.name for f in folder.iterdir() if f.is_dir()))
        raise UserError("this is no Stable Diffusion checkpoint", file=folder, key="unet", found=f"a {name} of {has}")
    config = folder / "config.json"
    kind = read_json(config).get("_class_name") if config.is_file() else None
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"a {kind}" if kind else ", ".join(files[:3] or sorted(f.name for f in folder.iterdir())[:6]) or "nothing"
    fix = "give the .safetensors file itself" if files and not kind else None
    expected = "folders unet, vae, text_encoder, tokenizer, scheduler"
    raise UserError("this folder is no checkpoint", file=folder, expected=expected, found=found, fix=fix)


def _check_variant(folder: Path, variant: str | None) -> None:
    """UserError when no component has the variant; where only some have, the others' plain weights do."""
    names = ("unet", "vae", *(name for name, _ in TEXTS))
    known = {v for name in names if (folder / name).is_dir() for v in variants(folder / name)}
    if variant and variant not in known:
        found = ", ".join(sorted(known)) or "none"
        raise UserError("no such variant of the weights", file=folder, key="variant", expected=found, found=variant)


def _as_told(family: Family, index: Mapping[str, Any], unet: Part, factor: int) -> Family:
    """The family with what this checkpoint says of itself: its natural size, and how it was trained without a prompt.

    factor: pixels of a picture per pixel of its latent, along each side.
    """
    raw = read_json(unet.config) if unet.config else {}
    side = raw.get("sample_size")
    zero = index.get("force_zeros_for_empty_prompt", family.zero_uncond) is True
    return replace(
        family, size=factor * side if type(side) is int and 0 < side < 1024 else family.size, zero_uncond=zero
    )


def _from_file(file: Path, prediction: str | None, tokenizer: Path | None) -> Parts:
    source = source_of(file)
    guess = detect(source.shapes)
    names = ("text", "text_2")[: len(FAMILIES[guess.family].texts)] if guess.family else ("text",)
    lacking = [name for name in ("unet", "vae", *names) if name not in guess.components]
    if guess.family is None or lacking:
        found = " ".join(filter(None, [guess.family, guess.kind])) + "".join(f"; {note}" for note in guess.notes)
        expected = "a U-Net, a VAE and text encoders in the original layout"
        raise UserError("this file is no whole checkpoint", file=file, expected=expected, found=found[:300])
    family = FAMILIES[guess.family]
    schedule, said = file_reading(file, source, guess, prediction)
    return Parts(
        replace(family, size=512) if family.predicts_v and said == "eps" else family,
        Part("unet", KINDS["unet"].words, source, None),
        Part("vae", KINDS["vae"].words, source, None),
        [Part(name, "CLIP text encoder", source, None) for name in names],
        [vocabulary(file, tokenizer, row) for row in family.texts],
        schedule,
        said,
    )


def file_reading(file: Path, source: Source, guess: Guess, prediction: str | None) -> tuple[Schedule, str]:
    """The noise levels and the prediction of a U-Net in a single file: as asked for, marked, or usual in its family."""
    said = prediction or guess.prediction
    if said is None and guess.family and usually_v(FAMILIES[guess.family], guess.channels_in):
        said, name = "v", file.name
        note = f"{name} does not say what it predicts: v, as SD 2.1 at 768 does; prediction=eps if it is the base model"
        warnings.warn(note, stacklevel=5)
    return zero_terminal_snr(ldm()) if "ztsnr" in source.entries else ldm(), said or "eps"


def usually_v(family: Family, channels_in: int | None) -> bool:
    """Whether a file that does not say it predicts v: SD 2.x' plain U-Net, of which both kinds were published."""
    return family.predicts_v and channels_in == 4


def _assemble(place: Place, parts: Parts, options: Options) -> Bundle:
    family = parts.family
    texts = [_text_config(part, row.activation) for part, row in zip(parts.texts, family.texts)]
    unet, vae = _config(parts.unet, texts[-1].projection or 0), _config(parts.vae, family.scale)
    _check_fit(place.path, unet, vae, texts)
    net = parts.unet.load(lambda: SDUNet(unet), *options)
    codec = parts.vae.load(lambda: AutoencoderKL(vae), *options)
    text = _text_encoder(parts, texts, options)
    denoiser = Denoiser(net, parts.prediction, "table", parts.schedule).eval()
    sources = [part.source for part in (parts.unet, parts.vae, *parts.texts)]
    files = [str(file) for file in dict.fromkeys(file for source in sources for file in source.files)]
    source = {"name": place.name, "commit": place.commit, "files": files}
    return Bundle(family, denoiser, codec, text, parts.schedule, source, parts.scheduler)


def _text_encoder(parts: Parts, configs: list[TextConfig], options: Options) -> TextEncoder:
    nets = [part.load(partial(CLIPText, config), *options) for part, config in zip(parts.texts, configs)]
    rows = zip(parts.tokenizers, nets, parts.family.texts)
    return TextEncoder([TextPart(tokenizer, clip, r.layer, r.norm, r.pooled) for tokenizer, clip, r in rows])


def _check_fit(path: Path, unet: SDUNetConfig, vae: AutoencoderKLConfig, texts: list[TextConfig]) -> None:
    """UserError unless the components belong together."""
    checks = {
        "features of the text": (unet.context_dim, sum(text.width for text in texts)),
        "features of the pooled text": (unet.pooled_dim, (texts[-1].projection or 0) if unet.added_dim else 0),
        "channels of the latents": (unet.channels_out, vae.latent_channels),
    }
    for what, (wanted, found) in checks.items():
        if wanted != found:
            raise UserError(
                "the parts of this checkpoint do not belong together",
                file=path,
                key=what,
                expected=f"{wanted}, says the U-Net",
                found=found,
                fix="take all of them from one family of checkpoints",
            )


def vocabulary(file: Path, given: Path | None, row: TextRow) -> CLIPTokenizer:
    """The tokenizer of a single file: from the folder given, beside the file, or in the hub's cache.

    UserError: none of them has one.
    """
    near = [given] if given else [file.parent]
    folders = [folder for start in near for folder in (start / "tokenizer", start)]
    for name in () if given else VOCABULARIES:
        owner, repository, *inside = name.split("/")
        if found := cached(f"{owner}/{repository}"):
            folders.append(found.joinpath(*inside))
    for folder in folders:
        if (folder / "vocab.json").is_file():
            return CLIPTokenizer.from_files(folder / "vocab.json", folder / "merges.txt", row.pad)
    raise UserError(
        "a single file has no tokenizer, and none is near",
        file=given or file,
        expected="vocab.json and merges.txt of CLIP, in a folder tokenizer beside it or in the hub's cache",
        fix="tokenizer=FOLDER",
    )
