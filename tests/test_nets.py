"""Networks: equality with other people's implementations, counts, starting values, and what they refuse."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
from reference import smalldiffusion
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.compat.translate import dit_keys, mlp_keys, unet_keys
from nanodiffusion.errors import UserError
from nanodiffusion.nets import NETS, IdealDenoiser, build_net, net_flops, net_size
from nanodiffusion.nets.layers import TimeEmbedding, timestep_embedding

EXACT = {"rtol": 0, "atol": 1e-10}
SMALL = {
    "mlp": {"hidden": [8, 16], "num_classes": 3},
    "unet": {"in_size": 8, "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [8], "num_classes": 3},
    "dit": {"in_size": [4, 6], "channels_in": 3, "dim": 24, "depth": 2, "heads": 2, "num_classes": 3},
    "pixart": {"in_size": [4, 6], "channels_in": 3, "dim": 24, "depth": 2, "heads": 2, "num_classes": 3},
    "tld": {"in_size": [4, 6], "channels_in": 3, "dim": 24, "depth": 2, "head_dim": 12, "text_dim": 5},
}
nets = pytest.mark.parametrize("name", NETS)
of_classes = pytest.mark.parametrize("name", [name for name in NETS if name != "tld"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, as after training: what starts at zero would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g).to(p) * (0.3 if p.ndim == 1 else (p[0].numel() ** -0.5))
    return net


def small(name: str, **options: object) -> nn.Module:
    return randomize(build_net(name, **SMALL[name] | options)).eval()


def inputs(net: nn.Module, b: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    label = {} if net.null_label is None else {"label": torch.arange(b) % (net.null_label + 1)}
    x, t = torch.randn(b, *net.sample_shape, generator=g), torch.linspace(-1, 1, b)
    pooled = {"pooled": torch.randn(b, 5, generator=g)} if "pooled" in net.takes else {}
    return {"x": x, "t": t} | label | pooled


def reason(match: str = "") -> object:
    return pytest.raises(UserError, match=match)


# --- smalldiffusion, weight for weight -------------------------------------------------------------------------------


def same_function(theirs: nn.Module, ours: nn.Module, translate, classes: int = 0) -> None:
    """Both nets, in float64, on the same x, sigma and labels; F is compared before their eps is read from it."""
    theirs = randomize(theirs.double()).eval()
    ours.double().eval().load_state_dict(translate(theirs.state_dict()), strict=True)
    x = torch.randn(4, *ours.sample_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.01, 0.7, 3.0, 80.0], dtype=torch.float64)
    label = torch.arange(4) % (classes + 1) if classes else None
    with torch.no_grad():
        want = theirs(x, sigma.reshape(-1, *[1] * (x.ndim - 1)), cond=label)
        got = ours(x, sigma.log() / 4, label)
    assert want.std() > 0.01
    assert_close(got, want, **EXACT)


log_clock = {"time_features": 2, "time_scale": 2.0}


def test_mlp_is_smalldiffusions():
    hidden = (16, 128, 128, 128, 128, 16)
    same_function(smalldiffusion().TimeInputMLP(hidden_dims=hidden), build_net("mlp", hidden=hidden), mlp_keys)


def test_conditional_mlp_is_smalldiffusions():
    theirs = smalldiffusion().ConditionalMLP(hidden_dims=(8, 8), num_classes=2)
    same_function(theirs, build_net("mlp", hidden=[8, 8], num_classes=2), mlp_keys, classes=2)


@pytest.mark.parametrize("classes", [0, 3])
def test_dit_is_smalldiffusions(classes):
    s = smalldiffusion()
    cond = s.CondEmbedderLabel(24, classes) if classes else None
    theirs = s.DiT(in_dim=8, channels=3, patch_size=2, depth=2, head_dim=12, num_heads=2, cond_embed=cond)
    options = {"in_size": 8, "channels_in": 3, "dim": 24, "depth": 2, "heads": 2, "num_classes": classes}
    same_function(theirs, build_net("dit", **options, **log_clock), dit_keys, classes)


@pytest.mark.parametrize(
    ("multipliers", "blocks", "attention", "classes"), [((1, 2, 1), 2, (4,), 0), ((2, 1), 1, (8,), 3)]
)
def test_unet_is_smalldiffusions(multipliers, blocks, attention, classes):
    s = smalldiffusion()
    cond = s.CondEmbedderLabel(128, classes) if classes else None
    theirs = s.Unet(8, 2, 2, 32, multipliers, 4, blocks, attention, cond_embed=cond)
    options = {"in_size": 8, "channels_in": 2, "channels": 32, "multipliers": multipliers, "num_classes": classes}
    ours = build_net("unet", **options, blocks=blocks, attention=attention, **log_clock)
    same_function(theirs, ours, unet_keys, classes)


def test_foreign_keys_are_named():
    for translate in (mlp_keys, dit_keys, unet_keys):
        with reason("key encoder.weight"):
            translate({"encoder.weight": torch.zeros(1)})


# --- diffusers: what smalldiffusion has not (flow and table clocks, ADM's modulation, several heads) ----------------


def test_dit_is_the_authors_as_diffusers_has_it():
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
    )  # fmt: skip
    options = {"in_size": 8, "channels_in": 3, "dim": 24, "depth": 2, "heads": 2, "num_classes": 5, "time_scale": 1.0}
    ours = randomize(build_net("dit", **options)).eval()
    theirs.eval().load_state_dict(diffusers_dit(ours.state_dict()), strict=True)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers has 1, against the authors' code
    x, t, label = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        assert_close(ours(x, t.float(), label), theirs(x, t, label).sample, rtol=1e-4, atol=1e-4)


def diffusers_dit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys in diffusers' names, which repeat the embedders in every block."""
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    names["proj_out_2"] = "final_layer.linear"
    out = {}
    for i in range(2):
        to, at = f"transformer_blocks.{i}", f"blocks.{i}"
        emb = f"{to}.norm1.emb"
        names |= {f"{emb}.timestep_embedder.linear_{j}": f"t_embedder.mlp.{2 * j - 2}" for j in (1, 2)}
        names |= {f"{to}.norm1.linear": f"{at}.adaLN_modulation.1", f"{to}.attn1.to_out.0": f"{at}.attn.proj"}
        names |= {f"{to}.ff.net.0.proj": f"{at}.mlp.fc1", f"{to}.ff.net.2": f"{at}.mlp.fc2"}
        out[f"{emb}.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", state[f"{at}.attn.qkv.{kind}"].chunk(3)):
                out[f"{to}.attn1.to_{letter}.{kind}"] = part
    return out | {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}


