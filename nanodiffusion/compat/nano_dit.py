"""nano256's nano-diffusion (the class-conditional latent transformer) on this core; change the import lines only.

    from diffusion.modules import DiTBlock               ->  from nanodiffusion.compat.nano_dit import DiTBlock
    from diffusion.noise_schedulers import ...           ->  from nanodiffusion.compat.nano_dit import ...

and so with its model, samplers, trainer, ema and utils. A model is called as model(x, timestep, context) with
x = sqrt(gamma) b x0 + sqrt(1 - gamma) eps and timestep = 0..num_timesteps, and returns eps.

Where that system has a defect, this follows the core: the attention's gate works; a sampler starts from the last timestep
that the core's `draw.bounded` allows, not always from gamma = 1e-9, whence the first step multiplied the model's error by
up to 4,472, and does not ask the model at t = 0; the input scale b is undone; sampling builds no graph; the sampler of
validation knows its own number of timesteps, and `fixed_validation_noise` works; a compiled model is saved under its own
names; checkpoints are safetensors, and the loss of validation is always measured with the same noise.
"""

import copy
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_type_hints

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanodiffusion import checkpoint, noise, sampler
from nanodiffusion.compat import codecs
from nanodiffusion.config import check_options
from nanodiffusion.denoiser import DISTANCES, PREDICTIONS, Denoiser, Prediction, expand
from nanodiffusion.distributed import pick_device
from nanodiffusion.draw import bounded
from nanodiffusion.ema import EMA
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.guidance import bind
from nanodiffusion.nets import pixart
from nanodiffusion.nets.layers import check_multiple, pair
from nanodiffusion.nets.pixart import PixArtConfig, interleaved, position_embedding
from nanodiffusion.show import save_png, to_uint8
from nanodiffusion.tensors import load_weights, pack_state, unpack_state
from nanodiffusion.tracking import Metrics

NAMES = {  # options of the model, here and there
    "patch_size": "patch",
    "hidden_dim": "dim",
    "num_attention_heads": "heads",
    "num_dit_blocks": "depth",
    "num_context_classes": "num_classes",
    "in_channels": "channels_in",
}

# -- noise schedulers --------------------------------------------------------------------------------------------------


