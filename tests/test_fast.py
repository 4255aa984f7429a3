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
from nanodiffusion.data import TensorData
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.fast import Dropout16, GroupNormLast, adapt, attend_by_products
from nanodiffusion.nets import DiT, DiTConfig, UNet, UNetConfig
from nanodiffusion.noise import log_linear, table_density
from nanodiffusion.train import TrainConfig, Trainer

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


# -- layers --------------------------------------------------------------------------------------------------------------


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
