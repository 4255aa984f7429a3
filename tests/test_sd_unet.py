"""Stable Diffusion's U-Net: diffusers' outputs, gradients and keys from the same weights, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.nets import SD15, SD21, SDXL, SDUNet, SDUNetConfig, net_size
from nanodiffusion.nets.sd_layers import CrossAttention
from nanodiffusion.noise import ldm

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"rtol": 0, "atol": 1e-10}
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
FULL = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sdxl_inpaint": replace(SDXL, channels_in=9)}
configs = pytest.mark.parametrize("name", sd.CONFIGS)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """A size halved so many times, rounded up as a convolution of stride 2 does."""
    for _ in range(times):
        size = (size[0] + 1) // 2, (size[1] + 1) // 2
    return size


def features(c: SDUNetConfig, size: tuple[int, int], middle: bool = False, b: int = 2) -> list[Tensor]:
    """What an adapter may add: per level, where it has no attention at the size after its halving."""
    last = len(c.widths) - 1
    shapes = [
        (b, width, *halved(size, level + (depth == 0 and level < last)))
        for level, (width, depth) in enumerate(zip(c.widths, c.depths))
    ]
    shapes += [(b, c.widths[-1], *halved(size, last))] if middle else []
    return [normal(*shape, seed=i) for i, shape in enumerate(shapes)]


def residuals(c: SDUNetConfig, size: tuple[int, int], b: int = 2) -> list[Tensor]:
    """What a ControlNet may add: to every output of the way down, and to the middle's."""
    shapes, last = [(b, c.widths[0], *size)], len(c.widths) - 1
    for level, width in enumerate(c.widths):
        shapes += [(b, width, *halved(size, level))] * c.blocks
        shapes += [(b, width, *halved(size, level + 1))] if level < last else []
    return [normal(*shape, seed=20 + i) for i, shape in enumerate([*shapes, (b, c.widths[-1], *halved(size, last))])]


# --- diffusers, weight for weight ------------------------------------------------------------------------------------


@configs
@pytest.mark.parametrize("size", [(8, 8), (7, 13)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_output_is_diffusers(name: str, size: tuple[int, int], dtype: torch.dtype):
    ours, reference = sd.pair_of_unets(sd.CONFIGS[name], dtype)
    given = sd.inputs(sd.CONFIGS[name], size, dtype=dtype)
    with torch.no_grad():
        want, got = sd.call_reference(reference, given), ours(**given)
    assert want.std() > 0.01
    assert got.dtype == dtype and sd.relative(got, want) <= BOUNDS[dtype]


@configs
def test_gradients_are_diffusers(name: str):
    c = sd.CONFIGS[name]
    ours, reference = sd.pair_of_unets(c, torch.float64)
    given = sd.inputs(c, dtype=torch.float64)
    leaves = [given[k].requires_grad_() for k in ("x", "context", "pooled") if k in given]
    got, want = ours(**given), sd.call_reference(reference, given)
    probe = normal(*want.shape)
    want_leaves = torch.autograd.grad((want * probe).sum(), [*leaves, *reference.parameters()])
    found = torch.autograd.grad((got * probe).sum(), [*leaves, *ours.parameters()])
    names = [k for k, _ in reference.named_parameters()]
    theirs = dict(zip(names, want_leaves[len(leaves) :]))
    for key, grad in zip([k for k, _ in ours.named_parameters()], found[len(leaves) :]):
        assert sd.relative(grad, theirs.pop(key)) <= 1e-10, key
    assert not theirs
    for ours_grad, want_grad in zip(found, want_leaves[: len(leaves)]):
        assert sd.relative(ours_grad, want_grad) <= 1e-10


@pytest.mark.parametrize(
    ("name", "middle"), [("sd1", False), ("sd1", True), ("xl", False), ("xl", True), ("deep", False)]
)
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (10, 7)])
def test_features_and_residuals_enter_as_in_diffusers(name: str, middle: bool, control: bool, size: tuple[int, int]):
    c = sd.CONFIGS[name]
    ours, reference = sd.pair_of_unets(c, torch.float64)
    given = sd.inputs(c, size, dtype=torch.float64)
    extra = [f.requires_grad_() for f in features(c, size, middle)]
    more = [r.requires_grad_() for r in residuals(c, size)] if control else []
    theirs = {"down_block_additional_residuals": more[:-1], "mid_block_additional_residual": more[-1]} if more else {}
    want = sd.call_reference(reference, given, down_intrablock_additional_residuals=list(extra), **theirs)
    got = ours(**given, features=tuple(extra), residuals=tuple(more))
    assert_close(got, want, **EXACT)
    probe = normal(*want.shape)
    for a, b in zip(*(torch.autograd.grad((f * probe).sum(), [*extra, *more]) for f in (got, want))):
        assert b.abs().max() > 1e-6
        assert sd.relative(a, b) <= 1e-10


def test_fewer_features_than_levels_enter_the_first_levels():
    ours, reference = sd.pair_of_unets(sd.XL, torch.float64)
    given, extra = sd.inputs(sd.XL, dtype=torch.float64), features(sd.XL, (8, 8))[:2]
    want = sd.call_reference(reference, given, down_intrablock_additional_residuals=[f.clone() for f in extra])
    assert_close(ours(**given, features=extra), want, **EXACT)


