"""diffusers' scheduler_config.json as noise levels and a prediction, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanodiffusion.errors import UserError
from nanodiffusion.noise import SCHEDULES, Schedule, from_betas, ldm, zero_terminal_snr
from nanodiffusion.pretrained.architecture import Fields

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"scaled_linear": "ldm", "linear": "ddpm", "squaredcos_cap_v2": "cosine_beta", "sigmoid": "sigmoid_beta"}


def read_scheduler(raw: Mapping[str, Any], file: Path) -> tuple[Schedule, str]:
    """The noise levels and the prediction that a scheduler_config.json says. UserError: of a kind that we do not support."""
    fields = Fields(raw, file, None)
    betas = raw.get("trained_betas")
    if betas is None and "beta_schedule" not in raw:
        found = raw.get("_class_name", "none")
        raise UserError("this noise schedule is of another family", file=file, key="beta_schedule", found=found)
    fields.only("use_flow_sigmas", False)
    said = fields.choice("prediction_type", "epsilon", *PREDICTIONS)
    if betas is None:
        name = BETAS[str(fields.choice("beta_schedule", None, *BETAS))]
        n = fields.integer("num_train_timesteps", 1000)
        ends = {"beta_start": fields.real("beta_start", 1e-4), "beta_end": fields.real("beta_end", 0.02)}
        if not 0 < ends["beta_start"] <= ends["beta_end"] < 1:
            raise fields.wrong("beta_start", "0 < beta_start <= beta_end < 1", list(ends.values()))
        schedule = SCHEDULES[name](n) if name == "cosine_beta" else SCHEDULES[name](n, **ends)
    else:
        schedule = _trained(betas, file)
    terminal = fields.flag("rescale_betas_zero_snr", False)
    return zero_terminal_snr(schedule) if terminal else schedule, PREDICTIONS[str(said)]


def _trained(betas: Any, file: Path) -> Schedule:
    good = isinstance(betas, list) and all(type(b) in (int, float) and 0 < b < 1 for b in betas)
    if not good:
        raise UserError("not a list of betas", file=file, key="trained_betas", expected="numbers between 0 and 1")
    return from_betas(torch.tensor(betas, dtype=torch.float64))


def same_levels(a: Schedule, b: Schedule) -> bool:
    """Whether two tables are one but for rounding: betas are published in half a dozen digits."""
    return len(a) == len(b) and torch.allclose(a.sigmas, b.sigmas, rtol=1e-3)


def scheduler_json(schedule: Schedule, prediction: str, came: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a schedule and a prediction: `came`, the one there was, if it still says the same.

    UserError: a prediction that diffusers has not.
    """
    if came:
        levels, said = read_scheduler(came, Path("scheduler_config.json"))
        if said == prediction and torch.equal(levels.sigmas, schedule.sigmas):
            return dict(came)
    name = next((theirs for theirs, ours in PREDICTIONS.items() if ours == prediction), None)
    if name is None:
        raise UserError(
            "diffusers has no such prediction", key="prediction", expected=list(PREDICTIONS), found=prediction
        )
    betas = _betas_json(schedule)
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.20.0",
        "num_train_timesteps": len(schedule),
        **betas,
        "prediction_type": name,
        # pure noise is a level that "leading" leaves out
        "timestep_spacing": "trailing" if betas.get("rescale_betas_zero_snr") else "leading",
        "steps_offset": 1,
    }


def _betas_json(schedule: Schedule) -> dict[str, Any]:
    plain = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for terminal, known in ((False, ldm()), (True, zero_terminal_snr(ldm()))):
        if torch.equal(known.sigmas, schedule.sigmas):
            return {**plain, "rescale_betas_zero_snr": terminal}
    abar = 1 / (1 + schedule.sigmas**2)
    return {"trained_betas": (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()}
