"""ControlNet: its residuals, sums and guess mode equal diffusers'; alone it changes nothing; and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from sd import (
    BARE_MIDDLE,
    DEEP,
    INPAINT,
    SD1,
    SD2,
    XL,
    call_reference,
    inputs,
    options,
    pair_of_unets,
    randomise,
    relative,
    same_weights,
)
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import cfg
from nanodiffusion.nets.adapter import Adapter, AdapterConfig
from nanodiffusion.nets.controlnet import (
    Controlled,
    ControlNet,
    ControlNetConfig,
    Stem,
    control_strengths,
)
from nanodiffusion.nets.sd_unet import SD15, SDXL, SDUNet, SDUNetConfig
from nanodiffusion.noise import ldm

CONFIGS = {
    "sd1": ControlNetConfig(SD1, hint_widths=(4, 8, 4, 12)),
    "sd2": ControlNetConfig(SD2, hint_channels=1),
    "xl": ControlNetConfig(XL, hint_widths=(4, 8, 4, 12)),
    "deep": ControlNetConfig(DEEP, hint_widths=(4, 6)),
    "bare middle": ControlNetConfig(BARE_MIDDLE, hint_widths=(2,)),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
families = pytest.mark.parametrize("config", [CONFIGS["sd1"], CONFIGS["xl"]], ids=["sd1", "xl"])


@pytest.fixture(autouse=True)
def _quick(one_thread):
    pass


def reference(c: ControlNetConfig, seed: int = 5, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' ControlNet with the layers of a config, its weights random, those that start at zero too."""
    net = ControlNetModel(
        **options(c.encoder), conditioning_channels=c.hint_channels, conditioning_embedding_out_channels=c.hint_widths
    )
    return nn.Module.to(randomise(net, seed), dtype)


def pair(c: ControlNetConfig, seed: int = 5, dtype: torch.dtype = torch.float32) -> tuple[ControlNet, Any]:
    """(ours, diffusers') with the same weights."""
    theirs = reference(c, seed, dtype)
    ours = same_weights(ControlNet(c), theirs)
    assert isinstance(ours, ControlNet)
    return ours, theirs


def picture(c: ControlNetConfig, given: dict[str, Tensor], seed: int = 2) -> Tensor:
    b, _, h, w = given["x"].shape
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, c.hint_channels, c.factor * h, c.factor * w, generator=g, dtype=torch.float64).to(given["x"])