def test_unet_with_scale_shift_is_adms_as_diffusers_has_it():
    from diffusers import UNet2DModel

    theirs = UNet2DModel(
        sample_size=(8, 12), in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32, resnet_time_scale_shift="scale_shift", downsample_padding=0, norm_eps=1e-6,
        flip_sin_to_cos=True, freq_shift=0, num_class_embeds=4, attn_norm_num_groups=32, dropout=0.0,
    )  # fmt: skip
    options = {"in_size": (8, 12), "channels_in": 3, "channels": 32, "multipliers": (1, 2), "blocks": 1}
    options |= {"attention": (6,), "heads": 2, "num_classes": 3, "scale_shift": True, "time_scale": 1.0}
    ours = randomize(build_net("unet", **options, time_features=32)).eval()
    theirs.eval().load_state_dict(diffusers_unet(ours.state_dict()), strict=True)
    x, t, label = torch.randn(3, 3, 8, 12), torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        assert_close(ours(x, t.float(), label), theirs(x, t, label).sample, rtol=1e-4, atol=1e-4)


def diffusers_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A two-level, one-block U-Net in the names of diffusers' UNet2DModel."""
    places = {
        "down.0": ("down_blocks.0", 0), "down.2": ("down_blocks.1", 0), "mid.0": ("mid_block", 0),
        "mid.1": ("mid_block", 1), "up.0": ("up_blocks.0", 0), "up.1": ("up_blocks.0", 1),
        "up.2": ("up_blocks.1", 0), "up.3": ("up_blocks.1", 1),
    }  # fmt: skip
    names = {"t_embedder.mlp.0": "time_embedding.linear_1", "t_embedder.mlp.2": "time_embedding.linear_2"}
    names |= {"y_embedder.embedding_table": "class_embedding", "norm_out": "conv_norm_out"}
    names |= {"conv_in": "conv_in", "conv_out": "conv_out", "down.1.conv": "down_blocks.0.downsamplers.0.conv"}
    names |= {"up.1.up.conv": "up_blocks.0.upsamplers.0.conv"}
    for at, (block, i) in places.items():
        res, attn = f"{block}.resnets.{i}", f"{block}.attentions.{i}"
        names |= {f"{at}.res.{k}": f"{res}.{k}" for k in ("norm1", "conv1", "norm2", "conv2")}
        names |= {f"{at}.res.emb": f"{res}.time_emb_proj", f"{at}.res.shortcut": f"{res}.conv_shortcut"}
        names |= {f"{at}.attn.norm": f"{attn}.group_norm", f"{at}.attn.attn.proj": f"{attn}.to_out.0"}
        names |= {f"{at}.attn.attn.qkv": f"{attn}.to_"}
    out = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        if module.endswith("qkv"):
            out |= {f"{names[module]}{n}.{kind}": part for n, part in zip("qkv", value.chunk(3))}
        else:
            out[f"{names[module]}.{kind}"] = value
    return out


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_timestep_embedding_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.5, 999.0])
    want = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert_close(timestep_embedding(t, 256), want, rtol=0, atol=1e-4)
    assert_close(timestep_embedding(t, 2), torch.stack([t.cos(), t.sin()], 1))


