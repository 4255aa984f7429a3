"""TLD: both layouts against a formula written here, the names and counts of the seed, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion import fast
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.nets import TLD, build_net, net_flops, net_size
from nanodiffusion.nets.tld import LEGACY

SMALL = {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 2, "head_dim": 12, "text_dim": 5}
layouts = pytest.mark.parametrize("layout", [{}, LEGACY], ids=["standard", "legacy"])


def make(seed: int = 0, **options: object) -> TLD:
    """A small net of random weights, in float64, as after training."""
    net, g = build_net("tld", **SMALL | options), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.double().eval()


def given(b: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    t = torch.linspace(0.01, 0.99, b, dtype=torch.float64)
    x, pooled = torch.randn(b, 3, 4, 6, generator=g), torch.randn(b, 5, generator=g)
    return {"x": x.double(), "t": t, "pooled": pooled.double()}


# --- the formula -----------------------------------------------------------------------------------------------------


def norm(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, order: str) -> Tensor:
    """Head by head, its features picked by index."""
    d, out = q.shape[2], torch.zeros_like(q)
    size = d // heads
    for h in range(heads):
        mine = [h * size + i if order == "hd" else i * heads + h for i in range(size)]
        scores = torch.einsum("bnd,bmd->bnm", q[:, :, mine], k[:, :, mine]) / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum(2, keepdim=True)
        out[:, :, mine] = torch.einsum("bnm,bmd->bnd", weights, v[:, :, mine])
    return out


def sep_conv(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    """1x1, depthwise 3x3 as a sum over nine shifted pictures, GELU, 1x1, on the 2 x 3 grid of tokens."""
    h = (x @ w[f"{at}.0.weight"][:, :, 0, 0].T + w[f"{at}.0.bias"]).unflatten(1, (2, 3))
    padded = torch.zeros(len(h), 4, 5, h.shape[3], dtype=h.dtype)
    padded[:, 1:3, 1:4] = h
    nine = [padded[:, i : i + 2, j : j + 3] * w[f"{at}.1.weight"][:, 0, i, j] for i in range(3) for j in range(3)]
    h = gelu(sum(nine) + w[f"{at}.1.bias"]).flatten(1, 2)
    return h @ w[f"{at}.3.weight"][:, :, 0, 0].T + w[f"{at}.3.bias"]


def formula(net: TLD, x: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
    c, w = net.config, net.state_dict()
    lin = lambda name, y: y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    speed = torch.tensor([2 * math.pi * 1000 ** (i / 127) for i in range(128)]).double()
    wave = torch.cat([(t[:, None] * speed).sin(), (t[:, None] * speed).cos()], 1)
    noise = lin("fourier_feats.3", gelu(lin("fourier_feats.1", wave)))
    y = norm(torch.stack([noise, lin("label_proj", pooled)], 1), w, "norm")
    at = "denoiser_trans_block"
    cut, tokens = w[f"{at}.patchify_and_embed.0.weight"], []
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            tokens.append(torch.einsum("bcpq,ocpq->bo", x[:, :, i : i + 2, j : j + 2], cut))
    h = torch.stack(tokens, 1) + w[f"{at}.patchify_and_embed.0.bias"]
    h = lin(f"{at}.patchify_and_embed.3", norm(h, w, f"{at}.patchify_and_embed.2"))
    h = norm(h, w, f"{at}.patchify_and_embed.4") + w[f"{at}.pos_embed.weight"]
    for i in range(c.depth):
        h = block(h, y, w, f"{at}.decoder_blocks.{i}", c)
    out, image = lin(f"{at}.out_proj.0", h), torch.empty_like(x)
    for n in range(6):
        i, j = 2 * (n // 3), 2 * (n % 3)
        image[:, :, i : i + 2, j : j + 2] = out[:, n].view(-1, 3, 2, 2)
    return image


def block(h: Tensor, y: Tensor, w: dict[str, Tensor], at: str, c) -> Tensor:
    def self_attention(x: Tensor) -> Tensor:
        q, k, v = (x @ part.T for part in w[f"{at}.self_attention.qkv_linear.weight"].chunk(3))
        return attention(q, k, v, 2, c.head_order)

    def cross_attention(x: Tensor) -> Tensor:
        k, v = (y @ part.T for part in w[f"{at}.cross_attention.kv_linear.weight"].chunk(2))
        return attention(x @ w[f"{at}.cross_attention.q_linear.weight"].T, k, v, c.cross_heads or 2, c.head_order)

    branches = self_attention, cross_attention, lambda x: sep_conv(x, w, f"{at}.mlp.mlp")
    for i, branch in enumerate(branches, 1):
        name = f"{at}.norm{i}"
        h = norm(branch(h) + h, w, name) if c.post_norm else branch(norm(h, w, name)) + h
    return h


@layouts
def test_tld_is_its_formula(layout):
    net, inputs = make(**layout), given()
    with torch.no_grad():
        want = formula(net, **inputs)
        assert want.std() > 0.1
        # The net's frequencies are float32 numbers: 1000^(i/127) to 1e-7, times t up to 6283 rad.
        net.fourier_feats[0] = Exact()
        assert_close(net(**inputs), want, rtol=0, atol=1e-10)


class Exact(nn.Module):
    """The noise level's waves from frequencies that are exactly the formula's."""

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.tensor([2 * math.pi * 1000 ** (i / 127) for i in range(128)]).double()
        return torch.cat([angle.sin(), angle.cos()], 1)


def test_waves_are_the_formulas_to_the_precision_of_float32():
    t = torch.linspace(0, 1, 65)
    waves = build_net("tld", **SMALL).fourier_feats[0]
    assert_close(waves(t).double(), Exact()(t.double()), rtol=0, atol=3e-3)
    assert_close(waves.bfloat16()(t), build_net("tld", **SMALL).fourier_feats[0](t), rtol=0, atol=0)


def test_the_layouts_differ():
    inputs = given()
    with torch.no_grad():
        outputs = [make(**LEGACY | change)(**inputs) for change in ({}, {"post_norm": False}, {"head_order": "hd"})]
        outputs.append(make(**LEGACY | {"cross_heads": 0})(**inputs))
    flat = torch.stack(outputs).flatten(1)
    assert (torch.cdist(flat, flat) > 1e-2).sum() == 12


# --- size and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 101_164_352), ({"in_size": 16, "dim": 128, "depth": 3}, 868_800), ({"dim": 512, "depth": 6}, 23_115_072)],
    ids=["base", "small", "middle"],
)
@layouts
def test_parameters_are_the_seeds(options, count, layout):
    with torch.device("meta"):
        assert net_size(build_net("tld", **options, **layout)) == count


@layouts
def test_keys_are_the_seeds(layout):
    lin = lambda name: {f"{name}.weight", f"{name}.bias"}
    block = {
        f"{kind}_attention.{name}_linear.weight" for kind, name in (("self", "qkv"), ("cross", "kv"), ("cross", "q"))
    }
    for name in ("mlp.mlp.0", "mlp.mlp.1", "mlp.mlp.3", "norm1", "norm2", "norm3"):
        block |= lin(name)
    trunk = {f"decoder_blocks.{i}.{key}" for i in range(2) for key in block}
    for i in (0, 2, 3, 4):
        trunk |= lin(f"patchify_and_embed.{i}")
    trunk |= {"pos_embed.weight", "precomputed_pos_enc"} | lin("out_proj.0")
    want = {f"denoiser_trans_block.{key}" for key in trunk} | {"fourier_feats.0.angular_speeds"}
    want |= lin("fourier_feats.1") | lin("fourier_feats.3") | lin("norm") | lin("label_proj")
    state = make(**layout).state_dict()
    assert state.keys() == want
    assert_close(state["denoiser_trans_block.precomputed_pos_enc"], torch.arange(6), rtol=0, atol=0)
    speed = torch.tensor([2 * math.pi * 1000 ** (i / 127) for i in range(128)])
    assert_close(state["fourier_feats.0.angular_speeds"].float(), speed, rtol=1e-6, atol=0)


def test_outpainting_widens_the_first_convolution_alone():
    shapes = lambda net: {key: tuple(value.shape) for key, value in net.state_dict().items()}
    plain, wide = shapes(make()), shapes(make(concat_channels=3))
    key = "denoiser_trans_block.patchify_and_embed.0.weight"
    assert {k for k in plain if plain[k] != wide[k]} == {key}
    assert (plain[key], wide[key]) == ((12, 3, 2, 2), (12, 6, 2, 2))


def test_flops_are_those_counted_by_hand():
    n, d, m, linear = 6, 24, 2, lambda rows, a, b: 2 * rows * a * b
    own = linear(n, d, 3 * d) + 2 * linear(n, d, n)
    cross = linear(n, d, d) + linear(m, d, 2 * d) + 2 * linear(n, d, m)
    mlp = 2 * linear(n, d, 4 * d) + linear(n, 9, 4 * d)
    ends = linear(n, 12, 12) + 2 * linear(n, 12, d) + linear(1, 256, d) + linear(1, d, d) + linear(1, 5, d)
    assert net_flops(build_net("tld", **SMALL), {"pooled": torch.zeros(1, 5)}) == 2 * (own + cross + mlp) + ends


# --- what goes in and comes out --------------------------------------------------------------------------------------


def test_it_takes_text_and_a_known_part():
    assert make().takes == ("pooled",)
    assert make(concat_channels=3).takes == ("pooled", "concat")
    assert make().null_label is None


def test_text_time_and_the_known_part_matter():
    net, inputs = make(concat_channels=3), given()
    inputs |= {"concat": torch.randn(3, 3, 4, 6).double()}
    for value in inputs.values():
        value.requires_grad_()
    net(**inputs).square().sum().backward()
    assert all((value.grad.abs() > 0).all() for value in inputs.values())


def test_no_text_is_zeros():
    net, inputs = make(), given()
    w = net.state_dict()
    with torch.no_grad():
        got = net(**inputs | {"pooled": torch.zeros(3, 5).double()})
        net.label_proj.weight.zero_()
        assert_close(got, net(**inputs), rtol=0, atol=0)
    assert w["label_proj.weight"].abs().max() == 0


def test_it_starts_at_zero_and_learns_in_every_parameter():
    torch.manual_seed(0)
    net = build_net("tld", **SMALL)
    inputs = {key: value.float() for key, value in given(4).items()}
    assert_close(net(**inputs), torch.zeros(4, 3, 4, 6), rtol=0, atol=0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (net(**inputs) - inputs["x"]).square().sum().backward()
        optimizer.step()
    assert [key for key, p in net.named_parameters() if not (p.grad.abs() > 0).any()] == []


def test_dropout_is_for_training_only_and_in_attention_too():
    net, inputs = make(dropout=0.5), given()
    assert_close(net(**inputs), net(**inputs), rtol=0, atol=0)
    assert net.train().denoiser_trans_block.decoder_blocks[0].self_attention.mha.dropout == 0.5
    assert (net(**inputs) - net(**inputs)).abs().max() > 1e-3


@layouts
def test_it_runs_under_autocast(layout):
    net, inputs = make(**layout).float(), {key: value.float() for key, value in given().items()}
    with torch.no_grad():
        want = net(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            got = net(**inputs)
    assert_close(got.float(), want, rtol=0.1, atol=0.1 * want.std().item())


@layouts
@pytest.mark.parametrize("frozen", [True, False])
def test_adapt_changes_no_number(layout, frozen):
    net, inputs = make(**layout).float(), {key: value.float() for key, value in given().items()}
    with torch.no_grad():
        want = net(**inputs)
        fast.adapt(net.requires_grad_(not frozen))
        block = net.denoiser_trans_block.decoder_blocks[0]
        assert block.self_attention.mha.attend is block.cross_attention.mha.attend is fast.attend
        assert_close(net(**inputs), want, rtol=1e-5, atol=1e-5)


def test_a_denoiser_of_it_predicts_x0():
    net, inputs = make().float(), {key: value.float() for key, value in given().items()}
    D = Denoiser(net, prediction="x0_linear", clock="flow")
    sigma = inputs["t"] / (1 - inputs["t"])
    x = inputs["x"] * (1 + sigma)[:, None, None, None]
    with torch.no_grad():
        assert_close(D(x, sigma, {"pooled": inputs["pooled"]}), net(**inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(3, 3, 2, 2)}, "another shape(.|\n)*found: \\(3, 3, 2, 2\\)"),
        ({"x": torch.zeros(3, 3, 8, 12)}, "another shape(.|\n)*found: \\(3, 3, 8, 12\\)"),
        ({"t": torch.zeros(3, 1)}, "key t"),
        ({"pooled": None}, "key pooled(.|\n)*nothing"),
        ({"pooled": torch.zeros(3, 7)}, "key pooled(.|\n)*\\(3, 5\\)(.|\n)*\\(3, 7\\)"),
        ({"concat": None}, "key concat(.|\n)*nothing"),
        ({"concat": torch.zeros(3, 4, 4, 6)}, "key concat(.|\n)*\\(3, 3, 4, 6\\)"),
    ],
)
def test_bad_inputs_are_explained(change, match):
    inputs = {key: value.float() for key, value in given().items()} | {"concat": torch.zeros(3, 3, 4, 6)}
    with pytest.raises(UserError, match=match):
        make(concat_channels=3).float()(**inputs | change)
