"""Codecs against diffusers' autoencoders on the same weights; tiles, slices and precision against their definition."""

import copy
import re
import warnings
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nanodiffusion
from nanodiffusion.codec import (
    F8C16,
    SD3_VAE,
    SD_VAE,
    SDXL_VAE,
    AutoencoderKL,
    AutoencoderKLConfig,
    PixelCodec,
    TinyAutoencoder,
    TinyConfig,
    tile_spans,
)
from nanodiffusion.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = AutoencoderKLConfig(widths=(8, 16, 16), blocks=1, groups=4)
CONFIGS = {
    "small": SMALL,
    "four levels": replace(SMALL, widths=(8, 16, 24, 24), blocks=2, groups=8),
    "16 channels, shifted": replace(
        SMALL, latent_channels=16, scale=1.5305, shift=0.0609, quant_conv=False, post_quant_conv=False
    ),
    "no attention": replace(SMALL, attention=False),
    "one level": replace(SMALL, widths=(12,), groups=3, blocks=3),
    "one of the quant convs": replace(SMALL, quant_conv=False, channels=1, latent_channels=3),
}


def like_diffusers(c, **more):
    """diffusers' autoencoder of the same configuration."""
    n = len(c.widths)
    return diffusers.AutoencoderKL(
        in_channels=c.channels,
        out_channels=c.channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=c.widths,
        layers_per_block=c.blocks,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        scaling_factor=c.scale,
        shift_factor=c.shift,
        use_quant_conv=c.quant_conv,
        use_post_quant_conv=c.post_quant_conv,
        mid_block_add_attention=c.attention,
        **more,
    )


def randomised(net):
    """The net with weights of which none is special: norms neither 1 nor 0."""
    torch.manual_seed(1)
    for p in net.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    return net.eval()


