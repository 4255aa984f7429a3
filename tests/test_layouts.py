"""Every name of a published file has one meaning, in both layouts: what diffusers reads there, bit for bit."""

import importlib
import importlib.util
import math
import random
import sys
import types
from collections.abc import Mapping
from typing import Any

import make_keys
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, T2IAdapter, UNet2DConditionModel
from diffusers.loaders import single_file_utils as reference
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from nanodiffusion.errors import UserError
from nanodiffusion.pretrained.layouts import (
    IGNORED,
    ROWS,
    Shape,
    join,
    module_names,
    originals,
    rename,
)
from nanodiffusion.pretrained.recognise import PUBLISHED, detect, published

# (tensors, parameters) as their authors publish them
COUNTS = {
    "sd15-unet": (686, 859_520_964),
    "sd15-inpaint-unet": (686, 859_535_364),
    "sd21-unet": (686, 865_910_724),
    "sdxl-unet": (1680, 2_567_463_684),
    "sdxl-inpaint-unet": (1680, 2_567_478_084),
    "sd15-controlnet": (340, 361_279_120),
    "sdxl-controlnet": (844, 1_251_014_160),
    "sdxl-adapter": (38, 79_028_160),
    "sd-vae": (248, 83_653_863),
    "vae-16": (248, 57_266_643),
    "clip-l": (196, 123_060_480),
    "clip-h": (372, 340_387_840),
    "clip-bigg": (517, 694_659_840),
}
CHECKPOINTS = {
    "sd1": {"unet": "sd15-unet", "vae": "sd-vae", "text": "clip-l", "controlnet": "sd15-controlnet"},
    "sd2": {"unet": "sd21-unet", "vae": "sd-vae", "text": "clip-h"},
    "sdxl": {
        "unet": "sdxl-unet",
        "vae": "sd-vae",
        "text": "clip-l",
        "text_2": "clip-bigg",
        "controlnet": "sdxl-controlnet",
    },
}
families = pytest.mark.parametrize("family", CHECKPOINTS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The published names with random tensors of the published ranks, each axis at most 4."""
    return {name: torch.randn([min(size, 4) for size in shape]) for name, shape in shapes.items()}


def whole(family: str) -> dict[str, dict[str, Tensor]]:
    return {component: small(published(name)) for component, name in CHECKPOINTS[family].items()}


def meta(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def split(file: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Component -> our name -> what the plan reads of a file."""
    plan = rename(file)
    assert not plan.unknown
    return {
        component: {ours: piece.read(file[piece.source]) for ours, piece in pieces.items()}
        for component, pieces in plan.components.items()
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def convert(component: str, family: str, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a component of an original file."""
    if component == "unet":
        config = {"layers_per_block": 2, "addition_embed_type": "text_time" if family == "sdxl" else None}
        return reference.convert_ldm_unet_checkpoint(dict(file), config)
    if component == "controlnet":
        return reference.convert_controlnet_checkpoint(dict(file), {"layers_per_block": 2})
    if component == "vae":
        blocks = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
        return reference.convert_ldm_vae_checkpoint(dict(file), blocks)
    if component == "text_2" or family == "sd2":
        prefix = "cond_stage_model.model." if family == "sd2" else "conditioner.embedders.1.model."
        width = file[prefix + "ln_final.weight"].shape[0]
        text = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=width))
        return reference.convert_open_clip_checkpoint(text, dict(file), prefix)
    return reference.convert_ldm_clip_checkpoint(dict(file))


def not_converted(component: str, family: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers leaves out the added embedding of a ControlNet, which its own original files never had."""
    skip = "add_embedding." if (component, family) == ("controlnet", "sdxl") else "-"
    return {name: tensor for name, tensor in ours.items() if not name.startswith(skip)}


# ---- published lists -----------------------------------------------------------------------------


def test_published_lists_have_the_published_counts():
    numbers = {name: [math.prod(shape) for shape in published(name).values()] for name in PUBLISHED}
    assert {name: (len(sizes), sum(sizes)) for name, sizes in numbers.items()} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_published_lists_are_those_of_diffusers_and_transformers(name):
    assert published(name) == make_keys.shapes(name)


def test_an_unknown_list_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'sdxl-unet'"):
        published("sdxl_unet")


# ---- original single files -----------------------------------------------------------------------


@families
def test_a_file_of_each_family_round_trips_bit_for_bit(family):
    ours = whole(family)
    file = join(ours, family)
    back = split(file)
    assert set(back) == set(ours)
    for component, tensors in ours.items():
        assert equal(back[component], tensors)
    assert equal(join(back, family), file)


@families
def test_every_tensor_is_the_one_that_diffusers_reads(family):
    ours = whole(family)
    file = join(ours, family)
    for component in ours:
        expected = {name: tensor for name, tensor in convert(component, family, file).items() if tensor is not None}
        assert equal(expected, not_converted(component, family, split(file)[component]))


@families
def test_full_size_files_have_the_shapes_that_diffusers_reads(family):
    ours = {component: meta(published(name)) for component, name in CHECKPOINTS[family].items()}
    file = join(ours, family)
    plan = rename(file)
    for component, tensors in ours.items():
        expected = shapes_of(not_converted(component, family, tensors))
        assert shapes_of(convert(component, family, file)) == expected
        pieces = plan.components[component]
        assert {name: piece.shape(tuple(file[piece.source].shape)) for name, piece in pieces.items()} == shapes_of(
            tensors
        )


UPSAMPLERS = {"sd1": ["2.1", "5.2", "8.2"], "sd2": ["2.1", "5.2", "8.2"], "sdxl": ["2.2", "5.2"]}


@families
def test_diffusers_takes_our_file_for_one_of_its_family(family):
    ours = {
        component: meta(published(name)) for component, name in CHECKPOINTS[family].items() if component != "controlnet"
    }
    file = join(ours, family)
    assert reference.infer_diffusers_model_type(file) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[family]
    # an upsampler follows the attention where there is one; diffusers reads either place
    assert [
        n for n in UPSAMPLERS[family] if f"model.diffusion_model.output_blocks.{n}.conv.weight" in file
    ] == UPSAMPLERS[family]


SCHEDULE = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance posterior_mean_coef1
posterior_log_variance_clipped posterior_mean_coef2 model_ema.decay model_ema.num_updates""".split()
EXTRA = {
    "sd1": ["cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.diffusion_modelout2bias"],
    "sd2": [
        *("cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"),
        *(f"cond_stage_model.model.transformer.resblocks.23.{leaf}" for leaf in ("ln_1.weight", "attn.in_proj_bias")),
        *("v_pred", "ztsnr", "cond_stage_model.model.attn_mask"),
    ],
    "sdxl": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
        "denoiser.sigmas",
    ],
}


@families
def test_what_we_have_no_use_for_is_named_and_can_be_put_back(family):
    extra = {name: torch.randn(3) for name in SCHEDULE + EXTRA[family]}
    file = {**join(whole(family), family), **extra}
    plan = rename(file)
    assert set(plan.ignored) == set(extra) and not plan.unknown
    assert set(plan.ignored.values()) <= {reason for _, reason in IGNORED}
    kept = {name: file[name] for name in plan.ignored}
    assert equal(join(split(file), family, extra=kept), file)


def test_a_file_of_sd2_with_23_layers_reads_as_one_with_24():
    file = join(whole("sd2"), "sd2")
    assert len({name.split(".")[4] for name in file if "resblocks" in name}) == 23
    last = {
        name.replace(".22.", ".23."): torch.zeros(2)
        for name in file
        if name.startswith("cond_stage_model") and ".22." in name
    }
    assert len(last) == 12
    assert equal(split({**file, **last})["text"], split(file)["text"])


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.0.foo.weight",
        "model.diffusion_model.input_blocks.77.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.77.0.op.weight",
        "model.diffusion_model.time_embedding.cond_proj.weight",
        "first_stage_model.encoder.down.3.attn.0.q.weight",
        "cond_stage_model.model.transformer.resblocks.0.attn.bias_k",
        "control_model.zero_convs.99.0.weight",
        "diffusion_model.foo",
        "something.else",
        "weight",
        "",
    ],
)
def test_an_unknown_name_is_returned_and_refused(name):
    file = {**join(whole("sd2"), "sd2"), **join({"controlnet": small(published("sd15-controlnet"))}, "sd2")}
    assert rename(file).unknown == ()
    assert rename([*file, name]).unknown == (name,)


def test_every_name_is_read_or_ignored_or_unknown():
    names = [name for family in CHECKPOINTS for name in join(whole(family), family)] + SCHEDULE + EXTRA["sd2"]
    draw = random.Random(0)
    for _ in range(30):
        some = draw.sample(names, 200)
        some += [f"{name}.x" if draw.random() < 0.5 else name.replace(".", ".9.", 1) for name in draw.sample(names, 20)]
        plan = rename(dict.fromkeys(some))
        read = {piece.source for pieces in plan.components.values() for piece in pieces.values()}
        assert read | set(plan.ignored) | set(plan.unknown) == set(some)
        assert len(read) + len(plan.ignored) + len(plan.unknown) == len(set(some))


def test_reading_copies_nothing():
    file = join(whole("sdxl"), "sdxl")
    plan = rename(file)
    kinds = set()
    for pieces in plan.components.values():
        for piece in pieces.values():
            tensor = file[piece.source]
            kinds.add(piece.how)
            view = piece.read(tensor)
            assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            assert piece.shape(tuple(tensor.shape)) == tuple(view.shape)
    assert kinds == {"same", "matrix", "transpose", "third 0", "third 1", "third 2"}


def test_a_name_without_counterpart_and_a_part_of_a_fused_tensor_are_refused():
    unet = small(published("sd15-unet"))
    with pytest.raises(UserError, match=r"no name in the original layout\s+key head.conv.weight"):
        originals("unet", [*unet, "head.conv.weight"], "sd1")
    text = [name for name in published("clip-bigg") if name != "text_model.encoder.layers.7.self_attn.k_proj.bias"]
    with pytest.raises(UserError, match=r"one tensor(.|\n)*resblocks.7.attn.in_proj_bias"):
        originals("text_2", text, "sdxl")
    with pytest.raises(UserError, match="'sd1' has no place"):
        originals("text_2", published("clip-bigg"), "sd1")


# ---- any depth -----------------------------------------------------------------------------------

WIDTHS: Any = (4, 8, 4, 8, 4)  # diffusers declares one width
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(
    "levels", [(CROSS,), (PLAIN, CROSS), (CROSS, PLAIN, CROSS), (PLAIN, PLAIN, CROSS, CROSS, PLAIN)]
)
def test_a_unet_and_a_controlnet_of_any_depth_are_those_that_diffusers_reads(levels, blocks):
    config = {
        "block_out_channels": (8,) * len(levels),
        "down_block_types": levels,
        "layers_per_block": blocks,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    }
    up = tuple(level.replace("Down", "Up") for level in reversed(levels))
    hint = (4,) * (blocks + 1)  # as deep as blocks
    with torch.device("meta"):
        unet = UNet2DConditionModel(up_block_types=up, **config)
        controlnet = ControlNetModel(conditioning_embedding_out_channels=hint, **config)
    ours = {name: small(shapes_of(net.state_dict())) for name, net in (("unet", unet), ("controlnet", controlnet))}
    file = join(ours, "sd1")
    unet_file = {name: tensor for name, tensor in file.items() if name.startswith("model.")}
    assert equal(reference.convert_ldm_unet_checkpoint(unet_file, config), ours["unet"])
    back = split(file)
    assert equal(back["unet"], ours["unet"]) and equal(back["controlnet"], ours["controlnet"])


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_an_autoencoder_of_any_depth_is_the_one_that_diffusers_reads(levels):
    config = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=WIDTHS[:levels], norm_num_groups=2, layers_per_block=levels, **config)
    ours = small(shapes_of(vae.state_dict()))
    file = join({"vae": ours}, "sd1")
    assert equal(reference.convert_ldm_vae_checkpoint(file, config), ours)
    assert equal(split(file)["vae"], ours)


# ---- one component -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "name", "prefix"),
    [
        ("unet", "sdxl-unet", "model.diffusion_model."),
        ("unet", "sd15-inpaint-unet", "model.diffusion_model."),
        ("vae", "sd-vae", "first_stage_model."),
        ("controlnet", "sd15-controlnet", "control_model."),
        ("text_2", "clip-bigg", "conditioner.embedders.1.model."),
    ],
)
def test_a_component_alone_reads_without_its_prefix(component, name, prefix):
    ours = small(published(name))
    bare = {key.removeprefix(prefix): tensor for key, tensor in join({component: ours}, "sdxl").items()}
    (back,) = split(bare).values()
    assert equal(back, ours)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_file_in_our_names_reads_as_it_is(name):
    ours = small(published(name))
    (back,) = split(ours).values()
    assert equal(back, ours)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_the_autoencoder_alone_reads_under_either_prefix_and_without_what_it_was_trained_with(prefix):
    ours = small(published("sd-vae"))
    file = {name.replace("first_stage_model.", prefix): t for name, t in join({"vae": ours}, "sd1").items()}
    file |= {"loss.discriminator.main.0.weight": torch.zeros(1), "model_ema.num_updates": torch.zeros(1)}
    assert equal(split(file)["vae"], ours)


@pytest.mark.parametrize("axes", [2, 4])
def test_the_autoencoder_reads_in_the_attention_names_diffusers_had_before(axes):
    ours = small(published("sd-vae"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = {}
    for name, tensor in ours.items():
        new = next((leaf for leaf in old if f".{leaf}." in name), None)
        matrix = new and tensor.ndim == 2 and axes == 4
        file[name.replace(new, old[new]) if new else name] = tensor[:, :, None, None] if matrix else tensor
    assert sum("query" in name for name in file) == 4  # weight and bias of encoder and decoder
    assert equal(split(file)["vae"], ours)


@pytest.mark.parametrize(
    "level", ["", "text_model.", "text_model.text_model.", "transformer.", "transformer.text_model."]
)
def test_clip_reads_with_any_number_of_its_outer_levels(level):
    ours = small(published("clip-l"))
    file = {level + name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    file[level + "embeddings.position_ids"] = torch.arange(77)
    assert equal(split(file)["text"], ours)
    within = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in file.items()}
    assert equal(split(within)["text"], ours)


def test_a_whole_clip_gives_its_text_half():
    ours = small(published("clip-bigg"))
    image = ["vision_model.embeddings.class_embedding", "visual_projection.weight", "logit_scale"]
    plan = rename([*ours, *image])
    assert list(plan.components["text"]) == list(ours) and list(plan.ignored) == image


def open_clip_text(**config: int) -> nn.Module:
    """open_clip's own text tower; its package wants torchvision, which that tower does not use."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    stubs = {
        name: types.ModuleType(name) for name in ("open_clip", "torchvision", "torchvision.ops", "torchvision.ops.misc")
    }
    stubs["open_clip"].__path__ = list(spec.submodule_search_locations or [])
    vars(stubs["torchvision.ops.misc"])["FrozenBatchNorm2d"] = nn.BatchNorm2d
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        net = importlib.import_module("open_clip.transformer").TextTransformer(**config)
        for name in set(sys.modules) - before - set(stubs):
            if name.startswith("open_clip."):
                del sys.modules[name]
    return net


def test_open_clip_and_transformers_compute_the_same_from_one_set_of_weights():
    theirs = open_clip_text(vocab_size=50, width=32, heads=4, layers=3, output_dim=24)
    for tensor in theirs.parameters():
        nn.init.normal_(tensor, std=0.3)
    (ours,) = split(theirs.state_dict()).values()
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
        vocab_size=50,
        hidden_act="gelu",
        bos_token_id=48,
        eos_token_id=49,
    )
    reference_net = CLIPTextModelWithProjection(config).eval()
    reference_net.load_state_dict(ours)
    ids = torch.randint(0, 49, (3, 77))
    ids[:, 20] = 49
    with torch.no_grad():
        assert_close(reference_net(ids).text_embeds, theirs(ids), rtol=1e-5, atol=1e-5)


def test_sdxl_files_with_the_projection_in_our_orientation_read():
    ours = {"text_2": small(published("clip-bigg"))}
    file = join(ours, "sdxl")
    projection = file.pop("conditioner.embedders.1.model.text_projection")
    file["conditioner.embedders.1.model.text_projection.weight"] = projection.T
    assert equal(split(file)["text_2"], ours["text_2"])


def test_the_refiner_reads_and_says_what_it_is():
    ours = small(published("clip-bigg"))
    file = {name.replace("embedders.1", "embedders.0"): t for name, t in join({"text_2": ours}, "sdxl").items()}
    assert equal(split(file)["text_2"], ours)
    assert "the refiner of SDXL" in detect(shapes_of(file)).notes


def test_the_original_t2i_adapters_read():
    with torch.device("meta"):
        full = T2IAdapter(adapter_type="full_adapter", num_res_blocks=2)
        light = T2IAdapter(adapter_type="light_adapter", num_res_blocks=4)
    for net, pairs in (
        (full, {"body.2.in_conv.bias": "body.1.in_conv.bias", "body.7.block2.bias": "body.3.resnets.1.block2.bias"}),
        (
            light,
            {
                "body.2.out_conv.bias": "body.2.out_conv.bias",
                "body.3.body.1.block1.bias": "body.3.resnets.1.block1.bias",
            },
        ),
    ):
        ours = small(shapes_of(net.state_dict()))
        file = join({"adapter": ours}, "sd1")
        assert equal(split(file)["adapter"], ours)
        assert all(torch.equal(file[theirs], ours[f"adapter.{name}"]) for theirs, name in pairs.items())
        assert detect(shapes_of(file)).kind == "adapter"


def test_the_original_tiny_autoencoder_reads_whole_and_in_halves():
    with torch.device("meta"):
        net = AutoencoderTiny()
    ours = small(shapes_of(net.state_dict()))
    encoder = {name.removeprefix("encoder.layers."): t for name, t in ours.items() if name.startswith("encoder")}
    decoder = {}
    for name, tensor in ours.items():
        if name.startswith("decoder"):
            number, _, leaf = name.removeprefix("decoder.layers.").partition(".")
            decoder[f"{int(number) + 1}.{leaf}"] = tensor  # the clamp is layer 0
    back = split(encoder)["tiny_vae"] | split(decoder)["tiny_vae"]
    assert equal(back, ours)
    whole = {f"taesd_encoder.{n}": t for n, t in encoder.items()} | {
        f"taesd_decoder.{n}": t for n, t in decoder.items()
    }
    assert equal(split(whole)["tiny_vae"], ours)
    file = join({"tiny_vae": ours}, "sd1")
    assert set(file) == {f"encoder.{n}" for n in encoder} | {f"decoder.{n}" for n in decoder}
    assert equal(split(file)["tiny_vae"], ours)
    assert {detect(shapes_of(f)).kind for f in (encoder, decoder, whole, file, ours)} == {"tiny_vae"}


def test_module_names_are_those_of_the_original_files():
    names = module_names("unet", published("sdxl-unet"))
    assert (
        names["input_blocks.4.1.transformer_blocks.0.attn1.to_q"]
        == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    assert names["output_blocks.2.2.conv"] == "up_blocks.0.upsamplers.0.conv"
    assert names["label_emb.0.2"] == "add_embedding.linear_2"
    assert len(names) == len(set(names.values())) == sum(name.endswith(".weight") for name in published("sdxl-unet"))


# ---- what a file is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "family", "channels"),
    [
        ("sd15-unet", "unet", "sd1", 4),
        ("sd15-inpaint-unet", "unet", "sd1", 9),
        ("sd21-unet", "unet", "sd2", 4),
        ("sdxl-unet", "unet", "sdxl", 4),
        ("sdxl-inpaint-unet", "unet", "sdxl", 9),
        ("sd15-controlnet", "controlnet", "sd1", 4),
        ("sdxl-controlnet", "controlnet", "sdxl", 4),
        ("sdxl-adapter", "adapter", "sdxl", None),
        ("sd-vae", "vae", None, None),
        ("vae-16", "vae", None, None),
        ("clip-l", "text", None, None),
        ("clip-h", "text", "sd2", None),
        ("clip-bigg", "text", "sdxl", None),
    ],
)
def test_a_component_is_recognised(name, kind, family, channels):
    shapes = published(name)
    guess = detect(shapes)
    assert (guess.kind, guess.layout, guess.family, guess.channels_in) == (kind, "diffusers", family, channels)
    tiny = detect(shapes_of(small(shapes)))
    assert (tiny.kind, tiny.layout) == (kind, "diffusers")
    if kind in ("unet", "controlnet"):  # at any width, by the structure
        assert tiny.family == family


@families
@pytest.mark.parametrize("channels", [4, 9])
def test_a_whole_checkpoint_is_recognised(family, channels):
    ours = {
        component: meta(published(name)) for component, name in CHECKPOINTS[family].items() if component != "controlnet"
    }
    width = ours["unet"]["conv_in.weight"].shape[0]
    ours["unet"]["conv_in.weight"] = torch.empty(width, channels, 3, 3)
    file = {**join(ours, family), "v_pred": torch.zeros(0), "model_ema.decay": torch.zeros(())}
    guess = detect(shapes_of(file))
    assert (guess.kind, guess.layout, guess.family) == ("checkpoint", "original", family)
    assert guess.channels_in == channels and guess.components == tuple(ours) and guess.prediction == "v"
    assert any("inpainting" in note for note in guess.notes) == (channels == 9)
    assert detect(shapes_of(join(ours, family))).prediction is None


@pytest.mark.parametrize(
    ("shapes", "kind", "family"),
    [
        (
            {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)},
            "lora",
            "sd1",
        ),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)}, "lora", "sdxl"),
        (
            {"mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 1024)},
            "lora",
            "sd2",
        ),
        (
            {"diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.lora_A.default.weight": (4, 2048)},
            "lora",
            "sdxl",
        ),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (4, 4)}, "lora", "sdxl"),
        ({"lora_unet_conv_in.hada_w1_a": (4, 4), "lora_unet_conv_in.alpha": ()}, "lora", None),
        ({"lora_controlnet": (), "time_embed.0.up": (4, 4)}, "control_lora", None),
        ({"emb_params": (3, 768)}, "embedding", "sd1"),
        ({"emb_params": (3, 1024)}, "embedding", "sd2"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embedding", "sdxl"),
        ({"<cat-toy>": (768,)}, "embedding", "sd1"),
        ({"double_blocks.0.img_attn.qkv.weight": (9, 3)}, "unknown", None),
        ({"x": (3, 3), "y": (2,)}, "unknown", None),
        ({"x": ()}, "unknown", None),
        ({}, "unknown", None),
    ],
)
def test_other_files_are_recognised(shapes, kind, family):
    assert (detect(shapes).kind, detect(shapes).family) == (kind, family)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (1, 2, 3, 4, 5)])
