"""What every task on a published checkpoint has in common: frozen parts about trained ones, and pixels made into latents.

A `Tuned` is to the training loop what a `Denoiser` is: `net` is what is trained, averaged and saved; the rest is frozen. A
batch (pixels, cond) of a data set becomes (latents, cond) in `Prepared`; what the U-Net is told is made of cond in
`Tuned.condition`, inside the loss, so that whatever takes part in it may be trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nanodiffusion.config import Config
from nanodiffusion.data.conditioning import hide, latent_mask
from nanodiffusion.denoiser import PRECISIONS, Cond, Denoiser, as_float
from nanodiffusion.draw import begin, check_settings, cycled, make_step
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.finetune.encoded import ready_made
from nanodiffusion.guidance import cfg
from nanodiffusion.noise import SCHEDULES
from nanodiffusion.objective import SHOWN, Fixed, at_once, make_schedule
from nanodiffusion.pretrained.scheduler_config import same_levels, scheduler_json
from nanodiffusion.sampler import ImageNoise, sample
from nanodiffusion.task import Task, refuse_images
from nanodiffusion.text.reader import Reader
from nanodiffusion.train import mix
from nanodiffusion.validate import Validator

if TYPE_CHECKING:
    from nanodiffusion.pretrained.load import Bundle
    from nanodiffusion.train import Trainer


class Tuned(nn.Module):
    """A checkpoint of which a part is trained, called as a Denoiser is: D(x, sigma, cond) -> E[x0 | x].

    net: what is trained. whole: the U-Net with whatever is about it, of which `net` is (a part), or that `net` conditions.
    takes: the names of the conditions that `condition` needs, see there.
    """

    takes: tuple[str, ...] = ("ids",)

    def __init__(self, bundle: "Bundle", config: Config, net: nn.Module, whole: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.codec = net, bundle.codec.eval()
        self.reader = Reader(bundle.text, bundle.family.zero_uncond)
        self.sizes = bundle.family.sizes
        self.known_nothing: dict[str, Tensor] = {}
        latent = bundle.family.size // bundle.codec.factor
        self.natural = 8 * latent  # the side of a picture, as a U-Net's folder counts it
        self.precision = PRECISIONS[config.precision]
        whole = bundle.denoiser.net if whole is None else whole
        schedule = make_schedule(config)
        self.denoiser = Denoiser(whole, config.prediction, config.clock, schedule, self.precision)
        self.scheduler = scheduler_json(schedule, config.prediction, bundle.scheduler)  # how F is to be read
        self.takes = (*self.takes, *(("sizes",) if self.sizes else ()))

    # what the U-Net is told

    def condition(self, cond: Cond) -> dict[str, Any]:
        """The U-Net's own conditions of a batch's.

        ids (b k 77) of k text encoders -> context (b 77 d) and, of SDXL, pooled (b p). sizes (b 6) and concat (b c h w), as
        the U-Net takes them, stay, and so does whatever is given ready.
        """
        known = {name: value for name, value in cond.items() if name != "ids"}
        return known | self.reader(cond["ids"]) if "ids" in cond else known

    def unconditional(self, cond: Cond) -> dict[str, Any]:
        """The same with no text, which is what the checkpoint was trained with: zeros of SDXL, else the encoded ""."""
        nothing = {"ids": self.reader.tokens([""])} if "ids" in cond else self.nothing()
        return {**cond, **{name: v.to(cond[name]).expand_as(cond[name]) for name, v in nothing.items()}}

    @torch.no_grad()
    def nothing(self) -> dict[str, Tensor]:
        """What the U-Net is told of no caption: context (1 77 d) and, of SDXL, pooled (1 p)."""
        device = next(self.reader.parameters()).device
        return self.known_nothing or self.reader(self.reader.tokens([""]).to(device))

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions as the data gives them to the loop: ids, or what the U-Net is told where that is read beforehand."""
        ids = self.reader.tokens(captions)
        return {"ids": ids} if "ids" in self.takes else {name: v.float() for name, v in self.reader(ids).items()}

    def without_encoders(self, nothing: dict[str, Tensor]) -> None:
        """Be given latents and what the U-Net is told, `nothing` where there is no caption; codec and text encoders stay behind.

        They are no modules of this one any more, so that they are neither moved nor cast with it.
        """
        self.known_nothing = nothing
        self.takes = (*nothing, *(("sizes",) if self.sizes else ()))
        for name in {"codec", "reader"} & self._modules.keys():
            vars(self)[name] = self._modules.pop(name)

    def caption(self, text: str, u: float) -> str:
        """What is said of a picture, of its caption, by chance u in [0, 1)."""
        return text

    # as a denoiser

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        """E[x0 | x]: x (b c h w), sigma (b) -> (b c h w)."""
        return self.denoiser(x, sigma, self.conditioned(cond or {}))

    def loss(self, x0: Tensor, sigma: Tensor, eps: Tensor, cond: Cond, *options: Any) -> Tensor:
        """`Denoiser.loss` of latents x0 (b c h w) -> (b)."""
        return self.denoiser.loss(x0, sigma, eps, self.conditioned(cond), *options)

    def conditioned(self, cond: Cond) -> dict[str, Any]:
        """`condition` in the model's precision."""
        if self.precision == torch.float32:  # whatever the frozen encoders are in
            return tree_map(partial(as_float, dtype=torch.float32), self.condition(cond))
        with torch.autocast(next(self.net.parameters()).device.type, self.precision):
            return self.condition(cond)


