"""T2I-Adapter: its feature maps equal diffusers', at every kind and size, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from diffusers import MultiAdapter, T2IAdapter
from sd import SD1, XL, call_reference, inputs, pair_of_unets
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.errors import UserError
from nanodiffusion.nets.adapter import (
    ADAPTER_SD15,
    ADAPTER_SD15_LIGHT,
    ADAPTER_SDXL,
    Adapter,
    AdapterConfig,
    sum_features,
)
from nanodiffusion.nets.sd_unet import SDUNet

FOUR = replace(SD1, widths=(4, 8, 12, 16), depths=(1, 1, 1, 0), heads=(2, 2, 2, 2))  # SD 1.x's levels
TINY = {
    "full": AdapterConfig("full", 3, (8, 16, 16, 24), 2),
    "full, one channel, odd sizes": AdapterConfig("full", 1, (8, 4), 3, downscale=4),
    "full_xl": AdapterConfig("full_xl", 3, (8, 16, 12, 12), 2, downscale=16),
    "full_xl, two levels": AdapterConfig("full_xl", 2, (8, 8), 1, downscale=2),
    "light": AdapterConfig("light", 3, (8, 16, 12), 4),
    "light, as wide as its input": AdapterConfig("light", 2, (8, 32), 1, downscale=2),
}
kinds = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())


def reference(config: AdapterConfig) -> T2IAdapter:
    names = {"full": "full_adapter", "full_xl": "full_adapter_xl", "light": "light_adapter"}
    return T2IAdapter(
        config.channels_in, list(config.widths), config.blocks, config.downscale, adapter_type=names[config.kind]
    )


def pair(config: AdapterConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Adapter, T2IAdapter]:
    """Ours and diffusers' with the same random weights."""
    torch.manual_seed(seed)
    theirs, ours = nn.Module.to(reference(config), dtype), Adapter(config).to(dtype)  # diffusers' own .to warns
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def image(config: AdapterConfig, dtype: torch.dtype = torch.float32, b: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(1)
    size = (5 * config.downscale, 3 * config.downscale)  # odd maps: halving rounds up
    return torch.rand(b, config.channels_in, *size, generator=g, dtype=dtype)


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    assert_close(ours, theirs, rtol=0, atol=rtol * float(theirs.detach().abs().max()))


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    sum((f.square() * (i + 1)).mean() for i, f in enumerate(net(x))).backward()
    return {"image": x.grad} | {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@kinds
def test_maps_equal_diffusers(config, dtype, rtol):
    ours, theirs = pair(config, dtype)
    x = image(config, dtype)
    maps, expected = ours(x), theirs(x)
    assert len(maps) == len(expected) == len(config.stages)
    for a, b in zip(maps, expected):
        close(a, b, rtol)


@kinds
def test_gradients_equal_diffusers(config):
    ours, theirs = pair(config, torch.float64)
    a, b = (gradients(net, image(config, torch.float64)) for net in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], 1e-10)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(ADAPTER_SDXL, 79_028_160, 38), (ADAPTER_SD15, None, None), (ADAPTER_SD15_LIGHT, None, None)],
)
def test_full_size_keys_and_shapes_are_the_published(config, parameters, tensors):
    with torch.device("meta"):
        ours, theirs = (
            {k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (Adapter(config), reference(config))
        )
    assert ours == theirs
    if tensors:
        assert len(ours) == tensors
        assert sum(torch.Size(s).numel() for s in ours.values()) == parameters


def test_sdxl_maps_have_the_sizes_of_the_unets_levels():
    with torch.device("meta"):
        maps = Adapter(ADAPTER_SDXL)(torch.empty(1, 3, 1024, 1024))
    assert [tuple(f.shape[1:]) for f in maps] == [(320, 64, 64), (640, 64, 64), (1280, 32, 32), (1280, 32, 32)]


def test_several_adapters_equal_multi_adapter():
    config = TINY["full"]
    pairs = [pair(config, torch.float64, seed) for seed in range(3)]
    images = [image(config, torch.float64) + i for i in range(3)]
    expected = MultiAdapter([theirs for _, theirs in pairs])(images, [0.5, 2.0, 0.25])
    total = sum_features([ours(x) for (ours, _), x in zip(pairs, images)], [0.5, 2.0, 0.25])
    for a, b in zip(total, expected):
        close(a, b, 1e-7)  # diffusers keeps the weights in float32
    (single,) = [sum_features([pairs[0][0](images[0])], [0.5])]
    for a, b in zip(single, pairs[0][1](images[0])):
        close(a, 0.5 * b, 1e-10)


@pytest.mark.parametrize(
    ("unet", "config"),
    [
        (SD1, AdapterConfig("full", 3, (8, 16, 16), 1)),
        (SD1, AdapterConfig("light", 1, (8, 16), 1)),
        (FOUR, AdapterConfig("full", 3, (4, 8, 12, 16), 2)),
        (XL, AdapterConfig("full_xl", 3, (8, 16, 32, 32), 2, downscale=16)),
    ],
    ids=["sd1 full", "sd1 light", "four levels", "xl, with a map for the middle"],
)
def test_a_unet_with_the_maps_equals_diffusers(unet, config):
    found = []
    for net, adapter in zip(pair_of_unets(unet, torch.float64), pair(config, torch.float64)):
        given = inputs(unet, (16, 8), dtype=torch.float64)
        image = torch.rand(2, config.channels_in, 128, 64, generator=torch.Generator().manual_seed(3)).double()
        image.requires_grad_()
        if isinstance(net, SDUNet):
            out = net(**given, features=adapter(image))
        else:
            out = call_reference(net, given, down_intrablock_additional_residuals=[f * 1 for f in adapter(image)])
        out.square().sum().backward()
        found.append((out, image.grad))
    for a, b in zip(*found):
        close(a, b, 1e-10)


def test_image_is_rounded_to_the_weights_precision():
    net = pair(TINY["full"])[0].to(torch.bfloat16)
    assert {f.dtype for f in net(image(TINY["full"]))} == {torch.bfloat16}


def test_compiles_as_one_graph():
    net, _ = pair(TINY["full_xl"])
    x = image(net.config)
    for a, b in zip(torch.compile(net, backend="eager", fullgraph=True)(x), net(x)):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 1, 32, 32), "(b, 3, H, W)"), ((1, 3, 30, 32), "8 divides"), ((3, 32, 32), "(3, 32, 32)")],
)
def test_refuses_other_images(shape, says):
    with pytest.raises(UserError) as e:
        Adapter(TINY["full"])(torch.zeros(shape))
    assert "adapter" in str(e.value) and "image" in str(e.value) and says in str(e.value)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"kind": "fulll"}, "'full'"),
        ({"widths": ()}, "widths"),
        ({"widths": (8, 0)}, "widths"),
        ({"downscale": 0}, "downscale"),
        ({"kind": "full_xl", "widths": (8, 8, 8, 16)}, "widths"),
        ({"kind": "light", "widths": (8, 2)}, "widths"),
    ],
)
def test_refuses_other_configs(options, key):
    with pytest.raises(UserError, match=key):
        AdapterConfig(**options)


def test_refuses_sums_of_unlike_adapters():
    maps = (torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 1))
    for features, strengths, key in (
        ([], [], "strengths"),
        ([maps], [1.0, 2.0], "strengths"),
        ([maps, maps[:1]], [1.0, 1.0], "features"),
        ([maps, maps[::-1]], [1.0, 1.0], "features"),
    ):
        with pytest.raises(UserError, match=key):
            sum_features(features, strengths)
