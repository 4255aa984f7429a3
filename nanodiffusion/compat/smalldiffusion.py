"""The package smalldiffusion 0.5.0 on this core: its names, argument orders and meanings; change the import line only.

    from nanodiffusion.compat.smalldiffusion import Swissroll, TimeInputMLP, ScheduleLogLinear, training_loop, samples

A model here is called as model(x, sigma, cond) with x = x0 + sigma * eps and sigma () or (b 1 ... 1), and returns eps
unless a modifier says otherwise. `samples` runs the core's loop on D = x - sigma * eps.

Flow matching keeps smalldiffusion's meaning: what ScheduleFlow holds, and what a PredFlow model is handed as `sigma`,
is the flow time t of x_t = (1 - t) x0 + t eps. Training changes the variable, sigma = t / (1 - t). Sampling has no need
to: the path is straight in t too and x_t - t (eps - x0) = x0, so the same D and the same steps hold with t for sigma.
A PredFlow model says so itself (`flow_time`), and so does a ladder fresh from `ScheduleFlow.sample_sigmas`.

Where smalldiffusion has a defect, this follows the core: ladders end at 0 and not at sigma_min, the training loop
yields after the update, DiT and Unet start as nothing (adaLN-zero), and what it asserted is a UserError.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial, partialmethod, reduce
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from tqdm import tqdm

from nanodiffusion import data as toys
from nanodiffusion import nets, noise
from nanodiffusion.compat.translate import dit_keys, mlp_keys, unet_keys
from nanodiffusion.config import TrainConfig
from nanodiffusion.denoiser import PREDICTIONS, Denoiser, expand, flow_clock, log_clock
from nanodiffusion.distributed import pick_device
from nanodiffusion.errors import UserError
from nanodiffusion.guidance import cfg, unconditional
from nanodiffusion.nets.dit import normal_
from nanodiffusion.nets.layers import timestep_embedding, zero_
from nanodiffusion.nets.unet import conv3
from nanodiffusion.sampler import ImageNoise, gradient_estimation, sample, start
from nanodiffusion.train import make_optimizer

# -- schedules -------------------------------------------------------------------------------------------------------


class Schedule:
    """A table of increasing noise levels, sigmas (n); `len` and indexing are the table's."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        noise.Schedule(sigmas)  # a UserError unless it is a table

    def __getitem__(self, i: Any) -> Tensor:
        return self.sigmas[i]

    def __len__(self) -> int:
        return len(self.sigmas)

    def sample_sigmas(self, steps: int) -> Tensor:
        """The levels to sample at, trailing spacing (Lin et al. 2023, table 2), then 0: (steps + 1)."""
        return noise.trailing(noise.Schedule(self.sigmas), steps).to(self.sigmas)

    def sample_batch(self, x0: Tensor | int) -> Tensor:
        """Levels to train at, uniform over the table: x0 (b ...), or b as before 0.5 -> (b), on x0's device."""
        batch = _batch(x0)
        return self.sigmas[torch.randint(len(self), (len(batch),))].to(batch)


def _batch(x0: Tensor | int) -> Tensor:
    return torch.empty(x0) if isinstance(x0, int) else x0


def sigmas_from_betas(betas: Tensor) -> Tensor:
    """sqrt((1 - abar) / abar), abar = prod(1 - beta): (n) -> (n)."""
    return noise.from_betas(betas).sigmas.to(betas)


class ScheduleLogLinear(Schedule):
    """Geometric from sigma_min to sigma_max."""

    def __init__(self, N: int, sigma_min: float = 0.02, sigma_max: float = 10) -> None:
        super().__init__(noise.log_linear(N, sigma_min, sigma_max).sigmas.float())


class ScheduleDDPM(Schedule):
    """Linear beta (Ho et al. 2020)."""

    def __init__(self, N: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02) -> None:
        super().__init__(noise.ddpm(N, beta_start, beta_end).sigmas.float())


