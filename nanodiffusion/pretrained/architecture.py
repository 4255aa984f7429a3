"""Which network a checkpoint is of: our config classes from diffusers' and transformers' config.json, and back.

Strict: every value of a config.json is used, or must be the one that these networks have, so that a variant that we lack is
named instead of computed wrongly. `*_of_shapes` read the same off the tensors, for files that bring no config.json.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanodiffusion.codec import AutoencoderKLConfig, TinyConfig
from nanodiffusion.errors import UserError
from nanodiffusion.nets.adapter import AdapterConfig
from nanodiffusion.nets.controlnet import ControlNetConfig
from nanodiffusion.nets.sd_unet import SIZES, SDUNetConfig
from nanodiffusion.text import TextConfig

Shapes = Mapping[str, tuple[int, ...]]
Raw = Mapping[str, Any]

# No published network comes near: a config.json that asks for more would build layers until the memory is full.
MOST, DEEPEST, LEVELS = 1 << 17, 128, 16

# -- config.json, every key accounted for --------------------------------------------------------------------------------


class Fields:
    """The keys of a config.json: each is taken, or checked; `end` refuses those left over, unless they say nothing."""

    def __init__(self, raw: Raw, file: Path, kind: str | None) -> None:
        self.file, self.left = file, {key: value for key, value in raw.items() if not key.startswith("_")}
        found = raw.get("_class_name", kind)
        if kind and found != kind:
            what = f"this is another kind of model, and no {kind}"
            raise UserError(what, file=file, key="_class_name", expected=kind, found=str(found)[:80])

    def integer(self, key: str, default: int, most: int = MOST) -> int:
        """A whole number from 0 to `most`, or a list of equal ones; null is the default."""
        value = self.left.pop(key, None)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            value = value[0]
        return self._whole(key, default if value is None else value, most)

    def integers(self, key: str, default: tuple[int, ...], most: int = MOST) -> tuple[int, ...]:
        """A short list of whole numbers from 0 to `most`."""
        value = self.left.pop(key, default)
        if not isinstance(value, list | tuple) or not 0 < len(value) <= LEVELS:
            raise self.wrong(key, f"a list of 1 to {LEVELS} numbers", value)
        return tuple(self._whole(key, item, most) for item in value)

    def levels(self, key: str, default: int, count: int, most: int = MOST) -> tuple[int, ...]:
        """A whole number for each of `count` levels: a list of so many, or one number for all."""
        if isinstance(self.left.get(key), list):
            numbers = self.integers(key, (), most)
            if len(numbers) != count:
                raise self.wrong(key, f"{count} numbers, one per level", numbers)
            return numbers
        return (self.integer(key, default, most),) * count

    def real(self, key: str, default: float) -> float:
        """A finite number; null is the default."""
        value = self.left.pop(key, None)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.left.pop(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false", value)
        return value

    def choice(self, key: str, default: str | None, *valid: str | None) -> str | None:
        """One of a few names."""
        value = self.left.pop(key, default)
        if value not in valid:
            raise self.wrong(key, " or ".join(map(str, valid)), value)
        return value

    def names(self, key: str, default: tuple[str, ...], *valid: str) -> list[str]:
        """A short list of some of the names."""
        value = self.left.pop(key, default)
        if not isinstance(value, list | tuple) or not 0 < len(value) <= LEVELS or any(v not in valid for v in value):
            raise self.wrong(key, f"a list of {' or '.join(valid)}", value)
        return list(value)

    def only(self, key: str, valid: Any) -> None:
        """UserError unless the key is absent, null, or has the one value that these networks have, at every level."""
        value = self.left.pop(key, None)
        if value is not None and any(item != valid for item in (value if isinstance(value, list) else [value])):
            raise self.wrong(key, repr(valid), value)

    def ignore(self, *keys: str) -> None:
        """Keys that say nothing about the network."""
        for key in keys:
            self.left.pop(key, None)

    def end(self) -> None:
        """UserError when a key is left that has a value."""
        for key, value in self.left.items():
            if value not in (None, False, [], {}):
                raise UserError("nothing here knows this setting", file=self.file, key=key, found=repr(value)[:80])

    def wrong(self, key: str, expected: str, found: Any) -> UserError:
        """What to say of a value that these networks do not have."""
        what = "this setting of the network is not supported"
        return UserError(what, file=self.file, key=key, expected=expected, found=repr(found)[:80])

    def _whole(self, key: str, value: Any, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise self.wrong(key, f"a whole number, at most {most}", value)
        return value


# -- the U-Net and ControlNet --------------------------------------------------------------------------------------------

ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UNET_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UNET_ONLY: dict[str, Any] = {  # what all Stable Diffusion U-Nets have in common
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


def unet_config(raw: Raw, file: Path) -> SDUNetConfig:
    """Our config of diffusers' UNet2DConditionModel. UserError: a setting that Stable Diffusion's U-Nets do not have."""
    fields = Fields(raw, file, "UNet2DConditionModel")
    config = _encoder(fields)
    _check_mirrored(fields, config)
    fields.end()
    return config


def _encoder(f: Fields) -> SDUNetConfig:
    attends = [ATTENDS[kind] for kind in f.names("down_block_types", UNET_BLOCKS, *ATTENDS)]
    n = len(attends)
    for key, valid in UNET_ONLY.items():
        f.only(key, valid)
    f.ignore("sample_size", "upcast_attention", "dropout", "addition_embed_type_num_heads")
    depths = f.levels("transformer_layers_per_block", 1, n, DEEPEST)
    middle = f.choice("mid_block_type", MIDDLES[0], *MIDDLES)
    # diffusers calls the number of heads attention_head_dim; a name of its own for it came later
    named = "attention_head_dim" if f.left.get("num_attention_heads") is None else "num_attention_heads"
    added, features = _added(f)
    config = SDUNetConfig(
        channels_in=f.integer("in_channels", 4),
        channels_out=f.integer("out_channels", 4),
        widths=f.levels("block_out_channels", 0, n) if "block_out_channels" in f.left else SDUNetConfig.widths,
        depths=tuple(depth if a else 0 for depth, a in zip(depths, attends)),
        depth_mid=depths[-1] if middle == MIDDLES[0] else 0,
        blocks=f.integer("layers_per_block", 2, DEEPEST),
        heads=f.levels(named, 8, n),
        context_dim=f.integer("cross_attention_dim", 1280),
        linear_projection=f.flag("use_linear_projection", False),
        groups=f.integer("norm_num_groups", 32),
        added_dim=added,
        size_features=features,
    )
    f.ignore("attention_head_dim")
    return config


def _added(f: Fields) -> tuple[int, int]:
    """Features of pooled and sizes together, and of each size: SDXL's added conditioning."""
    features = f.integer("addition_time_embed_dim", SDUNetConfig.size_features)
    total = f.integer("projection_class_embeddings_input_dim", 0)
    return (0, features) if f.choice("addition_embed_type", None, None, "text_time") is None else (total, features)


