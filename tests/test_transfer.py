"""Weights of one net for another: what fits is untouched, and what is changed is changed exactly as said."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.errors import UserError
from nanodiffusion.nets import MODERN, build_net, fit_state, resized
from nanodiffusion.nets.tld import LEGACY
from nanodiffusion.nets.transfer import resize_table

NETS = {
    "unet": ("unet", {"in_size": 8, "channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}),
    "dit": ("dit", {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 1, "heads": 2}),
    "modern": ("dit", {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 1, "heads": 2, **MODERN}),
    "pixart": ("pixart", {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 1, "heads": 2}),
    "tld": ("tld", {"in_size": (4, 6), "channels_in": 3, "dim": 24, "depth": 1, "head_dim": 12, "text_dim": 5}),
}
TABLE = "denoiser_trans_block.pos_embed.weight"
FIXED_SIZE = ["dit", "modern", "pixart", "tld"]  # a U-Net takes every size as it is
nets = pytest.mark.parametrize("name", NETS)


def make(name: str, seed: int = 0, **options: object) -> nn.Module:
    """A small net of random weights, as after training."""
    kind, size = NETS[name]
    classes = {} if name == "tld" else {"num_classes": 3}
    net, g = build_net(kind, **{**size, **classes, **options}).eval(), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net


def inputs(net: nn.Module, b: int = 3, label: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    cond = {"label": torch.tensor(label), "pooled": torch.randn(b, 5, generator=g)}
    x = torch.randn(b, *net.sample_shape, generator=g)
    return {"x": x, "t": torch.linspace(0.1, 0.9, b)} | {key: cond[key] for key in net.takes if key in cond}


def moved(old: nn.Module, new: nn.Module, **options: object) -> list[str]:
    state, notes = fit_state(new, old.state_dict(), **options)
    new.load_state_dict(state, strict=True)
    return notes


# --- what fits -------------------------------------------------------------------------------------------------------


@nets
def test_a_net_alike_gets_the_weights_bit_for_bit(name):
    old, new = make(name), make(name, seed=5)
    state, notes = fit_state(new, old.state_dict())
    assert notes == []
    assert state.keys() == new.state_dict().keys()
    for key, value in old.state_dict().items():
        assert_close(state[key], value, rtol=0, atol=0)
    new.load_state_dict(state)
    with torch.no_grad():
        assert_close(new(**inputs(new)), old(**inputs(old)), rtol=0, atol=0)


@nets
def test_the_given_weights_are_left_as_they_were(name):
    old = make(name)
    before = {key: value.clone() for key, value in old.state_dict().items()}
    resized(old, (8, 8))
    for key, value in old.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


# --- another size ----------------------------------------------------------------------------------------------------


@nets
def test_a_resized_net_takes_samples_of_its_size_and_keeps_every_other_weight(name):
    old = make(name)
    new = resized(old, (8, 12))
    assert new.sample_shape == (*old.sample_shape[:1], 8, 12)
    with torch.no_grad():
        assert new(**inputs(new)).shape == (3, *new.sample_shape)
    buffers = {key for key, _ in new.named_buffers()} | {TABLE}
    assert list(new.state_dict()) == list(old.state_dict())
    for key in new.state_dict().keys() - buffers:
        assert_close(new.state_dict()[key], old.state_dict()[key], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(8, 12), (2, 12)], ids=["more tokens", "as many in other rows"])
@pytest.mark.parametrize("name", FIXED_SIZE)
def test_fixed_positions_are_those_of_the_new_size(name, size):
    new, fresh = resized(make(name), size), make(name, in_size=size)
    want = dict(fresh.named_buffers())
    assert dict(new.named_buffers()).keys() == want.keys()
    for key, value in new.named_buffers():
        assert_close(value, want[key], rtol=0, atol=0)


@nets
def test_the_same_size_is_the_net_itself(name):
    net = make(name)
    assert resized(net, net.sample_shape[1:]) is net


def test_a_resized_unet_attends_at_the_same_levels():
    old = make("unet")
    new = resized(old, (16, 24))
    assert new.config.attention == (12,)
    inner = inputs(old)
    with torch.no_grad():
        assert_close(new(**inner), old(**inner), rtol=0, atol=0)  # a U-Net takes any size


@nets
def test_a_resized_net_keeps_dtype_mode_and_what_is_frozen(name):
    old = make(name).bfloat16().train()
    next(old.parameters()).requires_grad_(False)
    new = resized(old, (8, 8))
    assert new.training
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in old.parameters()]
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", [{}, LEGACY], ids=["standard", "legacy"])
def test_a_net_of_constant_positions_gives_the_same_at_every_size(layout):
    old = make("tld", in_size=4, **layout).double()
    old.get_parameter(TABLE).data[:] = old.get_parameter(TABLE).data[:1]
    for size in (8, (2, 6), (12, 4)):
        new = resized(old, size)
        assert_close(new.get_parameter(TABLE), old.get_parameter(TABLE)[:1].expand(*new.get_parameter(TABLE).shape))


# --- tables of positions ---------------------------------------------------------------------------------------------


def ramp(rows: int, columns: int) -> Tensor:
    """Row and column of each token's middle, in [0, 1] of the picture -> (rows*columns 2)."""
    middle = lambda n: (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.stack(torch.meshgrid(middle(rows), middle(columns), indexing="ij"), 2).flatten(0, 1)


@pytest.mark.parametrize("new", [(8, 8), (16, 8), (4, 4), (8, 16), (2, 24)])
def test_constants_and_ramps_keep_their_values_at_every_place(new):
    old = (8, 8)
    assert_close(resize_table(torch.ones(64, 3), old, new), torch.ones(new[0] * new[1], 3), rtol=0, atol=1e-6)
    got, want = resize_table(ramp(*old), old, new).unflatten(0, new), ramp(*new).unflatten(0, new)
    inside = [slice(None) if n <= m else slice(n // m, -(n // m)) for n, m in zip(new, old)]  # the edge is flat
    assert_close(got[inside[0], inside[1]], want[inside[0], inside[1]], rtol=0, atol=1e-12)


def test_half_the_size_is_the_mean_of_four():
    torch.manual_seed(0)
    table = torch.randn(24, 5, dtype=torch.float64)  # 4 x 6
    got = resize_table(table, (4, 6), (2, 3)).unflatten(0, (2, 3))
    for i in range(2):
        for j in range(3):
            four = [table[(2 * i + a) * 6 + 2 * j + b] for a in range(2) for b in range(2)]
            assert_close(got[i, j], sum(four) / 4, rtol=0, atol=1e-12)


def test_twice_the_size_is_three_quarters_of_the_nearest():
    row = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)  # 1 x 3
    want = torch.tensor([0, 0.25, 0.75, 2.0, 4.0, 5.0], dtype=torch.float64)[:, None]
    assert_close(resize_table(row, (1, 3), (1, 6)), want, rtol=0, atol=1e-12)


def test_up_and_down_again_is_nearly_the_same_table():
    smooth = (3 * ramp(8, 8)).sin()
    again = resize_table(resize_table(smooth, (8, 8), (16, 16)), (16, 16), (8, 8))
    assert (again - smooth).abs().max() < 0.05


@pytest.mark.parametrize(
    ("old", "new", "grid", "note"),
    [
        (8, 16, None, "4 x 4 -> 8 x 8"),  # a square
        (8, (4, 16), (4, 4), "4 x 4 -> 2 x 8"),  # as many tokens: only the grid tells
        ((4, 12), (8, 24), None, "2 x 6 -> 4 x 12"),  # the net's own aspect
        ((4, 12), 8, (2, 6), "2 x 6 -> 4 x 4"),
    ],
)
def test_positions_are_resized_from_the_grid_that_they_were_for(old, new, grid, note):
    source, target = make("tld", in_size=old), make("tld", in_size=new)
    assert any(note in n for n in moved(source, target, grid=grid))
    rows, columns = source.config.grid
    want = resize_table(source.get_parameter(TABLE), (rows, columns), target.config.grid)
    assert_close(target.get_parameter(TABLE).data, want, rtol=0, atol=0)
    index = target.state_dict()["denoiser_trans_block.precomputed_pos_enc"]
    assert_close(index, torch.arange(len(want)), rtol=0, atol=0)


# --- more channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_a_widened_net_is_the_old_one_whatever_the_new_channels_hold(name):
    old, new = make(name), make(name, seed=5, concat_channels=4)
    notes = moved(old, new)
    assert len(notes) == 1
    assert "the new ones 0" in notes[0]
    given, known = inputs(old), 100 * torch.randn(3, 4, 4, 6)
    with torch.no_grad():
        assert_close(new(**given, concat=known), old(**given), rtol=1e-5, atol=1e-5)
        assert_close(new(**given, concat=known), new(**given, concat=-known), rtol=0, atol=0)


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_the_new_channels_learn(name):
    old, new = make(name), make(name, seed=5, concat_channels=4)
    moved(old, new)
    new(**inputs(old), concat=torch.randn(3, 4, 4, 6)).square().sum().backward()
    key = next(key for key, p in new.named_parameters() if p.shape != dict(old.named_parameters())[key].shape)
    assert (new.get_parameter(key).grad[:, -4:].abs() > 0).any()


# --- other classes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "dit", "modern", "pixart"])
@pytest.mark.parametrize("classes", [2, 5])
def test_shared_classes_and_the_null_class_keep_their_rows(name, classes):
    old, new = make(name), make(name, seed=5, num_classes=classes)
    own = {key: value.clone() for key, value in new.state_dict().items()}
    notes = moved(old, new)
    assert notes == [f"classes: 3 -> {classes}, {min(3, classes)} shared"]
    key = next(key for key in own if own[key].shape != old.state_dict()[key].shape)
    rows, theirs, shared = new.state_dict()[key], old.state_dict()[key], min(3, classes)
    assert_close(rows[:shared], theirs[:shared], rtol=0, atol=0)
    assert_close(rows[-1], theirs[-1], rtol=0, atol=0)
    assert_close(rows[shared:-1], own[key][shared:-1], rtol=0, atol=0)
    with torch.no_grad():
        given, null = inputs(old, label=(0, 1, 3)), {"label": torch.tensor([0, 1, classes])}
        assert_close(new(**given | null), old(**given), rtol=0, atol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (("tld", {"dim": 48}), ("tld", {}), "weights of another shape"),
        (("tld", {"text_dim": 7}), ("tld", {}), "label_proj.weight(.|\n)*\\(24, 5\\)(.|\n)*\\(24, 7\\)"),
        (("tld", {"concat_channels": 2}), ("tld", {}), "patchify_and_embed.0.weight"),
        (("tld", {"depth": 2}), ("tld", {}), "another network's(.|\n)*0 missing(.|\n)*unknown \\(denoiser_trans"),
        (("dit", {}), ("dit", {"depth": 2}), "missing \\(blocks.1.(.|\n)*0 unknown"),
        (("dit", {"channels_in": 1}), ("dit", {}), "final_layer.linear"),
        (("unet", {}), ("dit", {}), "another network's"),
        (("dit", {}), ("pixart", {}), "another network's"),
        (("dit", {"num_classes": 0}), ("dit", {}), "y_embedder.embedding_table.weight"),
    ],
)
def test_weights_that_cannot_be_fitted_are_named(old, new, match):
    source, target = make(old[0], **old[1]), make(new[0], **new[1])
    with pytest.raises(UserError, match=match):
        fit_state(target, source.state_dict())


def test_positions_of_an_unknown_or_wrong_grid_are_refused():
    source, target = make("tld", in_size=(4, 10)), make("tld", in_size=8)
    with pytest.raises(UserError, match=r"unknown shape(.|\n)*10 tokens(.|\n)*pass the grid"):
        fit_state(target, source.state_dict())
    with pytest.raises(UserError, match=r"expected: 2 x 4(.|\n)*10 rows"):
        fit_state(target, source.state_dict(), grid=(2, 4))


@pytest.mark.parametrize(("name", "size"), [("tld", 5), ("dit", (4, 3)), ("unet", 9), ("pixart", (2, 2, 2))])
def test_sizes_that_a_net_cannot_have_are_refused(name, size):
    with pytest.raises(UserError, match="in_size"):
        resized(make(name), size)


def test_a_net_without_a_size_is_refused():
    with pytest.raises(UserError, match=r"key in_size(.|\n)*MLP"):
        resized(build_net("mlp", hidden=[8]), 4)
