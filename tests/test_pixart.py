"""PixArt: nano-diffusion's net with its faults mended, against formulas written here and torch's own attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion import fast
from nanodiffusion.errors import UserError
from nanodiffusion.nets import PixArt, PixArtConfig, build_net, net_flops, net_size
from nanodiffusion.tensors import load_tensors, save_tensors

SMALL = {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 2, "heads": 2, "num_classes": 3}


def make(seed: int = 0, **options: object) -> PixArt:
    """A small net of random weights, in float64, as after training."""
    net, g = build_net("pixart", **SMALL | options), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.double().eval()


def given(b: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(b, 3, 4, 6, generator=g, dtype=torch.float64)
    return x, torch.linspace(0, 1, b, dtype=torch.float64), torch.arange(b) % 4


# --- the formula -----------------------------------------------------------------------------------------------------


def place(row: int, column: int, dim: int) -> Tensor:
    """[sin x, cos x, sin y, cos y] at 10^(-4k/(d/4)), k = 0 ... d/4 - 1."""
    waves = []
    for k in range(dim // 4):
        speed = 10 ** (-4 * k / (dim // 4))
        waves += [math.sin(column * speed), math.cos(column * speed), math.sin(row * speed), math.cos(row * speed)]
    return torch.tensor(waves, dtype=torch.float64)


def clock(t: Tensor, dim: int) -> Tensor:
    rows = []
    for u in (1000 * t).tolist():
        angles = [u * 10 ** (-4 * k / (dim // 2)) for k in range(dim // 2)]
        rows.append([wave for a in angles for wave in (math.sin(a), math.cos(a))])
    return torch.tensor(rows, dtype=torch.float64)


def normed(x: Tensor, w: dict[str, Tensor], at: str, kind: str) -> Tensor:
    weight = w[f"{at}normalization_layer.weight"]
    if kind == "layer":
        x, bias = x - x.mean(-1, keepdim=True), w[f"{at}normalization_layer.bias"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt() * weight


def formula(net: PixArt, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The whole net, from its state dict: patches one by one, torch's MultiheadAttention, F.fold."""
    c, w = net.config, net.state_dict()
    part = [x[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, 4, 2) for j in range(0, 6, 2)]
    places = torch.stack([place(i, j, c.dim) for i in range(2) for j in range(3)])
    lin = lambda name, y: y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    tokens = lin("patch_embedding.lin_projection", torch.stack(part, 1)) + places.float().double()
    emb = clock(t, c.dim)
    shared = lin("adaln_single.time_mlp.0", emb * torch.sigmoid(emb))
    word = w["context_embedding.weight"][label][:, None]
    for i in range(c.depth):
        at = f"dit_blocks.{i}."
        six = (shared + w["adaln_single.layer_embeddings"][i]).view(len(x), 6, 1, c.dim)
        b1, b2, g1, g2, a1, a2 = six.unbind(1)
        attention = nn.MultiheadAttention(c.dim, c.heads, batch_first=True, dtype=torch.float64)
        ours = {k.removeprefix(f"{at}multi_head_attn."): v for k, v in w.items() if k.startswith(f"{at}multi_head")}
        attention.load_state_dict(ours, strict=True)
        h = normed(tokens, w, at, c.norm) * (1 + g1) + b1
        both = torch.cat([h, word], 1)
        tokens = tokens + a1 * attention(h, both, both, need_weights=False)[0]
        h = lin(f"{at}feedforward.0", normed(tokens, w, at, c.norm) * (1 + g2) + b2)
        h = h * torch.sigmoid(h) if c.activation == "silu" else h.clamp(min=0)
        tokens = tokens + a2 * lin(f"{at}feedforward.2", h)
    out = lin("reshaper.lin_projection", normed(tokens, w, "reshaper.", c.norm))
    return F.fold(out.transpose(1, 2), (4, 6), kernel_size=2, stride=2)


@pytest.mark.parametrize(("norm", "activation"), [("rms", "silu"), ("layer", "relu")])
def test_pixart_is_its_formula(norm, activation):
    net, (x, t, label) = make(norm=norm, activation=activation), given()
    with torch.no_grad():
        want = formula(net, x, t, label)
        assert want.std() > 0.1
        assert_close(net(x, t, label), want, rtol=0, atol=1e-10)


def test_time_may_pass_two_layers_first_as_in_the_paper():
    net, (x, t, label) = make(time_features=8), given()
    assert net.time_embedding.mlp[0].weight.shape == (24, 8)
    with torch.no_grad():
        assert (net(x, t, label) - net(x, 1 - t, label)).abs()[[0, 2]].max() > 1e-3


# --- size and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seeds", "dim"), [({}, 88_733_248, 768), ({"dim": 384, "heads": 6}, 22_248_256, 384)]
)
def test_parameters_are_nano_diffusions_and_the_null_class(options, seeds, dim):
    with torch.device("meta"):
        assert net_size(build_net("pixart", **options)) == seeds + dim


def test_the_default_norm_has_no_bias_as_the_published_count_wants():
    with torch.device("meta"):
        net = PixArt(PixArtConfig())
    assert net.config.norm == "rms" and not any(name.endswith("normalization_layer.bias") for name in net.state_dict())