@pytest.mark.parametrize("name", FULL)
def test_keys_and_shapes_are_diffusers(name: str):
    from diffusers import UNet2DConditionModel

    c = FULL[name]
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(c.depths))
    with torch.device("meta"):
        ours = SDUNet(c)
        reference = UNet2DConditionModel(**sd.options(c), up_block_types=up)
    shapes = [{key: tuple(v.shape) for key, v in net.state_dict().items()} for net in (ours, reference)]
    assert shapes[0] == shapes[1]


def test_sdxl_has_the_published_number_of_parameters():
    with torch.device("meta"):
        net = SDUNet(SDXL)
    assert (net_size(net), len(net.state_dict())) == (2_567_463_684, 1_680)


def test_bfloat16_weights_run_through_a_denoiser_as_diffusers_in_bfloat16():
    ours, reference = sd.pair_of_unets(sd.XL, torch.bfloat16)
    given = sd.inputs(sd.XL)
    x, t, sigma = given.pop("x"), given.pop("t"), torch.tensor([0.3, 9.0])
    denoiser = Denoiser(ours, "eps", "table", ldm())
    t, scaled = ldm().t(sigma), x * (1 + sigma.view(-1, 1, 1, 1) ** 2).rsqrt()
    theirs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        eps = sd.call_reference(reference, theirs | {"x": scaled.bfloat16(), "t": t}).float()
        got = denoiser(x, sigma, given)
    assert got.dtype == torch.float32
    assert_close(got, x - sigma.view(-1, 1, 1, 1) * eps, rtol=0, atol=1e-6)


# --- what diffusers does not have ------------------------------------------------------------------------------------


def test_concat_is_appended_to_x():
    net, given = sd.pair_of_unets(sd.INPAINT)[0], sd.inputs(sd.INPAINT)
    x = given.pop("x")
    assert_close(net(x[:, :4], concat=x[:, 4:], **given), net(x, **given), rtol=0, atol=0)


@pytest.mark.parametrize("residual", [False, True])
def test_last_layer_reads_output_and_concat(residual: bool):
    c = replace(sd.SD1, pass_through=5, pass_residual=residual)
    net, given = sd.randomise(SDUNet(c)), sd.inputs(c)
    bare = SDUNet(sd.SD1)
    state = net.state_dict()
    w, b, scale, shift = (
        state.pop(f"conv_{k}") for k in ("out_1.weight", "out_1.bias", "norm_out_1.weight", "norm_out_1.bias")
    )
    bare.load_state_dict(state)
    concat = normal(2, 5, 8, 8, dtype=torch.float32)
    out = bare(**given)
    joined = torch.cat([out, concat], dim=1)
    z = (joined - joined.mean((1, 2, 3), keepdim=True)) / (
        joined.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    last = F.conv2d(F.silu(z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)), w, b, padding=1)
    assert_close(net(**given, concat=concat), out + last if residual else last, rtol=1e-4, atol=1e-5)


def test_residual_last_layer_starts_as_the_bare_net_and_learns():
    c = replace(sd.SD1, pass_through=5, pass_residual=True)
    torch.manual_seed(0)
    net, given, concat = SDUNet(c), sd.inputs(c), normal(2, 5, 8, 8, dtype=torch.float32)
    bare = SDUNet(sd.SD1)
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith(("out_1.weight", "out_1.bias"))})
    out = net(**given, concat=concat)
    assert_close(out, bare(**given), rtol=0, atol=0)
    out.square().sum().backward()
    assert net.conv_norm_out_1.bias.grad.abs().min() > 0


def test_samples_of_a_batch_do_not_see_each_other():
    net, given = sd.pair_of_unets(sd.XL, torch.float64)[0], sd.inputs(sd.XL, dtype=torch.float64)
    assert_close(net(**given)[1:], net(**{k: v[1:] for k, v in given.items()}), **EXACT)


def test_skips_have_the_channels_the_config_says():
    for c in sd.CONFIGS.values():
        net, given = SDUNet(c), sd.inputs(c, size=(8, 8))
        emb = net.embed(given["t"], given.get("pooled"), given.get("sizes"))
        skips = net.down(net.conv_in(given["x"]), emb, given["context"])
        assert tuple(s.shape[1] for s in skips) == c.skip_channels
        assert net.middle(skips[-1], emb, given["context"]).shape == skips[-1].shape


# --- speed and memory ------------------------------------------------------------------------------------------------


