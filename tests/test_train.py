"""The training loop against plain torch loops, torch's own optimisers and schedulers, and the ideal denoiser."""

import copy
import json
import math
import sys
import warnings
from collections.abc import Callable
from itertools import islice
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.config import TrainConfig
from nanodiffusion.data import TensorData, swiss_roll, two_moons
from nanodiffusion.denoiser import Denoiser, edm
from nanodiffusion.distributed import World
from nanodiffusion.errors import UserError
from nanodiffusion.nets import IdealDenoiser, build_net
from nanodiffusion.noise import log_linear, log_normal, table_density
from nanodiffusion.tensors import pack_state, unpack_state
from nanodiffusion.train import LR_SCHEDULES, TORCH_OPTIMIZERS, TORCH_SCHEDULERS, Trainer, fit, mix

DENSITY = log_normal(-0.5, 1.0)


class Line(nn.Module):
    """F = x W: the smallest net, one matrix, which every optimiser takes. It remembers the labels it was given."""

    sample_shape, null_label = (2,), None

    def __init__(self, null_label: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -0.2], [0.1, 0.3]]))
        self.null_label, self.labels, self.dtypes = null_label, [], set()
        self.takes = () if null_label is None else ("label",)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.labels.append(label)
        out = x @ self.weight
        self.dtypes.add(out.dtype)
        return out


class Spoilt:
    """A data set whose batch number k = 0, 1, ... is filled with `value` where `bad(k)`."""

    def __init__(self, data: TensorData, bad: Callable[[int], bool], value: float = math.nan) -> None:
        self.data, self.bad, self.value, self.calls = data, bad, value, 0
        self.shape, self.draws = data.shape, data.draws

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device) -> "Spoilt":
        return self

    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        x0, cond = self.data.batch(index, u)
        self.calls += 1
        return (x0.fill_(self.value) if self.bad(self.calls - 1) else x0), cond


def mlp(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_net("mlp", **{"hidden": [16, 16], **options})


def make_trainer(net: nn.Module | None = None, data: Any = None, **options: Any) -> Trainer:
    config = TrainConfig(**{"batch_size": 16, "steps": 10, "lr": 1e-2, **options})
    return Trainer(Denoiser(net or Line()), swiss_roll(50) if data is None else data, DENSITY, config)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in trainer.denoiser.net.state_dict().items()}


