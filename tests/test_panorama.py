"""Panoramas: what is known stays, to the bit; what is made follows from it; and every image is a function of its seed."""

import math

import pytest
import torch
from latent_runs import write_run
from torch import Tensor, nn

from nanodiffusion.config import SampleConfig
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.noise import log_linear
from nanodiffusion.outpaint import SIDES, next_tile, panorama, tile
from nanodiffusion.run import Run, load_run
from nanodiffusion.sampler import STEPS, ImageNoise

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 4, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return load_run(write_run(folder, ["a", "b"], SHAPE, concat_channels=2, sample={"guidance": 2.0}))


def drawn(run: Run, seeds: list[int], tiles: int, toward: str = "right", **options) -> Tensor:
    cond = {"label": torch.tensor([seed % 2 for seed in seeds])}
    return panorama(run.denoiser, SHAPE, run.schedule, run.config.sample, seeds, tiles, toward, cond, **options)


class Level(nn.Module):
    """The ideal D of pictures that are one value v ~ N(0, 1) all over, told a part of them: that part's v, else E[v | x]."""

    takes, null_label = ("concat",), None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, concat: Tensor) -> Tensor:
        s = (4 * t).exp()[:, None, None, None]
        n = math.prod(x.shape[1:])
        guess = (x * (1 + s**2).sqrt()).mean((1, 2, 3), keepdim=True) * n / (n + s**2)
        seen = concat.abs().sum((1, 2, 3), keepdim=True)
        known = concat.sum((1, 2, 3), keepdim=True) / concat.ne(0).sum((1, 2, 3), keepdim=True).clamp(min=1)
        return torch.where(seen > 0, known, guess).expand_as(x)


@pytest.mark.parametrize("toward", SIDES)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddpm"])
def test_the_panorama_of_a_constant_field_is_constant(toward, sampler):
    config = SampleConfig(sampler={"name": sampler}, ladder={"name": "karras"}, steps=12)
    found = panorama(Denoiser(Level(), "x0"), SHAPE, log_linear(), config, range(5), 4, toward)
    torch.testing.assert_close(found, found[:, :1, :1, :1].expand_as(found), rtol=1e-4, atol=1e-5)
    assert found[:, 0, 0, 0].unique().numel() == 5


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.parametrize("toward", SIDES)
def test_what_is_known_stays_to_the_bit(run, sampler, toward):
    axis, before = SIDES[toward]
    whole = 3 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    known, mask = next_tile(whole, SHAPE[axis], SHAPE[axis] // 2, axis, before)
    config = SampleConfig(sampler={"name": sampler}, ladder={"name": "karras"}, steps=3, guidance=2.0)
    cond = {"label": torch.tensor([0, 1])}
    made = tile(run.denoiser, run.schedule, config, ImageNoise([3, 4]), known, mask, cond)
    there = mask.expand_as(made) == 0
    assert torch.equal(made[there], known[there])
    assert there.sum() == there.numel() // 2
    assert made[~there].ne(0).all()


class Spy(Level):
    """Level, which remembers x / c_in and sigma of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, concat: Tensor) -> Tensor:
        s = (4 * t).exp()[:, None, None, None]
        self.seen.append((x * (1 + s**2).sqrt(), s))
        return super().forward(x, t, concat)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_the_net_sees_what_is_known_under_its_noise_at_every_level(sampler):
    """known + sigma eps, as in training, and not what the sampler would have made of it."""
    spy, axis = Spy(), -1
    whole = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    known, mask = next_tile(whole, 6, 3, axis, before=False)
    config = SampleConfig(sampler={"name": sampler}, ladder={"name": "karras"}, steps=5)
    tile(Denoiser(spy, "x0"), log_linear(), config, ImageNoise([3, 4]), known, mask)
    eps = ImageNoise([3, 4]).draw(*SHAPE)
    assert len(spy.seen) >= 5
    for x, s in spy.seen:
        torch.testing.assert_close(x[..., :3], (known + s * eps)[..., :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("toward", SIDES)
def test_a_longer_panorama_holds_the_shorter_one_to_the_bit(run, toward):
    axis, before = SIDES[toward]
    short, long = drawn(run, [0, 1], 3, toward), drawn(run, [0, 1], 5, toward)
    side, new = SHAPE[axis], SHAPE[axis] // 2
    assert (short.shape[axis], long.shape[axis]) == (side + 2 * new, side + 4 * new)
    start = long.shape[axis] - short.shape[axis] if before else 0
    assert torch.equal(long.narrow(axis, start, short.shape[axis]), short)


def test_seeds_decide_everything_alone_or_in_a_batch(run):
    whole = drawn(run, [0, 1, 2], 4)
    for i in range(3):
        torch.testing.assert_close(drawn(run, [i], 4)[0], whole[i], rtol=1e-4, atol=1e-5)
    assert torch.equal(drawn(run, [0, 1, 2], 4), whole)
    assert not torch.allclose(drawn(run, [7], 4)[0], whole[0])


def test_the_next_tile_reads_half_of_the_last_one(run):
    """A change of the first tile's far half is not seen; one of its near half is."""
    first = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    far, near = first.clone(), first.clone()
    far[..., :3] += 1
    near[..., 3:] += 1
    plain, far, near = (drawn(run, [0], 2, first=x) for x in (first, far, near))
    assert torch.equal(plain[..., :6], first)
    assert torch.equal(plain[..., 6:], far[..., 6:])
    assert not torch.allclose(plain[..., 6:], near[..., 6:])


def test_tiles_of_an_odd_side_overlap_by_the_larger_half():
    found = panorama(Denoiser(Level(), "x0"), (1, 3, 5), log_linear(), SampleConfig(steps=2), [0], 3)
    assert found.shape == (1, 1, 3, 5 + 2 + 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiles": 0}, "at least 1"),
        ({"toward": "north"}, "valid: down, left, right, up"),
        ({"tiles": -3}, "at least 1"),
    ],
)
def test_impossible_panoramas_are_refused(run, options, words):
    with pytest.raises(UserError, match=words):
        drawn(run, [0], **{"tiles": 2, **options})


def test_a_model_that_does_not_outpaint_is_refused(tmp_path):
    plain = load_run(write_run(tmp_path / "plain", ["a", "b"], SHAPE))
    with pytest.raises(UserError, match="a panorama needs a model that outpaints"):
        drawn(plain, [0], 2)
