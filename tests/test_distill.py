"""Distillation: the loss by diffusers' own DDIM step, who learns and who does not, runs like any other, mistakes refused.

The sampler and the ladder of consistency models equal diffusers' LCMScheduler.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from reference import in_float64
from scipy.stats import kstest
from tiny import IMAGES, POINTS, differences, images, make_runner, rows
from torch import Tensor, nn
from torch.testing import assert_close

from nanodiffusion.config import read_config
from nanodiffusion.denoiser import PREDICTIONS, Denoiser, expand
from nanodiffusion.draw import draw
from nanodiffusion.ema import EMA, constant
from nanodiffusion.errors import UserError
from nanodiffusion.finetune.distill import Distill, Distilled, pseudo_huber
from nanodiffusion.nets import build_net
from nanodiffusion.noise import karras, lcm, ldm, log_linear, table_density, trailing
from nanodiffusion.objective import make_task
from nanodiffusion.run import load_run
from nanodiffusion.sampler import STEPS, ImageNoise, euler, heun, sample

F64 = torch.float64
NET = IMAGES["net"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- the sampler and its ladder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [50, 40, 20])
def test_the_ladder_is_that_of_diffusers(original):
    schedule, theirs = ldm(), LCMScheduler(**SD)
    for steps in range(1, original + 1):
        theirs.set_timesteps(steps, original_inference_steps=original)
        expected = torch.cat([schedule.sigmas[theirs.timesteps], torch.zeros(1, dtype=F64)])
        assert_close(lcm(schedule, steps, original), expected, rtol=0, atol=0)


def test_four_steps_of_fifty_are_the_published_timesteps():
    assert_close(ldm().t(lcm(ldm(), 4)[:-1]), torch.tensor([999.0, 759, 499, 259], dtype=F64))


def test_the_ladder_is_a_part_of_the_one_it_is_of():
    schedule = log_linear(1000, 0.002, 80)
    assert set(lcm(schedule, 4, 18, "karras").tolist()) <= set(karras(schedule, 18).tolist())
    assert_close(lcm(schedule, 18, 18, "karras"), karras(schedule, 18), rtol=0, atol=0)
    with pytest.raises(UserError, match="karras"):
        lcm(schedule, 4, of="karas")


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] of x0 ~ N(0.7, 0.5^2)."""
    s2 = expand(sigma.to(x), x) ** 2
    return (0.25 * x + s2 * 0.7) / (0.25 + s2)


def lcm_states(steps: int, generator: torch.Generator) -> Tensor:
    """x (k 3 2) after each step of diffusers' scheduler, divided by the factor of x0, from the noise of seed 1."""
    with in_float64():
        theirs, out = LCMScheduler(**SD), []
        theirs.set_timesteps(steps)
        abar = theirs.alphas_cumprod
        sigma = lambda t: ((1 - abar[t]) / abar[t]).sqrt()
        y = normal(1, 3, 2, dtype=F64) * (1 - abar[theirs.timesteps[0]]).sqrt()
        after = [*theirs.timesteps.tolist()[1:], None]
        for t, t_next in zip(theirs.timesteps, after):
            x, s = y / abar[t].sqrt(), sigma(t)
            eps = (x - gaussian(x, s.expand(3))) / s
            y = theirs.step(eps, int(t), y, generator=generator, return_dict=False)[0]
            out.append(y if t_next is None else y / abar[t_next].sqrt())
    return torch.stack(out)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("skip", [True, False])
