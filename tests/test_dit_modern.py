"""The DiT's later options: rotary positions, normed queries and keys, SwiGLU, RMS norms, text; each against its formula."""

import cmath
import time

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nanodiffusion import fast
from nanodiffusion.errors import UserError
from nanodiffusion.nets import MODERN, DiT, build_net, net_flops, net_size
from nanodiffusion.nets.dit import SwiGLU, TurnedAttention, rotations, turn

SMALL = {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 2, "heads": 2, "num_classes": 3, "pooled_dim": 5}
EXACT = {"rtol": 0, "atol": 1e-10}


def make(seed: int = 0, **options: object) -> DiT:
    """A small modern net of random weights, in float64, as after training."""
    net, g = build_net("dit", **SMALL | MODERN | options), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.double().eval()


def given(b: int = 3, size: tuple[int, int] = (4, 6)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, pooled = (torch.randn(b, *shape, generator=g).double() for shape in ((3, *size), (5,)))
    return {"x": x, "t": torch.linspace(0, 1, b).double(), "label": torch.arange(b) % 4, "pooled": pooled}


# --- rotary positions ------------------------------------------------------------------------------------------------


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """One head's vector (k) as complex numbers, each turned by its own angle: 100^(-i/(k/4)) rad a column, then a row."""
    z = torch.view_as_complex(x.double().reshape(-1, 2))
    quarter = len(z) // 2
    angles = [place * 100 ** (-i / quarter) for place in (column, row) for i in range(quarter)]
    return torch.view_as_real(z * torch.tensor([cmath.exp(1j * a) for a in angles])).flatten()


def test_rotary_is_a_product_of_complex_numbers():
    torch.manual_seed(0)
    q, table = torch.randn(2, 3, 20, 16, dtype=torch.float64), rotations((4, 5), 16)
    got = turn(q, table.double())
    for n in range(20):
        want = torch.stack([torch.stack([turned(q[b, h, n], n // 5, n % 5) for h in range(3)]) for b in range(2)])
        assert_close(got[:, :, n], want, rtol=0, atol=1e-6)  # the table is float32


def test_rotary_scores_depend_on_offsets_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    table = rotations((6, 7), 16)
    everywhere = lambda x: turn(x.expand(1, 1, 42, 16), table)[0, 0]
    scores = (everywhere(q) @ everywhere(k).T).unflatten(1, (6, 7)).unflatten(0, (6, 7))  # (row column row' column')
    base = {(i, j): scores[0, 0, i, j] for i in range(3) for j in range(3)}
    for (i, j), want in base.items():
        for row in range(6 - i):
            for column in range(7 - j):
                assert_close(scores[row, column, row + i, column + j], want, rtol=0, atol=1e-4)
    assert torch.stack(list(base.values())).std() > 0.1


def test_rotary_keeps_lengths_and_leaves_the_first_token():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 12, 8)
    got = turn(q, rotations((3, 4), 8))
    assert_close(got.norm(dim=3), q.norm(dim=3))
    assert_close(got[:, :, 0], q[:, :, 0], rtol=0, atol=0)


def test_a_rotary_net_has_no_table_to_save_and_knows_places():
    net, inputs = make(), given()
    assert "pos_embed" not in net.state_dict()
    assert not any("rotations" in key for key in net.state_dict())
    with torch.no_grad():
        out, moved = net(**inputs), net(**inputs | {"x": inputs["x"].roll(2, 3)})
    assert (out.roll(2, 3) - moved).abs().max() > 1e-3


def test_rotary_angles_are_float32_in_half_precision():
    torch.manual_seed(0)
    q, table = torch.randn(1, 1, 12, 8), rotations((3, 4), 8)
    assert turn(q.bfloat16(), table).dtype == torch.float32


# --- norms and feedforward -------------------------------------------------------------------------------------------


def test_normed_queries_and_keys_bound_the_scores():
    torch.manual_seed(0)
    layer, seen = TurnedAttention(24, 2, norm=True), []
    layer.attend = lambda q, k, v: seen.append((q, k)) or v
    layer(1e4 * torch.randn(2, 6, 24), rotations((2, 3), 12))
    q, k = seen[0]
    scores = q @ k.transpose(2, 3) / 12**0.5
    assert scores.abs().max() <= 12**0.5 * (1 + 1e-5)  # |q| = |k| = sqrt(12)
    assert_close(q.norm(dim=3), torch.full((2, 2, 6), 12**0.5))


def test_attention_is_its_formula():
    net = make()
    layer, x = net.blocks[0].attn, torch.randn(2, 6, 24).double()
    w = layer.state_dict()
    q, k, v = ((x @ w["qkv.weight"].T + w["qkv.bias"]).unflatten(2, (3, 2, 12)))[:, :, [0, 1, 2]].unbind(2)  # (b n h k)
    rms = lambda y, name: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]
    q, k = rms(q, "q_norm.weight"), rms(k, "k_norm.weight")
    cos, sin = (wave[:, None] for wave in net.rotations)
    spin = lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(3, (6, 2)).contiguous()) * (cos + 1j * sin))
    q, k = spin(q).flatten(3), spin(k).flatten(3)
    weights = (torch.einsum("bnhk,bmhk->bhnm", q, k) / 12**0.5).softmax(3)
    want = torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2) @ w["proj.weight"].T + w["proj.bias"]
    assert_close(layer(x, net.rotations), want, **EXACT)


def test_swiglu_is_its_formula():
    torch.manual_seed(0)
    layer, x = SwiGLU(24, 96).double(), torch.randn(2, 5, 24).double()
    w = layer.state_dict()
    gate, value = (x @ w["fc1.weight"].T + w["fc1.bias"]).split(64, dim=2)
    want = (gate * torch.sigmoid(gate) * value) @ w["fc2.weight"].T + w["fc2.bias"]
    assert_close(layer(x), want, **EXACT)


def test_an_rms_norm_is_its_formula():
    torch.manual_seed(0)
    net, x = make(), torch.randn(2, 6, 24).double()
    assert_close(net.blocks[0].norm1(x), x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt(), **EXACT)
    assert not any("norm1" in key or "norm_final" in key for key in net.state_dict())


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "takes"),
    [
        ({"num_classes": 0, "pooled_dim": 0}, ()),
        ({"num_classes": 0}, ("pooled",)),
        ({}, ("label", "pooled")),
        ({"concat_channels": 2}, ("label", "pooled", "concat")),
    ],
)
@pytest.mark.parametrize("modern", [True, False])
def test_a_net_takes_what_its_config_names_and_every_part_matters(options, takes, modern):
    net = make(**options) if modern else make(norm="layer", qk_norm=False, positions="sincos", ffn="gelu", **options)
    assert net.takes == takes
    inputs = {key: value for key, value in given().items() if key in ("x", "t", *takes)}
    inputs |= {"concat": torch.randn(3, 2, 4, 6).double()} if "concat" in takes else {}
    reals = [value.requires_grad_() for key, value in inputs.items() if key != "label"]
    net(**inputs).square().sum().backward()
    assert all((value.grad.abs() > 0).all() for value in reals)