def gradients(net: nn.Module, given: dict[str, Any]) -> tuple[Tensor, list[Tensor], int]:
    """The output, the gradients of all parameters, and how many numbers were kept for them."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = net(**given)
    return out, list(torch.autograd.grad(out.square().sum(), list(net.parameters()))), sum(kept.values())


def test_checkpointing_keeps_less_and_changes_nothing():
    net = sd.pair_of_unets(sd.XL)[0]
    given = sd.inputs(sd.XL, (16, 16)) | {"features": [f.float() for f in features(sd.XL, (16, 16))]}
    out, grads, kept = gradients(net, given)
    net.checkpointing = True
    out_again, grads_again, kept_less = gradients(net, given)
    assert_close(out_again, out, rtol=0, atol=0)
    assert_close(grads_again, grads, rtol=0, atol=0)
    assert kept_less < 0.6 * kept


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_in_one_graph(checkpointing: bool):
    c = replace(sd.XL, widths=(8, 16), depths=(0, 1), depth_mid=1, blocks=1, heads=(1, 2))
    net = sd.randomise(SDUNet(c))
    net.checkpointing = checkpointing
    given = sd.inputs(c, (6, 5)) | {"features": tuple(f.float() for f in features(c, (6, 5), middle=True))}
    given["residuals"] = tuple(r.float() for r in residuals(c, (6, 5)))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert_close(compiled(**given), net(**given), rtol=1e-5, atol=1e-6)


class Remembers(CrossAttention):
    """Cross-attention that projects its context once."""

    memory: list[Tensor]

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.memory:
            self.memory.extend(super().project(x, context)[1:])
        return self.split(self.to_q(x)), *self.memory


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_attention_can_be_replaced_from_outside():
    net, given = sd.pair_of_unets(sd.XL, torch.float64)[0], sd.inputs(sd.XL, dtype=torch.float64)
    want = net(**given)
    for name, module in net.named_modules():
        if type(module) is CrossAttention:
            module.attend = by_products
            if name.endswith("attn2"):
                module.__class__, module.memory = Remembers, []
    net(**given)
    assert_close(net(**given), want, **EXACT)


# --- what it refuses -------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], dict[str, Any]]
WRONG: dict[str, tuple[SDUNetConfig, str, Change]] = {
    "x of 3 channels": (sd.SD1, "x", lambda g: {"x": g["x"][:, :3]}),
    "x of 3 axes": (sd.SD1, "x", lambda g: {"x": g["x"][0]}),
    "one t for two": (sd.SD1, "t", lambda g: {"t": g["t"][:1]}),
    "a number t": (sd.SD1, "t", lambda g: {"t": g["t"][0]}),
    "no context": (sd.SD1, "context", lambda g: {"context": None}),
    "a narrow context": (sd.SD1, "context", lambda g: {"context": g["context"][..., :-1]}),
    "a flat context": (sd.SD1, "context", lambda g: {"context": g["context"][:, 0]}),
    "one context for two": (sd.SD1, "context", lambda g: {"context": g["context"][:1]}),
    "no pooled": (sd.XL, "pooled", lambda g: {"pooled": None}),
    "a wide pooled": (sd.XL, "pooled", lambda g: {"pooled": torch.zeros(2, 11)}),
    "pooled for SD 1": (sd.SD1, "pooled", lambda g: {"pooled": torch.zeros(2, 10)}),
    "no sizes": (sd.XL, "sizes", lambda g: {"sizes": None}),
    "five sizes": (sd.XL, "sizes", lambda g: {"sizes": g["sizes"][:, :5]}),
    "sizes for SD 1": (sd.SD1, "sizes", lambda g: {"sizes": torch.zeros(2, 6)}),
    "no concat": (sd.INPAINT, "concat", lambda g: {"x": g["x"][:, :4]}),
    "a small concat": (sd.INPAINT, "concat", lambda g: {"x": g["x"][:, :4], "concat": torch.zeros(2, 5, 4, 4)}),
    "concat for SD 1": (sd.SD1, "concat", lambda g: {"concat": torch.zeros(2, 5, 8, 8)}),
    "no concat to pass": (replace(sd.SD1, pass_through=5), "concat", lambda g: {}),
    "a small feature": (sd.SD1, "features", lambda g: {"features": [torch.zeros(2, 8, 4, 4)]}),
    "five features": (
        sd.SD1,
        "features",
        lambda g: {"features": [f.float() for f in features(sd.SD1, (8, 8), True)] * 2},
    ),
    "two residuals": (sd.SD1, "residuals", lambda g: {"residuals": [torch.zeros(2, 8, 8, 8)] * 2}),
    "a flat residual": (sd.ONE_LEVEL, "residuals", lambda g: {"residuals": [torch.zeros(2, 8)] * 3}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str):
    c, key, change = WRONG[case]
    given = sd.inputs(c)
    with pytest.raises(UserError) as error:
        SDUNet(c)(**(given | change(given)))
    assert error.value.details["key"] == key


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("depths", {"depths": (1, 1)}),
        ("heads", {"heads": (8,)}),
        ("depths", {"widths": (), "depths": (), "heads": ()}),
        ("widths", {"groups": 48}),
        ("widths", {"heads": (7, 7, 7, 7)}),
        ("added_dim", {"added_dim": 1536}),
        ("channels_in", {"channels_in": 0}),
    ],
)
def test_wrong_config_is_named(key: str, options: dict[str, Any]):
    with pytest.raises(UserError) as error:
        SDUNetConfig(**options)
    assert error.value.details["key"] == key