def test_the_step_is_that_of_diffusers_but_for_its_skip(steps, skip):
    """Their skip, of sigma_data 0.5 over ten times the timestep and on the scaled x, is written into D here; else left out."""
    schedule, ladder = ldm(), lcm(ldm(), steps)

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        x0, t = gaussian(x, sigma), 10 * schedule.t(sigma)
        if not skip:
            return x0
        c_skip, c_out = 0.25 / (t**2 + 0.25), t / (t**2 + 0.25).sqrt()
        return expand(c_out, x) * x0 + expand(c_skip, x) * x / expand((1 + sigma**2).sqrt(), x)

    generator = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=F64)
    x = float(ladder[0]) * normal(1, 3, 2, dtype=F64)
    found = torch.stack([state.x for state in sample(D, x, ladder, STEPS["lcm"], noise)])
    theirs = lcm_states(steps, torch.Generator().manual_seed(0))
    assert_close(found, theirs, rtol=1e-9 if skip else 1e-4, atol=1e-9 if skip else 1e-5)


def test_the_noise_of_a_step_is_the_images_own():
    x, ladder = normal(0, 3, 2), lcm(ldm(), 4)
    whole = [s.x for s in sample(gaussian, x, ladder, STEPS["lcm"], ImageNoise([5, 6, 7]))][-2]
    alone = [s.x for s in sample(gaussian, x[1:2], ladder, STEPS["lcm"], ImageNoise([6]))][-2]
    assert_close(whole[1:2], alone, rtol=0, atol=0)


# -- the loss ----------------------------------------------------------------------------------------------------------


def denoiser(prediction: str = "eps", seed: int = 0, classes: int = 3) -> Denoiser:
    """A net of three classes whose last layer is not zero."""
    torch.manual_seed(seed)
    net = build_net(**NET, channels_in=1, in_size=[4, 4], num_classes=classes)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return Denoiser(net, prediction, "table", ldm()).eval()


def distilled(prediction: str = "eps", **options: Any) -> Distilled:
    """A student that is unlike its teacher, and its average unlike both."""
    teacher, student = denoiser(prediction, 0), denoiser(prediction, 1)
    model = Distilled(teacher, student, student.net, options.pop("levels", trailing(ldm(), 50)), **options)
    for average in model.averages():
        for tensor in average.tensors.values():
            tensor.mul_(0.9)
    return model