def test_time_is_embedded_in_float32_whatever_the_nets_precision():
    t = torch.tensor([0.7371])
    full = TimeEmbedding(8)
    half = TimeEmbedding(8).bfloat16()
    half.load_state_dict(full.state_dict())
    assert half(t).dtype == torch.bfloat16
    assert_close(half(t).float(), full(t), rtol=0.05, atol=0.05)


@of_classes
def test_the_null_class_is_a_class_of_its_own_and_labels_matter(name):
    net = small(name)
    x, t = inputs(net, 1)["x"].expand(4, *net.sample_shape), torch.zeros(4)
    assert net.null_label == 3
    with torch.no_grad():
        out = net(x, t, label=torch.tensor([0, 1, 2, 3])).flatten(1)
    assert (torch.cdist(out, out) > 1e-3).sum() == 12


@nets
def test_time_matters(name):
    net = small(name)
    given = {key: value.expand(2, *value.shape[1:]) for key, value in inputs(net, 1).items()}
    with torch.no_grad():
        early, late = net(**given | {"t": torch.tensor([-1.0, 0.7])})
    assert (early - late).abs().max() > 1e-3


@of_classes
def test_unconditional_nets_have_no_null_label_and_ignore_labels(name):
    net = small(name, num_classes=0)
    given = inputs(net)
    assert net.null_label is None
    assert_close(net(**given, label=torch.zeros(3, dtype=torch.int64)), net(**given), rtol=0, atol=0)


# --- starting values -------------------------------------------------------------------------------------------------


def test_adaln_starts_at_zero_and_every_dit_block_as_the_identity():
    net = build_net("dit", **SMALL["dit"])
    tokens, emb = torch.randn(2, 6, 24), torch.randn(2, 24)
    for block in net.blocks:
        assert_close(block(tokens, emb), tokens, rtol=0, atol=0)
    given = inputs(net)
    assert_close(net(**given), torch.zeros_like(given["x"]), rtol=0, atol=0)


def test_the_unet_starts_at_zero_and_its_blocks_as_their_shortcuts():
    net = build_net("unet", **SMALL["unet"]).eval()
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    assert_close(net.down[0](x, emb), x, rtol=0, atol=0)
    given = inputs(net)
    assert_close(net(**given), torch.zeros_like(given["x"]), rtol=0, atol=0)


def test_dit_has_the_authors_keys():
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", *(f"blocks.0.{m}" for m in block)]
    modules += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    want = {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    keys = build_net("dit", **SMALL["dit"] | {"depth": 1}).state_dict().keys()
    assert keys == want | {"pos_embed", "y_embedder.embedding_table.weight"}


@nets
def test_gradients_reach_every_parameter(name):
    net = small(name).train()
    given = inputs(net, 4)  # 4 samples: one of each class and the null class
    net(**given).square().sum().backward()
    dead = [key for key, p in net.named_parameters() if p.grad is None or not (p.grad.abs() > 0).any()]
    assert dead == []


# --- shapes, compilation, precision ----------------------------------------------------------------------------------


@nets
def test_nets_compile_as_one_graph(name):
    net = small(name)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    given = inputs(net)
    with torch.no_grad():
        assert_close(compiled(**given), net(**given))


@nets
def test_a_sample_does_not_depend_on_its_batch(name):
    net, given = small(name).double(), inputs(small(name))
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    with torch.no_grad():
        alone = torch.cat([net(**{k: v[i : i + 1] for k, v in given.items()}) for i in range(3)])
        assert_close(net(**given), alone, rtol=0, atol=1e-12)


@nets
def test_nets_run_in_bfloat16(name):
    net, given = small(name), inputs(small(name))
    with torch.no_grad():
        want = net(**given)
        got = net.bfloat16()(**given | {"x": given["x"].bfloat16()})
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.std().item())


