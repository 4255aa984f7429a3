"""What a run is, as typed data: the Config dataclass, its strict reading, and the objects it describes.

A component is a mapping {"name": row of a table, **options}; names come from explicit tables, never from an import string.
"""

import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nanodiffusion.errors import UserError, lookup, nearest

Component = dict[str, Any]


def component(name: str, **options: Any) -> Any:
    """A dataclass field whose default is the component `name`."""
    return field(default_factory=lambda: {"name": name, **options})


@dataclass(frozen=True)
class TrainConfig:
    """How weights are fitted. Steps count optimiser updates; batch_size is global (over processes and accumulation)."""

    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1  # micro-batches per update and process
    seed: int = 0
    lr: float = 1e-3
    optimizer: Component = component("AdamW")  # any class of torch.optim with its options; AdamW8bit of bitsandbytes
    lr_schedule: Component = component("constant")  # constant, cosine, linear, rsqrt (warmup=...) or a torch scheduler
    clip: float = 0.0  # largest gradient norm; 0 = off
    loss: str = "mse"  # mse, l1, huber, smooth_l1
    weight: Component = component("one")  # one, snr, min_snr, edm, sigmoid, p2
    cond_dropout: float = 0.1  # share of samples trained without their condition, for guidance
    # profiles of averages, each with its options, and device: cpu where it is to be kept in the machine's memory
    ema: list[Component] = field(default_factory=lambda: [{"name": "constant", "decay": 0.999}])
    offset_noise: float = 0.0  # strength of the noise that all pixels of a channel share (Guttenberg 2023); 0 = none
    parallel: str = "ddp"  # several processes each hold the net (ddp) or a part of it (fsdp)
    compile: bool | str = False  # true: the loss as a whole; blocks: what a net repeats, once for all that are alike
    max_bad_steps: int = 10  # consecutive non-finite updates skipped before the run stops


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are made."""

    sampler: Component = component("dpmpp_2m")
    ladder: Component = component("karras")
    steps: int = 20
    guidance: float = 1.0  # classifier-free guidance scale; 1 = none
    guidance_rescale: float = 0.0
    guidance_interval: list[float] = field(default_factory=list)  # [low sigma, high sigma]; empty = everywhere
    n: int = 64  # pictures of a grid
    prompts: list[str] = field(default_factory=list)  # of the grids, where a net takes text


@dataclass(frozen=True)
class GridConfig(SampleConfig):
    """How a run's own pictures are made, and of what the user gives: each list is as long as the longest, or of one for all."""

    images: list[str] = field(default_factory=list)  # files that a control, or a picture with a hole, is made of
    masks: list[str] = field(default_factory=list)  # of `images`, white = to be painted; [] = the data's own holes


@dataclass(frozen=True)
class Config(TrainConfig):
    """A whole run, from data to pictures: what a recipe file sets and what a checkpoint carries."""

    name: str = "run"
    out: str = "runs"  # the run lives in out/name
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: str = "fp32"  # of the network's products: fp32, bf16, fp16
    task: Component = component("denoise")  # denoise, autoencode, or on a checkpoint a row of finetune.FINETUNES
    init_from: str = ""  # weights to start from: a run's folder, a checkpoint, a .safetensors; "" = fresh ones
    init_weights: str = "ema-0"  # which of a run's: an average, or model
    matmul: str = "auto"  # fp32 products: highest, high (TF32 on GPUs), medium; auto = the fastest that is exact enough
    data: Component = component("swiss-roll")
    codec: str = ""  # what decodes the data's latents: a folder, file or hub name; "" = what the data says, else pixels
    text: str = ""  # what turns prompts into the net's condition; "" = what the data says
    validation: float = 0.0  # share of the training set held out where the data has no test split; 0 = none
    validation_samples: int = 512  # of these, how many are measured; by a diffusion model each at 8 noise levels
    net: Component = component("mlp")
    prediction: str = "eps"  # eps, x0, x0_linear, v, flow, edm
    sigma_data: float = 0.5  # of prediction edm
    clock: str = "log"  # log, flow, table
    schedule: Component = component("log_linear")
    density: Component = component("table")
    time_limit: float = 0.0  # seconds of training; 0 = none
    log_every: int = 100
    validate_every: int = 0
    sample_every: int = 0
    checkpoint_every: int = 1000
    snapshot_every: int = 0  # EMA snapshots for reconstruction after training
    keep: int = 3  # rotating checkpoints
    patience: int = 0  # validations without improvement before the run stops; 0 = never
    trackers: list[str] = field(default_factory=list)  # tensorboard, mlflow, wandb
    sample: GridConfig = field(default_factory=GridConfig)
    overwrite: bool = False  # start afresh where another run's files lie


# Keys that may differ between a checkpoint and the run that resumes it; how a batch is cut changes rounding, and dropout.
RESUMABLE = frozenset(
    "steps name out device accumulate parallel compile time_limit log_every validate_every sample_every checkpoint_every "
    "keep patience trackers sample overwrite codec text validation_samples".split()
)


_ACCEPTED: dict[Any, Any] = {float: (int, float), str: (str, os.PathLike), dict: Mapping, type(None): type(None)}


def _fits(value: Any, want: Any) -> bool:
    """Whether a value fits an annotation: an int is a float too, a bool is no number, any sequence is a tuple."""
    origin, inner = typing.get_origin(want), typing.get_args(want)
    if want is Any or want is inspect.Parameter.empty:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in inner)
    kind = origin or want
    if kind in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return not inner or all(_fits(v, inner[0]) for v in value)
    accepted = _ACCEPTED.get(kind, kind)
    return not isinstance(accepted, (type, tuple)) or (
        isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    )