def residuals_of(net: ControlNet, image: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return net(hint=net.embed(image), **given)


def reference_residuals(net: Any, image: Any, given: dict[str, Tensor], scale: Any = 1.0, **more: Any) -> list[Tensor]:
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if "pooled" in given else None
    args = (given["x"], given["t"], given["context"], image, scale)
    down, middle = net(*args, added_cond_kwargs=added, return_dict=False, **more)
    return [*down, middle]


def controlled_reference(unet: Any, given: dict[str, Tensor], residuals: list[Tensor], **more: Any) -> Tensor:
    extra = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    return call_reference(unet, given, **extra, **more)


def gradients(out: Any, net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a function of every entry of out, by the parameters of a net and by tensors."""
    sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in out).backward()
    named = {**dict(net.named_parameters()), **tensors}
    assert all(p.grad is not None for p in named.values())
    return {name: p.grad for name, p in named.items()}


# ---- one ControlNet


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@configs
def test_residuals_equal_diffusers(config, size):
    ours, theirs = pair(config)
    given = inputs(config.encoder, size)
    image = picture(config, given)
    residuals, expected = residuals_of(ours, image, given), reference_residuals(theirs, image, given)
    assert len(residuals) == len(expected) == ours.count
    for a, b in zip(residuals, expected):
        assert relative(a, b) <= 1e-5


@families
def test_residuals_and_gradients_equal_diffusers_in_float64(config):
    grads = []
    for net in pair(config, dtype=torch.float64):
        given = inputs(config.encoder, dtype=torch.float64)
        given["t"] = given["t"].round()  # diffusers' sinusoids are float32: below, their error is excused
        leaves = {"image": picture(config, given), "x": given["x"], "context": given["context"]}
        for leaf in leaves.values():
            leaf.requires_grad_()
        compute = residuals_of if isinstance(net, ControlNet) else reference_residuals
        out = compute(net, leaves["image"], given)
        grads.append(({str(i): r.detach() for i, r in enumerate(out)}, gradients(out, net, leaves)))
    for a, b in zip(*grads):
        assert a.keys() == b.keys()
        for name in a:
            assert relative(a[name], b[name]) <= 1e-10, name


@families
def test_checkpointing_changes_no_gradient(config):
    net, given = pair(config)[0], inputs(config.encoder)
    found = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        image = picture(config, given).requires_grad_()
        found.append(
            {k: g.clone() for k, g in gradients(residuals_of(net, image, given), net, {"image": image}).items()}
        )
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=0, atol=0)


def test_a_hint_is_the_stems_output_and_rounded_to_its_precision():
    net, theirs = pair(CONFIGS["sd1"])
    image = torch.rand(2, 3, 24, 40)
    assert relative(net.embed(image), theirs.controlnet_cond_embedding(image)) <= 1e-6
    assert net.embed(image).shape == (2, 8, 3, 5)
    assert net.to(torch.bfloat16).embed(image).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("encoder", "parameters", "tensors"), [(SDXL, 1_251_014_160, 844), (SD15, 361_279_120, 340)], ids=["sdxl", "sd15"]
)
def test_full_size_keys_and_shapes_are_the_published(encoder, parameters, tensors):
    config = ControlNetConfig(encoder)
    with torch.device("meta"):
        theirs = ControlNetModel(
            **options(encoder), conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 96, 256)
        )
        ours = ControlNet(config)
    ours, theirs = ({k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (ours, theirs))
    assert ours == theirs
    assert len(ours) == tensors
    assert sum(torch.Size(s).numel() for s in ours.values()) == parameters


# ---- beside a U-Net


@families
def test_several_at_once_equal_multi_control_net(config):
    unet, reference_net = pair_of_unets(config.encoder)
    pairs = [pair(config, seed) for seed in (5, 6, 7)]
    given, scales = inputs(config.encoder), [0.5, 1.0, -0.3]
    images = [picture(config, given, seed) for seed in range(3)]
    for n in (1, 2, 3):
        multi = MultiControlNetModel([theirs for _, theirs in pairs[:n]])
        residuals = reference_residuals(multi, images[:n], given, scales[:n])
        expected = controlled_reference(reference_net, given, residuals)
        nets = [ours for ours, _ in pairs[:n]]
        hints = tuple(net.embed(image) for net, image in zip(nets, images))
        strengths = tuple(control_strengths(s, 2, net.count) for s, net in zip(scales, nets))
        assert relative(Controlled(unet, nets)(**given, hints=hints, strengths=strengths), expected) <= 1e-5


@families
def test_guess_mode_equals_diffusers_with_guidance(config):
    """diffusers' pipeline runs the ControlNet on the conditional half only and gives zeros to the other."""
    unet, reference_net = pair_of_unets(config.encoder)
    ours, theirs = pair(config)
    both = inputs(config.encoder, b=4)
    half = {key: value[2:] for key, value in both.items()}
    image = picture(config, half)
    residuals = reference_residuals(theirs, image, half, 0.7, guess_mode=True)
    expected = controlled_reference(reference_net, both, [torch.cat([torch.zeros_like(r), r]) for r in residuals])
    hint, strength = ours.embed(image), control_strengths(0.7, 2, ours.count, guess=True)
    hints, strengths = (torch.cat([hint, hint]),), (torch.cat([torch.zeros_like(strength), strength]),)
    assert relative(Controlled(unet, [ours])(**both, hints=hints, strengths=strengths), expected) <= 1e-5


def test_strengths_are_one_per_row_and_residual():
    assert_close(control_strengths(0.5, 3, 4), torch.full((3, 4), 0.5))
    assert_close(control_strengths(2.0, 1, 3, guess=True), torch.tensor([[0.2, 2 * 10**-0.5, 2]]))


@families
def test_strength_0_is_the_bare_net_exactly(config):
    unet, net, given = randomise(SDUNet(config.encoder)), pair(config)[0], inputs(config.encoder)
    hints, strengths = (net.embed(picture(config, given)),), (control_strengths(0.0, 2, net.count),)
    out = Controlled(unet, [net])(**given, hints=hints, strengths=strengths)
    assert torch.equal(out, unet(**given))
    assert torch.equal(Controlled(unet, [])(**given), unet(**given))


@families
def test_a_row_of_strength_0_is_the_bare_nets_row_whatever_the_other_rows(config):
    unet, net, given = randomise(SDUNet(config.encoder)), pair(config)[0], inputs(config.encoder)
    strength = control_strengths(1.0, 2, net.count) * torch.tensor([[0.0], [1.0]])
    out = Controlled(unet, [net])(**given, hints=(net.embed(picture(config, given)),), strengths=(strength,))
    assert torch.equal(out[0], unet(**given)[0])
    assert not torch.equal(out[1], unet(**given)[1])


def test_control_and_adapter_together_equal_diffusers():
    config, dtype = CONFIGS["xl"], torch.float64
    unet, reference_net = pair_of_unets(XL, dtype)
    ours, theirs = pair(config, dtype=dtype)
    torch.manual_seed(0)
    adapter = Adapter(AdapterConfig("full_xl", 3, (8, 16, 32, 32), 1, downscale=16)).to(dtype)
    given = inputs(XL, (16, 16), dtype=dtype)
    image = torch.rand(2, 3, 128, 128, dtype=dtype)
    with torch.no_grad():
        features = adapter(image)
        residuals = reference_residuals(theirs, image, given)
        expected = controlled_reference(
            reference_net, given, residuals, down_intrablock_additional_residuals=[f.clone() for f in features]
        )
        cond = {"hints": (ours.embed(image),), "strengths": (control_strengths(1.0, 2, ours.count),)}
        out = Controlled(unet, [ours])(**given, **cond, features=features)
    assert relative(out, expected) <= 1e-10
    assert relative(out, unet(**given)) > 1e-3 and relative(out, unet(**given, features=features)) > 1e-3


def test_an_inpainting_net_is_controlled_by_a_four_channel_control_net():
    unet, reference_net = pair_of_unets(INPAINT)
    config = ControlNetConfig(replace(INPAINT, channels_in=4), hint_widths=(4, 8, 4, 12))
    ours, theirs = pair(config)
    full = inputs(INPAINT)
    given = full | {"x": full["x"][:, :4]}
    image = picture(config, given)
    expected = controlled_reference(reference_net, full, reference_residuals(theirs, image, given))
    cond = {"hints": (ours.embed(image),), "strengths": (control_strengths(1.0, 2, ours.count),)}
    out = Controlled(unet, [ours])(**given, **cond, concat=full["x"][:, 4:])
    assert relative(out, expected) <= 1e-5


def test_guidance_and_the_denoiser_carry_hints_and_strengths():
    config = CONFIGS["sd1"]
    unet, net, given = randomise(SDUNet(SD1)), pair(config)[0], inputs(SD1)
    hint, strength = net.embed(picture(config, given)), control_strengths(1.0, 2, net.count, guess=True)
    cond = {"context": given["context"], "hints": (hint,), "strengths": (strength,)}
    uncond = cond | {"context": given["context"].flip(1), "strengths": (torch.zeros_like(strength),)}
    controlled, bare = (Denoiser(n, "eps", clock="table", schedule=ldm()) for n in (Controlled(unet, [net]), unet))
    x, sigma = 3 * given["x"], torch.tensor([2.0, 2.0])
    with torch.no_grad():
        guided = cfg(controlled, cond, uncond, 5.0)(x, sigma)
        d_u = bare(x, sigma, {"context": uncond["context"]})
        assert_close(guided, d_u + 5 * (controlled(x, sigma, cond) - d_u), rtol=1e-4, atol=1e-4)
        half = controlled.to(torch.bfloat16)(x, sigma, cond)
    assert half.dtype == torch.float32 and bool(half.isfinite().all())


@pytest.mark.slow
def test_compiles_as_one_graph():
    config = ControlNetConfig(replace(BARE_MIDDLE, widths=(8,), depths=(1,), heads=(2,)), hint_widths=(2,))
    unet, net, given = SDUNet(config.encoder), pair(config)[0], inputs(config.encoder)
    cond = given | {"hints": (net.embed(picture(config, given)),), "strengths": (control_strengths(1.0, 2, net.count),)}
    whole = Controlled(unet, [net])
    with torch.no_grad():
        assert_close(torch.compile(whole, backend="eager", fullgraph=True)(**cond), whole(**cond), rtol=0, atol=0)


# ---- training


@pytest.mark.parametrize("encoder", [SD1, XL, INPAINT], ids=["sd1", "xl", "inpaint"])
def test_a_control_net_from_a_unet_starts_as_the_bare_net(encoder):
    unet = randomise(SDUNet(encoder))
    net = ControlNet.from_unet(unet)
    config = net.control
    assert config == ControlNetConfig(replace(encoder, channels_in=4))
    own, theirs = net.state_dict(), unet.state_dict()
    for key in own.keys() & theirs.keys():
        expected = theirs[key][:, :4] if key == "conv_in.weight" else theirs[key]
        assert torch.equal(own[key], expected), key
    assert all(torch.isfinite(v).all() for v in own.values())
    given = inputs(encoder)
    concat = {"concat": given["x"][:, 4:]} if encoder.channels_in > 4 else {}
    given |= {"x": given["x"][:, :4], **concat}
    image = picture(config, given)
    hint = net.embed(image)
    assert not hint.any()
    out = Controlled(unet, [net])(**given, hints=(hint,), strengths=(control_strengths(1.0, 2, net.count),))
    assert torch.equal(out, unet(**given))
    (gradient,) = torch.autograd.grad(out.square().sum(), net.controlnet_mid_block.weight)
    assert gradient.abs().max() > 0  # it learns, although it starts at zero


def test_a_stem_starts_as_pytorch_starts_convolutions():
    torch.manual_seed(0)
    net = ControlNet.from_unet(SDUNet(SD1))
    assert isinstance(net.controlnet_cond_embedding, Stem)
    for conv in (net.controlnet_cond_embedding.conv_in, *net.controlnet_cond_embedding.blocks):
        bound = conv.weight[0].numel() ** -0.5
        assert bound * 0.8 < conv.weight.abs().max() <= bound and conv.bias.abs().max() <= bound


def test_from_unet_keeps_dtype_and_shares_no_memory():
    unet = SDUNet(SD1).to(torch.bfloat16)
    net = ControlNet.from_unet(unet)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in unet.parameters()}


# ---- row 51 of the inventory: the variants of W


def test_a_pre_encoded_control_net_has_no_stem_and_reads_nine_channels():
    unet = randomise(SDUNet(XL))
    config = ControlNetConfig(replace(XL, channels_in=9), hint_channels=0)
    net = ControlNet.from_unet(unet, config)
    assert net.conv_in.weight.shape == (8, 9, 3, 3) and not net.conv_in.weight[:, 4:].any()
    assert not any("embedding.conv" in key for key in net.state_dict())
    given, hint = inputs(XL), torch.randn(2, 5, 8, 8)
    assert net.embed(hint) is hint
    cond = {"hints": (hint,), "strengths": (control_strengths(1.0, 2, net.count),)}
    assert torch.equal(Controlled(unet, [net])(**given, **cond), unet(**given))  # zero convolutions
    randomise(net)
    residuals = net(hint=hint, **given)
    assert [tuple(r.shape[:2]) for r in residuals] == [(2, w) for w in (*XL.skip_channels, XL.widths[-1])]


def test_a_pre_encoded_control_net_is_a_plain_encoder_of_nine_channels():
    """diffusers' ControlNet of nine channels, whose stem gives nothing, is the same net."""
    encoder = replace(XL, channels_in=9)
    theirs = reference(ControlNetConfig(encoder, hint_widths=(4,)))
    ours = ControlNet(ControlNetConfig(encoder, hint_channels=0))
    nn.init.zeros_(theirs.controlnet_cond_embedding.conv_out.weight)
    nn.init.zeros_(theirs.controlnet_cond_embedding.conv_out.bias)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("controlnet_cond_embedding")}
    ours.load_state_dict(state, strict=True)
    given = inputs(encoder)
    expected = reference_residuals(theirs, torch.zeros(2, 3, 8, 8), given)
    residuals = ours(hint=given["x"][:, 4:], **given | {"x": given["x"][:, :4]})
    for a, b in zip(residuals, expected):
        assert relative(a, b) <= 1e-5