def test_unet_takes_any_multiple_of_its_factor():
    net = small("unet")
    x, t, label = torch.randn(2, 1, 4, 14), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    assert net(x, t, label).shape == x.shape


def test_dit_tokens_of_a_wide_picture_know_their_row_and_column():
    net = build_net("dit", **SMALL["dit"])  # 4 x 6 pixels: 2 x 3 tokens
    place = net.pos_embed.unflatten(1, (2, 3))[0]
    column, row = place.chunk(2, dim=2)
    assert_close(column[0], column[1])
    assert_close(row[:, 0], row[:, 2])
    frequency = 10000.0 ** (-torch.arange(6) / 6)
    assert_close(column[0, 2], torch.cat([(2 * frequency).sin(), (2 * frequency).cos()]))
    assert_close(row[1, 0], torch.cat([frequency.sin(), frequency.cos()]))


# --- counts ----------------------------------------------------------------------------------------------------------


def test_parameter_counts():
    s = smalldiffusion()
    count = lambda net: sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert net_size(build_net("mlp", hidden=[16, 128, 128, 128, 128, 16])) == 53_890
    dit = {"in_size": 28, "channels_in": 1, "dim": 384, "depth": 3, "heads": 6}
    theirs = s.DiT(in_dim=28, channels=1, patch_size=2, depth=3, head_dim=64, num_heads=6)
    assert net_size(build_net("dit", **dit, **log_clock)) == count(theirs)
    unet = build_net("unet", in_size=28, channels=64, multipliers=[1, 1, 2], attention=[14], **log_clock)
    attentions = [64] * 5 + [128]
    merged = sum(c * c + c for c in attentions) - sum(3 * c for c in attentions)  # one output map less, qkv bias more
    assert net_size(unet) == 4_424_833 - merged == 4_388_865


def test_dit_xl_2_has_the_published_size():
    with torch.device("meta"):
        net = build_net("dit", dim=1152, depth=28, heads=16, num_classes=1000)
    # 675,129,632 as published, which predicts a variance too: 16 more rows of the last layer; pos_embed counts there.
    assert net_size(net) == 675_129_632 - 16 * (1152 + 1) - 256 * 1152


def linear(n: int, a: int, b: int) -> int:
    return 2 * n * a * b


def conv(side: int, a: int, b: int, kernel: int = 3) -> int:
    return 2 * side**2 * a * b * kernel**2


def attention(n: int, d: int) -> int:
    return linear(n, d, 3 * d) + 2 * linear(n, d, n) + linear(n, d, d)


def test_flops_of_mlp_and_dit_are_those_counted_by_hand():
    assert net_flops(small("mlp")) == linear(1, 8, 8) + linear(1, 8, 16) + linear(1, 16, 2)
    block = attention(6, 24) + linear(6, 24, 96) + linear(6, 96, 24) + linear(1, 24, 6 * 24)
    ends = linear(6, 12, 24) + linear(6, 24, 12) + linear(1, 24, 48) + linear(1, 256, 24) + linear(1, 24, 24)
    assert net_flops(small("dit")) == 2 * block + ends


def test_flops_of_unet_are_those_counted_by_hand():
    net = build_net("unet", in_size=8, channels=32, multipliers=[1], blocks=1, attention=[])
    res = lambda a: conv(8, a, 32) + conv(8, 32, 32) + linear(1, 128, 32) + (a > 32) * conv(8, a, 32, 1)
    ends = conv(8, 1, 32) + conv(8, 32, 1) + linear(1, 256, 128) + linear(1, 128, 128)
    assert net_flops(net) == ends + 3 * res(32) + 2 * res(64) + attention(64, 32)


def test_counting_flops_leaves_the_net_where_it_was():
    net = small("dit")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net_flops(net)
    for key, value in net.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


# --- building and refusing -------------------------------------------------------------------------------------------


