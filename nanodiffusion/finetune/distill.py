"""Few-step models out of trained ones: latent consistency distillation, of all weights or as a LoRA (Luo et al. 2023a, b).

A consistency model's D(x, sigma) is where the trajectory through x ends. It is learnt from two neighbours on a trajectory of
the teacher: D(x, s) is to be what D says of x', one guided step of the teacher further down at s' (Song et al. 2023,
algorithm 2), and at level 0 D(x', 0) = x'. Predictions of eps, v, flow and edm have that end built in (c_skip = 1 and
c_out = 0 there); here no net is asked at level 0, so that it holds for those of x0 too.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nanodiffusion.config import Config, read_config
from nanodiffusion.denoiser import DISTANCES, Cond, Denoiser, expand, mean_within
from nanodiffusion.ema import EMA, constant
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.finetune.lora import Factored
from nanodiffusion.lora import new_lora
from nanodiffusion.lora.names import layers_of
from nanodiffusion.noise import LADDERS
from nanodiffusion.objective import Denoise, make_schedule
from nanodiffusion.tensors import load_weights


class Distilled(nn.Module):
    """A student with its teacher, trained where a Denoiser would be, and called as one: D(x, sigma, cond) -> x0.

    teacher: frozen, called as a Denoiser, with its `takes` and `unconditional`. student: the Denoiser that is trained.
    net: what of it is trained, averaged and saved: its net, or factors. levels (n+1) decreasing to 0: the ladder that
    both walk. skip: how many of its levels a step of the teacher goes down. guidance: the lowest and highest scale of the
    teacher's guidance, 1 = none. decay: of the average that says the target; 0 = the student itself. huber: c of the
    pseudo-Huber distance; 0 = the distance that the loss is asked for. solver: a row of `SOLVERS`.
    All runs in eval mode: dropout would be noise in teacher and target.
    """

    def __init__(
        self,
        teacher: Any,
        student: Denoiser,
        net: nn.Module,
        levels: Tensor,
        skip: int = 1,
        guidance: tuple[float, float] = (1.0, 1.0),
        decay: float = 0.95,
        huber: float = 1e-3,
        solver: str = "ddim",
    ) -> None:
        super().__init__()
        self.teacher, self.denoiser, self.net = teacher.requires_grad_(False), student, net
        self.register_buffer("levels", levels.flip(0).float(), persistent=False)  # (n+1) from 0 up
        self.skip, self.guidance, self.decay, self.huber, self.solver = skip, guidance, decay, huber, solver
        self.precision, self.average = student.precision, None
        self.eval()

    levels: Tensor
    teacher: Any
    average: EMA | None

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the teacher's conditions."""
        return self.teacher.takes

    def unconditional(self, cond: Cond) -> dict[str, Any]:
        """What the teacher takes for no condition."""
        return self.teacher.unconditional(cond)

    def train(self, mode: bool = True) -> "Distilled":
        """In eval mode, whatever is asked for."""
        return super().train(False)

    def averages(self) -> list[EMA]:
        """The average that says the target, for the loop to update, save and load with its own; none where decay is 0."""
        self.average = EMA(self.net, constant(self.decay)) if self.decay else None
        return [self.average] if self.average else []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        """The student's estimate of the end of the trajectory: x (b ...), sigma (b) -> (b ...)."""
        return self.denoiser(x, sigma, cond)

    def loss(
        self,
        x0: Tensor,
        sigma: Tensor,
        eps: Tensor,
        cond: Cond | None = None,
        distance: str = "mse",
        weight: Callable[[Tensor, Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """How far D is from itself one teacher's step later: x0, eps (b ...), sigma (b) -> (b); gradients to the student alone.

        sigma is raised to the next level of the ladder (lowered to its first one): of sigmas that are uniform over 1,000
        timesteps the 50 `trailing` levels get 20 each. weight(sigma, 1): on the error of x0. mask (b 1 h w): which pixels
        count. Luo et al. 2023a, algorithm 1.
        """
        i = torch.searchsorted(self.levels, sigma.contiguous()).clamp(1, len(self.levels) - 1)
        s, s_next = self.levels[i], self.levels[(i - self.skip).clamp(min=0)]
        x, cond = x0 + expand(s, x0) * eps, cond or {}
        with torch.no_grad():
            target = self.target(self.stepped(x, s, s_next, cond, eps), s_next, cond)
        out = self.denoiser(x, s, cond)
        each = pseudo_huber(out, target, self.huber) if self.huber else lookup(DISTANCES, distance, "loss")(out, target)
        per_sample = each.flatten(1).mean(1) if mask is None else mean_within(each, mask)
        return per_sample if weight is None else per_sample * weight(s, torch.ones_like(s))

    def stepped(self, x: Tensor, s: Tensor, s_next: Tensor, cond: Cond, eps: Tensor) -> Tensor:
        """x (b ...) one step of the teacher down, each sample between its own levels (b); `sampler.euler` and `heun`."""
        d, ratio = self.guided(x, s, cond, eps), expand(s_next / s, x)
        x_next = torch.lerp(d, x, ratio)
        if self.solver == "ddim":
            return x_next
        d_next = self.guided(x_next, torch.maximum(s_next, self.levels[1]), cond, eps)
        mean = torch.where(ratio > 0, torch.lerp(d, d_next, 0.5 / ratio.clamp(min=1e-12)), d)
        return torch.lerp(mean, x, ratio)

    def target(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """What the average of the student says the end is: x (b ...), sigma (b) -> (b ...), x itself where sigma is 0."""
        with self.average.swap(self.net) if self.average else nullcontext():
            end = self.denoiser(x, torch.maximum(sigma, self.levels[1]), cond)
        return torch.where(expand(sigma, x) > 0, end, x)

    def guided(self, x: Tensor, sigma: Tensor, cond: Cond, eps: Tensor) -> Tensor:
        """The teacher's D under guidance of each sample's own scale: x, eps (b ...), sigma (b) -> (b ...)."""
        if not self.takes or self.guidance == (1, 1):
            return self.teacher(x, sigma, cond)
        both = tree_map(lambda c, u: torch.cat([c, u]), dict(cond), self.unconditional(cond))
        d_c, d_u = self.teacher(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return torch.lerp(d_u, d_c, expand(self.scales(eps), x))

    def scales(self, eps: Tensor) -> Tensor:
        """Guidance scales uniform between the two, a function of the noise alone: eps (b ...) -> (b).

        The fraction of 1,024 times a sample's first number: uniform to 1e-3, and the same whenever step k is drawn again.
        """
        lo, hi = self.guidance
        return lo + (hi - lo) * (eps.flatten(1)[:, 0].float().abs() * 1024).frac()


SOLVERS = {"ddim": 1, "heun": 2}  # how often the teacher is asked in a step


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt((a - b)^2 + c^2) - c of each number (Song & Dhariwal 2023, section 3.3, which takes it of the whole vector)."""
    return ((a - b) ** 2 + c**2).sqrt() - c


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Options of latent consistency distillation, which `Distill` and `LCM` share.

    solver: of the teacher's step, ddim or heun, which asks twice and allows fewer levels (Song et al. 2023, section 6.1).
    ladder, levels: name and length of the ladder that is walked; skip: levels that the teacher goes down at once.
    w_min, w_max: guidance scales of the teacher, 1 = none (the papers count from 0). The student learns their mean effect:
    one scale is best where it is not told which.
    decay, huber: see `Distilled`. rank: of a LoRA that is trained instead of all weights; 0 = none. match: ends of the names
    of its layers; [] = all.
    """

    solver: str = "ddim"
    ladder: str = "trailing"
    levels: int = 50
    skip: int = 1
    w_min: float = 1.0
    w_max: float = 1.0
    decay: float = 0.95
    huber: float = 1e-3
    rank: int = 0
    match: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lookup(LADDERS, self.ladder, "task.ladder")
        lookup(SOLVERS, self.solver, "task.solver")
        for key, fine, expected in (
            ("levels", self.levels >= 1, "1 or more"),
            ("skip", 1 <= self.skip <= self.levels, f"1 to the {self.levels} levels of the ladder"),
            ("w_min", 0 <= self.w_min <= self.w_max < float("inf"), f"0 to w_max, which is {self.w_max}"),
            ("decay", 0 <= self.decay < 1, "in [0, 1)"),
            ("huber", 0 <= self.huber < float("inf"), "a number from 0 up"),
            ("rank", self.rank >= 0, "0 or more"),
        ):
            if not fine:
                what = "this cannot be distilled with"
                raise UserError(what, key=f"task.{key}", expected=expected, found=getattr(self, key))

    def walk(self, config: Config) -> dict[str, Any]:
        """The options as a `Distilled` takes them."""
        guidance = (float(self.w_min), float(self.w_max))
        ladder = LADDERS[self.ladder](make_schedule(config), self.levels)
        more = {key: getattr(self, key) for key in ("skip", "decay", "huber", "solver")}
        return {"levels": ladder, "guidance": guidance, **more}

    def factors(self, net: nn.Module, seed: int) -> Factored:
        """New factors of a LoRA that change nothing yet, on a net's layers."""
        draw = torch.Generator().manual_seed(seed)
        return Factored(new_lora({"unet": net}, self.rank, match=tuple(self.match or layers_of(net)), generator=draw))


@dataclass(frozen=True)
class Distill(Walk, Denoise):
    """A few-step model of a run of ours; `nanodiffusion sample RUN` draws it with sampler=lcm steps=4 guidance=1.

    base: the run's folder, whose net, prediction, schedule and clock the config takes over; weights: which of its weights.
    embed_guidance: the student is told its guidance scale, as published latent consistency U-Nets are (time_cond_proj_dim);
    no net of a run takes one, so this must be false.
    """

    base: str
    weights: str = "ema-0"
    embed_guidance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base:
            raise UserError("nothing to distil", key="task.base", expected="a run's folder", found=self.base)
        if self.embed_guidance:
            fix = "w_min and w_max alike, and embed_guidance=false"
            raise UserError("no net of a run takes a guidance scale", key="task.embed_guidance", fix=fix)

    def settled(self, config: Config) -> Config:
        """The config with what the base decides: net, prediction, clock and schedule, and codec and text unless given."""
        base = self._base()[0]
        told = {key: getattr(config, key) or getattr(base, key) for key in ("codec", "text")}
        same = ("net", "prediction", "sigma_data", "clock", "schedule")
        return replace(config, **told, **{key: getattr(base, key) for key in same})

    def known(self, config: Config, shape: tuple[int, ...], classes: int, data: Any = None) -> dict[str, Any]:
        """Nothing of a net is left to the data. UserError: the base was trained on samples or classes of another kind."""
        _, meta, _ = self._base()
        found, expected = (tuple(shape), classes), (tuple(meta["shape"]), len(meta["classes"]))
        if found[0] != expected[0] or (config.net.get("num_classes") and found != expected):
            words = ["samples of {} in {} classes".format(*each) for each in (expected, found)]
            fix = "the data options of the base"
            raise UserError(
                "the base is for other data", file=self.base, key="data", expected=words[0], found=words[1], fix=fix
            )
        return {}

    def model(self, config: Config) -> Distilled:
        """The base as a frozen teacher, and a student that starts as it is."""
        teacher = self.teacher(config).requires_grad_(False)
        if self.w_max != 1 and not teacher.takes:
            fix = "task.w_min=1 task.w_max=1"
            raise UserError("the base has no conditions to be guided by", file=self.base, key="task.w_max", fix=fix)
        student = twin(teacher) if self.rank else copy.deepcopy(teacher)
        net: Any = student.net
        if self.rank:
            net = self.factors(student.net, config.seed)
            for name in ("config", "sample_shape", "takes", "null_label"):  # what the loop asks of a net
                setattr(net, name, getattr(student.net, name, None))
        student.net.requires_grad_(not self.rank)
        return Distilled(teacher, student, net, **self.walk(config))

    def teacher(self, config: Config) -> Denoiser:
        """The denoiser of the base, in this run's precision."""
        base, _, (tensors, folder) = self._base()
        teacher = super().model(replace(base, precision=config.precision))
        load_weights(teacher.net, tensors, folder)
        return teacher

    def finished(self, config: Config) -> Any:
        """What a trained run's weights are read into: a Denoiser, or a Distilled with one, whose base is needed again."""
        return self.model(config) if self.rank else super().model(config)

    def check(self, model: Distilled, *rest: Any) -> None:
        """UserError for what would be refused only after training."""
        super().check(model.denoiser, *rest)

    def flops(self, model: Distilled) -> int | None:
        """Of a forward pass of the student."""
        return super().flops(model.denoiser)

    def pictures(self, model: Distilled, *rest: Any, **more: Any) -> Tensor:
        """Samples (n *shape) of the student, one a seed, conditions in turn."""
        return super().pictures(model.denoiser, *rest, **more)

    def _base(self) -> tuple[Config, dict[str, Any], tuple[Any, object]]:
        """The base's config, what its header says beside it, and its weights with the folder they are from."""
        from nanodiffusion.run import choose_weights, find_checkpoint  # which imports the tasks

        checkpoint = find_checkpoint(self.base)
        name = choose_weights(checkpoint, self.weights)
        meta = checkpoint.meta["model"]
        if "config" not in meta:
            raise UserError("this checkpoint carries no run configuration", file=checkpoint.folder, key="task.base")
        config = read_config(meta["config"])
        if config.task["name"] != "denoise" and not (config.task["name"] == "distill" and not config.task.get("rank")):
            expected, found = "a run that trained a denoiser", config.task["name"]
            raise UserError("this run is no teacher", file=self.base, key="task.base", expected=expected, found=found)
        return config, meta, (checkpoint.files[name], checkpoint.folder)


def twin(denoiser: Denoiser) -> Denoiser:
    """Other modules with the very same parameters."""
    return copy.deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})