class _NoiseScheduler(nn.Module):
    """gamma(t) falling from 1 to `clip_min` for t in [0, 1]; options by a mapping (`type` is not used) or by keyword.

    The first argument may be the number of timesteps alone. UserError: an option there is not, no timesteps.
    """

    DEFAULT_CONFIG: ClassVar[dict[str, float]] = {"clip_min": 1e-9, "scale_factor": 1.0}

    def __init__(self, config: Mapping[str, Any] | int | None = None, **options: Any) -> None:
        super().__init__()
        given = {"num_timesteps": config} if isinstance(config, int) else get_kwargs(config or {})
        given |= options
        check_options(given, {"num_timesteps": int, **dict.fromkeys(self.DEFAULT_CONFIG, float)}, "noise_scheduler")
        if given.get("num_timesteps", 0) < 1:
            found = given.get("num_timesteps", "nothing")
            raise UserError("must be at least 1", key="noise_scheduler.num_timesteps", found=found)
        self.config = SimpleNamespace(**{**self.DEFAULT_CONFIG, **given})

    def __getattr__(self, name: str) -> Any:
        config = vars(self).get("config")  # options are attributes too, as they were in its first versions
        return getattr(config, name) if config and hasattr(config, name) else super().__getattr__(name)

    def _curve(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def gamma_func(self, timesteps: Tensor) -> Tensor:
        """gamma of normalised times: (...) in [0, 1] -> (...) (Chen 2023)."""
        t = timesteps.double() if timesteps.device.type != "mps" else timesteps.float()
        return self._curve(t).clamp(self.config.clip_min, 1.0).to(torch.promote_types(timesteps.dtype, torch.float32))

    def sigma(self, timesteps: Tensor) -> Tensor:
        """The core's level of x0 + sigma eps at timesteps 0..num_timesteps: (...) -> (...) float64 on the CPU."""
        gamma = self.gamma_func(timesteps.cpu().double() / self.config.num_timesteps)
        return ((1 - gamma) / gamma).sqrt() / self.config.scale_factor

    def prediction(self) -> Prediction:
        """eps, from an input sqrt(gamma) b (x0 + sigma eps): b / sqrt(1 + (b sigma)^2) is what scales it."""
        b = self.config.scale_factor
        return Prediction("eps", lambda s: (torch.ones_like(s), -s, b * ((b * s) ** 2 + 1).rsqrt()))

    def forward(
        self, x: Tensor, timesteps: Tensor, noise: Tensor | None = None, return_noise: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The noisy sample, with its noise on request: x (b ...), timesteps (b), noise (b ...) -> (b ...)."""
        gamma = expand(self.gamma_func(timesteps.to(x.device).float() / self.config.num_timesteps), x)
        noise = torch.randn_like(x) if noise is None else noise
        noisy = gamma.sqrt() * self.config.scale_factor * x + (1 - gamma).sqrt() * noise
        return (noisy, noise) if return_noise else noisy


class LinearNoiseScheduler(_NoiseScheduler):
    """gamma = 1 - t."""

    def _curve(self, t: Tensor) -> Tensor:
        return 1 - t


class CosineNoiseScheduler(_NoiseScheduler):
    """gamma from cos(u pi/2)^(2 tau), u from start to end."""

    DEFAULT_CONFIG: ClassVar = {**_NoiseScheduler.DEFAULT_CONFIG, "start": 0.2, "end": 1.0, "tau": 2.0}

    def _curve(self, t: Tensor) -> Tensor:
        c = self.config
        return noise.cosine_curve(t, c.start, c.end, c.tau)


class SigmoidNoiseScheduler(_NoiseScheduler):
    """gamma from sigmoid(u / tau), u from start to end."""

    DEFAULT_CONFIG: ClassVar = {**_NoiseScheduler.DEFAULT_CONFIG, "start": 0.0, "end": 3.0, "tau": 0.7}

    def _curve(self, t: Tensor) -> Tensor:
        c = self.config
        return noise.sigmoid_curve(t, c.start, c.end, c.tau)


# -- the model ---------------------------------------------------------------------------------------------------------


def _pixart(config: Any, **more: Any) -> PixArtConfig:
    """The core's config of that system's options; those of other parts (device, vae_name, ...) are not used."""
    given = get_kwargs(config) | more
    names = {**NAMES, "activation": "activation", "normalization_layer": "norm", "dropout": "dropout"}
    options = {names[key]: value for key, value in given.items() if key in names and value is not None}
    check_options(options, get_type_hints(PixArtConfig), "model")
    words = {"activation": str.lower, "norm": lambda name: name.removesuffix("Norm").lower()}
    options |= {key: change(options[key]) for key, change in words.items() if key in options}
    return PixArtConfig(**{"in_size": 2 * options.get("patch", 2), "time_scale": 1.0, **options})


class PatchEmbedding(nn.Module):
    """Patches as tokens that know their place: x (b c h w) -> (b n d). UserError: the patches do not divide x."""

    def __init__(self, patch_size: int, hidden_dim: int, in_channels: int, device: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.patch_size, self.hidden_dim, self.in_channels = patch_size, hidden_dim, in_channels
        self.lin_projection = nn.Linear(in_channels * patch_size**2, hidden_dim, device=device)

    def patchify(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (b n (c p p)) row by row, and their columns and rows (n) each."""
        rows, columns = _grid(x, self.patch_size)
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)
        row, column = torch.meshgrid(*(torch.arange(n, device=x.device) for n in (rows, columns)), indexing="ij")
        return patches, column.flatten(), row.flatten()

    def forward(self, x: Tensor, patch_pos: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        patches, x_pos, y_pos = self.patchify(x)
        place = position_embedding(_grid(x, self.patch_size), self.hidden_dim)
        tokens = self.lin_projection(patches) + place.to(x)
        return (tokens, x_pos, y_pos) if patch_pos else tokens


def _grid(x: Tensor, patch: int) -> tuple[int, int]:
    for key, side in zip(("height", "width"), x.shape[2:]):
        check_multiple(key, side, patch, "the sample is cut into patches")
    return x.shape[2] // patch, x.shape[3] // patch


class TimeEmbedding(nn.Module):
    """Timesteps as interleaved sines and cosines: () or (b) -> (b d)."""

    def __init__(self, num_timesteps: int, hidden_dim: int, device: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.num_timesteps, self.hidden_dim = num_timesteps, hidden_dim

    def forward(self, timesteps: Tensor) -> Tensor:
        return interleaved(timesteps.reshape(-1).float(), self.hidden_dim // 2).flatten(1)


class AdaLNSingle(pixart.AdaLNSingle):
    """Modulation of all blocks by one layer: time_emb (b d) -> (b 6d), to which each block adds its own; at first zero."""

    def __init__(self, hidden_dim: int, num_dit_blocks: int, device: Any = None, **kwargs: Any) -> None:
        super().__init__(hidden_dim, num_dit_blocks)
        self.to(device)

    def forward(self, time_emb: Tensor) -> Tensor:
        return self.time_mlp(F.silu(time_emb))

    def get_layer_params(self, global_params: Tensor, layer_idx: int) -> tuple[Tensor, ...]:
        """A block's shifts, scales (about 1) and gates of attention and feedforward: (b 6d) -> 6 x (b d)."""
        return (global_params + self.layer_embeddings[layer_idx]).chunk(6, dim=-1)


class DiTBlock(pixart.PixArtBlock):
    """Attention over tokens and context, and feedforward, modulated and gated; at first the identity.

    adaln_single is shared by the blocks, and no part of their state dicts.
    """

    def __init__(
        self,
        layer_idx: int,
        adaln_single: AdaLNSingle,
        hidden_dim: int,
        num_attention_heads: int,
        activation: str = "SiLU",
        normalization_layer: str = "LayerNorm",
        dropout: float = 0.0,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        size = {"hidden_dim": hidden_dim, "num_attention_heads": num_attention_heads}
        rest = {"activation": activation, "normalization_layer": normalization_layer, "dropout": dropout}
        super().__init__(_pixart(size, **rest))
        self.layer_idx, self._shared = layer_idx, (adaln_single,)
        self.to(device)

    def forward(self, x: Tensor, global_adaln_params: Tensor, c: Tensor | None = None) -> Tensor:
        """x (b n d), global_adaln_params (b 6d), c (b m d) or (b d) or None -> (b n d)."""
        six = torch.stack(self._shared[0].get_layer_params(global_adaln_params, self.layer_idx), dim=1)
        return super().forward(x, six, c[:, None] if c is not None and c.ndim == 2 else c)


class Reshaper(pixart.Reshaper):
    """Tokens to the pixels of their patches: x (b n d), the tokens' columns and rows (n) -> (b c h w); at first zero."""

    def __init__(
        self,
        patch_size: int,
        hidden_dim: int,
        in_channels: int,
        normalization_layer: str = "LayerNorm",
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        size = {"patch_size": patch_size, "hidden_dim": hidden_dim, "in_channels": in_channels}
        super().__init__(_pixart(size, normalization_layer=normalization_layer, num_attention_heads=1))
        self.to(device)

    def forward(self, x: Tensor, x_pos: Tensor, y_pos: Tensor) -> Tensor:
        self.grid = int(y_pos.max()) + 1, int(x_pos.max()) + 1
        return super().forward(x)


class NanoDiffusionModel(pixart.PixArt):
    """The core's PixArt: x (b c h w) of any size that the patches divide, timestep () or (b), context (b) int64 -> (b c h w).

    Context num_context_classes is the class that stands for none. UserError: no classes, an option of another type, or
    the state dict of that system's own training, whose arithmetic is another.
    """

    def __init__(self, config: Any) -> None:
        given = get_kwargs(config)
        if not given.get("num_context_classes"):
            raise UserError("the model is class-conditional", key="num_context_classes", found="none")
        super().__init__(_pixart(given))
        self.to(given.get("device"))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        if x.ndim == 4 and tuple(x.shape[2:]) != pair(self.config.in_size):
            self._resize(_grid(x, self.config.patch), (x.shape[2], x.shape[3]))
        return super().forward(x, torch.as_tensor(timestep, device=x.device).reshape(-1).expand(len(x)), context)

    def _resize(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        """Places for another number of tokens: no weight depends on it."""
        self.config = replace(self.config, in_size=size)
        self.sample_shape = (self.config.channels_in, *size)
        old = self.patch_embedding.position
        self.patch_embedding.position = position_embedding(grid, self.config.dim).to(old)
        self.reshaper.grid = grid

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load this model's own weights."""
        if "time_embedding.omega" in state_dict:
            found = "weights of a model whose attention had no gate and whose modulation passed a SiLU"
            raise UserError("these weights would draw something else here", found=found, fix="train them anew")
        return super().load_state_dict(state_dict, strict, assign)


# -- sampling ----------------------------------------------------------------------------------------------------------


class _Told(nn.Module):
    """A model of that system as a core net: it hears whole timesteps, and its label is called context."""

    takes = ("label",)

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.model(x, t.round().long(), label)


class DDIMSampler:
    """DDIM (Song et al. 2021, eta = 0) over `num_sampling_steps` timesteps, evenly from num_timesteps to 0.

    The first is the last whole one that the core's `bounded` allows. UserError: fewer than two steps.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        noise_scheduler: _NoiseScheduler,
        num_timesteps: int,
        num_sampling_steps: int,
        **kwargs: Any,
    ) -> None:
        if num_sampling_steps < 2 or num_timesteps < 2:
            raise UserError("a sampler goes from noise to data", expected="two steps or more", found=num_sampling_steps)
        self.model, self.noise_scheduler = model, noise_scheduler
        self.num_timesteps, self.num_sampling_steps = num_timesteps, num_sampling_steps

    def timesteps(self) -> Tensor:
        """The timesteps visited, falling to 0: (<= num_sampling_steps) int64."""
        even = torch.linspace(self.num_timesteps, 0, self.num_sampling_steps).round().long().unique().flip(0)
        scaled = lambda times: self._sigma(times) * self.noise_scheduler.config.scale_factor
        highest = bounded(scaled(even), PREDICTIONS["eps"])[0]
        every = torch.arange(1, self.num_timesteps + 1)
        return even.clamp(max=int((scaled(every) <= highest).sum().clamp(min=1))).unique().flip(0)

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return self.noise_scheduler.sigma(timesteps * (self.noise_scheduler.config.num_timesteps / self.num_timesteps))

    def step(self, x_t: Tensor, eps: Tensor, gamma_t: Tensor) -> Tensor:
        """The clean sample that eps says: x_t, eps (b ...), gamma_t () or (b 1 ... 1) -> (b ...), times the input scale."""
        return (x_t - (1 - gamma_t).sqrt() * eps) / gamma_t.sqrt()

    def sample(self, x_T: Tensor, context: Tensor, return_intermediates: bool = False, seed: int | None = None) -> Any:
        """x0 from unit noise: x_T (b ...), context (b) -> (b ...), and on request the noisy sample after every step.

        seed is not used: nothing is drawn. UserError: another number of classes than of samples.
        """
        if len(context) != len(x_T):
            raise UserError("context needs one class per sample", key="context", expected=len(x_T), found=len(context))
        times = self.timesteps()
        ladder = self._sigma(times)
        row = self.noise_scheduler.prediction()
        rising, behind = ladder.flip(0), times.flip(0)
        clock = lambda s: behind[torch.searchsorted(rising, s.cpu()).clamp(max=len(rising) - 1)]
        D = bind(Denoiser(_Told(self.model), row, clock), {"label": context.to(x_T.device)})
        scale = lambda s: float(row.coefficients(torch.tensor(s, dtype=torch.float64))[2])
        states = sampler.sample(D, x_T / scale(float(ladder[0])), ladder, sampler.euler)
        noisy = [state.x * (scale(state.sigma_next) if state.sigma_next else 1.0) for state in states]
        return (noisy[-1], noisy) if return_intermediates else noisy[-1]


# -- training ----------------------------------------------------------------------------------------------------------


class EMAModel:
    """An average of a model's weights whose decay rises linearly from 0 to `decay` over the first warmup_steps updates."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup_steps: int = 1000) -> None:
        if not 0 <= decay < 1 or warmup_steps < 0:
            raise UserError("no such average", key="ema_model", expected="0 <= decay < 1", found=f"{decay}")
        self.decay, self.warmup_steps, self.step = decay, warmup_steps, 0
        self._average = EMA(model, self._effective_decay)
        self._copy = copy.deepcopy(model).eval().requires_grad_(False)

    def _effective_decay(self, step: int) -> float:
        return self.decay * min(1.0, (step - 1) / self.warmup_steps) if self.warmup_steps else self.decay

    @property
    def model(self) -> nn.Module:
        """A copy of the model with the averaged weights."""
        self._average.copy_to(self._copy)
        return self._copy

    def update(self, model: nn.Module | None = None) -> None:
        """Take in the weights of the model that this averages, as they are now."""
        self.step += 1
        self._average.update(self.step)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights by name, and the number of updates."""
        return {"ema_model": dict(self._average.tensors), "step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. UserError: it belongs to another model."""
        self._average.load(state_dict["ema_model"])
        self.step = int(state_dict["step"])


class NanoDiffusionTrainer:
    """Fits a model to batches of (latents, context); its arguments are those of that system's trainer.

    Numbers go to checkpoint_dir/metrics.jsonl, pictures of `validation_context` to checkpoint_dir/samples where there is a
    `vae`, checkpoints to checkpoint_dir/checkpoint (step-* every save_every_n_epochs and at the end, and best).
    patience: validations without improvement before training stops. Of these three numbers 0 is for never. UserError: no
    such loss, an empty loader, a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        noise_scheduler: _NoiseScheduler,
        checkpoint_dir: str | Path = "checkpoints",
        num_sampling_steps: int = 50,
        loss_fn: str = "mse_loss",
        validation_interval: int = 10,
        save_every_n_epochs: int = 10,
        keep_n_checkpoints: int = 3,
        vae: Any = None,
        validation_context: Sequence[int] | None = None,
        fixed_validation_noise: bool = False,
        ema_model: EMAModel | None = None,
        patience: int = 0,
    ) -> None:
        self.model, self.noise_scheduler, self.vae, self.ema_model = model, noise_scheduler, vae, ema_model
        self.checkpoint_dir, self.num_sampling_steps = Path(checkpoint_dir), num_sampling_steps
        self.loss_fn = lookup({f"{name}_loss": name for name in DISTANCES}, loss_fn, "loss_fn")
        self.validation_interval, self.save_every_n_epochs = validation_interval, save_every_n_epochs
        self.keep_n_checkpoints, self.patience = keep_n_checkpoints, patience
        self.validation_context = None if validation_context is None else torch.tensor(validation_context)
        self.fixed_validation_noise = fixed_validation_noise
        self.best_val_loss, self.epoch, self.waited = float("inf"), 0, 0
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)

    def compute_loss(self, batch: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Distance between the model's eps and the true one at random timesteps: (x0 (b ...), context (b ...)) -> ()."""
        return self._loss(self.model, batch, generator)

    def _loss(self, model: nn.Module, batch: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        x0, context = batch
        x0, steps = x0.float(), self.noise_scheduler.config.num_timesteps
        t = torch.randint(0, steps + 1, (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        sigma = self.noise_scheduler.sigma(t).clamp(min=1e-6).to(x0)  # at 0 the target of eps would be 0/0
        told = Denoiser(_Told(model), self.noise_scheduler.prediction(), lambda s: t.to(x0.device))
        loss = told.loss(x0, sigma, eps, {"label": context}, self.loss_fn).mean()
        if not bool(loss.isfinite()):
            raise UserError("the loss is not finite", found=loss.item(), fix="a lower learning rate")
        return loss

    def train(
        self,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        train_dataloader: Iterable[Any],
        val_dataloader: Iterable[Any] | None = None,
        aim_run: Any = None,
        experiment_name: str | None = None,
    ) -> None:
        """Train to epoch `epochs` (counted from the checkpoint that was loaded). aim_run, experiment_name: not used."""
        metrics = Metrics(self.checkpoint_dir / "metrics.jsonl", self.epoch - 1)
        while self.epoch < epochs:
            losses = [self._update(batch, optimizer, lr_scheduler) for batch in train_dataloader]
            if not losses:
                raise UserError(
                    "the loader gave no batch", key="train_dataloader", fix="a DataLoader, a list of batches"
                )
            loss = torch.stack(losses).mean().item()
            row = {"step": self.epoch, "loss_train": loss, "learning_rate": optimizer.param_groups[0]["lr"]}
            due = self._is_due(self.validation_interval)
            if due and val_dataloader is not None:
                row |= self._validate(val_dataloader)
            metrics(row)
            if due:
                self._pictures(train_dataloader)
            self._save_if_due(row, epochs, optimizer, lr_scheduler)
            self.epoch += 1
            if self.patience and self.waited >= self.patience:
                break
        metrics.close()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.epoch % every == 0

    def _update(self, batch: Sequence[Tensor], optimizer: torch.optim.Optimizer, lr_scheduler: Any) -> Tensor:
        self.model.train()
        optimizer.zero_grad()
        loss = self.compute_loss(batch)
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        if self.ema_model is not None:
            self.ema_model.update(self.model)
        return loss.detach()

    @torch.no_grad()
    def _validate(self, loader: Iterable[Any]) -> dict[str, float]:
        """loss_val of the weights and loss_val_ema of their average."""
        models = {"loss_val": self.model} | ({"loss_val_ema": self.ema_model.model} if self.ema_model else {})
        row = {}
        for name, model in models.items():
            model.eval()
            g = torch.Generator().manual_seed(0)
            losses = [self._loss(model, batch, g) for batch in loader]
            if not losses:
                raise UserError("the loader gave no batch", key="val_dataloader", fix="val_dataloader=None for none")
            row[name] = torch.stack(losses).mean().item()
        return row

    def _pictures(self, loader: Iterable[Any]) -> None:
        if self.validation_context is None or self.vae is None:
            return
        shape, steps = next(iter(loader))[0].shape[1:], self.noise_scheduler.config.num_timesteps
        seed = 0 if self.fixed_validation_noise else self.epoch
        x = torch.randn(len(self.validation_context), *shape, generator=torch.Generator().manual_seed(seed))
        models = {"": self.model} | ({"_ema": self.ema_model.model} if self.ema_model else {})
        for name, model in models.items():
            model.eval()
            draw = DDIMSampler(model, self.noise_scheduler, steps, self.num_sampling_steps)
            where = next(model.parameters(), x).device
            x0 = draw.sample(x.to(where), self.validation_context.to(where))
            for image, c in zip(decode_latents(x0, self.vae), self.validation_context.tolist()):
                save_png(image, self.checkpoint_dir / f"samples/epoch_{self.epoch:04d}_class_{c}{name}.png")

    def _save_if_due(self, row: Mapping[str, Any], epochs: int, optimizer: Any, lr_scheduler: Any) -> None:
        loss = row.get("loss_val_ema", row.get("loss_val"))
        if loss is not None:
            self.waited = 0 if loss < self.best_val_loss else self.waited + 1
            if loss < self.best_val_loss:
                self.best_val_loss = loss
                self.save_checkpoint(self.epoch, optimizer, lr_scheduler, loss, is_best=True)
        if self._is_due(self.save_every_n_epochs) or self.epoch == epochs - 1:
            self.save_checkpoint(self.epoch, optimizer, lr_scheduler, row["loss_train"] if loss is None else loss)

    def save_checkpoint(
        self, epoch: int, optimizer: torch.optim.Optimizer, lr_scheduler: Any, loss: float, is_best: bool = False
    ) -> Path:
        """Write everything that `load_checkpoint` reads; of the older checkpoints the newest keep_n_checkpoints - 1 stay."""
        header = {"model_config": get_kwargs(getattr(self.model, "config", {})), "epoch": epoch}
        tensors, structure = pack_state(optimizer.state_dict())
        files = {"model": (_own_names(self.model.state_dict()), header), "optimizer": (tensors, {})}
        if self.ema_model is not None:
            files["ema-0"] = (_own_names(self.ema_model.state_dict()["ema_model"]), {"step": self.ema_model.step})
        state = {"epoch": epoch, "loss": loss, "best_val_loss": self.best_val_loss, "waited": self.waited}
        state = pack_state(state | {"optimizer": structure, "lr_scheduler": lr_scheduler.state_dict()})[1]
        root = self.checkpoint_dir / "checkpoint"
        if is_best:
            return checkpoint.save_best(root, epoch, files, state)
        return checkpoint.save_checkpoint(root, epoch, files, state, self.keep_n_checkpoints)

    def load_checkpoint(
        self, checkpoint_path: str | Path, optimizer: torch.optim.Optimizer | None = None, lr_scheduler: Any = None
    ) -> tuple[int, float]:
        """Continue from a checkpoint's folder: its epoch and loss. UserError: none there, damaged, of another model."""
        found = checkpoint.load_checkpoint(checkpoint_path)
        state = unpack_state({}, found.state)
        plain = getattr(self.model, "_orig_mod", self.model)  # what torch.compile wraps
        load_weights(plain, found.files["model"], checkpoint_path)
        if self.ema_model is not None and "ema-0" in found.files:
            saved, names = found.files["ema-0"], self.ema_model.state_dict()["ema_model"]
            tensors = {name: saved.get(name.removeprefix("_orig_mod.")) for name in names}
            self.ema_model.load_state_dict({"ema_model": tensors, "step": found.meta["ema-0"]["step"]})
        if optimizer is not None:
            optimizer.load_state_dict(unpack_state(found.files["optimizer"], state["optimizer"]))
        if lr_scheduler is not None:
            lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.best_val_loss, self.waited, self.epoch = state["best_val_loss"], state["waited"], state["epoch"] + 1
        return state["epoch"], state["loss"]


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that the model has when it is not compiled."""
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


# -- helpers -----------------------------------------------------------------------------------------------------------


def get_kwargs(config: Any) -> dict[str, Any]:
    """The options of a mapping or a namespace, without its `type`."""
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    return {key: value for key, value in items if key != "type"}


def create_mlp(
    layer_dims: Sequence[int],
    activation: str | Callable[[], nn.Module] = "SiLU",
    final_activation: str | Callable[[], nn.Module] | None = None,
    dropout: float = 0.0,
    device: Any = None,
) -> nn.Sequential:
    """Linear layers with activations between them, dropout after each activation. UserError: fewer than two sizes."""
    if len(layer_dims) < 2:
        raise UserError("an MLP goes from one size to another", key="layer_dims", found=list(layer_dims))
    hidden = _activation(activation)
    layers: list[nn.Module] = []
    for a, b in pairwise(layer_dims):
        layers += [nn.Linear(a, b, device=device), hidden(), *([nn.Dropout(dropout)] if dropout else [])]
    layers = layers[: -2 if dropout else -1]
    return nn.Sequential(*layers, *([_activation(final_activation)()] if final_activation else []))


def _activation(name: str | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    known = {key: value for key, value in vars(nn.modules.activation).items() if isinstance(value, type)}
    return lookup(known, name, "activation") if isinstance(name, str) else name


def slugify(value: object, allow_unicode: bool = False) -> str:
    """A name for files: lower case; letters, digits and underscores; single dashes in place of spaces."""
    form = "NFKC" if allow_unicode else "NFKD"
    text = unicodedata.normalize(form, str(value))
    if not allow_unicode:
        text = "".join(letter for letter in text if letter.isascii())
    words = re.sub(r"[^\w\s-]", "", text.lower())
    return re.sub(r"[\s-]+", "-", words).strip("-_")


def get_available_device() -> torch.device:
    """cuda, else mps, else cpu."""
    return pick_device()


@torch.no_grad()
def encode_images(images: Tensor, vae: Any) -> Tensor:
    """Scaled latents, a sample of the posterior: images (b 3 H W) in [-1, 1] -> (b c h w)."""
    return codecs.encode(vae, images) * codecs.scaling(vae)[0]


@torch.no_grad()
def decode_latents(latents: Tensor, vae: Any) -> list[Image.Image]:
    """The pictures of scaled latents (b c h w), rounded to bytes."""
    pixels = to_uint8(codecs.decode(vae, latents / codecs.scaling(vae)[0]).cpu())
    return [Image.fromarray(image.squeeze(-1).numpy()) for image in pixels]
