"""The one training loop: sigma and noise -> loss -> step, a generator. Serves every net, from the swiss roll upwards.

Everything random in step k is a function of (seed, k): one generator draws for the global batch and a process keeps its slice.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanodiffusion.config import TrainConfig, from_dict, make, validate_training
from nanodiffusion.data import order
from nanodiffusion.denoiser import DISTANCES, WEIGHTS, Cond, Denoiser, expand
from nanodiffusion.distributed import World
from nanodiffusion.ema import EMA, PROFILES
from nanodiffusion.errors import UserError, lookup, need, workable
from nanodiffusion.fast import BLOCKS, compile_blocks
from nanodiffusion.noise import Density
from nanodiffusion.shard import FUSED, WHOLE, load_parts, local, optimizer_parts, parts, repeated, shard, sharded
from nanodiffusion.tensors import check_fit, pack_state

VALIDATION_SEED = 7  # of whatever a validation draws, the same each time


class Data(Protocol):
    """What the loop needs of a data set."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def draws(self) -> int: ...
    def __len__(self) -> int: ...
    def to(self, device: torch.device) -> "Data": ...
    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]: ...


class Step(NamedTuple):
    """After update number `step`: the global mean loss, and what went into it on this process."""

    step: int
    loss: Tensor  # () over the global batch
    losses: Tensor  # (b) per sample, before weighting is averaged
    sigma: Tensor  # (b)
    grad_norm: Tensor  # ()
    lr: float
    skipped: bool  # the update was not finite and was not made