def pair(config, dtype=torch.float32, **more):
    """Our codec and diffusers' autoencoder with the same random weights."""
    ours, theirs = randomised(AutoencoderKL(config)).to(dtype), like_diffusers(config, **more).eval().to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(b=2, channels=3, height=24, width=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return torch.rand(b, channels, height, width, generator=g, dtype=dtype) * 2 - 1


def latents(codec, b=2, height=3, width=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return torch.randn(b, codec.latent_channels, height, width, generator=g, dtype=dtype)


def error(found, expected):
    """Relative to the largest."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def small():
    return randomised(AutoencoderKL(SMALL))


# -- parity


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode_are_diffusers(name, dtype, bound):
    c = CONFIGS[name]
    ours, theirs = pair(c, dtype)
    image = images(channels=c.channels, dtype=dtype)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        mean, logvar = ours.moments(image)
        assert error(mean, posterior.mean) < bound and error(logvar, posterior.logvar) < bound
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
        sample = posterior.sample(torch.Generator().manual_seed(4))
        for x0, z in ((ours.encode(image), posterior.mode()), (ours.encode(image, noise), sample)):
            assert error(x0, (z - c.shift) * c.scale) < bound
            assert error(ours.decode(x0), theirs.decode(x0 / c.scale + c.shift).sample) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ["small", "16 channels, shifted"])
def test_gradients_are_diffusers(name, dtype, bound):
    c = CONFIGS[name]
    ours, theirs = pair(c, dtype)
    image, x0 = images(dtype=dtype).requires_grad_(), latents(ours, dtype=dtype).requires_grad_()
    grads = []
    for z, picture in (
        (ours.encode(image), ours.decode(x0)),
        ((theirs.encode(image).latent_dist.mode() - c.shift) * c.scale, theirs.decode(x0 / c.scale + c.shift).sample),
    ):
        loss = (z.sin() * z).sum() + (picture.cos() * picture).sum()
        net = ours if not grads else theirs
        grads.append(torch.autograd.grad(loss, [image, x0, *dict(sorted(net.named_parameters())).values()]))
    for found, expected in zip(*grads):
        # a bias that a norm removes has a gradient of rounding errors alone
        assert_close(found, expected, rtol=bound, atol=bound * max(1.0, float(expected.abs().max())))


def test_log_variance_is_clamped(small):
    with torch.no_grad():
        small.quant_conv.bias[4:] = torch.tensor([-1e3, 1e3, -1e3, 1e3])
        _, logvar = small.moments(images())
    assert torch.equal(logvar.unique(), torch.tensor([-30.0, 20.0]))


def test_tiny_autoencoder_is_diffusers():
    ours = randomised(TinyAutoencoder(TinyConfig(width=8, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1)))).double()
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
    ).double()
    theirs.load_state_dict(ours.state_dict())
    image, x0 = images(dtype=torch.float64), 3 * latents(ours, dtype=torch.float64)
    with torch.no_grad():
        assert error(ours.encode(image), theirs.encode(image).latents) < 1e-10
        assert error(ours.decode(x0), theirs.decode(x0).sample) < 1e-10
    assert ours.factor == 4


def test_tiny_autoencoder_of_16_channels_has_the_published_keys():
    with torch.device("meta"):
        ours, theirs = TinyAutoencoder(TinyConfig(latent_channels=16)), diffusers.AutoencoderTiny(latent_channels=16)
    assert shapes(ours) == shapes(theirs)


def shapes(net):
    return {name: tuple(p.shape) for name, p in net.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "size", "tensors"),
    [(SD_VAE, 83_653_863, 248), (SDXL_VAE, 83_653_863, 248), (F8C16, 57_266_643, 248), (SD3_VAE, 83_819_683, 244)],
    ids=["sd", "sdxl", "f8c16", "sd3"],
)
def test_presets_have_the_published_keys(config, size, tensors):
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), like_diffusers(config)
    assert shapes(ours) == shapes(theirs)
    assert (sum(p.numel() for p in ours.parameters()), len(ours.state_dict())) == (size, tensors)
    assert ours.factor == 8


def test_latent_constants_occur_once():
    source = "\n".join(p.read_text() for p in Path(nanodiffusion.__file__).parent.rglob("*.py"))
    assert [len(re.findall(re.escape(c), source)) for c in ("0.18215", "0.13025", "0.24447", "1.5305")] == [1, 1, 1, 1]


# -- the call


def test_pixels_are_their_own_latents():
    codec, image = PixelCodec(), images()
    assert codec.encode(image, noise=image) is image and codec.decode(image) is image and codec.factor == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_take_and_give_the_callers_dtype(small, dtype):
    half = copy.deepcopy(small).to(dtype)
    image, x0 = images(), latents(small)
    with torch.no_grad():
        for found, expected in (half.encode(image), small.encode(image)), (half.decode(x0), small.decode(x0)):
            assert found.dtype == torch.float32
            assert error(found, expected) < 0.1


def test_a_size_that_is_no_multiple_is_refused_with_the_nearest(small):
    with pytest.raises(UserError, match=r"multiples of 4(?s:.)*22 x 41(?s:.)*resize to 24 x 40"):
        small.encode(images(height=22, width=41))


@pytest.mark.parametrize(
    "call",
    [
        lambda codec: codec.encode(images(channels=1)),
        lambda codec: codec.encode(images()[0]),
        lambda codec: codec.encode((images() * 255).byte()),
        lambda codec: codec.encode(images(), torch.zeros(2, 4, 3, 3)),
        lambda codec: codec.decode(torch.zeros(1, 16, 4, 4)),
        lambda codec: PixelCodec(1).encode(images()),
    ],
    ids=["channels", "no batch", "bytes", "noise", "latents", "pixels"],
)
def test_what_is_no_image_or_latent_is_refused(small, call):
    with pytest.raises(UserError, match=r"expected: (?s:.)*found: "):
        call(small)


@pytest.mark.parametrize(
    "options",
    [{"widths": ()}, {"widths": (8, 9)}, {"blocks": 0}, {"groups": 3}],
    ids=["no level", "9", "blocks", "groups"],
)
def test_a_configuration_that_cannot_be_is_refused(options):
    with pytest.raises(UserError):
        AutoencoderKLConfig(**asdict(SMALL) | options)


def test_both_ways_of_a_tiny_autoencoder_have_one_factor():
    with pytest.raises(UserError):
        TinyConfig(encoder_blocks=(1, 1))


def test_checkpointing_keeps_the_gradient(small):
    image = images().requires_grad_()
    grads = []
    for on in (False, True):
        small.encoder.checkpointing = small.decoder.checkpointing = on
        grads.append(torch.autograd.grad(small.decode(small.encode(image)).square().sum(), image)[0])
    assert_close(*grads, rtol=0, atol=0)


def test_the_nets_compile_whole(small):
    x0 = latents(small)
    with torch.no_grad():
        expected = small.decoder(x0)
        assert_close(torch.compile(small.decoder, backend="eager", fullgraph=True)(x0), expected)


# -- slices and tiles


def test_slices_change_nothing(small):
    image, x0 = images(b=3), latents(small, b=3)
    with torch.no_grad():
        whole = small.encode(image), small.decode(x0)
        small.slices = True
        for found, expected in zip((small.encode(image), small.decode(x0)), whole):
            assert error(found, expected) < 1e-6
        assert torch.equal(small.decode(x0)[1:2], small.decode(x0[1:2]))


class Spy(nn.Module):
    """Stands for a decoder: notes the sizes of what it is given, and enlarges it, or gives the number of the call."""

    def __init__(self, factor=4, constant=False):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.factor, self.constant, self.sides = factor, constant, []

    def forward(self, x):
        self.sides.append(tuple(x.shape[2:]))
        x = x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        return torch.full_like(x, len(self.sides)) if self.constant else x


def spied(codec, **options):
    codec.post_quant_conv, codec.decoder = nn.Identity(), Spy(**options)
    return codec.decoder


def test_spans_cover_overlap_and_stay_small():
    for side in range(4, 20):
        for size in range(1, 100):
            spans = tile_spans(size, side)
            assert spans[0][0] == 0 and spans[-1][1] == size
            assert len({stop - start for start, stop in spans}) == 1 and spans[0][1] <= side
            assert all(a[1] - b[0] >= side // 4 for a, b in pairwise(spans))
            assert all(a[1] <= c[0] for a, c in zip(spans, spans[2:]))  # at most two tiles share a pixel


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 4), (7, 23), (33, 9)])
def test_tiles_weigh_one_everywhere_at_any_size(small, size):
    spy, x0 = spied(small), latents(small, height=size[0], width=size[1])
    small.tile = 4
    expected = spy(x0 / SMALL.scale)
    spy.sides.clear()
    assert error(small.decode(x0), expected) < 1e-6
    assert max(h * w for h, w in spy.sides) <= 16  # this bounds the memory


def test_tiles_fade_into_each_other(small):
    """Two tiles that disagree by 1 meet in a ramp over their overlap, without a step."""
    spied(small, constant=True)  # the thumbnail is its call 1
    small.tile = 8
    with torch.no_grad():
        row = small.decode(latents(small, b=1, height=8, width=13))[0, 0, 0]
    overlap = 4 * (8 + 8 - 13)
    assert row[0] == 2 and row[-1] == 3
    assert_close(row.diff().max(), torch.tensor(1 / overlap))
    assert row.diff().min() >= 0


def test_one_tile_that_covers_everything_is_the_whole(small):
    image, x0 = images(), latents(small)
    with torch.no_grad():
        whole = small.encode(image), small.decode(x0)
        small.tile = 10
        assert torch.equal(small.encode(image), whole[0]) and torch.equal(small.decode(x0), whole[1])


def smooth(channels, height, width):
    """A few slow waves: (1 c h w) in [-1, 1]."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([torch.sin(3 * (i + 1) * y + 4 * x + i) for i in range(channels)])[None]


@pytest.mark.parametrize("size", [(22, 30), (13, 40)])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_tiles_are_nearer_the_whole_than_those_of_diffusers(way, size):
    ours, theirs = quiet_codec(), like_diffusers(SMALL, sample_size=32)  # pixels: a tile of 8 latent pixels
    theirs.load_state_dict(ours.state_dict())
    theirs.eval().enable_tiling()
    with torch.no_grad():
        if way == "encode":
            call, x = ours.encode, smooth(3, 4 * size[0], 4 * size[1])
            found = theirs.encode(x).latent_dist.mode() * SMALL.scale
        else:
            call, x = ours.decode, smooth(4, *size)
            found = theirs.decode(x / SMALL.scale).sample
        whole = call(x)
        ours.tile = 8
        mine, peer = call(x) - whole, found - whole
    for measure in (lambda e: e.abs().mean(), lambda e: e.abs().max(), steps):
        assert 0 < measure(mine) < measure(peer)


def quiet_codec():
    """A codec whose residual branches change little, as those of trained ones do."""
    torch.manual_seed(0)
    codec = AutoencoderKL(SMALL).eval()
    for name, p in codec.named_parameters():
        p.data *= 0.1 if "conv2" in name or "to_out" in name else 1.0
    return codec


def steps(difference):
    """The largest step from pixel to pixel: a seam."""
    return max(difference.diff(dim=d).abs().max() for d in (2, 3))


def test_tiles_share_the_statistics_of_the_norms(small):
    """An image whose halves differ in contrast keeps them, although tiles lie in one or the other."""
    norm = small.decoder = nn.GroupNorm(2, 4)
    small.post_quant_conv, small.factor, small.tile = nn.Identity(), 1, 16
    x0 = latents(small, height=16, width=16) * torch.tensor([0.1, 3.0]).repeat_interleave(8)
    x0 = x0.repeat_interleave(2, 2).repeat_interleave(2, 3)  # so that the thumbnail has exactly its statistics
    with torch.no_grad():
        whole = norm(x0 / SMALL.scale)
        assert error(small.decode(x0), whole) < 1e-5
        assert torch.equal(norm(x0 / SMALL.scale), whole)  # the norm has its own statistics again


def test_tiles_have_a_gradient(small):
    small.tile = 4
    x0 = latents(small, height=6, width=9).double().requires_grad_()
    small.double()
    assert torch.autograd.gradcheck(lambda x: small.decode(x).mean((2, 3)), x0, eps=1e-5, atol=1e-6, fast_mode=True)


def test_a_tile_too_small_to_overlap_is_refused(small):
    small.tile = 3
    with pytest.raises(UserError, match="key tile"):
        small.decode(latents(small))


# -- overflow


def overflowing(dtype=torch.float16):
    """A codec whose convolutions reach 1e5 in the first layer, which the norms bring back; and its double in float32."""
    codec = randomised(AutoencoderKL(SMALL))
    with torch.no_grad():
        codec.decoder.conv_in.weight.mul_(2e4)
        codec.encoder.conv_in.weight.mul_(6e4)
    half = codec.to(dtype)
    return half, copy.deepcopy(half).float()


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.filterwarnings("ignore:the codec overflows")
def test_what_overflows_in_half_precision_is_what_float32_gives(way):
    half, full = overflowing()
    before = copy.deepcopy(half.state_dict())
    x = images() if way == "encode" else latents(half)
    with torch.no_grad():
        assert not getattr(half, way[:2] + "coder")(x.half()).isfinite().all()
        assert error(getattr(half, way)(x), getattr(full, way)(x)) < 1e-5
    assert half.overflows == 2
    after = half.state_dict()
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == torch.float16 for k in before)


@pytest.mark.filterwarnings("ignore:the codec overflows")
def test_only_the_images_that_overflow_are_computed_again():
    half, full = overflowing()
    x0 = latents(half) * torch.tensor([1e-3, 1.0]).view(2, 1, 1, 1)
    with torch.no_grad():
        both, alone = half.decode(x0), half.decode(x0[:1])
        assert half.overflows == 1
        assert torch.equal(both[:1], alone)
        assert error(both[1:], full.decode(x0[1:])) < 1e-5


@pytest.mark.filterwarnings("ignore:the codec overflows")
def test_tiles_that_overflow_are_computed_again():
    half, full = overflowing()
    half.tile = full.tile = 4
    x0 = latents(half, height=6, width=4)
    with torch.no_grad():
        assert error(half.decode(x0), full.decode(x0)) < 1e-5
    assert half.overflows == 2


@pytest.mark.filterwarnings("ignore:the codec overflows")
def test_the_gradient_survives_an_overflow():
    half, full = overflowing()
    grads = []
    for codec in (half, full):
        x0 = latents(codec).requires_grad_()
        grads.append(torch.autograd.grad(codec.decode(x0).square().sum(), x0)[0])
    assert error(*grads) < 1e-5


def test_an_overflow_is_said_once_and_counted():
    half, _ = overflowing()
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        half.decode(latents(half))
        half.encode(images())
    assert [str(w.message).split(":")[0] for w in said] == ["the codec overflows in float16"]
    assert half.overflows == 4


def test_bfloat16_overflows_later_but_is_caught_too():
    """3.39e38 is the largest bfloat16; 3.40e38 still is a float32."""
    codec = AutoencoderKL(SMALL).to(torch.bfloat16)
    with torch.no_grad():
        nn.init.zeros_(codec.decoder.conv_norm_out.weight)
        nn.init.ones_(codec.decoder.conv_norm_out.bias)
        nn.init.zeros_(codec.decoder.conv_out.weight)
        codec.decoder.conv_out.weight[:, 0, 1, 1] = 1e36  # times silu(1) = 0.73
        nn.init.constant_(codec.decoder.conv_out.bias, torch.finfo(torch.bfloat16).max)
        with pytest.warns(UserWarning, match="overflows in bfloat16"):
            assert codec.decode(latents(codec)).isfinite().all()


@pytest.mark.filterwarnings("error")
def test_latents_that_are_not_finite_are_no_overflow(small):
    x0 = latents(small)
    x0[1] = torch.nan
    half = small.half()
    with torch.no_grad():
        image = half.decode(x0)
    assert image[0].isfinite().all() and image[1].isnan().all() and half.overflows == 0


def test_a_half_codec_on_meta_is_measured_without_being_read():
    with torch.device("meta"):
        codec = AutoencoderKL(SMALL).half()
        assert codec.decode(torch.empty(1, 4, 8, 8)).shape == (1, 3, 32, 32)
