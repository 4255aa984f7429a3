"""What is faster is the same: values and gradients of every replaced layer against torch's own, in the same precision."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nanodiffusion import fast
from nanodiffusion.codec import AutoencoderKL, AutoencoderKLConfig
from nanodiffusion.data import TensorData
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.fast import ConvLast, Dropout16, GroupNormLast, adapt, attend_by_products, attend_in_pieces
from nanodiffusion.lora import new_lora
from nanodiffusion.nets import DiT, DiTConfig, SDUNet, UNet, UNetConfig
from nanodiffusion.nets.controlnet import ControlNet, ControlNetConfig
from nanodiffusion.noise import log_linear, table_density
from nanodiffusion.text import CLIPText, TextConfig
from nanodiffusion.train import TrainConfig, Trainer
from tests import sd

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def precision():
    """Whatever a test chooses, the next one starts as torch does."""
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision("highest")


def small_nets():
    """A U-Net with every kind of layer, and a DiT, none of whose layers is zero."""
    unet = UNet(UNetConfig(in_size=8, channels=16, multipliers=(1, 2), attention=(4,), num_classes=3, time_scale=1.0))
    dit = DiT(DiTConfig(in_size=8, channels_in=1, dim=32, depth=2, heads=2, num_classes=3, time_scale=1.0))
    for net in (unet, dit):
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
    return [unet, dit]


NETS = ["unet", "dit"]


def outputs_and_gradients(net, dtype):
    """Output, gradient of the input and of every weight, of fixed inputs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 8, 8, generator=g).to(dtype).requires_grad_()
    t, toward = torch.rand(3, generator=g).to(dtype), torch.randn(3, 1, 8, 8, generator=g).to(dtype)
    net.zero_grad()
    out = net(x, t, label=torch.tensor([0, 2, 3]))
    (out * toward).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters())]


def error(found, exact):
    """Relative error of a list of tensors taken together."""
    found, exact = (torch.cat([t.double().flatten() for t in ts]) for ts in (found, exact))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("which", range(2), ids=NETS)
def test_adapted_net_is_the_same_function(which):
    net = small_nets()[which].double().eval()
    expected = outputs_and_gradients(net, torch.float64)
    found = outputs_and_gradients(adapt(copy.deepcopy(net)), torch.float64)
    assert error(found, expected) < 1e-13


@pytest.mark.parametrize("matmul", ["highest", "medium"])
@pytest.mark.parametrize("which", range(2), ids=NETS)
def test_adapted_net_stays_within_fp32_rounding(which, matmul):
    torch.set_float32_matmul_precision(matmul)
    if fast.product_error() > fast.FULL_PRECISION:
        pytest.skip("here 'medium' means bf16")
    net = small_nets()[which].eval()
    exact = outputs_and_gradients(copy.deepcopy(net).double(), torch.float64)
    assert error(outputs_and_gradients(adapt(net), torch.float32), exact) < 2e-6


def test_adapt_keeps_names_layout_and_types():
    net = small_nets()[0]
    before = {k: (v.clone(), v.stride()) for k, v in net.state_dict().items()}
    kinds = [type(m) for m in net.modules()]
    assert adapt(net) is net
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) and after[k].stride() == stride for k, (v, stride) in before.items())
    assert all(isinstance(m, kind) for m, kind in zip(net.modules(), kinds))
    assert any(type(m) is GroupNormLast for m in net.modules())


def test_adapt_twice_is_adapt_once():
    net = adapt(small_nets()[0])
    kinds = [type(m) for m in net.modules()]
    assert [type(m) for m in adapt(net).modules()] == kinds


def test_adapt_leaves_a_net_elsewhere_alone():
    net = small_nets()[0].to("meta")
    assert not any(type(m) is GroupNormLast for m in adapt(net).modules())


def test_maps_stay_channels_last_all_through_an_adapted_unet():
    unet, other = adapt(small_nets()[0]), []

    def see(module, inputs, out):
        other.extend([module] if out.ndim == 4 and not out.is_contiguous(memory_format=LAST) else [])

    for module in unet.modules():
        module.register_forward_hook(see)
    unet(torch.randn(2, 1, 8, 8), torch.rand(2), label=torch.tensor([0, 1]))
    assert not other