def test_keys_are_nano_diffusions_each_once():
    lin = lambda name: {f"{name}.weight", f"{name}.bias"}
    block = lin("multi_head_attn.out_proj") | lin("feedforward.0") | lin("feedforward.2")
    block |= {"normalization_layer.weight", "multi_head_attn.in_proj_weight", "multi_head_attn.in_proj_bias"}
    want = {f"dit_blocks.{i}.{key}" for i in range(2) for key in block}
    want |= lin("patch_embedding.lin_projection") | lin("adaln_single.time_mlp.0") | lin("reshaper.lin_projection")
    want |= {"adaln_single.layer_embeddings", "context_embedding.weight", "reshaper.normalization_layer.weight"}
    net = make()
    assert net.state_dict().keys() == want
    places = {value.data_ptr() for value in net.state_dict().values()}
    assert len(places) == len(want)


def test_weights_survive_a_safetensors_file(tmp_path):
    net, again, (x, t, label) = make(), make(seed=5), given()
    save_tensors(tmp_path / "net.safetensors", dict(net.state_dict()), {})
    again.load_state_dict(load_tensors(tmp_path / "net.safetensors")[0], strict=True)
    assert_close(again(x, t, label), net(x, t, label), rtol=0, atol=0)


def test_flops_are_those_counted_by_hand():
    n, d, linear = 6, 24, lambda rows, a, b: 2 * rows * a * b
    attention = linear(n, d, 3 * d) + linear(1, d, 2 * d) + 2 * linear(n, d, n + 1) + linear(n, d, d)
    block = attention + 2 * linear(n, d, 4 * d)
    net = build_net("pixart", **SMALL)
    assert net_flops(net) == 2 * block + 2 * linear(n, 12, d) + linear(1, d, 6 * d)


# --- starting values, what matters ----------------------------------------------------------------------------------


def test_it_starts_as_nothing_with_every_block_the_identity():
    net = build_net("pixart", **SMALL)
    x, t, label = given()
    tokens, context = torch.randn(3, 6, 24), torch.randn(3, 1, 24)
    six = net.adaln_single(torch.randn(3, 24))
    for i, block in enumerate(net.dit_blocks):
        assert_close(block(tokens, six[:, i], context), tokens, rtol=0, atol=0)
    assert_close(net(x.float(), t.float(), label), torch.zeros(3, 3, 4, 6), rtol=0, atol=0)


def test_three_steps_from_the_start_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    net = build_net("pixart", **SMALL)
    x, t, label = (y.float() if y.is_floating_point() else y for y in given(4))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x, t, label) - x).square().sum().backward()
        optimizer.step()
    assert [key for key, p in net.named_parameters() if not (p.grad.abs() > 0).any()] == []


@pytest.mark.parametrize("vector", range(6), ids="shift1 shift2 scale1 scale2 gate1 gate2".split())
def test_each_of_the_six_modulations_is_used(vector):
    net, (x, t, label) = make(), given()
    with torch.no_grad():
        before = net(x, t, label)
        net.adaln_single.layer_embeddings.unflatten(1, (6, -1))[1, vector] += 0.5
        assert (net(x, t, label) - before).abs().max() > 1e-3


def test_the_null_class_and_every_class_differ():
    net, (x, t, _) = make(), given()
    same = x[:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        out = net(same, t[:1].expand(4), torch.arange(4)).flatten(1)
    assert (torch.cdist(out, out) > 1e-3).sum() == 12


def test_an_unconditional_net_has_no_class_token():
    net, (x, t, label) = make(num_classes=0), given()
    assert (net.takes, net.null_label) == ((), None)
    assert not any(key.startswith("context") for key in net.state_dict())
    assert_close(net(x, t, label), net(x, t), rtol=0, atol=0)


def test_a_known_part_is_read():
    net, (x, t, label) = make(concat_channels=2), given()
    assert net.takes == ("label", "concat")
    known = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    net(x, t, label, concat=known).sum().backward()
    assert (known.grad.abs() > 0).all()


def test_dropout_is_for_training_only():
    net, (x, t, label) = make(dropout=0.5), given()
    assert_close(net(x, t, label), net(x, t, label), rtol=0, atol=0)
    net.train()
    assert (net(x, t, label) - net(x, t, label)).abs().max() > 1e-3


# --- precision, speed, refusals --------------------------------------------------------------------------------------


def test_it_runs_under_autocast():
    net, (x, t, label) = make().float(), given()
    x, t = x.float(), t.float()
    with torch.no_grad():
        want = net(x, t, label)
        with torch.autocast("cpu", torch.bfloat16):
            got = net(x, t, label)
    assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.std().item())


def test_adapt_changes_no_number():
    net, (x, t, label) = make().float(), given()
    x, t = x.float(), t.float()
    with torch.no_grad():
        want = net(x, t, label)
        fast.adapt(net)
        assert net.dit_blocks[0].multi_head_attn.attend is fast.attend
        assert_close(net(x, t, label), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(3, 3, 4, 8)}, "another shape"),
        ({"x": torch.zeros(3, 4, 4, 6)}, "another shape"),
        ({"t": torch.zeros(2)}, "key t"),
        ({"label": None}, "key label(.|\n)*0 to 3"),
        ({"concat": None}, "key concat(.|\n)*nothing"),
        ({"concat": torch.zeros(3, 2, 4, 4)}, "key concat(.|\n)*found: \\(3, 2, 4, 4\\)"),
    ],
)
def test_bad_inputs_are_explained(change, match):
    inputs = {"x": torch.zeros(3, 3, 4, 6), "t": torch.zeros(3), "label": torch.zeros(3, dtype=torch.int64)}
    inputs["concat"] = torch.zeros(3, 2, 4, 6)
    with pytest.raises(UserError, match=match):
        make(concat_channels=2).float()(**inputs | change)


def test_a_side_that_patches_do_not_fill_is_refused():
    with pytest.raises(UserError, match=r"in_size(.|\n)*multiple of 2"):
        PixArtConfig(in_size=(4, 5))