def passing(unet: SDUNet, residual: bool) -> SDUNet:
    """The U-Net with a last layer that reads five channels more, which has the values it starts with."""
    net = SDUNet(replace(unet.config, pass_through=5, pass_residual=residual))
    missing, unexpected = net.load_state_dict(unet.state_dict(), strict=False)
    assert sorted(missing) == [f"conv_{part}_1.{kind}" for part in ("norm_out", "out") for kind in ("bias", "weight")]
    assert not unexpected
    return net


def test_a_residual_pass_through_starts_as_the_bare_net_and_learns():
    unet = randomise(SDUNet(XL))
    net, given, concat = passing(unet, residual=True), inputs(XL), torch.randn(2, 5, 8, 8)
    out = net(**given, concat=concat)
    assert torch.equal(out, unet(**given))
    (gradient,) = torch.autograd.grad(out.square().sum(), net.conv_norm_out_1.weight)
    assert gradient.abs().max() > 0


def test_a_pass_through_head_is_norm_silu_convolution_of_output_and_concat():
    unet = randomise(SDUNet(XL))
    given, concat = inputs(XL), torch.randn(2, 5, 8, 8)
    for residual in (False, True):
        net = passing(unet, residual)
        randomise(net.conv_norm_out_1), randomise(net.conv_out_1)
        assert net.conv_out_1.weight.shape == (4, 9, 3, 3) and net.conv_norm_out_1.num_groups == 1
        bare = unet(**given)
        joined = nn.functional.group_norm(
            torch.cat([bare, concat], 1), 1, net.conv_norm_out_1.weight, net.conv_norm_out_1.bias
        )
        last = nn.functional.conv2d(nn.functional.silu(joined), net.conv_out_1.weight, net.conv_out_1.bias, padding=1)
        assert_close(net(**given, concat=concat), last + bare if residual else last, rtol=1e-5, atol=1e-5)