def test_training_of_an_adapted_unet_resumes_bit_identically():
    def trainer():
        torch.manual_seed(0)
        net = adapt(UNet(UNetConfig(in_size=8, channels=16, multipliers=(1, 2), attention=(4,))))
        data = TensorData(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        return Trainer(Denoiser(net), data, table_density(log_linear()), TrainConfig(steps=6, batch_size=8))

    def written(value):  # as a file gives it back: in torch's default layout
        if isinstance(value, dict):
            return {k: written(v) for k, v in value.items()}
        return value.contiguous().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    first, second = trainer(), trainer()
    for _ in range(3):
        first.update()
    big, small = first.state()
    second.load_state(written(big), small)
    for _ in range(3):
        first.update(), second.update()
    for a, b in zip(first.denoiser.parameters(), second.denoiser.parameters()):
        assert torch.equal(a, b)


# -- Stable Diffusion ----------------------------------------------------------------------------------------------------


def oneDNN():
    """fp32 products by oneDNN, as `tune_cpu` sets them where they are that."""
    torch.set_float32_matmul_precision("medium")
    if fast.product_error() > fast.FULL_PRECISION:
        pytest.skip("here 'medium' means bf16")


def call_unet(net, dtype):
    return [net(**sd.inputs(sd.XL, size=(32, 40), dtype=dtype))]


def call_controlnet(net, dtype):
    given = sd.inputs(sd.SD1, dtype=dtype)
    return list(net(hint=torch.full((2, 8, 8, 8), 0.5, dtype=dtype), **given))


def call_codec(net, dtype):
    g = torch.Generator().manual_seed(2)
    image, x0 = torch.rand(1, 3, 72, 64, generator=g).to(dtype), torch.randn(1, 4, 24, 32, generator=g).to(dtype)
    return [net.encode(image), net.decode(x0)]


def call_text(net, dtype):
    encoded = net(torch.arange(24).view(2, 12))
    return [encoded.last, encoded.pooled]


STABLE = {  # name -> how the net is made, and its outputs for fixed inputs
    "unet": (lambda: SDUNet(sd.XL), call_unet),
    "controlnet": (lambda: ControlNet(ControlNetConfig(sd.SD1, hint_widths=(4, 8))), call_controlnet),
    "codec": (lambda: AutoencoderKL(AutoencoderKLConfig(widths=(8, 16, 16), blocks=1, groups=4)), call_codec),
    "text": (lambda: CLIPText(TextConfig(16, 2, 2, 32, vocab=30, positions=12, eos=23)), call_text),
}


@pytest.mark.parametrize("wanted", [False, True], ids=["frozen", "training"])
@pytest.mark.parametrize("name", STABLE)
def test_adapted_stable_diffusion_is_the_same_function(name, wanted):
    oneDNN()
    make, call = STABLE[name]
    net = sd.randomise(make()).requires_grad_(wanted).eval()
    results = []
    for dtype, copied in ((torch.float64, copy.deepcopy(net)), (torch.float32, adapt(copy.deepcopy(net)))):
        outs = call(copied.to(dtype), dtype)
        if wanted:
            sum(out.square().mean() for out in outs).backward()
        grads = [p.grad for p in copied.parameters() if p.grad is not None]
        assert bool(grads) == wanted
        results.append([*(out.detach() for out in outs), *grads])
    assert error(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("name", STABLE)
def test_adapted_stable_diffusion_is_as_exact_in_bfloat16(name):
    oneDNN()
    make, call = STABLE[name]
    net = sd.randomise(make()).requires_grad_(False).eval().bfloat16()
    with torch.no_grad():
        exact = call(copy.deepcopy(net).double(), torch.float64)
        plain, adapted = (error(call(n, torch.bfloat16), exact) for n in (net, adapt(copy.deepcopy(net))))
    assert adapted < 1.2 * plain + 1e-9


def test_adapt_moves_only_frozen_kernels_in_memory():
    net = sd.randomise(SDUNet(sd.SD1)).requires_grad_(False)
    net.conv_in.requires_grad_(True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    after = adapt(net).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    kernels = {k for k, v in after.items() if v.stride() != before[k].stride()}
    assert kernels == {k for k, v in before.items() if v.shape[2:] == (3, 3)} - {"conv_in.weight"}


def test_a_lora_on_an_adapted_net_acts_and_leaves_no_trace():
    net, given = adapt(sd.randomise(SDUNet(sd.SD1)).requires_grad_(False).eval()), sd.inputs(sd.SD1)
    with torch.no_grad():
        before, weights = net(**given), {k: v.clone() for k, v in net.state_dict().items()}
        lora = new_lora({"unet": net}, rank=2, match=("to_q", "conv1"))
        for p in lora.parameters():
            nn.init.normal_(p, std=0.1)
        live = net(**given)
        fused = lora.fuse() and net(**given)
        assert error([live], [before]) > 1e-3
        assert error([fused], [live]) < 1e-5
        lora.remove()
        assert torch.equal(net(**given), before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


def test_blocks_that_are_alike_are_compiled_once():
    net, given, graphs = sd.randomise(SDUNet(sd.SD1)).requires_grad_(False), sd.inputs(sd.SD1, size=(16, 16)), []
    expected, names = net(**given), list(net.state_dict())
    blocks = [m for m in net.modules() if isinstance(m, fast.BLOCKS)]
    fast.compile_blocks(net, backend=lambda graph, inputs: graphs.append(1) or graph.forward)
    assert_close(net(**given), expected)
    assert 0 < len(graphs) < len(blocks)
    compiled = len(graphs)
    net(**given)
    assert len(graphs) == compiled and list(net.state_dict()) == names


# -- layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["small scores", "large scores"])
@pytest.mark.parametrize("scores", [7, 64, 1000, 2**20])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 2, 50, 16)])
def test_attention_in_pieces_is_attention(shape, scores, size, monkeypatch):
    oneDNN()
    monkeypatch.setattr(fast, "SCORES", scores)
    b, h, n, d = shape
    q = size * torch.randn(b, n, h, d).transpose(1, 2)
    k, v = torch.randn(2, b, 11, h, d).transpose(2, 3).unbind()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error([attend_in_pieces(q, k, v)], [exact]) < 1e-6 * max(1, size / 4)  # q k itself is rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_pieces_is_as_exact_as_torchs_in_half_precision(dtype):
    oneDNN()
    q, k, v = 2 * torch.randn(3, 2, 2, 64, 32)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = [
        error([f(*(x.to(dtype) for x in (q, k, v)))], [exact])
        for f in (attend_in_pieces, F.scaled_dot_product_attention)
    ]
    assert errors[0] < 1.2 * errors[1]


def test_attention_in_pieces_holds_its_own_precision_under_autocast():
    oneDNN()
    q, k, v = torch.randn(3, 1, 2, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_in_pieces(q, k, v)
    assert torch.equal(found, attend_in_pieces(q, k, v))


def test_attention_of_nothing_to_nothing_is_torchs():
    oneDNN()
    empty = torch.randn(1, 2, 0, 8)
    assert attend_in_pieces(empty, empty, empty).shape == empty.shape


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), ((1, 3), (0, 1)), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_of_small_maps_is_a_product(kernel, padding, stride, bias):
    oneDNN()
    conv = nn.Conv2d(5, 6, kernel, stride=stride, padding=padding, bias=bias).requires_grad_(False)
    x = torch.randn(2, 5, 7, 9)
    expected = F.conv2d(
        x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), stride, padding
    )
    conv = adapt(nn.Sequential(conv))[0]
    assert isinstance(conv, ConvLast) and conv._as_product(x.contiguous(memory_format=LAST))
    assert conv(x).is_contiguous(memory_format=LAST)
    assert_close(conv(x), expected.float())