def frozen(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a skipped update must not touch."""
    big, _ = trainer.state()
    optimizer, _ = pack_state(big.pop("optimizer"))
    return {f"{file}/{k}": v.clone() for file, part in {**big, "o": optimizer}.items() for k, v in part.items()}


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# -- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_updates_equal_a_hand_written_torch_loop(clip):
    trainer = make_trainer(mlp(), clip=clip, ema=[{"name": "constant", "decay": 0.9}])
    net = copy.deepcopy(trainer.denoiser.net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    average = weights(trainer)
    for _ in range(6):
        (draw,) = trainer.draw()
        sigma = draw.sigma[:, None]
        x = trainer.data.x[draw.index] + sigma * draw.eps
        out = net(x / (1 + sigma**2).sqrt(), draw.sigma.log() / 4)
        loss = ((out - draw.eps) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)
        optimizer.step()
        average = {k: 0.9 * average[k] + 0.1 * v.detach() for k, v in net.state_dict().items()}
        step = trainer.update()
        assert_close(step.loss, loss, rtol=1e-6, atol=1e-7)
        assert_close(step.grad_norm, norm, rtol=1e-5, atol=1e-6)
        assert not clip or norm > clip  # or nothing is tested
    assert_close(weights(trainer), dict(net.state_dict()), rtol=1e-5, atol=1e-6)
    assert_close(trainer.emas[0].tensors, average, rtol=1e-5, atol=1e-6)


def reference_losses(trainer: Trainer, optimizer: torch.optim.Optimizer, weight: Tensor, each: Any) -> list[Tensor]:
    """A plain loop over a trainer's draws with torch's own `optimizer` on `weight`; `each` follows every update."""
    for k in range(4):
        trainer.step = k
        (draw,) = trainer.draw()
        sigma = draw.sigma[:, None]
        out = ((trainer.data.x[draw.index] + sigma * draw.eps) / (1 + sigma**2).sqrt()) @ weight
        loss = ((out - draw.eps) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each(loss.detach())
    trainer.step = 0


@pytest.mark.parametrize("name", sorted(TORCH_OPTIMIZERS))
def test_any_optimiser_by_name_is_torchs_own(name):
    trainer = make_trainer(optimizer={"name": name})
    weight = nn.Parameter(Line().weight.detach().clone())
    losses: list[Tensor] = []
    reference_losses(trainer, getattr(torch.optim, name)([weight], lr=1e-2), weight, losses.append)
    assert_close(torch.stack([trainer.update().loss for _ in range(4)]), torch.stack(losses), rtol=1e-5, atol=1e-6)
    assert_close(trainer.denoiser.net.weight, weight, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight, Line().weight)


def test_8_bit_averages_are_those_of_bitsandbytes(monkeypatch):
    """By a stand-in for the package, which gets what it would."""
    given = {}

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params: Any, min_8bit_size: int = 0, **options: Any) -> None:
            given.update(options, min_8bit_size=min_8bit_size)
            super().__init__(params, **options)

    package: Any = ModuleType("bitsandbytes")
    package.optim = SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    trainer = make_trainer(optimizer={"name": "AdamW8bit", "betas": [0.8, 0.9]})
    assert given == {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 1e-2, "min_8bit_size": 4096}
    plain = make_trainer(optimizer={"name": "AdamW", "betas": [0.8, 0.9]})
    assert_close([s.loss for s in trainer], [s.loss for s in plain])


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"nanodiffusion\[bnb\]"):
        make_trainer(optimizer={"name": "AdamW8bit"})


def test_options_of_an_optimiser_reach_it():
    trainer = make_trainer(optimizer={"name": "AdamW", "betas": [0.5, 0.6], "weight_decay": 0.3, "fused": False})
    group = trainer.optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["weight_decay"], group["fused"]) == ((0.5, 0.6), 0.3, False)


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("optimizer", {"name": "Adamw"}),
        ("optimizer", {"name": "LBFGS"}),
        ("optimizer", {"name": "AdamW", "beta": 1}),
        ("optimizer", {"name": "AdamW", "weight_decay": "much"}),
        ("optimizer", {"name": "AdamW", "betas": [2.0, 3.0]}),
        ("optimizer", {"name": "AdamW", "amsgrad": True, "fused": True, "foreach": True}),
        ("optimizer", {}),
        ("lr_schedule", {"name": "cosin"}),
        ("lr_schedule", {"name": "cosine", "warm_up": 3}),
        ("lr_schedule", {"name": "StepLR"}),
        ("lr_schedule", {"name": "StepLR", "step_size": 0}),  # torch divides by it at its first step
        ("lr_schedule", {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 0.4, "step_size_up": 0}),
        ("lr_schedule", {"name": "CosineAnnealingLR", "T_max": 0}),
        ("lr_schedule", {"name": "OneCycleLR", "max_lr": 1.0}),
        ("lr_schedule", {"name": "SequentialLR"}),
        ("weight", {"name": "min_snr", "gama": 5.0}),
        ("ema", [{"name": "constant", "decay": 2.0}]),
        ("ema", [{"name": "constant", "device": "cuda"}]),
        ("parallel", "dpp"),
        ("compile", "block"),
    ],
)
def test_wrong_parts_are_refused_before_training(key, spec):
    with pytest.raises(UserError):
        make_trainer(**{key: spec})


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of accumulate") as refused:
        make_trainer(batch_size=16, accumulate=3)
    assert refused.value.details["fix"] == "batch_size=18 accumulate=3"


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "fix"),
    [
        (4, 1, 8, "batch_size=8 accumulate=1"),
        (64, 8, 32, "batch_size=64 accumulate=1"),
        (64, 8, 6, "batch_size=72 accumulate=2"),
    ],
)
def test_of_too_many_processes_the_next_batch_that_fits_is_named(batch_size, accumulate, processes, fix):
    config = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UserError) as refused:
        Trainer(Denoiser(Line()), swiss_roll(50), DENSITY, config, World(size=processes))
    assert refused.value.details["fix"] == fix


@pytest.mark.parametrize("key", ["steps", "batch_size", "accumulate", "max_bad_steps"])
def test_nothing_is_done_no_times(key):
    with pytest.raises(UserError, match="must be at least 1"):
        next(fit(Denoiser(Line()), swiss_roll(50), DENSITY, **{key: 0}))


@pytest.mark.parametrize("sigma_data", [0.5, 1.2])
def test_the_weight_of_edm_makes_the_loss_of_its_net_even(sigma_data):
    """lambda(sigma) c_out(sigma)^2 = 1 (Karras et al. 2022, table 1), for data of whatever deviation."""
    D, sigma = Denoiser(Line(), edm(sigma_data)), torch.tensor([0.05, 1.0, 10.0])
    weight = Trainer(D, swiss_roll(50), DENSITY, TrainConfig(weight={"name": "edm"})).plain_objective.weight
    assert_close(weight(sigma, D.prediction.coefficients(sigma)[1]), torch.ones(3))


# -- learning rates --------------------------------------------------------------------------------------------------

K = torch.arange(12, dtype=torch.float64)
FORMULAS = {
    "constant": ({}, torch.ones(12, dtype=torch.float64)),
    "constant, warm": ({"warmup": 4}, ((K + 1) / 4).clamp(max=1)),
    "cosine": ({}, (1 + torch.cos(math.pi * K / 12)) / 2),
    "cosine, warm": (
        {"warmup": 4, "final": 0.1},
        torch.where(K < 4, (K + 1) / 4, 0.1 + 0.9 * torch.cos(math.pi * (K - 4) / 16) ** 2),
    ),
    "linear": ({}, 1 - K / 12),
    "linear, warm": ({"warmup": 2, "final": 0.5}, torch.where(K < 2, (K + 1) / 2, 1 - 0.5 * (K - 2) / 10)),
    "rsqrt": ({"hold": 4}, (4 / K.clamp(min=4)).sqrt()),
    "rsqrt, warm": ({"hold": 4, "warmup": 3}, ((K + 1) / 3).clamp(max=1) * (4 / K.clamp(min=4)).sqrt()),
}


@pytest.mark.parametrize("row", FORMULAS)
def test_learning_rates_are_their_formulas(row):
    options, factor = FORMULAS[row]
    trainer = make_trainer(steps=12, lr=0.3, lr_schedule={"name": row.split(",")[0], **options})
    found = torch.tensor([step.lr for step in trainer], dtype=torch.float64)
    assert_close(found, 0.3 * factor, rtol=1e-12, atol=1e-12)


TORCH_OPTIONS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 5]},
    "ExponentialLR": {"gamma": 0.8},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.4, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 20},
    "ReduceLROnPlateau": {"patience": 1, "threshold": 0.5},
}


@pytest.mark.parametrize("name", sorted(TORCH_SCHEDULERS))
def test_any_torch_scheduler_by_name_is_torchs_own(name):
    options = TORCH_OPTIONS.get(name, {})
    sgd = {"name": "SGD", "momentum": 0.5}
    trainer = make_trainer(steps=12, lr=0.3, optimizer=sgd, lr_schedule={"name": name, **options})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.5)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
    for step in trainer:
        assert step.lr == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step(*[step.loss] * (name == "ReduceLROnPlateau"))


PAIRS = [({"name": n}, {"name": "cosine"}) for n in sorted(TORCH_OPTIMIZERS)] + [
    ({"name": "SGD", "momentum": 0.5}, {"name": n, **TORCH_OPTIONS.get(n, {})}) for n in sorted(LR_SCHEDULES)
]


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS, ids=lambda spec: spec["name"])
def test_a_restored_state_continues_bit_by_bit(optimizer, schedule):
    """Through JSON and tensors, as a checkpoint stores it, for every optimiser and every schedule."""
    make = lambda: make_trainer(optimizer=optimizer, lr_schedule=schedule)
    whole, first, second = make(), make(), make()
    expected = [(step.loss.item(), step.lr) for step in whole]
    list(islice(first, 4))
    big, small = first.state()
    tensors, structure = pack_state({"big": big, "small": small})
    again = unpack_state({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(structure)))
    second.load_state(**again)
    assert [(step.loss.item(), step.lr) for step in second] == expected[4:]
    assert_identical(frozen(second), frozen(whole))


def test_a_restored_scale_of_fp16_continues_bit_by_bit():
    """After an overflow, with good steps counted since."""
    data = lambda: Spoilt(swiss_roll(50), lambda k: k == 1, math.inf)
    config = TrainConfig(steps=8, batch_size=16, lr=1e-2)
    make = lambda data: Trainer(Denoiser(Line(), precision=torch.float16), data, DENSITY, config)
    whole, first, second = make(data()), make(data()), make(swiss_roll(50))
    expected = [step.loss.item() for step in whole]
    list(islice(first, 4))
    big, small = first.state()
    second.load_state(big, json.loads(json.dumps(small)))
    assert second.scaler.state_dict()["_growth_tracker"] == 2 and second.scaler.get_scale() == 2**15
    assert [step.loss.item() for step in second] == expected[4:]
    assert second.scaler.state_dict() == whole.scaler.state_dict()


# -- draws -----------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_step():
    a, b, other = make_trainer(), make_trainer(), make_trainer(seed=1)
    torch.manual_seed(123)  # the global generator has no part in it
    list(islice(a, 3))
    b.step = other.step = 3
    for x, y in zip(a.draw()[0], b.draw()[0]):
        assert torch.equal(x, y)
    for name in ("index", "sigma", "eps"):
        mine = getattr(a.draw()[0], name)
        assert not torch.equal(mine, getattr(other.draw()[0], name))
        a.step += 1
        assert not torch.equal(mine, getattr(a.draw()[0], name))
        a.step -= 1


def test_accumulation_cuts_the_same_global_draw():
    whole, cut = make_trainer(two := mlp(), accumulate=1), make_trainer(two, accumulate=4)
    parts = cut.draw()
    assert [len(p.index) for p in parts] == [4, 4, 4, 4]
    for x, *pieces in zip(whole.draw()[0], *parts):
        assert torch.equal(x, torch.cat(pieces))


def test_an_epoch_visits_every_sample_once():
    trainer = make_trainer(data=swiss_roll(48))
    seen = []
    for trainer.step in range(6):
        seen += trainer.draw()[0].index.tolist()
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
    assert seen[:48] != seen[48:]


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_offset_noise_is_one_number_for_all_pixels_of_a_channel(strength):
    """Beside which all that is drawn stays as it is without."""
    pixels = TensorData(torch.zeros(50, 3, 8, 8))
    (plain,) = make_trainer(data=pixels, batch_size=400).draw()
    (draw,) = make_trainer(data=pixels, batch_size=400, offset_noise=strength).draw()
    for name in ("index", "sigma", "u", "keep"):
        assert torch.equal(getattr(draw, name), getattr(plain, name))
    offset = draw.eps - plain.eps
    assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-5)
    numbers = offset[:, :, 0, 0].flatten() / strength  # 1,200 of them
    assert abs(numbers.mean()) < 4 / 1200**0.5 and abs(numbers.std() - 1) < 4 / 2400**0.5
    assert abs(torch.corrcoef(torch.stack([numbers, plain.eps.mean((2, 3)).flatten()]))[0, 1]) < 4 / 1200**0.5


class Varied:
    """Images of 4 x 8 or 8 x 4 pixels, a batch of one of them, which are begun before they are asked for."""

    shape, draws, classes = (1, 8, 8), 2, ()

    def __init__(self) -> None:
        self.begun: list[Tensor] = []
        self.waiting: list[int] = []
        self.asked: list[Tensor] = []

    def __len__(self) -> int:
        return 40

    def to(self, device: torch.device) -> "Varied":
        return self

    def order(self, batch: int, seed: int, step: int) -> Tensor:
        return torch.arange(batch) + 20 * (step % 2)

    def shape_of(self, index: Tensor) -> tuple[int, ...]:
        return (1, 4, 8) if index[0] < 20 else (1, 8, 4)

    def prefetch(self, index: Tensor, u: Tensor) -> None:
        self.begun.append(torch.cat([index[:, None], u], 1))

    def batch(self, index: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.waiting.append(len(self.begun) - len(self.asked))
        self.asked.append(torch.cat([index[:, None], u], 1))
        return index.float()[:, None, None, None].expand(-1, *self.shape_of(index)) / 40, {}


class Scale(nn.Module):
    """F = w x, of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape[1:]))
        return self.weight * x


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_data_chooses_its_order_and_shape_and_hears_of_the_next_micro_batch(accumulate):
    data, net = Varied(), Scale()
    list(make_trainer(net, data, batch_size=8, steps=6, accumulate=accumulate))
    assert net.shapes == [shape for k in range(6) for shape in [((1, 4, 8), (1, 8, 4))[k % 2]] * accumulate]
    assert_close(torch.stack(data.begun), torch.stack(data.asked[1:]), rtol=0, atol=0)  # each once, none after the last
    assert max(data.waiting) <= 2  # this one and the next: no more is kept