@nets
def test_a_config_survives_json(name):
    net = build_net(name, **SMALL[name])
    again = build_net(name, **json.loads(json.dumps(asdict(net.config))))
    assert again.config == net.config
    assert hash(again.config) == hash(net.config)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unett", {}, "did you mean 'unet'"),
        ("mlp", {"hiden": [8]}, "did you mean 'hidden'"),
        ("dit", {"depth": "12"}, "depth(.|\n)*expected: int(.|\n)*'12'"),
        ("dit", {"heads": True}, "heads(.|\n)*expected: int(.|\n)*True"),
        ("mlp", {"hidden": [8, "16"]}, "hidden(.|\n)*expected: tuple"),
        ("dit", {"dim": 30, "heads": 4}, "dim(.|\n)*multiple of 4(.|\n)*30"),
        ("dit", {"in_size": [32, 33]}, "in_size(.|\n)*multiple of 2(.|\n)*33"),
        ("dit", {"in_size": [32, 32, 3]}, "in_size(.|\n)*32, 32, 3"),
        ("dit", {"norm": "rsm"}, "key norm(.|\n)*did you mean 'rms'"),
        ("dit", {"ffn": "relu"}, "key ffn(.|\n)*valid: gelu, swiglu"),
        ("dit", {"positions": "rotary", "dim": 36, "heads": 6}, "dim(.|\n)*multiple of 24(.|\n)*36"),
        ("dit", {"mlp_ratio": -1.0}, "mlp_ratio(.|\n)*-1.0"),
        *(
            (name, {"num_classes": -3}, "num_classes(.|\n)*0 or more(.|\n)*-3")
            for name in ("mlp", "unet", "dit", "pixart")
        ),
        ("tld", {"cross_heads": -2}, "cross_heads(.|\n)*0 or more(.|\n)*-2"),
        ("unet", {"dropout": 1.5}, "dropout(.|\n)*below 1(.|\n)*1.5"),
        ("pixart", {"in_size": 5}, "in_size(.|\n)*multiple of 2(.|\n)*5"),
        ("pixart", {"activation": "silo"}, "key activation(.|\n)*did you mean 'silu'"),
        ("pixart", {"dropout": 1.5}, "key dropout(.|\n)*1.5"),
        ("pixart", {"heads": 7}, "dim(.|\n)*multiple of 7(.|\n)*768"),
        ("pixart", {"time_features": 9}, "time_features(.|\n)*9"),
        ("tld", {"dim": 100}, "dim(.|\n)*multiple of 64(.|\n)*100"),
        ("tld", {"cross_heads": 5}, "dim(.|\n)*multiple of 5(.|\n)*768"),
        ("tld", {"head_order": "dhh"}, "head_order(.|\n)*valid: dh, hd"),
        ("tld", {"in_size": 33}, "in_size(.|\n)*33"),
        ("tld", {"noise_features": 3}, "noise_features(.|\n)*3"),
        ("unet", {"in_size": 30}, "in_size(.|\n)*multiple of 4(.|\n)*30"),
        ("unet", {"channels": 30, "heads": 4}, "channels(.|\n)*multiple of 4(.|\n)*30"),
        ("unet", {"multipliers": []}, "multipliers"),
        ("unet", {"blocks": 0}, "blocks(.|\n)*1 or more(.|\n)*0"),
        ("unet", {"time_features": 7}, "time_features(.|\n)*7"),
    ],
)
def test_bad_options_are_explained(name, options, message):
    with reason(message):
        build_net(name, **options)


@nets
def test_bad_inputs_are_explained(name):
    net = small(name)
    x, t, cond = inputs(net).values()
    with reason(f"key {net.takes[0]}"):
        net(x, t)
    with reason("key t(.|\n)*expected: \\(3,\\)(.|\n)*found: \\(\\)"):
        net(x, torch.tensor(0.5), cond)
    with reason("expected(.|\n)*found"):
        net(x[:, 1:] if x.ndim == 2 else x.repeat(1, 2, 1, 1), t, cond)
    with reason("expected(.|\n)*found"):
        net(x[..., 1:], t, cond)


# --- the ideal denoiser ----------------------------------------------------------------------------------------------