def test_convolution_with_a_gradient_or_large_maps_is_torchs():
    oneDNN()
    conv, x = adapt(nn.Sequential(nn.Conv2d(5, 6, 3).requires_grad_(False)))[0], torch.randn(2, 5, 7, 9)
    given = lambda x: x.contiguous(memory_format=LAST)
    assert not conv._as_product(given(x).requires_grad_())
    assert not conv._as_product(given(torch.randn(1, 5, 32, 32)))
    other = adapt(nn.Sequential(nn.Conv2d(5, 6, 3, padding="same", dilation=2).requires_grad_(False)))[0]
    assert not other._as_product(given(x))


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 1, 50, 16)])
def test_attention_by_products_is_attention(shape):
    torch.set_float32_matmul_precision("medium")
    if fast.product_error() > fast.FULL_PRECISION:
        pytest.skip("here 'medium' means bf16")
    q, k, v, toward = torch.randn(4, *shape).unbind()
    results = []
    for attend, dtype in ((attend_by_products, torch.float32), (F.scaled_dot_product_attention, torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        (out * toward.to(dtype)).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    assert error(*results) < 1e-6


def test_attention_whose_scores_would_not_fit_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(fast, "MAX_SCORES", 10)
    called = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: called.append(q.shape) or v)
    attend_by_products(*torch.randn(3, 1, 1, 4, 8).bfloat16())
    assert called == [(1, 1, 4, 8)]


def test_groupnorm_has_the_derivatives_of_its_formula():
    norm = GroupNormLast(2, 4, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64).to(memory_format=LAST).requires_grad_()
    forward = lambda x, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, x)
    assert torch.autograd.gradcheck(forward, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
def test_groupnorm_equals_torchs(mean):
    norm = GroupNormLast(8, 32)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, toward = torch.randn(2, 4, 32, 9, 7).add(mean).unbind()
    results = []
    for layer, dtype, layout in ((norm, torch.float32, LAST), (nn.GroupNorm(8, 32), torch.float64, None)):
        layer = layer.to(dtype)
        layer.load_state_dict(norm.state_dict())
        given = x.to(dtype, copy=True)
        given = (given if layout is None else given.contiguous(memory_format=layout)).requires_grad_()
        layer.zero_grad()
        out = layer(given)
        (out * toward.to(dtype)).sum().backward()
        results.append([out.detach(), given.grad, layer.weight.grad, layer.bias.grad])
    assert results[0][0].is_contiguous(memory_format=LAST)
    assert error(*results) < 1e-6 * max(1, mean / 3)  # x - mean itself is known to 2^-24 mean


def test_groupnorm_of_bfloat16_is_computed_in_fp32():
    norm = GroupNormLast(4, 16)
    x = torch.randn(2, 16, 28, 28).bfloat16().contiguous(memory_format=LAST)
    exact = F.group_norm(x.double(), 4)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_groupnorm_of_large_maps_in_bfloat16_errs_as_its_input_does(mean):
    x = (torch.randn(1, 16, 40, 40) + mean).contiguous(memory_format=LAST)
    exact = F.group_norm(x.double(), 4)
    rounded = F.group_norm(x.bfloat16().double(), 4)
    found = GroupNormLast(4, 16).requires_grad_(False)(x.bfloat16())
    assert error([found], [exact]) < 1.2 * error([rounded.bfloat16()], [exact])


def test_groupnorm_of_other_layouts_is_torchs():
    norm = GroupNormLast(2, 4)
    for x in (torch.randn(3, 4), torch.randn(3, 4, 5), torch.randn(3, 4, 5, 6)):
        assert torch.equal(norm(x), F.group_norm(x, 2, norm.weight, norm.bias))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p, layout):
    x = torch.ones(8, 32, 32, 32).contiguous(memory_format=layout).requires_grad_()
    out = Dropout16(p)(x)
    kept = out != 0
    n = x.numel()
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / n) ** 0.5 + 2**-16)
    assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    out.sum().backward()
    assert_close(x.grad, out.detach())
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("p", [0.0, 1e-6, 1 - 1e-6, 1.0])
def test_dropout_of_nearly_nothing_or_everything_is_finite(p):
    assert bool(Dropout16(p)(torch.ones(1000)).isfinite().all())