def test_seeds_mix_without_collisions():
    seeds = {mix(a, b, c) for a in range(40) for b in range(40) for c in range(10)}
    assert len(seeds) == 16000 and min(seeds) >= 0 and max(seeds) < 2**63


def test_accumulation_equals_one_batch():
    whole, cut = make_trainer(mlp(), steps=20, lr=1e-3), make_trainer(mlp(), steps=20, lr=1e-3, accumulate=4)
    for a, b in zip(whole, cut):
        assert_close(a.losses, b.losses, rtol=0, atol=1e-6)
        assert_close(a.loss, b.loss, rtol=0, atol=1e-6)
        assert torch.equal(a.sigma, b.sigma)
    assert_close(weights(whole), weights(cut), rtol=0, atol=1e-6)


def test_cond_dropout_replaces_its_share_by_the_null_class():
    data = two_moons(400)
    net = Line(null_label=2)
    trainer = make_trainer(net, data, batch_size=400, steps=25, cond_dropout=0.2)
    for _ in range(25):
        given = data.labels[trainer.draw()[0].index]
        trainer.update()
        dropped = net.labels[-1] != given
        assert torch.equal(net.labels[-1][dropped], torch.full((int(dropped.sum()),), 2))
    share = (torch.cat(net.labels) == 2).float().mean().item()
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 10000)  # four standard deviations of a binomial share