def test_damaged_shapes_are_no_error(shape: Shape):
    for family in CHECKPOINTS:
        detect(dict.fromkeys(join(whole(family), family), shape))
    for name in COUNTS:
        detect(dict.fromkeys(published(name), shape))


def test_a_huge_number_in_a_name_costs_no_time():
    for name in ("encoder.%d.weight", "input_hint_block.%d.weight", "input_blocks.%d.0.op.weight", "%d.weight"):
        for digits in (9, 5000):
            rename([name.replace("%d", "9" * digits), "zero_convs.0.0.weight"])


def test_two_names_for_one_tensor_are_not_both_taken():
    ours = small(published("clip-l"))
    file = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in ours.items()}
    twice = "cond_stage_model.transformer.embeddings.token_embedding.weight"
    assert rename([*file, twice]).unknown == (twice,)


def test_reading_a_whole_sdxl_file_plans_each_tensor_once():
    file = join(whole("sdxl"), "sdxl")
    sources = [piece.source for pieces in rename(file).components.values() for piece in pieces.values()]
    fused = [name for name in file if "in_proj" in name]
    assert len(fused) == 64 and len(sources) == len(file) + 2 * len(fused) and set(sources) == set(file)


def test_no_two_rows_share_a_name_of_ours_or_theirs():
    """Both directions are functions: apart from fused q, k, v and one spelling that is only read."""
    for table, name in {
        "unet": "sdxl-unet",
        "controlnet": "sdxl-controlnet",
        "vae": "sd-vae",
        "open_clip": "clip-bigg",
    }.items():
        rows = list(ROWS[table](set(published(name))))
        ours, theirs = [row[1] for row in rows], [row[0] for row in rows if not row[2].startswith("third")]
        assert len(theirs) == len(set(theirs))
        assert len(ours) - len(set(ours)) == (table == "open_clip")