class Prepared:
    """A data set of pixels as the loop needs it: latents of a codec, ids of captions, and what inpainting is told.

    batch -> x0 (b c h w), cond: ids (b k 77), sizes (b 6), control (b 3 H W), hole (b 1 H W) and, beside that, concat
    (b 1+c h w): the hole and the latents of what is left, as the data set gives them. Latents are drawn from the
    posterior by noise that the last column of u decides; the one before it chooses between captions.
    """

    def __init__(self, data: Any, model: Tuned) -> None:
        self.data, self.model = data, model
        self.classes: tuple[str, ...] = ()
        self.labels = None
        self.captions: Sequence[str] = data.captions
        factor, (_, h, w) = model.codec.factor, data.shape
        if h % factor or w % factor:
            expected = f"multiples of {factor}"
            raise UserError(
                "the codec cannot halve pictures of this size", key="data.size", expected=expected, found=(h, w)
            )
        self.shape = (model.codec.latent_channels, h // factor, w // factor)
        self.draws = data.draws + 2

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device) -> "Prepared":
        """The same, its batches on a device."""
        return Prepared(self.data.to(device), self.model)

    def square(self) -> "Prepared":
        """The same, every picture cut to one size, where the data set has several."""
        return Prepared(self.data.square(), self.model)

    def own(self, *given: Sequence[str]) -> "Prepared":
        """Other pictures, masks and captions made into samples as these are; see `Pictures.own`."""
        return Prepared(self.data.own(*given), self.model)

    def order(self, batch: int, seed: int, step: int) -> Tensor:
        """The samples (batch) of global batch `step`, as the data set chooses them."""
        return self.data.order(batch, seed, step)

    def shape_of(self, index: Tensor) -> tuple[int, ...]:
        """The shape (c h w) of the latents of a batch."""
        return (self.shape[0], *(side // self.model.codec.factor for side in self.data.shape_of(index)[1:]))

    def prefetch(self, index: Tensor, u: Tensor) -> None:
        """Let the data set begin what `batch` will ask for."""
        self.data.prefetch(index, u[:, :-2])

    @torch.no_grad()
    def batch(self, index: Tensor, u: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """index (b), u (b draws) -> x0, cond; without u the data's own choice, and the middle of the posterior."""
        pixels, cond = self.data.batch(index, None if u is None else u[:, :-2])
        codec = self.model.codec
        shape = (codec.latent_channels, *(side // codec.factor for side in pixels.shape[2:]))
        noise = None if u is None else posterior_noise(u[:, -1], shape).to(pixels)
        x0 = codec.encode(pixels, noise)
        choice = [0.0] * len(index) if u is None else u[:, -2].tolist()
        texts = [self.model.caption(str(self.captions[row]), c) for row, c in zip(cond["row"].tolist(), choice)]
        ids = self.model.reader.tokens(texts)
        known = {name: value for name, value in cond.items() if name != "row"} | {"ids": ids.to(x0.device)}
        if "hole" in cond:
            hidden = codec.encode(hide(pixels, cond["hole"]))
            known["concat"] = torch.cat([latent_mask(cond["hole"], codec.factor), hidden], 1)
        return x0, known


def posterior_noise(u: Tensor, shape: Sequence[int]) -> Tensor:
    """Unit noise (b *shape) on the CPU, of which row i depends on u[i] in [0, 1) alone: u (b)."""
    seeds = [mix(int(k)) for k in (u.double().cpu() * 2**24).tolist()]  # CPU generators read 32 bits of a seed
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class Finetune(Task):
    """Options of every task on a checkpoint. base: a folder, a file or a name on the hub, see `load_pretrained`."""

    base: str
    variant: str = ""  # of the weights: fp16
    frozen: str = "auto"  # dtype of what is not trained: fp32, bf16, fp16; auto = the run's precision on a GPU
    checkpointing: bool = False  # activations are computed again, for a third more time and much less memory
    new_prediction: bool = False  # allows a `prediction` and a `schedule` other than the checkpoint's

    # what a task adds, beside what it publishes

    @property
    def from_base(self) -> bool:
        """Whether what is trained starts as the base's own weights, which are then read unrounded."""
        return False

    def loaded(self, dtype: str) -> "Bundle":
        """The checkpoint as training finds it."""
        from nanodiffusion.pretrained.load import load_pretrained  # slow to import

        return load_pretrained(self.base, dtype, "cpu", self.variant or None)

    def tuned(self, bundle: "Bundle", config: Config) -> Tuned:
        """The checkpoint with what is to be trained: frozen, but for `net`."""
        raise NotImplementedError

    # what the tasks share

    def settled(self, config: Config) -> Config:
        """The net is the checkpoint's."""
        return replace(config, net={"name": "checkpoint"})

    def flops(self, model: Tuned) -> None:
        """Not known: they depend on the size of the pictures."""

    def frozen_in(self, config: Config) -> str:
        """The name of the dtype of what is not trained. UserError: there is none of that name."""
        half = config.precision if torch.cuda.is_available() and config.device != "cpu" else "fp32"
        lookup({**PRECISIONS, "auto": None}, self.frozen, "task.frozen")
        return half if self.frozen == "auto" else self.frozen

    def model(self, config: Config) -> Tuned:
        """The checkpoint at `base` with what is to be trained, the same for the same seed."""
        dtype = self.frozen_in(config)
        bundle = self.loaded("fp32" if self.from_base else dtype)
        if not self.new_prediction:
            check_reading(bundle, config)
        bundle.denoiser.requires_grad_(False)
        vars(bundle.denoiser.net)["checkpointing"] = self.checkpointing
        model = self.tuned(bundle, config)
        model.net.requires_grad_(True)
        for weight in model.parameters():
            if self.from_base and not weight.requires_grad:
                weight.data = weight.data.to(PRECISIONS[dtype])
        return model

    def prepared(self, data: Any, model: Tuned) -> Any:
        """The data set as the model takes it."""
        if hasattr(data, "context"):
            return ready_made(data, model)
        if not hasattr(data, "captions"):
            raise UserError("this task needs pictures with captions", key="data.name", fix="data.name=pictures")
        return Prepared(data, model)

    def check(self, model: Tuned, config: Config, shape: tuple[int, ...]) -> None:
        """UserError for what would be refused only after training."""
        check_settings(config.sample, make_schedule(config))
        if not {"control", "concat"} & set(model.takes):
            refuse_images(config.sample)

    def validator(self, trainer: "Trainer", data: Any, density: Any, most: int) -> Validator:
        """What measures the model on held-out data."""
        return Validator(trainer, data.square(), density, most)

    def fixed(self, config: Config, model: Tuned, data: Any) -> Fixed:
        """The conditions (k ...) that pictures are drawn from: of the first samples, with `sample.prompts` for captions.

        Of `sample.images` instead, where there are any, and without prompts no caption.
        """
        given, prompts = config.sample, config.sample.prompts
        k = max(len(prompts), min(len(data), SHOWN))
        if given.images:
            k = max(map(len, (prompts, given.images, given.masks)))
            each = ([some[i % len(some)] for i in range(k)] if some else [] for some in (given.images, given.masks))
            data = data.own(*each, [""] * k)
        data = data.square()
        conds = [
            data.batch(row)[1] for row in cycled(k, len(data)).split(1)
        ]  # so that one picture at a time is encoded
        taken = {name: torch.cat([cond[name] for cond in conds]).cpu() for name in conds[0] if name in model.takes}
        if prompts:
            taken |= {name: v[cycled(k, len(v))] for name, v in model.told(prompts).items()}
        return taken

    @torch.no_grad()
    def pictures(
        self, model: Tuned, config: Config, shape: Sequence[int], fixed: Fixed, seeds: Sequence[int]
    ) -> Tensor:
        """Latents (n *shape), one a seed, the fixed conditions in turn, as many at once as `at_once` says."""
        model.eval()
        each = at_once(shape, model.codec.factor)
        row = cycled(len(seeds), len(next(iter(fixed.values()))))
        parts = [
            self._drawn(
                model, config, shape, {name: v[row[i : i + each]] for name, v in fixed.items()}, seeds[i : i + each]
            )
            for i in range(0, len(seeds), each)
        ]
        return torch.cat(parts)

    def _drawn(self, model: Tuned, config: Config, shape: Sequence[int], fixed: Fixed, seeds: Sequence[int]) -> Tensor:
        device, given = next(model.net.parameters()).device, config.sample
        cond = {name: value.to(device) for name, value in fixed.items()}
        lo, hi = given.guidance_interval or (0.0, float("inf"))
        told, nothing = (model.conditioned(c) for c in (cond, model.unconditional(cond)))
        D = cfg(model.denoiser, told, nothing, given.guidance, lo, hi, given.guidance_rescale)
        own = ImageNoise(seeds)
        x, ladder = begin(model.denoiser, make_schedule(config), given, own.draw(*shape))
        *_, last = sample(D, x.to(device), ladder, make_step(given), own)
        return last.x

    def columns(self, classes: int, fixed: Fixed, n: int) -> int:
        """As many columns as conditions."""
        return min(n, len(next(iter(fixed.values()))))


def check_reading(bundle: "Bundle", config: Config) -> None:
    """UserError unless a checkpoint predicts what a config says, and was trained on its noise levels."""
    file, said = bundle.source.get("unet", bundle.source["name"]), bundle.denoiser.prediction.name
    if config.prediction != said:
        fix = f"prediction={said}, or task.new_prediction=true to train it to predict another thing"
        what, found = "the checkpoint predicts something else", config.prediction
        raise UserError(what, file=file, key="prediction", expected=said, found=found, fix=fix)
    schedule = make_schedule(config)
    if not same_levels(schedule, bundle.schedule):
        name = next((name for name in ("ldm", "ldm_zero_snr") if same_levels(SCHEDULES[name](), bundle.schedule)), None)
        known = f"schedule={{name: {name}}}" if name else "a schedule of these levels"
        fix = f"{known}, or task.new_prediction=true to train it on other levels"
        expected, found = (
            f"{len(s)} levels, sigma {s.sigmas[0]:.4g} to {s.sigmas[-1]:.5g}" for s in (bundle.schedule, schedule)
        )
        what = "the checkpoint was trained on other noise levels"
        raise UserError(what, file=file, key="schedule", expected=expected, found=found, fix=fix)
