"""Configuration: strict at every level, the same through JSON, and components by name from explicit tables."""

import dataclasses
import json
import math
import typing

import pytest

from nanodiffusion.config import (
    RESUMABLE,
    Component,
    Config,
    SampleConfig,
    TrainConfig,
    check_options,
    from_dict,
    make,
    read_config,
)
from nanodiffusion.denoiser import WEIGHTS
from nanodiffusion.ema import PROFILES
from nanodiffusion.errors import UserError
from nanodiffusion.noise import DENSITIES, LADDERS, SCHEDULES
from nanodiffusion.sampler import STEPS
from nanodiffusion.train import LR_SCHEDULES, OPTIMIZERS


def refused(options: dict[str, typing.Any]) -> str:
    with pytest.raises(UserError) as e:
        read_config(options)
    return str(e.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batchsize": 3}, "did you mean 'batch_size'"),
        ({"sample": {"step": 3}}, "did you mean 'steps'"),
        ({"sample": {"step": 3}}, "unknown key sample.step"),
        ({"sample": 3}, "key sample"),
        ({"sample": {"guidance": "much"}}, "key sample.guidance"),
        ({"sample": {"guidance_interval": [1, "x"]}}, "key sample.guidance_interval"),
        ({"steps": 1.5}, "found: 1.5 (float)"),
        ({"steps": True}, "found: True (bool)"),
        ({"steps": "10"}, "expected: int"),
        ({"lr": "1e-3"}, "expected: float"),
        ({"lr": False}, "key lr"),
        ({"lr": None}, "key lr"),
        ({"compile": 1}, "expected: bool"),
        ({"name": 3}, "expected: str"),
        ({"net": "mlp"}, "key net"),
        ({"ema": {"name": "power"}}, "key ema"),
        ({"ema": ["power"]}, "key ema"),
        ({"trackers": "wandb"}, "key trackers"),
        ({"trackers": [1]}, "key trackers"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_at_each_level(options, said):
    assert said in refused(options)


@pytest.mark.parametrize(
    "options",
    [
        *({key: 0} for key in ("steps", "batch_size", "accumulate", "log_every", "keep", "max_bad_steps")),
        *({key: -1} for key in ("validate_every", "sample_every", "checkpoint_every", "snapshot_every", "patience")),
        *({key: value} for key in ("lr", "clip", "time_limit") for value in (-1.0, math.nan, math.inf)),
        *({key: value} for key in ("cond_dropout", "validation") for value in (-0.1, 1.0, math.nan)),
        {"seed": -1},
        {"seed": 2**63},
        {"sigma_data": 0.0},
        {"sigma_data": math.nan},
        {"precision": "fp8"},
        {"matmul": "low"},
        {"data": {"n": 3}},
        {"data": {"name": "swiss-roll", "split": "test"}},
        {"net": {"hidden": [3]}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options):
    (key,) = options
    assert key in refused(options)


def test_an_integer_is_a_float_and_a_tuple_is_a_list():
    config = read_config({"lr": 1, "ema": ({"name": "power"},)})
    assert config.lr == 1 and len(config.ema) == 1


def test_errors_are_at_most_six_lines():
    for options in ({"batchsize": 1}, {"lr": -1}, {"sample": {"n": "x"}}, {"precision": "x"}):
        assert len(refused(options).splitlines()) <= 6


FULL = {
    "steps": 7,
    "lr": 0.25,
    "optimizer": {"name": "SGD", "momentum": 0.5},
    "lr_schedule": {"name": "cosine", "warmup": 3},
    "ema": [{"name": "power", "sigma_rel": 0.1}, {"name": "constant"}],
    "net": {"name": "unet", "multipliers": [1, 2]},
    "sample": {"sampler": {"name": "heun"}, "guidance": 2.0, "guidance_interval": [0.1, 5.0]},
    "trackers": ["wandb"],
}


@pytest.mark.parametrize("options", [{}, FULL])
def test_a_config_is_the_same_after_json(options):
    config = read_config(options)
    assert read_config(json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))) == config


def test_what_is_given_is_what_is_there():
    config = dataclasses.asdict(read_config(FULL))
    defaults = dataclasses.asdict(Config())
    for key in defaults.keys() - FULL.keys():
        assert config[key] == defaults[key]
    for key in FULL.keys() - {"sample"}:
        assert config[key] == FULL[key]
    assert config["sample"] == {**defaults["sample"], **FULL["sample"]}


def test_defaults_are_not_shared():
    Config().optimizer["name"] = "broken"
    Config().ema.append({})
    assert Config().optimizer == {"name": "AdamW"} and len(Config().ema) == 1


def test_resumable_keys_exist_and_change_no_arithmetic():
    names = {f.name for f in dataclasses.fields(Config)}
    assert names >= RESUMABLE
    # steps is where a run ends; how it is computed is not what; all else of TrainConfig decides what an update is
    how = {"accumulate", "parallel", "compile"}
    assert {f.name for f in dataclasses.fields(TrainConfig)} & RESUMABLE == {"steps", *how}
    assert not RESUMABLE & {"data", "validation", "net", "prediction", "sigma_data", "clock", "schedule", "density"}


TABLES = {
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "weight": WEIGHTS,
    "schedule": SCHEDULES,
    "density": DENSITIES,
}


@pytest.mark.parametrize("key", TABLES)
def test_default_components_are_rows_of_their_tables(key):
    assert getattr(Config(), key)["name"] in TABLES[key]
    assert make(TABLES[key], getattr(Config(), key), key) is None or key != "weight"


def test_components_are_the_fields_that_say_so():
    hints = typing.get_type_hints(Config)
    components = {k for k, v in hints.items() if v == Component}
    assert components == {"optimizer", "lr_schedule", "weight", "data", "net", "schedule", "density", "task"}
    assert {k for k, v in typing.get_type_hints(SampleConfig).items() if v == Component} == {"sampler", "ladder"}
    assert SampleConfig().sampler["name"] in STEPS and SampleConfig().ladder["name"] in LADDERS
    assert Config().ema[0]["name"] in PROFILES


def scale(x: float, steps: int, factor: float = 2.0, times: int = 1) -> float:
    return x * factor**times * steps


def needs(x: float, height: float) -> float:
    return x + height


TABLE = {"scale": scale, "needs": needs, "none": None}


def test_make_binds_options_and_offers_what_is_given():
    row = make(TABLE, {"name": "scale", "factor": 3.0}, "key", steps=5, unheard_of=1)
    assert row is not None and row(1.0) == 15.0
    row = make(TABLE, {"name": "scale", "times": 2}, "key", steps=1, times=7)
    assert row is not None and row(1.0) == 4.0  # the recipe's own word counts
    assert make(TABLE, {"name": "none"}, "key") is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"name": "scal"}, "did you mean 'scale'"),
        ({"name": 3}, "unknown key"),
        ({"name": ["scale"]}, "unknown key"),
        ({}, "a component needs a name"),
        ("scale", "a component needs a name"),
        ({"name": "scale", "facter": 1.0}, "did you mean 'factor'"),
        ({"name": "scale", "factor": "big"}, "key key.factor"),
        ({"name": "scale", "x": 1.0}, "unknown key key.x"),  # the program's to fill in
        ({"name": "scale", "steps": 3}, "unknown key key.steps"),
        ({"name": "needs"}, "needs 'height'"),
        ({"name": "none", "factor": 1.0}, "unknown key key.factor"),
    ],
)
def test_make_refuses_what_does_not_fit(spec, said):
    with pytest.raises(UserError) as e:
        make(TABLE, spec, "key")
    assert said in str(e.value)


def test_types_are_checked_to_the_depth_they_are_written():
    types = {"a": float | None, "b": tuple[int, ...], "c": dict[str, int], "d": list[float], "e": tuple[int, str]}
    check_options({"a": None, "b": [1, 2], "c": {}, "d": [1, 2.5], "e": (1, "x")}, types, "k")
    for options in ({"a": "x"}, {"b": [1.5]}, {"b": 3}, {"c": [1]}, {"d": ["x"]}, {"e": 1}):
        with pytest.raises(UserError):
            check_options(options, types, "k")


def test_from_dict_reads_any_dataclass():
    assert from_dict(TrainConfig, {"steps": 3}) == TrainConfig(steps=3)
    with pytest.raises(UserError, match="name"):
        from_dict(TrainConfig, {"name": "x"})