def test_a_pass_through_net_is_controlled_like_any_other():
    unet = passing(randomise(SDUNet(XL)), residual=True)
    net = ControlNet.from_unet(unet)
    assert net.control.encoder == XL
    given, concat = inputs(XL), torch.randn(2, 5, 8, 8)
    cond = {"hints": (net.embed(torch.rand(2, 3, 64, 64)),), "strengths": (control_strengths(1.0, 2, net.count),)}
    assert torch.equal(Controlled(unet, [net])(**given, **cond, concat=concat), unet(**given, concat=concat))


# ---- what is refused


def refused(what: Any, *words: str) -> None:
    with pytest.raises(UserError) as e:
        what()
    message = str(e.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 6


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 64, 64), ("image", "(b, 3, H, W)")),
        ((2, 3, 64, 60), ("image", "8 divides H and W", "60")),
        ((3, 64, 64), ("image", "(3, 64, 64)")),
    ],
)
def test_images_that_the_stem_cannot_take_are_refused(shape, words):
    refused(lambda: ControlNet(CONFIGS["sd1"]).embed(torch.zeros(shape)), "ControlNet", *words)


def test_a_control_image_of_another_size_than_the_picture_is_refused_with_both_sizes():
    net, given = ControlNet(CONFIGS["sd1"]), inputs(SD1, (8, 6))
    unet = SDUNet(SD1)
    hint = net.embed(torch.zeros(2, 3, 48, 64))
    refused(lambda: net(hint=hint, **given), "hint", "64 x 48", "48 x 64", "picture's size")
    good, strength = net.embed(torch.zeros(2, 3, 64, 48)), control_strengths(1, 2, net.count)
    cond = given | {"hints": (good, hint), "strengths": (strength, strength)}
    refused(lambda: Controlled(unet, [net, net])(**cond), "hints[1]", "64 x 48", "48 x 64")