def _check_mirrored(f: Fields, config: SDUNetConfig) -> None:
    expected = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)]
    default = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    found = f.names("up_block_types", default, "CrossAttnUpBlock2D", "UpBlock2D")
    if found != expected:
        raise f.wrong("up_block_types", ", ".join(expected), found)


def unet_json(c: SDUNetConfig, sample_size: int | None = None) -> dict[str, Any]:
    """The config.json that diffusers builds the same U-Net from; sample_size: the natural side of a latent."""
    if c.pass_through:
        raise UserError("diffusers has no such U-Net", key="pass_through", found=c.pass_through)
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(c.depths)]
    return {
        "_class_name": "UNet2DConditionModel",
        **_encoder_json(c),
        "up_block_types": up,
        "sample_size": sample_size,
    } | {"out_channels": c.channels_out}


def _encoder_json(c: SDUNetConfig) -> dict[str, Any]:
    depths = [depth or 1 for depth in c.depths]
    last = c.depth_mid or depths[-1]
    if c.depth_mid and c.depths[-1] and c.depth_mid != c.depths[-1]:
        found = (c.depths[-1], c.depth_mid)
        raise UserError("diffusers has as many transformer blocks in the middle as below", key="depth_mid", found=found)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": c.size_features,
        "projection_class_embeddings_input_dim": c.added_dim,
    }
    return {
        "_diffusers_version": "0.20.0",
        **{
            key: UNET_ONLY[key] for key in ("flip_sin_to_cos", "freq_shift", "downsample_padding", "act_fn", "norm_eps")
        },
        "in_channels": c.channels_in,
        "block_out_channels": list(c.widths),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depths],
        "mid_block_type": MIDDLES[0] if c.depth_mid else MIDDLES[1],
        "transformer_layers_per_block": [*depths[:-1], last],
        "layers_per_block": c.blocks,
        "attention_head_dim": list(c.heads),
        "cross_attention_dim": c.context_dim,
        "use_linear_projection": c.linear_projection,
        "norm_num_groups": c.groups,
        **(added if c.added_dim else {}),
    }