def reference(
    model: Distilled, x0: Tensor, t: Tensor, eps: Tensor, label: Tensor, scales: Tensor, stride: int
) -> Tensor:
    """Luo et al. 2023a, algorithm 1, sample by sample in their own terms, with the DDIM step of diffusers: -> (b)."""
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    ddim.set_timesteps(1000 // stride)
    abar, losses = ddim.alphas_cumprod, []

    def f(net: nn.Module, z: Tensor, t: int, label: Tensor) -> Tensor:
        return (z - (1 - abar[t]).sqrt() * net(z, torch.tensor([t]), label=label)) / abar[t].sqrt()

    average = denoiser(seed=1).net
    (model.average or EMA(model.net, constant(0))).copy_to(average)
    for k in range(len(x0)):
        i, none = int(t[k]), torch.tensor([3])
        z = abar[i].sqrt() * x0[k : k + 1] + (1 - abar[i]).sqrt() * eps[k : k + 1]
        e_c, e_u = (model.teacher.net(z, t[k : k + 1], label=y) for y in (label[k : k + 1], none))
        z_next = ddim.step(e_u + scales[k] * (e_c - e_u), i, z, return_dict=False)[0]
        target = f(average, z_next, i - stride, label[k : k + 1]) if i >= stride else z_next
        gap = (f(model.net, z, i, label[k : k + 1]) - target) ** 2
        losses.append(((gap + 0.001**2).sqrt() - 0.001).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(("skip", "guidance"), [(1, (1.0, 3.0)), (2, (1.5, 1.5)), (1, (1.0, 1.0))])
@pytest.mark.parametrize("decay", [0.95, pytest.param(0.0, marks=pytest.mark.slow)])
def test_the_loss_is_the_papers_with_the_step_of_diffusers(skip, guidance, decay):
    model = distilled(skip=skip, guidance=guidance, decay=decay)
    x0, eps, label = normal(2, 5, 1, 4, 4), normal(3, 5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 3])
    t = torch.tensor([999, 259, 39, 19, 499])
    loss = model.loss(x0, ldm().sigmas[t].float(), eps, {"label": label})
    expected = reference(model, x0, t, eps, label, model.scales(eps), 20 * skip)
    assert_close(loss, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("solver", "step"), [("ddim", euler), ("heun", heun)])
def test_a_step_of_the_teacher_is_the_samplers(solver, step):
    model, x, label = distilled(solver=solver), normal(0, 2, 1, 4, 4), {"label": torch.tensor([0, 1])}
    levels = [(2.0, 1.0), (float(model.levels[1]), 0.0)]
    with torch.no_grad():
        for k, (s, s_next) in enumerate(levels):
            expected, _, _ = step(lambda x, sigma: model.teacher(x, sigma, label), x, s, s_next, None, torch.randn_like)
            both = [torch.tensor(pair) for pair in zip(*levels)]
            assert_close(model.stepped(x, *both, label, x)[k], expected[k], rtol=1e-5, atol=1e-5)


def test_a_weight_a_distance_and_a_mask_are_of_the_error_of_x0(monkeypatch):
    model, plain = distilled(huber=0.0), distilled(huber=1e-3)
    x0, eps, cond = normal(2, 2, 1, 4, 4), normal(3, 2, 1, 4, 4), {"label": torch.tensor([0, 1])}
    sigma = ldm().sigmas[[259, 499]].float()
    half = torch.zeros(2, 1, 4, 4)
    half[..., :2] = 1
    target, out = [], model.denoiser(x0 + expand(sigma, x0) * eps, sigma, cond)
    own = model.target
    monkeypatch.setattr(model, "target", lambda *args: target.append(own(*args)) or target[-1])
    masked = model.loss(x0, sigma, eps, cond, "l1", lambda sigma, c_out: sigma * c_out, half)
    assert_close(masked, sigma * (out - target[0])[..., :2].abs().mean((1, 2, 3)))
    assert_close(plain.loss(x0, sigma, eps, cond), pseudo_huber(out, target[0], 1e-3).mean((1, 2, 3)))


def test_levels_of_a_table_are_equally_likely_and_each_is_the_next_above(monkeypatch):
    """The 50 trailing levels of 1,000 timesteps: 20 of the table's entries to each."""
    model = distilled()
    seen = []
    monkeypatch.setattr(model, "guided", lambda x, sigma, *rest: seen.append(sigma) or torch.zeros_like(x))
    x0 = torch.zeros(1000, 1, 4, 4)
    with torch.no_grad():
        model.loss(x0, ldm().sigmas.float(), x0 + 1, {"label": torch.zeros(1000, dtype=torch.int64)})
    assert_close(seen[0], ldm().sigmas[torch.arange(1000) // 20 * 20 + 19].float(), rtol=0, atol=0)
    beyond = table_density(ldm())(7, torch.Generator().manual_seed(0)) + 100
    with torch.no_grad():
        model.loss(x0[:7], beyond, x0[:7], {"label": torch.zeros(7, dtype=torch.int64)})
    assert_close(seen[1], ldm().sigmas[-1:].float().expand(7))


def test_guidance_scales_are_uniform_and_a_function_of_a_samples_own_noise():
    model = distilled(guidance=(2.0, 5.0))
    eps = normal(0, 20000, 1, 4, 4)
    scales = model.scales(eps)
    assert kstest((scales - 2).numpy() / 3, "uniform").pvalue > 0.01
    assert abs(float(torch.corrcoef(torch.stack([scales, eps[:, 0, 0, 0]]))[0, 1])) < 0.03
    assert_close(model.scales(eps[7:9]), scales[7:9], rtol=0, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "edm"])
def test_a_prediction_has_the_boundary_built_in(prediction):
    c_skip, c_out, _ = PREDICTIONS[prediction].coefficients(torch.zeros(1))
    assert (float(c_skip), abs(float(c_out))) == (1, 0)


@pytest.mark.parametrize("prediction", ["eps", "v", "edm", "x0"])
def test_at_level_0_the_target_is_x_itself(prediction):
    model, x = distilled(prediction), normal(0, 3, 1, 4, 4)
    sigma, cond = torch.tensor([0.0, 0.2, 0.0]), {"label": torch.tensor([0, 1, 2])}
    target = model.target(x, sigma, cond)
    assert_close(target[[0, 2]], x[[0, 2]], rtol=0, atol=0)
    assert bool((target[1] != x[1]).all())


class Known(nn.Module):
    """A D of N(0.7, 0.5^2): its mean, or with `end` where its trajectory ends."""

    takes, precision = (), torch.float32

    def __init__(self, end: bool) -> None:
        super().__init__()
        self.end, self.net = end, nn.Linear(1, 1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        ratio = 0.5 / (0.25 + expand(sigma.to(x), x) ** 2).sqrt()
        return 0.7 + (x - 0.7) * ratio ** (1 if self.end else 2)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3)])