class ScheduleLDM(Schedule):
    """Beta linear in its square root (Rombach et al. 2022)."""

    def __init__(self, N: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        super().__init__(noise.ldm(N, beta_start, beta_end).sigmas.float())


class ScheduleSigmoid(Schedule):
    """Sigmoid beta (Xu et al. 2022)."""

    def __init__(self, N: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02) -> None:
        super().__init__(noise.sigmoid_beta(N, beta_start, beta_end).sigmas.float())


class ScheduleCosine(Schedule):
    """Squared-cosine abar (Nichol & Dhariwal 2021); the two betas are not used, as in smalldiffusion."""

    def __init__(
        self, N: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02, max_beta: float = 0.999
    ) -> None:
        super().__init__(noise.cosine_beta(N, max_beta=max_beta).sigmas.float())


class ScheduleFlow(Schedule):
    """Flow times, uniform in [t_min, t_max]; its "sigmas" are t."""

    def __init__(self, N: int = 1000, t_min: float = 0.001, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = t_min, t_max
        super().__init__(torch.linspace(t_min, t_max, N))

    def sample_sigmas(self, steps: int) -> Tensor:
        """Even times from t_max to t_min, then 0: (steps + 1) float64, marked `flow_time`."""
        ladder = torch.zeros(steps + 1, dtype=torch.float64)
        ladder[:-1] = torch.linspace(self.t_max, self.t_min, steps, dtype=torch.float64)
        ladder.flow_time = True  # type: ignore[attr-defined]
        return ladder


class ScheduleLogNormalFlow(ScheduleFlow):
    """Flow times that training draws logit-normal (Esser et al. 2024, eq. 19), within [t_min, t_max]."""

    def sample_batch(self, x0: Tensor | int) -> Tensor:
        batch = _batch(x0)
        t = flow_clock(noise.logit_normal()(len(batch), torch.default_generator))
        return t.clamp(self.t_min, self.t_max).to(batch)


# -- training --------------------------------------------------------------------------------------------------------


def generate_train_sample(
    x0: Any, schedule: Schedule, conditional: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A batch x0 (b ...), or (x0, cond) when conditional -> x0, sigma (b 1 ... 1), eps (b ...), cond or None."""
    x0, cond = x0 if conditional else (x0, None)
    if not isinstance(x0, Tensor):
        raise UserError(
            "a batch is a tensor of data",
            expected="(x0, cond)" if conditional else "x0",
            found=type(x0).__name__,
            fix="conditional=True for (data, labels), or MappedDataset(dataset, lambda item: item[0])",
        )
    return x0, expand(schedule.sample_batch(x0), x0), torch.randn_like(x0), cond


def _check_clock(model: Any, levels: Tensor) -> None:
    if getattr(model, "flow_time", False) and float(levels.max()) > 1:
        raise UserError(
            "a PredFlow model hears flow times",
            key="schedule",
            expected="0 to 1",
            found=float(levels.max()),
            fix="ScheduleFlow, or PredV in place of PredFlow",
        )


def training_loop(
    loader: Iterable[Any],
    model: Any,
    schedule: Schedule,
    accelerator: Any = None,
    epochs: int = 10000,
    lr: float = 1e-3,
    conditional: bool = False,
) -> Iterator[SimpleNamespace]:
    """Fit the model with AdamW; yield a namespace (loss, x0, sigma, eps, cond, model, optimizer, pbar, ...) per update.

    loader: any iterable of batches that can be read once per epoch. The model moves to the accelerator's device, or
    without one to the best device there is. It yields after the update, so an average kept by the caller is current.
    Raises UserError on an empty loader, and on batches with labels unless conditional.
    """
    _check_clock(model, schedule.sigmas)
    get_loss = type(model).get_loss  # of the model itself: a wrapper around it has none
    device = pick_device() if accelerator is None else accelerator.device
    model.to(device)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], TrainConfig(lr=lr))
    if accelerator is not None:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with tqdm(range(epochs)) as pbar:
        for epoch in pbar:
            batch = None
            for batch in loader:
                if not model.training:
                    model.train()
                optimizer.zero_grad()
                x0, sigma, eps, cond = generate_train_sample(_to(device, batch), schedule, conditional)
                loss = get_loss(model, x0, sigma, eps, cond=cond)
                loss.backward() if accelerator is None else accelerator.backward(loss)
                optimizer.step()
                yield SimpleNamespace(**locals())
            if batch is None:
                raise UserError(
                    f"the loader gave no batch in epoch {epoch + 1}", fix="a DataLoader or a list of batches"
                )


def _to(device: torch.device, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tree_map(lambda part: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part, batch)


# -- sampling --------------------------------------------------------------------------------------------------------


def samples(
    model: Any,
    sigmas: Iterable[Any],
    gam: float = 1.0,
    mu: float = 0.0,
    cfg_scale: float = 0.0,
    batchsize: int = 1,
    xt: Tensor | None = None,
    cond: Tensor | None = None,
    accelerator: Any = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield x_t (b ...) after every step down the ladder sigmas (k+1); a ladder from `sample_sigmas` ends in x0.

    (gam, mu) = (1, 1/2) is DDPM, (1, 0) DDIM, (2, 0) accelerated (Permenter & Yuan 2024). cfg_scale: 0 = no guidance
    (the core's scale is 1 + cfg_scale). xt (b ...) starts from there. Noise is the model's `rand_input`, or image i has
    the seed `seed + i`, or it is drawn from `generator`. Raises UserError on a ladder that is not decreasing, mu
    outside [0, 1) or above 0 in flow time, and cond of another batch size.
    """
    ladder = torch.tensor([float(s) for s in sigmas], dtype=torch.float64)
    _check_ladder(ladder)
    _check_clock(model, ladder)
    flow_time = getattr(model, "flow_time", False) or getattr(sigmas, "flow_time", False)
    if not 0 <= mu < 1 or (mu and flow_time):
        raise UserError("no such sampler", key="mu", expected="0 in flow time, else 0 <= mu < 1", found=mu)
    n = batchsize if xt is None else len(xt)
    if cond is not None and len(cond) != n:
        raise UserError("cond needs one entry per sample", key="cond", expected=n, found=len(cond))
    draw = _noise(model, n, seed, generator)
    device = _device(model) if accelerator is None else accelerator.device
    x = start(ladder, draw())[0].to(device) if xt is None else xt
    cond = None if cond is None else cond.to(x.device)
    model.eval()
    step = partial(gradient_estimation, gam=gam, mu=mu)
    states = sample(partial(_denoise, model, x.dtype, cond, cfg_scale), x, ladder, step, lambda x: draw().to(x))
    return (state.x.to(xt.dtype if xt is not None else state.x.dtype) for state in states)


def _check_ladder(ladder: Tensor) -> None:
    # Equal neighbours are let through: smalldiffusion's own tables, sampled in as many steps as they have rows, end so.
    if len(ladder) < 2 or not bool((ladder.diff() <= 0).all()) or not bool((ladder[:-1] > 0).all()) or ladder[-1] < 0:
        raise UserError(
            "sampling needs decreasing noise levels",
            key="sigmas",
            expected="two or more, only the last may be 0",
            found=ladder.tolist()[:6],
            fix="schedule.sample_sigmas(steps)",
        )


def _denoise(model: Any, dtype: torch.dtype, cond: Tensor | None, cfg_scale: float, x: Tensor, level: Tensor) -> Tensor:
    """The model as the core's D, x - sigma * eps; the model sees the dtype of the first x, and sigma of shape ()."""
    sigma = float(level[0])
    eps = model.predict_eps_cfg(x.to(dtype), torch.full((), sigma, dtype=dtype, device=x.device), cond, cfg_scale)
    return x - sigma * eps


def _noise(model: Any, n: int, seed: int | None, generator: torch.Generator | None) -> Callable[[], Tensor]:
    if seed is not None:
        images = ImageNoise(range(seed, seed + n))
        return lambda: images.draw(*model.input_dims)
    if generator is not None:
        return lambda: torch.randn(n, *model.input_dims, generator=generator, device=generator.device)
    return lambda: model.rand_input(n)


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


# -- what a model is -------------------------------------------------------------------------------------------------

# The core's rows, for their targets; these models scale their own inputs.
_ROWS = {name: Denoiser(nn.Identity(), name) for name in ("eps", "x0", "v", "flow")}


def _loss(
    model: Any,
    prediction: str,
    x0: Tensor,
    sigma: Tensor,
    eps: Tensor,
    cond: Tensor | None = None,
    loss: Callable[[], Callable[[Tensor, Tensor], Tensor]] = nn.MSELoss,
) -> Tensor:
    """Distance between the model's output and the core's target: x0, eps (b ...), sigma () or (b 1 ... 1) -> ()."""
    out = model(x0 + sigma * eps, sigma, cond=cond)
    return loss()(out, _ROWS[prediction].target(x0, sigma, eps))


def _eps(model: Any, prediction: str, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """(x - D) / sigma for D = c_skip x + c_out F, with x's parts put together first."""
    c_skip, c_out, _ = PREDICTIONS[prediction].coefficients(sigma)
    return (1 - c_skip) / sigma * x - c_out / sigma * model(x, sigma, cond=cond)


class ModelMixin:
    """What turns a module with `input_dims` (the shape of one sample) and forward(x, sigma, cond) into a model.

    get_loss(x0, sigma, eps, cond, loss) -> () and predict_eps(x, sigma, cond) -> (b ...) may be overridden.
    """

    input_dims: tuple[int, ...]

    def rand_input(self, batchsize: int) -> Tensor:
        """Unit noise (batchsize, *input_dims), on the CPU."""
        if not hasattr(self, "input_dims"):
            raise UserError(
                "the model needs the shape of a sample", key="input_dims", fix="self.input_dims = (c, h, w)"
            )
        return torch.randn(batchsize, *self.input_dims)

    get_loss = partialmethod(_loss, "eps")

    def predict_eps(self: Any, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self(x, sigma, cond=cond)

    def predict_eps_cfg(self: Any, x: Tensor, sigma: Tensor, cond: Tensor | None, cfg_scale: float) -> Tensor:
        """eps_c + cfg_scale (eps_c - eps_u), 0 meaning no guidance; the null class is `self.cond_embed.null_cond`."""
        if cond is None or cfg_scale == 0:
            return self.predict_eps(x, sigma, cond=cond)
        null = getattr(getattr(self, "cond_embed", None), "null_cond", None)
        if null is None:
            raise UserError("guidance needs a null class", key="cond_embed", fix="a cond_embed with null_cond")
        # eps is affine in D at one level, so the core's guidance serves it as it is; the level asked for plays no part.
        twice = sigma if sigma.ndim == 0 else torch.cat([sigma, sigma])
        predict = lambda x, _, c: self.predict_eps(x, twice, cond=c["label"])
        c = {"label": cond}
        return cfg(predict, c, unconditional(c, null), 1 + cfg_scale)(x, torch.ones(len(x)))


# -- modifiers of model classes --------------------------------------------------------------------------------------


class _Modified:
    """Pickles an instance as (its first class, the modifiers): a class that a call has made has no name to import."""

    _recipe: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_recipe" not in vars(type(self)):  # a subclass, which has a name
            return super().__reduce_ex__(protocol)
        return _instance, self._recipe, self.__getstate__()


@cache
def _modify(cls: type, modifier: type) -> type:
    recipe = (*vars(cls).get("_recipe", (cls,)), modifier)
    name = cls.__name__ + modifier.__name__.removeprefix("_")
    return type(name, (modifier, cls), {"_recipe": recipe, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _instance(cls: type, *modifiers: type) -> Any:
    modified: Any = reduce(_modify, modifiers, cls)
    return modified.__new__(modified)


class _Scaled(_Modified):
    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        c_in = PREDICTIONS["eps"].coefficients(sigma)[2]
        return super().forward(c_in * x, sigma, cond=cond)  # type: ignore[misc]


class _PredX0(_Modified):
    get_loss, predict_eps = partialmethod(_loss, "x0"), partialmethod(_eps, "x0")


class _PredV(_Modified):
    get_loss, predict_eps = partialmethod(_loss, "v"), partialmethod(_eps, "v")


class _PredFlow(_Modified):
    flow_time = True

    def get_loss(
        self: Any,
        x0: Tensor,
        sigma: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        loss: Callable[[], Callable[[Tensor, Tensor], Tensor]] = nn.MSELoss,
    ) -> Tensor:
        level = noise.flow_sigma(sigma)
        c_in = PREDICTIONS["flow"].coefficients(level)[2]
        out = self(c_in * (x0 + level * eps), sigma, cond=cond)
        return loss()(out, _ROWS["flow"].target(x0, level, eps))

    def predict_eps(self: Any, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        dtype = next(self.parameters()).dtype
        return self(x.to(dtype), sigma.to(dtype), cond=cond).to(x.dtype)


def Scaled(cls: type) -> Any:
    """The model class with its input scaled to unit variance, x / sqrt(1 + sigma^2)."""
    return _modify(cls, _Scaled)


def PredX0(cls: type) -> Any:
    """The model class predicting x0."""
    return _modify(cls, _PredX0)


def PredV(cls: type) -> Any:
    """The model class predicting v (Salimans & Ho 2022)."""
    return _modify(cls, _PredV)


def PredFlow(cls: type) -> Any:
    """The model class predicting eps - x0, its `sigma` being the flow time; `predict_eps` gives eps - x0 as well."""
    return _modify(cls, _PredFlow)


# -- embedders -------------------------------------------------------------------------------------------------------


def get_sigma_embeds(batches: int, sigma: Tensor, scaling_factor: float = 0.5, log_scale: bool = True) -> Tensor:
    """(sin, cos) of scaling_factor * ln(sigma), or of scaling_factor * sigma: sigma () or (b) -> (b 2)."""
    level = _levels(sigma, batches)
    return timestep_embedding((level.log() if log_scale else level) * scaling_factor, 2).flip(1)


class SigmaEmbedderSinCos(nn.Module):
    """`get_sigma_embeds` through a two-layer MLP: batches, sigma () or (b) -> (b d)."""

    def __init__(self, hidden_size: int, scaling_factor: float = 0.5, log_scale: bool = True) -> None:
        super().__init__()
        self.scaling_factor, self.log_scale = scaling_factor, log_scale
        self.mlp = nn.Sequential(nn.Linear(2, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, batches: int, sigma: Tensor) -> Tensor:
        return self.mlp(
            get_sigma_embeds(batches, sigma, self.scaling_factor, self.log_scale).to(next(self.parameters()))
        )


class TimestepEmbedder(nn.Module):
    """256 sinusoids of 1000 t through a three-layer MLP, for flow times: batches, t () or (b) -> (b d)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        gelu = partial(nn.GELU, approximate="tanh")
        last = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.Linear(256, 1024), gelu(), nn.Linear(1024, hidden_size), gelu(), last)

    def forward(self, batches: int, sigma: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(_levels(sigma, batches) * 1000, 256).to(next(self.parameters())))


class CondEmbedderLabel(nn.Module):
    """Class vectors with a null class, `null_cond` = num_classes, by which training replaces labels: (b) -> (b d)."""

    def __init__(self, hidden_size: int, num_classes: int, dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(num_classes + 1, hidden_size)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.null_cond, self.dropout_prob = num_classes, dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        if self.training:
            keep = torch.rand(len(labels), device=labels.device) >= self.dropout_prob
            labels = torch.where(keep, labels, self.null_cond)
        return self.mlp(self.embeddings(labels))


def _levels(sigma: Tensor, b: int) -> Tensor:
    """() or (b 1 ... 1) -> (b)."""
    if sigma.numel() not in (1, b):
        raise UserError("sigma needs one value, or one per sample", key="sigma", expected=b, found=tuple(sigma.shape))
    return sigma.reshape(-1).expand(b)


class _Clock(nn.Module):
    """An embedder of sigma in the place of a core net's embedder of its clock, which then is sigma itself."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, sigma: Tensor) -> Tensor:
        return self.embed(len(sigma), sigma)


# -- models ----------------------------------------------------------------------------------------------------------


class _OnCore(nn.Module, ModelMixin):
    """A model whose work a net of the core does, `core`. It loads smalldiffusion's state dicts as well as its own."""

    core: Any
    _translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    _EMBEDDERS = ("sig_embed.", "cond_embed.")

    @property
    def sig_embed(self) -> Any:
        return self.core.t_embedder.embed

    @property
    def cond_embed(self) -> Any:
        return self.core.y_embedder

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.core.y_embedder is not None and (cond is None or len(cond) != len(x)):
            found = None if cond is None else tuple(cond.shape)
            raise UserError(
                "the model is conditional", key="cond", expected=f"one entry per sample, {len(x)}", found=found
            )
        return self.core(x, self._clock(_levels(sigma, len(x))), cond)

    def _clock(self, sigma: Tensor) -> Tensor:
        return sigma

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load its own state dict or one of smalldiffusion's same model."""
        if not any(key.startswith("core.") for key in state_dict):
            state_dict = self._from_smalldiffusion(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _from_smalldiffusion(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        at = dict(zip(self._EMBEDDERS, ("core.t_embedder.embed.", "core.y_embedder.")))
        net = {key: value for key, value in state.items() if not key.startswith(self._EMBEDDERS)}
        own = {f"core.{key}": value for key, value in type(self)._translate(net).items()}
        for old, new in at.items():
            own |= {new + key.removeprefix(old): value for key, value in state.items() if key.startswith(old)}
        return own


class TimeInputMLP(_OnCore):
    """The core's MLP told (sin, cos) of ln(sigma)/2: x (b dim), sigma () or (b 1) -> (b output_dim or dim)."""

    sigma_dim = 2
    _translate = staticmethod(mlp_keys)

    def __init__(
        self, dim: int = 2, output_dim: int | None = None, hidden_dims: Sequence[int] = (16, 128, 256, 128, 16)
    ) -> None:
        super().__init__()
        self.core = nets.MLP(nets.MLPConfig(dim, tuple(hidden_dims)))
        if output_dim not in (None, dim):
            self.core.layers[-1] = nn.Linear(hidden_dims[-1], output_dim)
        self.input_dims = (dim,)

    @property
    def net(self) -> nn.Sequential:
        """The layers, which subclasses call on [x, get_sigma_embeds, ...]."""
        return self.core.layers

    def _clock(self, sigma: Tensor) -> Tensor:
        return log_clock(sigma)


class ConditionalMLP(TimeInputMLP):
    """TimeInputMLP told the class too: x (b dim), sigma () or (b 1), cond (b) int64 -> (b dim)."""

    def __init__(
        self,
        dim: int = 2,
        hidden_dims: Sequence[int] = (16, 128, 256, 128, 16),
        cond_dim: int = 4,
        num_classes: int = 10,
        dropout_prob: float = 0.1,
    ) -> None:
        super().__init__(dim, hidden_dims=hidden_dims)
        self.core = nets.MLP(nets.MLPConfig(dim, tuple(hidden_dims), num_classes, cond_dim))
        self.core.y_embedder = CondEmbedderLabel(cond_dim, num_classes, dropout_prob)


class IdealDenoiser(nn.Module, ModelMixin):
    """eps = (x - E[x0 | x]) / sigma of a data set, exactly: x (b ...), sigma () or (b 1 ... 1) -> (b ...)."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.core = nets.IdealDenoiser(torch.stack([dataset[i] for i in range(len(dataset))]))
        self.input_dims = self.core.sample_shape

    @property
    def data(self) -> Tensor:
        """The data set (n ...)."""
        return self.core.data

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        level = _levels(sigma, len(x))
        return (x - self.core(x, level)) / expand(level, x)


class DiT(_OnCore):
    """The core's diffusion transformer: x (b c h w), sigma () or (b 1 1 1), cond (b ...) -> (b c h w).

    sig_embed(b, sigma (b)) -> (b d) and cond_embed(cond) -> (b d), of d = head_dim * num_heads, replace its embedders.
    """

    _translate = staticmethod(dit_keys)

    def __init__(
        self,
        in_dim: int = 32,
        channels: int = 3,
        patch_size: int = 2,
        depth: int = 12,
        head_dim: int = 64,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        sig_embed: nn.Module | None = None,
        cond_embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        dim = head_dim * num_heads
        self.core = nets.DiT(nets.DiTConfig(in_dim, channels, patch_size, dim, depth, num_heads, mlp_ratio))
        self.input_dims = self.core.sample_shape
        if sig_embed is None:
            normal_(sig_embed := SigmaEmbedderSinCos(dim))
        self.core.t_embedder, self.core.y_embedder = _Clock(sig_embed), cond_embed


class Unet(_OnCore):
    """The core's pixel U-Net: x (b in_ch h w), sigma () or (b 1 1 1), cond (b ...) -> (b out_ch h w).

    sig_embed(b, sigma (b)) -> (b d) and cond_embed(cond) -> (b d), of d = ch * embed_ch_mult, replace its embedders.
    resamp_with_conv is not used, as in smalldiffusion.
    """

    _translate = staticmethod(unet_keys)

    def __init__(
        self,
        in_dim: int,
        in_ch: int,
        out_ch: int,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        embed_ch_mult: int = 4,
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        resamp_with_conv: bool = True,
        sig_embed: nn.Module | None = None,
        cond_embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        size, attention = (in_dim, in_ch, ch, tuple(ch_mult), num_res_blocks), tuple(attn_resolutions)
        self.core = nets.UNet(nets.UNetConfig(*size, attention=attention, dropout=dropout))
        self.input_dims, self.temb_ch = self.core.sample_shape, ch * embed_ch_mult
        if embed_ch_mult != 4:
            for block in (*self.core.down, *self.core.mid, *self.core.up):
                if hasattr(block, "res"):
                    block.res.emb = nn.Linear(self.temb_ch, block.res.emb.out_features)
        if out_ch != in_ch:
            self.core.conv_out = conv3(self.core.config.widths[0], out_ch)
            zero_(self.core.conv_out)
        self.core.t_embedder = _Clock(sig_embed or SigmaEmbedderSinCos(self.temb_ch))
        self.core.y_embedder = cond_embed


# -- data ------------------------------------------------------------------------------------------------------------


class MappedDataset(Dataset):
    """A data set seen through a function, for instance to drop its labels."""

    def __init__(self, dataset: Any, fn: Callable[[Any], Any]) -> None:
        self.dataset, self.fn = dataset, fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return self.fn(self.dataset[i])


class Swissroll(Dataset):
    """N points (2) of a spiral, t from tmin to tmin + tmax; all of them are `vals` (N 2)."""

    def __init__(
        self, tmin: float, tmax: float, N: int, center: tuple[float, float] = (0, 0), scale: float = 1.0
    ) -> None:
        self.vals = toys.swiss_roll(N, tmin, tmax, center, scale).x

    def __len__(self) -> int:
        return len(self.vals)

    def __getitem__(self, i: int) -> Tensor:
        return self.vals[i]

    def __getitems__(self, index: Sequence[int]) -> list[Tensor]:
        """What a DataLoader asks for, many at once."""
        return list(self.vals[index].unbind())


class DatasaurusDozen(Dataset):
    """A shape of the Datasaurus Dozen, (p - offset) / scale, `enlarge_factor` times over; UserError on another name."""

    def __init__(
        self,
        csv_file: str,
        dataset: str,
        enlarge_factor: int = 15,
        delimiter: str = "\t",
        scale: float = 50,
        offset: float = 50,
    ) -> None:
        if delimiter != "\t":
            raise UserError("the table's columns are separated by tabs", key="delimiter", found=repr(delimiter))
        plain = toys.datasaurus(csv_file, dataset, repeat=1).x  # (p - 50) / 50
        self.points, self.enlarge_factor = list(((plain * 50 + 50) - offset) / scale), enlarge_factor

    def __len__(self) -> int:
        return len(self.points) * self.enlarge_factor

    def __getitem__(self, i: int) -> Tensor:
        return self.points[i % len(self.points)]


class TreeDataset(Dataset):
    """Points on a tree with its leaves on the unit circle, as (point (2), the leaf's number)."""

    def __init__(self, branching_factor: int = 4, depth: int = 3, num_samples_per_path: int = 30) -> None:
        tree = toys.tree(branching_factor, depth, num_samples_per_path)
        assert tree.labels is not None
        self.data = list(zip(tree.x, tree.labels.tolist()))
        self.total_leaves = len(tree.classes)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.data[i]


def img_train_transform(image: Any) -> Tensor:
    """A PIL image or bytes (h w) or (h w c) -> (c h w) in [-1, 1], mirrored half of the time."""
    pixels = np.array(image)  # a copy, which torch may write to
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise UserError("this is no image", expected="uint8 (h w) or (h w c)", found=f"{pixels.dtype} {pixels.shape}")
    x = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).movedim(2, 0).float().div_(127.5).sub_(1)
    return x.flip(2) if torch.rand(()) < 0.5 else x


def img_normalize(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped."""
    return ((x + 1) / 2).clamp(0, 1)