def test_no_text_adds_a_constant():
    net, inputs = make(), given()
    with torch.no_grad():
        net.pooled_embedder.bias.zero_()
        none = net(**inputs | {"pooled": torch.zeros(3, 5).double()})
        net.pooled_embedder = None
        assert_close(none, net(**inputs), **EXACT)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"label": None}, "key label"),
        ({"pooled": None}, "key pooled(.|\n)*nothing"),
        ({"pooled": torch.zeros(3, 4)}, "key pooled(.|\n)*\\(3, 5\\)(.|\n)*\\(3, 4\\)"),
        ({"pooled": torch.zeros(2, 5)}, "key pooled(.|\n)*\\(2, 5\\)"),
        ({"concat": torch.zeros(3, 1, 4, 6)}, "key concat(.|\n)*\\(3, 1, 4, 6\\)"),
        ({"x": torch.zeros(3, 3, 6, 4)}, "another shape"),
    ],
)
def test_bad_inputs_are_explained(change, match):
    net, inputs = make(concat_channels=2), given() | {"concat": torch.zeros(3, 2, 4, 6)}
    with pytest.raises(UserError, match=match):
        net(**inputs | change)


# --- size, start, compiling, precision -------------------------------------------------------------------------------


def test_the_defaults_have_the_authors_keys_alone():
    keys = build_net("dit", in_size=4, dim=24, depth=1, heads=2).state_dict().keys()
    assert not any(name in key for key in keys for name in ("q_norm", "pooled", "rotations"))
    assert {"pos_embed", "blocks.0.mlp.fc1.weight"} <= keys