def test_the_ends_of_trajectories_have_a_loss_that_vanishes_with_the_teachers_steps(solver, order):
    """Of a Gaussian they are known. The error of one step is of second or third order; its square is the loss."""
    schedule, sigma = log_linear(1000, 0.01, 20), torch.logspace(-2, 1.3, 4096, dtype=F64)
    x0, eps = 0.7 + 0.5 * normal(0, 4096, 2, dtype=F64), normal(1, 4096, 2, dtype=F64)

    def loss(end: bool, levels: int) -> float:
        student = Known(end)
        model = Distilled(Known(False), student, student.net, karras(schedule, levels), 1, (1, 1), 0.0, 0.0, solver)  # type: ignore[arg-type]
        return float(model.double().loss(x0, sigma, eps)[sigma > 0.5].mean())

    assert loss(True, 400) < loss(False, 400) / 100
    assert math.log2(loss(True, 100) / loss(True, 200)) == pytest.approx(2 * order, abs=0.3)


# -- who learns --------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_student_alone():
    model = distilled(guidance=(1.0, 2.0))
    label = {"label": torch.tensor([0, 1, 2])}
    model.loss(normal(0, 3, 1, 4, 4), torch.full((3,), 2.0), normal(1, 3, 1, 4, 4), label).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.net.parameters())
    assert model.average is not None
    assert not any(t.requires_grad for t in model.average.tensors.values())


def test_asking_the_average_leaves_the_students_weights_as_they_were():
    model = distilled()
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    model.target(normal(0, 2, 1, 4, 4), torch.ones(2), {"label": torch.zeros(2, dtype=torch.int64)})
    for name, tensor in model.net.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)