def test_without_cond_dropout_every_label_stays():
    data, net = two_moons(400), Line(null_label=2)
    trainer = make_trainer(net, data, batch_size=400, cond_dropout=0.0)
    (draw,) = trainer.draw()
    trainer.update()
    assert torch.equal(net.labels[-1], data.labels[draw.index])


# -- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_batch_changes_no_weight_average_or_optimiser_state(value, accumulate):
    data = Spoilt(swiss_roll(50), lambda k: k == 3 * accumulate, value)
    trainer = make_trainer(mlp(), data, accumulate=accumulate, ema=[{"name": "constant"}, {"name": "power"}])
    list(islice(trainer, 3))
    before = frozen(trainer)
    assert trainer.update().skipped
    assert_identical(frozen(trainer), before)
    assert trainer.step == 4 and trainer.bad_steps == 1
    step = trainer.update()
    assert not step.skipped and step.loss.isfinite() and trainer.bad_steps == 0
    assert all(v.isfinite().all() for v in frozen(trainer).values())


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped():
    trainer = make_trainer()
    list(islice(trainer, 2))
    before = frozen(trainer)
    hook = trainer.denoiser.net.weight.register_hook(lambda g: g * math.nan)
    step = trainer.update()
    hook.remove()
    assert step.skipped and step.loss.isfinite()
    assert_identical(frozen(trainer), before)