def test_dropout_is_independent_from_element_to_element():
    kept = (Dropout16(0.5)(torch.ones(2**16 + 3)) != 0).float() - 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((kept[lag:] * kept[:-lag]).mean()) * 4) < 0.02


def test_dropout_follows_the_seed_and_does_nothing_in_evaluation():
    layer, x = Dropout16(0.3), torch.randn(5, 7)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)


# -- the process ---------------------------------------------------------------------------------------------------------


def test_matmul_stays_fp32_where_medium_means_bf16(monkeypatch):
    monkeypatch.setattr(
        fast, "product_error", lambda: 2e-3 if torch.get_float32_matmul_precision() == "medium" else 2e-7
    )
    assert fast.choose_matmul() == ("highest", 2e-7)
    assert torch.get_float32_matmul_precision() == "highest"


def test_chosen_matmul_is_fp32():
    name, found = fast.choose_matmul()
    assert torch.get_float32_matmul_precision() == name
    assert found <= fast.FULL_PRECISION
    assert found == fast.product_error()


def test_allocator_is_left_alone_without_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fast.keep_freed_memory() is False


def test_tuned_process_says_what_it_did_and_still_multiplies():
    code = "from nanodiffusion.fast import tune_cpu; import torch; print(tune_cpu()); print(torch.ones(3, 3) @ torch.ones(3))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "allocator" in said and "tensor([3., 3., 3.])" in said


def test_importing_changes_nothing():
    code = "import torch; import nanodiffusion.fast; print(torch.get_float32_matmul_precision())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "highest"


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_joined_projections_compute_the_same_with_fewer_layers(name):
    net, reference = sd.pair_of_unets(sd.CONFIGS[name])
    given, before = sd.inputs(net.config), len(net.state_dict())
    want = sd.call_reference(reference, given)
    for _ in range(2):  # a second time does no harm
        assert sd.relative(fast.fuse_projections(net)(**given), want) < 1e-5
    assert len(net.state_dict()) < before