def brute_force(data: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean from the differences themselves, in float64."""
    data, x, sigma = data.double(), x.double(), sigma.double()
    distance = (x[:, None] - data[None]).flatten(2).square().sum(2)
    weight = torch.softmax(-distance / (2 * sigma.square()[:, None]), dim=1)
    return torch.einsum("bn,n...->b...", weight, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ideal_denoiser_is_the_posterior_mean_at_every_sigma(dtype):
    g = torch.Generator().manual_seed(0)
    data = torch.rand(500, 1, 28, 28, generator=g) * 2 - 1
    data[1] = data[0] + 1e-4 * torch.randn(1, 28, 28, generator=g)  # a twin, which only precision tells apart
    sigma = torch.tensor([0.002, 0.002, 0.01, 0.1, 1.0, 10.0, 80.0])
    x = data[[0, 1, 0, 3, 4, 5, 6]] + sigma.reshape(-1, 1, 1, 1) * torch.randn(7, 1, 28, 28, generator=g)
    got = IdealDenoiser(data)(x.to(dtype), sigma)
    assert got.dtype == dtype
    tight = 1e-6 if dtype == torch.float32 else 1e-9
    assert_close(got.double(), brute_force(data, x, sigma), rtol=0, atol=tight)


def test_ideal_denoiser_does_not_depend_on_the_chunk():
    data, x, sigma = torch.randn(97, 5), 3 * torch.randn(8, 5), torch.logspace(-3, 2, 8)
    label, labels = torch.tensor([0, 1, 2, 3] * 2), torch.arange(97) // 33  # sorted: some chunks lack a class
    whole = IdealDenoiser(data.double(), labels)(x.double(), sigma, {"label": label})
    for chunk in (1, 10, 96, 97, 1000):
        split = IdealDenoiser(data.double(), labels, chunk)(x.double(), sigma, {"label": label})
        assert_close(split, whole, rtol=0, atol=1e-12)


def test_ideal_denoiser_of_a_class_is_that_of_its_points():
    data, labels, x = torch.randn(60, 2), torch.arange(60) % 3, torch.randn(4, 2)
    D, sigma = IdealDenoiser(data, labels), torch.full((4,), 0.5)
    got = D(x, sigma, {"label": torch.tensor([0, 1, 2, D.null_label])})
    subsets = [data[labels == c] for c in range(3)] + [data]
    want = torch.cat([brute_force(d, x[i : i + 1], sigma[:1]) for i, d in enumerate(subsets)]).float()
    assert_close(got, want)
    assert_close(D(x, sigma), brute_force(data, x, sigma).float())


def test_ideal_denoiser_without_noise_is_the_nearest_point():
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    x = torch.tensor([[0.2, 0.1], [0.6, 0.0], [0.1, 2.0], [0.5, 0.0]])  # the last between two points
    want = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.5, 0.0]])
    assert_close(IdealDenoiser(data, chunk=1)(x, torch.zeros(4)), want, rtol=0, atol=0)


def test_ideal_denoisers_derivative_is_the_posterior_variance():
    data, x, sigma = (
        torch.randn(40, 1, dtype=torch.float64),
        torch.randn(6, 1, dtype=torch.float64),
        torch.full((6,), 0.4),
    )
    D = IdealDenoiser(data, chunk=7)
    got = torch.autograd.grad(D(x.requires_grad_(), sigma).sum(), x)[0]
    weight = torch.softmax(-((x - data.T) ** 2) / (2 * sigma.double().square()[:, None]), 1)
    variance = weight @ data.square() - (weight @ data).square()
    assert_close(got, variance / sigma.double().square()[:, None], **EXACT)  # Tweedie's formula, once more


def test_ideal_denoiser_compiles_as_one_graph():
    D = IdealDenoiser(torch.randn(20, 2), torch.arange(20) % 2, chunk=8)
    given = (torch.randn(3, 2), torch.ones(3), {"label": torch.tensor([0, 1, 2])})
    assert_close(torch.compile(D, fullgraph=True, backend="eager")(*given), D(*given))


def test_ideal_denoiser_refuses_what_it_cannot_know():
    D = IdealDenoiser(torch.randn(20, 2))
    with reason("labels"):
        D(torch.randn(3, 2), torch.ones(3), {"label": torch.zeros(3, dtype=torch.int64)})
    with reason("found: \\(3, 3\\)"):
        D(torch.randn(3, 3), torch.ones(3))
    for make in (partial(IdealDenoiser, torch.empty(0, 2)), partial(IdealDenoiser, torch.ones(2, 2), torch.ones(3))):
        with reason("needs points"):
            make()
