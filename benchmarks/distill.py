"""Four steps as good as thirty? A run on the digits is trained, distilled, and both are measured against the real ones.

    python -m benchmarks.distill [--teacher-steps 1000] [--steps 2000] [--n 2000]

The distance is Fréchet's on the 64 features of a small net that tells the real digits apart, of n pictures against the
1,438 training digits; every row has the same seeds and classes. Times are of this process, on one thread.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.frechet import statistics
from nanodiffusion.config import SampleConfig, from_dict, read_config
from nanodiffusion.data import digits
from nanodiffusion.distributed import world
from nanodiffusion.draw import cycled, draw
from nanodiffusion.evaluate import frechet, of_data
from nanodiffusion.evaluate.features import fit_small
from nanodiffusion.fast import tune_cpu
from nanodiffusion.nets import net_size
from nanodiffusion.run import Run, load_run
from nanodiffusion.runner import Runner

RESULT = Path(__file__).parent / "results" / "distill.json"
OUT = "runs/distill"
GUIDANCE = 1.5
LEVELS = 18  # of the ladder that is distilled
TEACHER = {
    "name": "teacher",
    "out": OUT,
    "device": "cpu",
    "overwrite": True,
    "data": {"name": "digits"},
    "net": {"name": "unet", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.1},
    "prediction": "edm",
    "sigma_data": 0.75,
    "schedule": {"name": "log_linear", "n": 1000, "sigma_min": 0.005, "sigma_max": 80.0},
    "density": {"name": "log_normal", "mean": -0.6, "std": 1.2},
    "precision": "fp32",
    "batch_size": 128,
    "lr": 1e-3,
    "lr_schedule": {"name": "cosine", "warmup": 50},
    "clip": 1.0,
    "ema": [{"name": "power", "sigma_rel": 0.1}],
    "checkpoint_every": 0,
}
STUDENT = TEACHER | {
    "name": "student",
    "task": {
        "name": "distill",
        "base": f"{OUT}/teacher",
        "solver": "heun",
        "ladder": "karras",
        "levels": LEVELS,
        "w_min": GUIDANCE,
        "w_max": GUIDANCE,
    },
    "net": {"name": "mlp"},  # the teacher's
    "density": {"name": "log_normal", "mean": 0.6, "std": 1.9},
    "batch_size": 64,
    "lr": 5e-4,
    "cond_dropout": 0.0,
}


def train(options: dict[str, Any], steps: int) -> tuple[Run, float]:
    """A run to its end, read back, and its CPU seconds."""
    start = time.process_time()
    with world("cpu") as here:
        runner = Runner(read_config({**options, "steps": steps}), here)
        runner.run()
    return load_run(runner.folder), time.process_time() - start


def pictures(run: Run, n: int, **options: Any) -> tuple[Tensor, float]:
    """n digits (n 1 8 8), classes in turn, and CPU milliseconds for each."""
    config, start, parts = from_dict(SampleConfig, options), time.process_time(), []
    for seeds in torch.arange(n).split(250):
        label = {"label": cycled(n, 10)[seeds]}
        *_, last = draw(run.denoiser, run.shape, run.schedule, config, seeds.tolist(), label)
        parts.append(last.x)
    return torch.cat(parts), (time.process_time() - start) / n * 1e3


def teachers(sampler: str, steps: int) -> dict[str, Any]:
    """Options of the teacher's pictures."""
    ladder = {"name": "karras", "sigma_min": 0.01}
    return {"sampler": {"name": sampler}, "ladder": ladder, "steps": steps, "guidance": GUIDANCE}


def students(steps: int) -> dict[str, Any]:
    """Options of the student's."""
    return {"sampler": {"name": "lcm"}, "ladder": {"name": "lcm", "original": LEVELS, "of": "karras"}, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--keep-teacher", action="store_true", help="the one that lies there from last time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tune_cpu()
    start = time.process_time()

    net = fit_small(of_data(digits("train"), "digits"), 300)
    x, y = (d.batch(torch.arange(len(d)))[0] for d in (digits("train"), digits("test")))
    reference = statistics(net, x)
    distance = lambda x: frechet(statistics(net, x), reference)

    made = Path(OUT, "teacher")
    teacher, taught = (load_run(made), 0.0) if args.keep_teacher else train(TEACHER, args.teacher_steps)
    student, learnt = train(STUDENT, args.steps)
    rows = {}
    plans = [
        ("teacher", teacher, f"{name} {k}", teachers(name, k))
        for name, k in (("dpmpp_2m", 30), ("heun", 15), ("ddim", 30))
    ]
    plans += [("teacher", teacher, f"{name} 4", teachers(name, 4)) for name in ("dpmpp_2m", "ddim")]
    plans += [("student", student, f"lcm {k}", students(k)) for k in (1, 2, 4, 8)]
    for who, run, what, options in plans:
        images, ms = pictures(run, args.n, **options)
        rows[f"{who} {what}"] = {"distance": round(distance(images), 4), "ms_an_image": round(ms, 3)}
        print(f"{who} {what}: {rows[f'{who} {what}']}", flush=True)
    result = {
        "distances": rows,
        "student_lcm_4_over_teacher_30": round(
            rows["student lcm 4"]["distance"] / rows["teacher dpmpp_2m 30"]["distance"], 4
        ),
        "held_out_real": round(distance(y), 4),
        "samples": args.n,
        "guidance": GUIDANCE,
        "teacher": {
            "steps": teacher.step,
            "parameters": net_size(teacher.denoiser.net),
            "cpu_s": round(taught) or None,
        },
        "student": {"steps": student.step, "levels": LEVELS, "cpu_s": round(learnt)},
        "cpu_s": round(time.process_time() - start),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": " ".join(["python -m benchmarks.distill", *sys.argv[1:]]),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