def controlnet_config(raw: Raw, file: Path) -> ControlNetConfig:
    """Our config of diffusers' ControlNetModel. UserError: a setting that we do not support."""
    f = Fields(raw, file, "ControlNetModel")
    f.only("controlnet_conditioning_channel_order", "rgb")
    stem = f.integers("conditioning_embedding_out_channels", ControlNetConfig.hint_widths)
    config = ControlNetConfig(_encoder(f), f.integer("conditioning_channels", 3), stem)
    f.end()
    return config


def controlnet_json(c: ControlNetConfig) -> dict[str, Any]:
    """The config.json that diffusers builds the same ControlNet from."""
    if not c.hint_channels:
        raise UserError("diffusers has no ControlNet without a stem", key="hint_channels", found=0)
    stem = {"conditioning_channels": c.hint_channels, "conditioning_embedding_out_channels": list(c.hint_widths)}
    return {"_class_name": "ControlNetModel", **_encoder_json(c.encoder), **stem}


# -- codecs, text encoders, adapters -------------------------------------------------------------------------------------


def vae_config(raw: Raw, file: Path) -> AutoencoderKLConfig:
    """Our config of diffusers' AutoencoderKL. UserError: a setting that we do not support."""
    f = Fields(raw, file, "AutoencoderKL")
    widths = f.integers("block_out_channels", (64,))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if len(found := f.names(key, (kind,), kind)) != len(widths):
            raise f.wrong(key, f"{kind}, {len(widths)} times", found)
    channels = f.integer("in_channels", 3)
    f.only("act_fn", "silu")
    f.only("out_channels", channels)
    f.ignore("sample_size", "force_upcast")
    config = AutoencoderKLConfig(
        channels=channels,
        latent_channels=f.integer("latent_channels", 4),
        widths=widths,
        blocks=f.integer("layers_per_block", 1, DEEPEST),
        groups=f.integer("norm_num_groups", 32),
        scale=f.real("scaling_factor", AutoencoderKLConfig.scale),
        shift=f.real("shift_factor", 0.0),
        attention=f.flag("mid_block_add_attention", True),
        quant_conv=f.flag("use_quant_conv", True),
        post_quant_conv=f.flag("use_post_quant_conv", True),
    )
    f.end()  # latents_mean and latents_std of other families are refused here
    return config


def vae_json(c: AutoencoderKLConfig) -> dict[str, Any]:
    """The config.json that diffusers builds the same autoencoder from."""
    n = len(c.widths)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.20.0",
        "act_fn": "silu",
        "in_channels": c.channels,
        "out_channels": c.channels,
        "latent_channels": c.latent_channels,
        "block_out_channels": list(c.widths),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "layers_per_block": c.blocks,
        "norm_num_groups": c.groups,
        "scaling_factor": c.scale,
        "shift_factor": c.shift or None,
        "mid_block_add_attention": c.attention,
        "use_quant_conv": c.quant_conv,
        "use_post_quant_conv": c.post_quant_conv,
    }


TINY_ONLY = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
}


def tiny_config(raw: Raw, file: Path) -> TinyConfig:
    """Our config of diffusers' AutoencoderTiny. UserError: a setting that we do not support."""
    f = Fields(raw, file, "AutoencoderTiny")
    width, channels = f.integer("encoder_block_out_channels", 64), f.integer("in_channels", 3)
    for key, valid in {**TINY_ONLY, "decoder_block_out_channels": width, "out_channels": channels}.items():
        f.only(key, valid)
    f.ignore("force_upcast", "block_out_channels")
    config = TinyConfig(
        channels=channels,
        latent_channels=f.integer("latent_channels", 4),
        width=width,
        encoder_blocks=f.integers("num_encoder_blocks", TinyConfig.encoder_blocks, DEEPEST),
        decoder_blocks=f.integers("num_decoder_blocks", TinyConfig.decoder_blocks, DEEPEST),
        scale=f.real("scaling_factor", 1.0),
        shift=f.real("shift_factor", 0.0),
    )
    f.end()
    return config