def test_a_non_finite_loss_of_a_finite_gradient_is_skipped():
    """The slope of l1 is finite even where its value is not."""
    net = Line()
    trainer = make_trainer(net, Spoilt(swiss_roll(50), lambda k: k == 2, 1e38), loss="l1")
    trainer.denoiser.net.forward = lambda x, t: (x @ net.weight).clamp(-1, 1) + (math.inf if x.abs().max() > 1e9 else 0)
    list(islice(trainer, 2))
    before = frozen(trainer)
    step = trainer.update()
    assert step.skipped and not step.loss.isfinite() and step.grad_norm.isfinite()
    assert_identical(frozen(trainer), before)


def test_a_thousand_bad_batches_among_good_ones_poison_nothing():
    data = Spoilt(swiss_roll(50), lambda k: k % 3 > 0)
    trainer = make_trainer(data=data, steps=1500, batch_size=4)
    assert sum(step.skipped for step in trainer) == 1000
    assert all(v.isfinite().all() for v in frozen(trainer).values())


def test_a_row_of_bad_updates_ends_the_run_and_single_ones_do_not():
    trainer = make_trainer(data=Spoilt(swiss_roll(50), lambda k: k % 4 > 0), steps=40, max_bad_steps=4)
    assert sum(1 for _ in trainer) == 40
    trainer = make_trainer(data=Spoilt(swiss_roll(50), lambda k: k >= 5), steps=40, max_bad_steps=4)
    good = list(islice(trainer, 5))
    before = frozen(trainer)
    with pytest.raises(UserError, match="4 updates in a row were not finite"):
        list(trainer)
    assert len(good) == 5 and trainer.step == 9
    assert_identical(frozen(trainer), before)


# -- precision and speed ---------------------------------------------------------------------------------------------


def test_bf16_multiplies_in_bf16_and_keeps_fp32_weights():
    net = Line()
    config = TrainConfig(steps=20, batch_size=16, lr=1e-2)
    denoiser = Denoiser(net, precision=torch.bfloat16)
    trainer, full = Trainer(denoiser, swiss_roll(50), DENSITY, config), make_trainer(steps=20)
    losses = torch.stack([a.loss - b.loss for a, b in zip(trainer, full)])
    assert net.dtypes == {torch.bfloat16}
    assert all(v.dtype == torch.float32 for v in frozen(trainer).values())
    assert 0 < losses.abs().max() < 2**-6  # bf16 has 8 bits of mantissa