def check_options(options: Mapping[str, Any], types_of: Mapping[str, Any], key: str) -> None:
    """Every option must be known and of its annotated type; else a UserError with the nearest valid names."""
    for k, v in options.items():
        if k not in types_of:
            fix = nearest(k, types_of) if types_of else "leave it out: this one has no options"
            raise UserError(f"unknown key {key}.{k}".replace(" .", " "), fix=fix)
        if not _fits(v, types_of[k]):
            want = types_of[k] if typing.get_args(types_of[k]) else getattr(types_of[k], "__name__", types_of[k])
            raise UserError(
                "wrong type", key=f"{key}.{k}".lstrip("."), expected=want, found=f"{v!r} ({type(v).__name__})"
            )


def from_dict(cls: type, options: Mapping[str, Any], key: str = "") -> Any:
    """A dataclass from a mapping, strict in names and types, nested dataclasses included."""
    hints = typing.get_type_hints(cls)
    nested = {k: v for k, v in hints.items() if dataclasses.is_dataclass(v)}
    values = dict(options)
    for k, sub in nested.items():
        if isinstance(values.get(k), Mapping):
            values[k] = from_dict(typing.cast(type, sub), values[k], f"{key}.{k}".lstrip("."))
    check_options(values, hints, key)
    return cls(**values)


def make(table: Mapping[str, Any], spec: Component, key: str, **given: Any) -> Any:
    """The row spec["name"] of a table with spec's other items bound as options; `given` are offered where it takes them."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise UserError("a component needs a name", key=f"{key}.name", found=repr(spec), fix=f"{key}.name=...")
    row = lookup(table, spec["name"], f"{key}.name")
    options = {k: v for k, v in spec.items() if k != "name"}
    if row is None:
        check_options(options, {}, key)
        return None
    known, required = option_types(row), _required(row)
    check_options(options, {k: v for k, v in known.items() if k not in CALL_ARGUMENTS & required | {"split"}}, key)
    bound = {k: v for k, v in given.items() if k in known} | options
    for k in required - bound.keys() - CALL_ARGUMENTS:
        raise UserError(f"{spec['name']} needs {k!r}", key=f"{key}.{k}", fix=f"{key}.{k}=...")
    return partial(row, **bound)


# Parameters without a default that the program fills in when it calls a row; never options of a recipe.
CALL_ARGUMENTS = frozenset("D x s s_next memory noise schedule steps step sigma c_out params".split())


def _signature(row: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(row.func if isinstance(row, partial) else row).parameters


def _required(row: Callable[..., Any]) -> set[str]:
    return {k for k, p in _signature(row).items() if p.default is p.empty}


def option_types(row: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function or class with their annotations."""
    target = row.func if isinstance(row, partial) else row
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations of a foreign class that do not resolve
        hints = {}
    return {k: hints.get(k, Any) for k in _signature(row)}


def validate(config: Config) -> None:
    """Values that types do not catch."""
    validate_training(config)
    _check_counts(config, "log_every", "keep", "validation_samples")
    for key in (
        "lr",
        "clip",
        "time_limit",
        "validate_every",
        "sample_every",
        "checkpoint_every",
        "snapshot_every",
        "patience",
        "offset_noise",
        "seed",
    ):
        if not 0 <= getattr(config, key) < 2**63:  # nor NaN, nor infinite
            raise UserError("must be a number from 0 up", key=key, found=getattr(config, key))
    if not 0 < config.sigma_data < math.inf:
        raise UserError("must be positive", key="sigma_data", found=config.sigma_data)
    for key in ("cond_dropout", "validation"):
        if not 0 <= getattr(config, key) < 1:
            raise UserError("must be a share in [0, 1)", key=key, found=getattr(config, key))
    for key in ("data", "net", "task"):
        if not isinstance(getattr(config, key).get("name"), str):
            raise UserError("a component needs a name", key=f"{key}.name", fix=f"{key}.name=...")
    if "split" in config.data:
        raise UserError("unknown key data.split", key="data.split", fix="validate_every uses the test split")
    lookup(dict.fromkeys(("auto", "highest", "high", "medium")), config.matmul, "matmul")
    lookup(dict.fromkeys(("fp32", "bf16", "fp16")), config.precision, "precision")
    _check_given(config.sample)


def _check_given(sample: GridConfig) -> None:
    if sample.masks and not sample.images:
        raise UserError("masks of no pictures", key="sample.masks", found=sample.masks, fix="sample.images=[...] too")
    counts = {key: len(getattr(sample, key)) for key in ("prompts", "images", "masks")}
    most = max(counts.values())
    for key, n in counts.items():
        if sample.images and n not in (0, 1, most):
            expected = f"1 for all or {most}, as there are {max(counts, key=lambda k: counts[k])}"
            raise UserError("not one for each picture", key=f"sample.{key}", expected=expected, found=n)


def _check_counts(config: TrainConfig, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < 1:
            raise UserError("must be at least 1", key=key, found=getattr(config, key))


def validate_training(config: TrainConfig) -> None:
    """Values that types do not catch."""
    _check_counts(config, "steps", "batch_size", "accumulate", "max_bad_steps")
    lookup(dict.fromkeys(("ddp", "fsdp")), config.parallel, "parallel")
    if config.compile not in (True, False, "blocks"):
        raise UserError("unknown way to compile", key="compile", expected="true, false or blocks", found=config.compile)
    for spec in config.ema:
        if spec.get("device", "") not in ("", "cpu"):
            raise UserError("an average is kept elsewhere", key="ema.device", expected="cpu", found=spec["device"])


def read_config(options: Mapping[str, Any]) -> Config:
    """A Config from a mapping (a recipe with its overrides, a checkpoint's header), checked."""
    config = from_dict(Config, options)
    validate(config)
    return config