ADAPTERS = {"full_adapter": "full", "full_adapter_xl": "full_xl", "light_adapter": "light"}


def adapter_config(raw: Raw, file: Path) -> AdapterConfig:
    """Our config of diffusers' T2IAdapter. UserError: a setting that we do not support."""
    f = Fields(raw, file, "T2IAdapter")
    config = AdapterConfig(
        kind=ADAPTERS[str(f.choice("adapter_type", "full_adapter", *ADAPTERS))],
        channels_in=f.integer("in_channels", 3),
        widths=f.integers("channels", AdapterConfig.widths),
        blocks=f.integer("num_res_blocks", 2, DEEPEST),
        downscale=f.integer("downscale_factor", 8),
    )
    f.end()
    return config


def adapter_json(c: AdapterConfig) -> dict[str, Any]:
    """The config.json that diffusers builds the same adapter from."""
    return {
        "_class_name": "T2IAdapter",
        "_diffusers_version": "0.20.0",
        "adapter_type": next(theirs for theirs, ours in ADAPTERS.items() if ours == c.kind),
        "in_channels": c.channels_in,
        "channels": list(c.widths),
        "num_res_blocks": c.blocks,
        "downscale_factor": c.downscale,
    }


def text_config(raw: Raw, file: Path, shapes: Shapes) -> TextConfig:
    """Our config of transformers' CLIP text encoder, alone or in a whole CLIP. shapes: of its tensors, in our names.

    Much of a transformers config says nothing about the network, so only what does is read. UserError: what we do not support.
    """
    inner = raw.get("text_config")
    f = Fields({**raw, **inner} if isinstance(inner, dict) else raw, file, None)
    f.choice("model_type", "clip_text_model", "clip_text_model", "clip")
    f.only("layer_norm_eps", 1e-5)
    vocab, end = f.integer("vocab_size", TextConfig.vocab, MOST * 8), f.integer("eos_token_id", 2, MOST * 8)
    return TextConfig(
        width=f.integer("hidden_size", 512),
        layers=f.integer("num_hidden_layers", 12, DEEPEST),
        heads=f.integer("num_attention_heads", 8),
        mlp=f.integer("intermediate_size", 2048),
        activation=str(f.choice("hidden_act", "quick_gelu", "quick_gelu", "gelu")),
        projection=_projection(shapes),
        vocab=vocab,
        positions=f.integer("max_position_embeddings", 77),
        # the published configs of SD say 2, which is wrong; transformers then looks for the largest id instead
        eos=min(TextConfig.eos, vocab - 1) if end == 2 else end,
    )