def test_fp16_scales_its_loss_and_keeps_fp32_weights():
    net, full = Line(), make_trainer(steps=20)
    config = TrainConfig(steps=20, batch_size=16, lr=1e-2)
    trainer = Trainer(Denoiser(net, precision=torch.float16), swiss_roll(50), DENSITY, config)
    losses = torch.stack([a.loss - b.loss for a, b in zip(trainer, full) if not a.skipped])
    assert net.dtypes == {torch.float16} and trainer.scaler.get_scale() == 2**16
    assert all(v.dtype == torch.float32 for v in frozen(trainer).values())
    assert len(losses) == 20 and 0 < losses.abs().max() < 2**-9


def test_fp16_overflow_halves_the_scale_and_changes_nothing_else():
    config = TrainConfig(steps=20, batch_size=16, lr=1e-2)
    data = Spoilt(swiss_roll(50), lambda k: k in (2, 3), math.inf)
    trainer = Trainer(Denoiser(Line(), precision=torch.float16), data, DENSITY, config)
    list(islice(trainer, 2))
    before = frozen(trainer)
    assert trainer.update().skipped and trainer.update().skipped
    assert_identical(frozen(trainer), before)
    assert trainer.scaler.get_scale() == 2**14 and trainer.scaler.state_dict()["_growth_tracker"] == 0
    assert not trainer.update().skipped


@pytest.mark.slow  # inductor's compiler
def test_compiled_losses_equal_eager_ones():
    eager, fast = make_trainer(mlp(), accumulate=2), make_trainer(mlp(), accumulate=2, compile=True)
    for a, b in zip(eager, fast):
        assert_close(a.losses, b.losses, rtol=1e-5, atol=1e-6)
    assert_close(weights(eager), weights(fast), rtol=1e-4, atol=1e-5)


def test_compile_blocks_compiles_what_is_repeated(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: seen.append(type(self).__name__))
    image = TensorData(torch.zeros(20, 3, 8, 8))
    for name, expected in (("dit", ["DiTBlock"] * 2), ("unet", ["Block"] * 12)):
        options = {"depth": 2, "patch": 4} if name == "dit" else {"multipliers": [1, 2], "blocks": 2}
        seen.clear()
        make_trainer(build_net(name, in_size=(8, 8), channels_in=3, **options), image, compile="blocks")
        assert [kind for kind in seen if "sample" not in kind] == expected


def test_compile_compiles_the_loss(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: seen.append(self))
    trainer = make_trainer(compile=True)
    assert seen == [trainer.plain_objective]


# -- the loss means what it should -----------------------------------------------------------------------------------


def test_the_swiss_rolls_loss_approaches_the_ideal_denoisers():
    """No denoiser has a smaller expected error than the posterior mean; a short run comes within a few per cent."""
    data, schedule = swiss_roll(300), log_linear(200, 0.1, 10.0)
    density = table_density(schedule)
    torch.manual_seed(0)
    D = Denoiser(build_net("mlp", hidden=[64, 64, 64]))
    options = {"steps": 1000, "batch_size": 128, "lr": 5e-3, "lr_schedule": {"name": "cosine"}}
    for _ in fit(D, data, density, **options):
        pass
    g = torch.Generator().manual_seed(1)
    x0, sigma, eps = data.x.repeat(60, 1), density(18000, g), torch.randn(18000, 2, generator=g)
    x = x0 + sigma[:, None] * eps
    with torch.no_grad():
        ours = D.loss(x0, sigma, eps).mean().item()
        ideal = (((x - IdealDenoiser(data.x)(x, sigma)) / sigma[:, None] - eps) ** 2).mean().item()
    assert 0.99 * ideal < ours < 1.08 * ideal, (ours, ideal)


def test_fit_is_a_generator_that_yields_every_update():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = list(fit(Denoiser(Line()), swiss_roll(50), DENSITY, steps=5, batch_size=8, lr=1e-3))
    assert [s.step for s in steps] == [1, 2, 3, 4, 5]
    assert all(s.losses.shape == s.sigma.shape == (8,) for s in steps)
    with pytest.raises(UserError, match="learning_rate"):
        next(fit(Denoiser(Line()), swiss_roll(50), DENSITY, learning_rate=1))