def test_hints_and_strengths_of_another_number_or_shape_are_refused():
    net, given = ControlNet(CONFIGS["sd1"]), inputs(SD1)
    controlled = Controlled(SDUNet(SD1), [net])
    hint, strength = net.embed(torch.zeros(2, 3, 64, 64)), control_strengths(1, 2, net.count)

    def call(hints: tuple[Tensor, ...], strengths: tuple[Tensor, ...]) -> None:
        refused(lambda: controlled(**given, hints=hints, strengths=strengths), *words)

    words = ("hints", "expected: 1", "found: 0")
    call((), ())
    words = ("strengths", "expected: 1", "found: 2")
    call((hint,), (strength, strength))
    words = ("strengths[0]", f"(2, {net.count})", f"(2, {net.count - 1})")
    call((hint,), (strength[:, 1:],))
    words = ("strengths[0]", f"(1, {net.count})")
    call((hint,), (strength[:1],))
    words = ("hints[0]", "(2, 8, any, any)", "(1, 8, 8, 8)")
    call((hint[:1],), (strength,))
    words = ("hints[0]", "(2, 3, 64, 64)")
    call((torch.zeros(2, 3, 64, 64),), (strength,))  # an image that was not embedded


def test_missing_and_superfluous_conditions_are_named():
    for config, wrong, word in (
        (CONFIGS["xl"], {"pooled": None}, "pooled"),
        (CONFIGS["xl"], {"sizes": torch.zeros(2, 5)}, "sizes"),
        (CONFIGS["sd1"], {"context": torch.zeros(2, 5, 24)}, "context"),
        (CONFIGS["sd1"], {"pooled": torch.zeros(2, 10)}, "pooled"),
        (CONFIGS["sd1"], {"t": torch.zeros(3)}, "t"),
    ):
        net, given = ControlNet(config), inputs(config.encoder)
        hint = net.embed(picture(config, given))
        refused(lambda given=given, hint=hint, net=net, wrong=wrong: net(**given | wrong, hint=hint), word)