def test_modern_keys_are_the_plain_ones_but_for_positions_and_two_norms():
    plain = build_net("dit", **SMALL).state_dict().keys()
    modern = build_net("dit", **SMALL | MODERN).state_dict().keys()
    assert plain - modern == {"pos_embed"}
    assert modern - plain == {f"blocks.{i}.attn.{name}_norm.weight" for i in range(2) for name in "qk"}


def test_a_modern_net_has_as_many_parameters_and_flops_within_a_thousandth():
    with torch.device("meta"):
        plain, modern = build_net("dit"), build_net("dit", **MODERN)
    extra = 12 * (2 * 64 + 2 * 1024 - 1536)  # q and k norms; fc1's biases, 2 x 1024 for 1536
    assert net_size(modern) - net_size(plain) == extra < net_size(plain) / 1000
    assert net_flops(modern) == net_flops(plain)


def test_a_large_net_is_built_on_meta_at_once():
    start = time.perf_counter()
    with torch.device("meta"):
        net = build_net("dit", dim=1152, depth=28, heads=16, num_classes=1000, **MODERN)
    assert time.perf_counter() - start < 5
    assert all(value.is_meta for value in net.state_dict().values())


def test_it_starts_at_zero_and_after_three_steps_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    net = build_net("dit", **SMALL | MODERN)
    inputs = {key: value if key == "label" else value.float() for key, value in given(4).items()}
    assert_close(net(**inputs), torch.zeros(4, 3, 4, 6), rtol=0, atol=0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (net(**inputs) - inputs["x"]).square().sum().backward()
        optimizer.step()
    assert [key for key, p in net.named_parameters() if not (p.grad.abs() > 0).any()] == []


def test_it_compiles_as_one_graph():
    net, inputs = make(), given()
    with torch.no_grad():
        assert_close(torch.compile(net, fullgraph=True, backend="eager")(**inputs), net(**inputs))


@pytest.mark.parametrize("cast", ["autocast", "bfloat16"])
@pytest.mark.filterwarnings("error")
def test_it_runs_in_bfloat16(cast):
    net = make().float()
    inputs = {key: value if key == "label" else value.float() for key, value in given().items()}
    with torch.no_grad():
        want = net(**inputs)
        if cast == "bfloat16":
            net, inputs = net.bfloat16(), inputs | {"x": inputs["x"].bfloat16()}
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            got = net(**inputs)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.std().item())


@pytest.mark.parametrize("modern", [True, False])
def test_adapt_changes_no_number(modern):
    net = make() if modern else make(norm="layer", qk_norm=False, positions="sincos", ffn="gelu")
    inputs = {key: value if key == "label" else value.float() for key, value in given().items()}
    with torch.no_grad():
        want = net.float()(**inputs)
        fast.adapt(net)
        assert net.blocks[0].attn.attend is fast.attend
        assert_close(net(**inputs), want, rtol=1e-5, atol=1e-5)