class Objective(nn.Module):
    """The weighted loss per sample as a module, which is what DDP and compile wrap."""

    def __init__(self, denoiser: Denoiser, distance: str = "mse", weight: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        lookup(DISTANCES, distance, "loss")
        self.denoiser, self.distance, self.weight = denoiser, distance, weight

    def forward(self, x0: Tensor, sigma: Tensor, eps: Tensor, cond: Cond) -> Tensor:
        """x0, eps (b ...), sigma (b) -> (b). cond["mask"] (b 1 h w), where the data gives one, is where the loss counts."""
        mask = cond.get("mask")
        cond = {name: value for name, value in cond.items() if name != "mask"}
        return self.denoiser.loss(x0, sigma, eps, cond, self.distance, self.weight, mask)


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (splitmix64's finaliser)."""
    z = 0
    for n in numbers:
        z = (z + n + 0x9E3779B97F4A7C15) & (2**64 - 1)
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        z ^= z >> 31
    return z >> 1


# -- optimisers and learning rates ---------------------------------------------------------------------------------------

TORCH_OPTIMIZERS = {
    k: v
    for k, v in vars(torch.optim).items()
    if inspect.isclass(v)
    and issubclass(v, torch.optim.Optimizer)
    and k not in ("Optimizer", "LBFGS", "SparseAdam")  # the base class; a closure, sparse gradients: not this loop's
}


def adamw_8bit(
    params: list[nn.Parameter],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    min_8bit_size: int = 4096,
) -> torch.optim.Optimizer:
    """AdamW whose averages are 8-bit numbers in blocks with a scale each (Dettmers et al. 2022), of bitsandbytes.

    Parameters of fewer than `min_8bit_size` numbers have averages in fp32.
    """
    optim = need("bitsandbytes", "bnb").optim
    return optim.AdamW8bit(
        params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {**TORCH_OPTIMIZERS, "AdamW8bit": adamw_8bit}
# Made of other schedulers or of functions, which a recipe cannot name; LRScheduler is their base class.
_NOT_BY_NAME = {"LRScheduler", "ChainedScheduler", "SequentialLR", "LambdaLR", "MultiplicativeLR"}
TORCH_SCHEDULERS = {
    k: v
    for k, v in vars(torch.optim.lr_scheduler).items()
    if inspect.isclass(v) and issubclass(v, torch.optim.lr_scheduler.LRScheduler) and k.lstrip("_") not in _NOT_BY_NAME
}


def constant(step: int, steps: int, warmup: int = 0) -> float:
    """Linear warm-up, then 1."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def cosine(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 to `final` (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def linear(step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Linear warm-up, then linear from 1 to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 - min(1.0, (step - warmup) / max(1, steps - warmup)))


def rsqrt(step: int, steps: int, warmup: int = 0, hold: int = 1000) -> float:
    """Linear warm-up, 1 until `hold`, then sqrt(hold / step) (Karras et al. 2024b, eq. 67)."""
    return constant(step, steps, warmup) / math.sqrt(max(1.0, step / hold))


LR_SCHEDULES: dict[str, Callable[..., Any]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "rsqrt": rsqrt,
    **TORCH_SCHEDULERS,
}


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser by name, fused where torch has it."""
    spec = config.optimizer
    cls = OPTIMIZERS.get(spec.get("name", ""))
    able = cls and "fused" in inspect.signature(cls).parameters
    fused = {"fused": True} if able and (spec["name"] in FUSED or not any(map(sharded, parameters))) else {}
    build = make(OPTIMIZERS, {**({} if "foreach" in spec else fused), **spec}, "optimizer", lr=config.lr)
    try:
        return build(parameters)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{spec['name']} refuses its options", key="optimizer", found=str(e)) from None


def _rehearse(row: Callable[..., Any], config: TrainConfig) -> None:
    """Two steps of a torch scheduler on an optimiser of its own: some refuse their options only then."""
    scheduler = row(make_optimizer([nn.Parameter(torch.zeros(1, 1))], config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no step of the optimiser came before
        for _ in range(2):
            scheduler.step(*([0.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate schedule by name: one of ours as a factor of the step, or a torch class with its own options."""
    spec = config.lr_schedule
    if spec.get("name") in TORCH_SCHEDULERS:
        row = TORCH_SCHEDULERS[spec["name"]]
        options = {k: v for k, v in spec.items() if k != "name"}
        try:
            _rehearse(partial(row, **options), config)
            scheduler = row(optimizer, **options)
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"torch's {spec['name']} refuses its options", key="lr_schedule", found=str(e)) from None
        if (last := getattr(scheduler, "total_steps", config.steps)) < config.steps:
            expected = f"at least steps={config.steps}"
            raise UserError(
                "the schedule ends before the run", key="lr_schedule.total_steps", expected=expected, found=last
            )
        return scheduler
    factor = make(LR_SCHEDULES, spec, "lr_schedule", steps=config.steps)
    with workable("lr_schedule"):
        if min(factor(k) for k in (0, 1, config.steps)) < 0:
            raise ValueError("a negative rate")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: factor(k))


# -- the loop ------------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """Everything random about (a part of) a batch: which samples, their noise, their augmentation, which labels go."""

    index: Tensor  # (b)
    sigma: Tensor  # (b)
    eps: Tensor  # (b ...)
    u: Tensor  # (b draws)
    keep: Tensor  # (b) bool, False = without its condition


class Trainer:
    """Fits a denoiser to data: iterate over it, one `Step` per update. Its `state` is all a resumed run needs.

    denoiser: or another module with its `net`, `precision` and `loss`, `takes` and `unconditional` where it is
    conditioned, and `noise_shape` where its noise has not the shape of a sample. density: (n, generator) -> sigma (n), see
    noise.py. It is trained where `world.device` is.
    Raises UserError for a batch that does not divide, and after `max_bad_steps` non-finite updates in a row.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        data: Data,
        density: Density,
        config: TrainConfig,
        world: World | None = None,
    ) -> None:
        validate_training(config)
        self.config, self.world, self.density = config, world or World(), density
        self.parts = config.accumulate * self.world.size
        if config.batch_size % self.parts:
            fewer = -(-config.accumulate // self.world.size)  # no process holds more at once than one alone did
            least = -(-config.batch_size // (fewer * self.world.size)) * fewer * self.world.size
            raise UserError(
                "the global batch does not divide into micro-batches",
                key="batch_size",
                expected=f"a multiple of accumulate * processes = {self.parts}",
                found=config.batch_size,
                fix=f"batch_size={least} accumulate={fewer}",
            )
        self.micro_batch = config.batch_size // self.parts  # samples that a process holds at once
        device = self.world.device
        self.denoiser, self.data = denoiser.to(device), data.to(device)
        self.noise_shape: tuple[int, ...] = getattr(denoiser, "noise_shape", tuple(data.shape))
        self.sharded = config.parallel == "fsdp" and self.world.size > 1  # the net lies in parts on all processes
        self._compile_blocks()
        if self.sharded:
            self._shard()
        self.takes: tuple[str, ...] = getattr(denoiser, "takes", ())
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config)
        self.scheduler = make_scheduler(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=denoiser.precision == torch.float16)
        self.emas = [self._average(spec) for spec in config.ema]
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in denoiser.modules())
        self.generator = torch.Generator(device)
        self.step, self.bad_steps = 0, 0
        known = denoiser.prediction.options if isinstance(denoiser, Denoiser) else {}
        self.plain_objective = Objective(denoiser, config.loss, make(WEIGHTS, config.weight, "weight", **known))
        self.objective = self._wrap(self.plain_objective)

    def _average(self, spec: dict[str, Any]) -> EMA:
        options = {k: v for k, v in spec.items() if k != "device"}
        profile = make(PROFILES, options, "ema", batch=self.config.batch_size)()
        return EMA(self.denoiser.net, profile, spec.get("device", ""))

    def _compile_blocks(self) -> None:
        if self.config.compile == "blocks":
            compile_blocks(self.denoiser)
            for block in repeated(self.denoiser):
                if not isinstance(block, BLOCKS):
                    block.compile()

    def _shard(self) -> None:
        if (name := self.config.optimizer.get("name")) in WHOLE:
            fix = "parallel=ddp, or optimizer=AdamW"
            raise UserError("this optimiser cannot work on parts", key="optimizer", found=name, fix=fix)
        if self.config.compile is True:
            raise UserError("a sharded loss is not compiled as a whole", key="compile", fix="compile=blocks")
        shard(self.denoiser, self.world)

    def _wrap(self, objective: nn.Module) -> nn.Module:
        if self.config.compile is True:
            objective.compile()
        if self.world.size == 1 or self.sharded:
            return objective
        ids = [self.world.device] if self.world.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers"  # its name since torch 2.13
        key = new if new in inspect.signature(ddp).parameters else "broadcast_buffers"
        told: dict[str, Any] = {"device_ids": ids, key: False}
        return ddp(objective, **told)

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.config.steps:
            yield self.update()

    def draw(self) -> list[Draw]:
        """This process's micro-batches of update `self.step`, each a slice of one draw for the global batch."""
        b, g = self.config.batch_size, self.generator.manual_seed(mix(self.config.seed, self.step))
        uniform = lambda *shape: torch.rand(*shape, generator=g, device=g.device)
        index, shape = self._order()
        whole = Draw(
            index=index.to(g.device),
            sigma=self.density(b, g),
            eps=torch.randn(b, *shape, generator=g, device=g.device),
            u=uniform(b, self.data.draws),
            keep=uniform(b) >= self.config.cond_dropout if self.takes else self._all(b),
        )
        if self.config.offset_noise:  # one number a channel; after all else, which stays as it is without
            offset = torch.randn(b, shape[0], *[1] * (len(shape) - 1), generator=g, device=g.device)
            whole = whole._replace(eps=whole.eps + self.config.offset_noise * offset)
        if self.parts == 1:
            return [whole]
        cuts = zip(*(t.chunk(self.parts) for t in whole))
        return [Draw(*cut) for i, cut in enumerate(cuts) if i % self.world.size == self.world.rank]

    def _order(self) -> tuple[Tensor, tuple[int, ...]]:
        """Which samples make up the global batch, and the shape of their noise: the data's own say, where it has one."""
        data: Any = self.data
        own = getattr(data, "order", None)
        asked = self.config.batch_size, self.config.seed, self.step
        index = own(*asked) if own else order(len(data), *asked)
        varies = hasattr(data, "shape_of") and not hasattr(self.denoiser, "noise_shape")
        return index, tuple(data.shape_of(index)) if varies else self.noise_shape

    def _following(self) -> Draw | None:
        """The first micro-batch of the next update, where the data can begin to prepare it.

        It is drawn twice, which is cheap beside decoding a picture, so that no noise is kept meanwhile.
        """
        if not hasattr(self.data, "prefetch") or self.step + 1 >= self.config.steps:
            return None
        self.step += 1
        try:
            return self.draw()[0]
        finally:
            self.step -= 1

    def _announce(self, draw: Draw | None) -> None:
        """Tell the data which micro-batch comes after the one that is about to be asked for: one waits, and no more."""
        if draw is not None and hasattr(self.data, "prefetch"):
            self.data.prefetch(draw.index, draw.u)  # type: ignore[attr-defined]

    def _all(self, b: int) -> Tensor:
        return torch.ones(b, dtype=torch.bool, device=self.world.device)

    def losses(self, draw: Draw) -> Tensor:
        """Weighted loss per sample of a draw: -> (b)."""
        x0, cond = self.data.batch(draw.index, draw.u)
        return self.objective(x0, draw.sigma, draw.eps, self._dropped(self.conditions(cond), draw.keep))

    def conditions(self, given: Cond) -> dict[str, Tensor]:
        """What the net takes of what the data gives, and the mask of the loss where there is one."""
        if missing := [name for name in self.takes if name not in given]:
            raise UserError("the net takes what the data lacks", key=missing[0], found=", ".join(given) or "nothing")
        return {name: value for name, value in given.items() if name in self.takes or name == "mask"}

    def _dropped(self, cond: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        nothing = self.denoiser.unconditional(cond) if self.takes else cond
        return {name: torch.where(expand(keep, c), c, nothing[name]) for name, c in cond.items()}

    def update(self) -> Step:
        """One optimiser update over the global batch."""
        if self.has_dropout:
            torch.manual_seed(mix(self.config.seed, self.step, 1 + self.world.rank))
        if not self.denoiser.training:
            self.denoiser.train()
        self.optimizer.zero_grad(set_to_none=True)
        draws, losses = self.draw(), []
        for k, draw in enumerate(draws):
            last = k + 1 == len(draws)
            self._announce(self._following() if last else draws[k + 1])
            with self._exchanging(last):
                loss = self.losses(draw)
                self.scaler.scale(loss.mean() / len(draws)).backward()
            losses.append(loss.detach())
        lr = self.optimizer.param_groups[0]["lr"]
        per_sample = torch.cat(losses)
        mean = self.world.mean(per_sample.mean())
        norm, skipped = self._apply(mean)
        self.step += 1
        self._guard(skipped, mean)
        return Step(self.step, mean, per_sample, torch.cat([d.sigma for d in draws]), norm, lr, skipped)

    def _exchanging(self, now: bool) -> Any:
        """Gradients are averaged over the processes after the last micro-batch alone."""
        if self.sharded:
            self.denoiser.net.set_requires_gradient_sync(now)  # type: ignore[operator]
        elif self.world.size > 1 and not now:
            return self.objective.no_sync()  # type: ignore[operator]
        return nullcontext()

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """Of the whole gradient, of which each process may have a part."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return self.world.sum(norm.square()).sqrt() if self.sharded else norm

    def _apply(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Clip, update weights and averages; a non-finite loss or gradient leaves them and the optimiser alone."""
        self.scaler.unscale_(self.optimizer)
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        norm = self._norm(grads)
        skipped = not bool((norm + loss).isfinite())
        if not skipped:
            if self.config.clip:
                torch._foreach_mul_(grads, (self.config.clip / (norm + 1e-6)).clamp(max=1.0))
            self.scaler.step(self.optimizer)
            for ema in self.emas:
                ema.update(self.step + 1)
        self.scaler.update()
        if not isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
        elif not skipped:
            self.scheduler.step(loss)
        return norm, skipped

    def _guard(self, skipped: bool, loss: Tensor) -> None:
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if self.bad_steps >= self.config.max_bad_steps:
            raise UserError(
                f"{self.bad_steps} updates in a row were not finite and were skipped; the weights are those before them",
                found=f"loss {loss.item()} at step {self.step}",
                fix="a lower lr, clip=1.0, warm-up, or precision=fp32",
            )

    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """State dicts of weights, averages and optimiser, and the small rest; see `load_state`.

        Of a sharded net the averages are this process's parts, all else is DTensors; see `save_state`.
        """
        big = {"model": self.denoiser.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        big |= {f"ema-{i}": ema.tensors for i, ema in enumerate(self.emas)}
        small = {"step": self.step, "bad_steps": self.bad_steps, "scaler": self.scaler.state_dict()}
        return big, small | {"scheduler": self.scheduler.state_dict()}

    def save_state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """`state` as files of tensors, by name, and what JSON takes; of a sharded net, what this process has to write."""
        big, small = self.state()
        tensors, structure = pack_state(big.pop("optimizer"))
        like = self.denoiser.net.state_dict()
        files = {name: parts(values, self.world.first, like) for name, values in big.items()}
        files["optimizer"] = parts(tensors, self.world.first)
        return files, {"optimizer": structure, "trainer": pack_state(small)[1]}

    def load_state(self, big: Mapping[str, Mapping[str, Any]], small: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken, by however many processes, sharded or not: `big` is of whole tensors.

        A sharded net reads them one file after the other into the machine's memory, and keeps its parts.
        """
        check_fit(self.denoiser.net.state_dict(), weights := dict(big["model"]))
        load_parts(self.denoiser.net, weights)
        del weights
        self.optimizer.load_state_dict(optimizer_parts(big["optimizer"], self.optimizer))
        for i, ema in enumerate(self.emas):
            ema.load(big[f"ema-{i}"])
        self.scaler.load_state_dict(small["scaler"])
        self.scheduler.load_state_dict(small["scheduler"])
        self.step, self.bad_steps = small["step"], small["bad_steps"]


def fit(denoiser: Denoiser, data: Data, density: Density, world: World | None = None, **options: Any) -> Iterator[Step]:
    """Fit a denoiser and yield after every update: `for step in fit(D, data, density, steps=1000, lr=1e-3)`.

    options: the fields of TrainConfig.
    """
    yield from Trainer(denoiser, data, density, from_dict(TrainConfig, options), world)