def test_a_control_net_of_another_family_is_refused():
    nets = [ControlNet(CONFIGS["sd1"]), ControlNet(CONFIGS["sd2"])]
    refused(lambda: Controlled(SDUNet(SD1), nets), "controlnets[1]", "family", "context_dim")
    refused(lambda: ControlNet.from_unet(SDUNet(SD1), CONFIGS["xl"]), "config.encoder", "family", "added_dim")


def test_a_control_net_with_fewer_layers_starts_from_a_unet_and_one_with_more_is_refused():
    unet = randomise(SDUNet(XL))
    small = ControlNet.from_unet(unet, ControlNetConfig(replace(XL, depths=(0, 0, 1), depth_mid=0)))
    assert torch.equal(small.state_dict()["mid_block.resnets.0.conv1.weight"], unet.mid_block.resnets[0].conv1.weight)
    deep = ControlNetConfig(replace(XL, depths=(1, 1, 2)))
    refused(lambda: ControlNet.from_unet(unet, deep), "down_blocks.0.attentions.0")
    refused(lambda: ControlNet.from_unet(unet, ControlNetConfig(replace(XL, linear_projection=False))), "proj_")


@pytest.mark.parametrize("options", [{"hint_channels": -1}, {"hint_widths": ()}, {"hint_widths": (16, 0)}])
def test_impossible_stems_are_refused(options):
    refused(
        lambda: ControlNetConfig(**options), next(iter(options)) if options != {"hint_widths": ()} else "hint width"
    )


def test_a_pre_encoded_hint_of_other_channels_is_refused():
    encoder: SDUNetConfig = replace(SD1, channels_in=9)
    net = ControlNet(ControlNetConfig(encoder, hint_channels=0))
    refused(lambda: net(hint=torch.zeros(2, 3, 8, 8), **inputs(SD1)), "hint", "(2, 5, any, any)", "(2, 3, 8, 8)")
    refused(lambda: net(hint=torch.zeros(2, 5, 8, 4), **inputs(SD1)), "hint", "8 x 8", "8 x 4")