def text_json(c: TextConfig) -> dict[str, Any]:
    """The config.json that transformers builds the same text encoder from."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if c.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "hidden_act": c.activation,
        "projection_dim": c.projection or c.width,
        "vocab_size": c.vocab,
        "max_position_embeddings": c.positions,
        "layer_norm_eps": 1e-5,
        "bos_token_id": c.eos - 1,
        "eos_token_id": c.eos,
        "pad_token_id": 1,
    }


# -- the same off the tensors --------------------------------------------------------------------------------------------


def _count(pattern: str, shapes: Shapes) -> int:
    """One more than the largest number that the group takes in a name; 0 if it is in none."""
    return max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1) + 1


def unet_of_shapes(shapes: Shapes, pooled: int = 1280) -> SDUNetConfig:
    """Our config of a U-Net's (or ControlNet's) tensors, in our names.

    Heads leave no trace in shapes: as published, they are 8 where the projections are convolutions (SD 1.x), else of 64
    features each (SD 2.x, SDXL). pooled: features of the text among the added ones. UserError: it cannot be so many.
    """
    levels = range(_count(r"down_blocks\.(\d+)\.", shapes))
    widths = tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels)
    blocks = r"{}\.attentions\.0\.transformer_blocks\.(\d+)\."
    linear = any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())
    cross = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    added = shapes.get("add_embedding.linear_1.weight", (0, 0))[1]
    return SDUNetConfig(
        channels_in=shapes["conv_in.weight"][1],
        channels_out=shapes.get("conv_out.weight", (4,))[0],
        widths=widths,
        depths=tuple(_count(blocks.format(rf"down_blocks\.{i}"), shapes) for i in levels),
        depth_mid=_count(blocks.format("mid_block"), shapes),
        blocks=_count(r"down_blocks\.0\.resnets\.(\d+)\.", shapes),
        heads=tuple(max(1, width // 64) if linear else 8 for width in widths),
        context_dim=cross or SDUNetConfig.context_dim,
        linear_projection=linear,
        added_dim=added,
        size_features=_size_features(added, pooled),
    )


def _size_features(added: int, pooled: int) -> int:
    features, rest = divmod(added - pooled, SIZES)
    if added and (rest or features < 1):
        key, fix = "add_embedding.linear_1.weight", "keep it beside the config.json that says how they are shared out"
        raise UserError(
            "which added features are the text's?", key=key, expected=f"{pooled} of them", found=added, fix=fix
        )
    return features if added else SDUNetConfig.size_features


def controlnet_of_shapes(shapes: Shapes) -> ControlNetConfig:
    """Our config of a ControlNet's tensors, in our names."""
    stem = "controlnet_cond_embedding"
    first = shapes.get(f"{stem}.conv_in.weight")
    if first is None:
        return ControlNetConfig(unet_of_shapes(shapes), hint_channels=0)
    halvings = range(1, _count(rf"{stem}\.blocks\.(\d+)\.", shapes), 2)
    widths = (first[0], *(shapes[f"{stem}.blocks.{i}.weight"][0] for i in halvings))
    return ControlNetConfig(unet_of_shapes(shapes), first[1], widths)


def vae_of_shapes(shapes: Shapes, scale: float) -> AutoencoderKLConfig:
    """Our config of a KL autoencoder's tensors, in our names; its scale leaves no trace there."""
    levels = range(_count(r"encoder\.down_blocks\.(\d+)\.", shapes))
    return AutoencoderKLConfig(
        channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        widths=tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
        blocks=_count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", shapes),
        scale=scale,
        attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv="post_quant_conv.weight" in shapes,
    )


def tiny_of_shapes(shapes: Shapes) -> TinyConfig:
    """Our config of a TAESD's tensors, in our names."""
    width, channels = shapes["encoder.layers.0.weight"][:2]
    return TinyConfig(channels, shapes["decoder.layers.0.weight"][1], width)


def adapter_of_shapes(shapes: Shapes) -> AdapterConfig:
    """Our config of an adapter's tensors, in our names: read for 3 channels, or 1 where that is what fits."""
    light = "adapter.body.0.out_conv.weight" in shapes
    first = shapes["adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"][1]
    downscale = 16 if first in (3 * 256, 256) else 8
    stages = range(_count(r"adapter\.body\.(\d+)\.", shapes))
    last = "out_conv" if light else "resnets.0.block1"
    widths = tuple(shapes[f"adapter.body.{i}.{last}.weight"][0] for i in stages)
    return AdapterConfig(
        kind="light" if light else "full_xl" if downscale == 16 else "full",
        channels_in=max(1, first // downscale**2),
        widths=widths[:-1] if light else widths,
        blocks=_count(r"adapter\.body\.0\.resnets\.(\d+)\.", shapes),
        downscale=downscale,
    )


def text_of_shapes(shapes: Shapes, activation: str) -> TextConfig:
    """Our config of a CLIP text encoder's tensors, in our names: heads of 64 features, as all published ones have."""
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    return TextConfig(
        width=width,
        layers=_count(r"text_model\.encoder\.layers\.(\d+)\.", shapes),
        heads=max(1, width // 64),
        mlp=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        activation=activation,
        projection=_projection(shapes),
        vocab=vocab,
        positions=shapes["text_model.embeddings.position_embedding.weight"][0],
        eos=min(TextConfig.eos, vocab - 1),
    )


def _projection(shapes: Shapes) -> int | None:
    return shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None