def test_nothing_is_dropped_out_in_training():
    model = distilled()
    model.train()
    assert not any(m.training for m in model.modules())


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of labelled images in base/, one of points in points/, and their data."""
    folder = tmp_path_factory.mktemp("base")
    labelled = {**IMAGES, "data": images(folder), "prediction": "v", "clock": "table", "schedule": {"name": "ldm"}}
    make_runner(folder, labelled, name="base", steps=4).run()
    make_runner(folder, POINTS, name="points", steps=4).run()
    return folder


def options(folder: Path, **task: Any) -> dict[str, Any]:
    """A recipe that distils folder/base."""
    return {
        **IMAGES,
        "data": images(folder),
        "steps": 4,
        "checkpoint_every": 2,
        "log_every": 2,
        "cond_dropout": 0.0,
        "task": {"name": "distill", "base": str(folder / "base"), "levels": 10, "w_min": 1.0, "w_max": 2.0, **task},
        "ema": [{"name": "constant", "decay": 0.9}],
        "accumulate": 1,
        "sample": {"sampler": {"name": "lcm"}, "ladder": {"name": "lcm", "original": 10}, "steps": 4, "n": 4},
    }


VARIANTS = {"whole": {}, "itself": {"decay": 0.0}, "lora": {"rank": 2}}


@pytest.mark.slow
def test_a_student_is_validated_like_any_denoiser(base, tmp_path):
    make_runner(tmp_path, options(base), steps=1, validation=0.25, validate_every=1).run()
    row = rows(tmp_path / "run")[0]
    assert row["val/loss"] > 0 and row["val/ema_loss"] > 0


@pytest.mark.parametrize("variant", ["whole", pytest.param("itself", marks=pytest.mark.slow), "lora"])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(base, tmp_path, variant):
    recipe = options(base, **VARIANTS[variant])
    make_runner(tmp_path / "whole", recipe).run()
    make_runner(tmp_path / "parted", recipe, steps=2).run()
    make_runner(tmp_path / "parted", recipe).run()
    assert differences(tmp_path / "whole/run", tmp_path / "parted/run") == []
    losses = [row["loss"] for row in rows(tmp_path / "whole/run") if "loss" in row]
    assert losses and all(math.isfinite(loss) and loss > 0 for loss in losses)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_target_is_an_average_of_the_student_after_every_update(base, tmp_path, rank):
    runner = make_runner(tmp_path, options(base, rank=rank))
    net = runner.trainer.denoiser.net
    expected = {name: t.clone() for name, t in net.state_dict().items()}
    for _ in runner.trainer:
        for name, t in net.state_dict().items():
            expected[name] = 0.95 * expected[name] + 0.05 * t
    average = runner.trainer.emas[-1]
    assert average is runner.trainer.denoiser.average
    for name, tensor in average.tensors.items():
        assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_parts_of_a_batch_are_one_update(base, tmp_path):
    recipe = options(base)
    for accumulate in (1, 4):
        make_runner(tmp_path / str(accumulate), recipe, accumulate=accumulate).run()
    one, four = ([row["loss"] for row in rows(tmp_path / n / "run")] for n in ("1", "4"))
    assert_close(torch.tensor(one), torch.tensor(four), rtol=1e-4, atol=1e-6)


def drawn(run: Any) -> Tensor:
    label = torch.tensor([0, 1, 2, 0])
    *_, last = draw(run.denoiser, run.shape, run.schedule, run.config.sample, range(4), {"label": label})
    return last.x


def test_a_distilled_run_is_read_and_drawn_without_its_base(base, tmp_path):
    shutil.copytree(base / "base", tmp_path / "base")
    runner = make_runner(tmp_path, options(tmp_path))
    runner.run()
    pictures = runner.pictures(4)
    shutil.rmtree(tmp_path / "base")
    run = load_run(tmp_path / "run")
    assert (run.config.prediction, run.config.schedule, run.config.clock) == ("v", {"name": "ldm"}, "table")
    assert_close(drawn(run), pictures, rtol=1e-5, atol=1e-5)


def test_a_lora_trains_its_factors_and_keeps_nothing_else(base, tmp_path):
    runner = make_runner(tmp_path, options(base, rank=2, match=["conv1", "conv2"]))
    model: Any = runner.trainer.denoiser
    before = {name: t.clone() for name, t in model.teacher.state_dict().items()}
    factors = dict(model.net.named_parameters())
    assert factors and all(name.endswith(("conv1/down", "conv1/up", "conv2/down", "conv2/up")) for name in factors)
    assert {id(p) for p in runner.trainer.parameters} == {id(p) for p in factors.values()}
    x, sigma, cond = normal(0, 2, 1, 4, 4), torch.ones(2), {"label": torch.tensor([0, 1])}
    with torch.no_grad():
        assert_close(model(x, sigma, cond), model.teacher(x, sigma, cond), rtol=0, atol=0)
    runner.run()
    for name, tensor in model.teacher.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.equal(model(x, sigma, cond), model.teacher(x, sigma, cond))
    run = load_run(tmp_path / "run")
    assert_close(drawn(run), runner.pictures(4), rtol=1e-5, atol=1e-5)


def test_teacher_and_student_of_a_lora_share_their_weights(base):
    config = read_config(options(base, rank=2))
    task = make_task(config)
    model = task.model(task.settled(config))
    frozen = {id(p) for p in model.teacher.parameters()}
    assert {id(p) for p in model.denoiser.parameters()} == frozen


@pytest.mark.slow
def test_a_distilled_run_is_a_base_too_but_a_lora_is_not(base, tmp_path):
    make_runner(tmp_path, options(base), name="whole", steps=1).run()
    make_runner(tmp_path, options(base, base=str(tmp_path / "whole")), name="again", steps=1).run()
    make_runner(tmp_path, options(base, rank=2), name="lora", steps=1).run()
    with pytest.raises(UserError, match="no teacher"):
        make_runner(tmp_path, options(base, base=str(tmp_path / "lora")), name="not")


def test_points_without_conditions_are_distilled_without_guidance(base, tmp_path):
    task = {"name": "distill", "base": str(base / "points"), "levels": 20}
    make_runner(tmp_path, POINTS, task=task, steps=3).run()
    assert load_run(tmp_path / "run").step == 3


# -- mistakes ----------------------------------------------------------------------------------------------------------

WRONG = {
    "no such run": ({"base": "nowhere"}, "no such run"),
    "no base": ({"base": ""}, "task.base"),
    "no such weights": ({"weights": "ema-9"}, "no such weights"),
    "w_min above w_max": ({"w_min": 3.0, "w_max": 2.0}, "0 to w_max"),
    "a negative scale": ({"w_min": -1.0, "w_max": 2.0}, "w_min"),
    "a skip longer than the ladder": ({"levels": 4, "skip": 5}, "1 to the 4 levels"),
    "no skip": ({"skip": 0}, "task.skip"),
    "no levels": ({"levels": 0}, "task.levels"),
    "more levels than the schedule": ({"levels": 2000}, "1 to 1000"),
    "an unknown solver": ({"solver": "dimm"}, "ddim"),
    "an unknown ladder": ({"ladder": "kerras"}, "karras"),
    "a decay of 1": ({"decay": 1.0}, "task.decay"),
    "a negative c": ({"huber": -1.0}, "task.huber"),
    "a negative rank": ({"rank": -1}, "task.rank"),
    "layers that are not there": ({"rank": 2, "match": ["to_q"]}, "no layer matches"),
    "an embedded scale": ({"embed_guidance": True}, "embed_guidance"),
    "an unknown option": ({"w_mid": 2.0}, "w_min"),
    "an option of another type": ({"levels": "many"}, "wrong type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_has_one_clear_message(base, tmp_path, name):
    task, words = WRONG[name]
    with pytest.raises(UserError, match=words) as error:
        make_runner(tmp_path, options(base, **task))
    assert len(str(error.value).splitlines()) <= 6
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_base_must_be_a_run_of_a_denoiser_on_the_same_data(base, tmp_path):
    other = {"name": "distill", "base": str(base / "points")}
    with pytest.raises(UserError, match="other data"):
        make_runner(tmp_path, options(base), task=other)
    with pytest.raises(UserError, match="guided"):
        make_runner(tmp_path, POINTS, task={**other, "w_max": 2.0})
    squares = {**IMAGES, "data": images(tmp_path), "steps": 1, "ema": [], "batch_size": 4}
    net = {"name": "autoencoder", "widths": [8, 8], "latent_channels": 2, "groups": 4}
    make_runner(tmp_path, squares, name="codec", task={"name": "autoencode"}, net=net).run()
    with pytest.raises(UserError, match="no teacher"):
        make_runner(tmp_path, options(base, base=str(tmp_path / "codec")))


def test_the_task_needs_a_base():
    with pytest.raises(UserError, match="base"):
        make_task(read_config({"task": {"name": "distill"}}))
    assert isinstance(make_task(read_config({"task": {"name": "distill", "base": "x"}})), Distill)
