"""Fashion-MNIST for a limited time on the CPU: our U-Net recipe against smalldiffusion's own U-Net example.

    python -m benchmarks.quality                     both sides for 15 CPU minutes each, side by side, a thread each
    python -m benchmarks.quality ours --minutes 5    one side (ours, ours-unconditional, peer, peer-1024)

A run of another length, or of a changed recipe, has that in the name of its result, and replaces no other.

The distance is Fréchet's on the features of benchmarks/frechet.py, 2,000 samples against the 10,000 test images.
The peer's example trains with batches of 1,024, some 40 updates in this time: `peer-1024` is that; `peer` gives it
batches of 64 and reports the better of its averaged and its raw weights.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

RESULTS, MINUTES = Path(__file__).parent / "results", 15.0
SIDES = ("ours", "ours-unconditional", "peer", "peer-1024")


def named(side: str, minutes: float, usual: float, overrides: Sequence[str] = ()) -> str:
    """A result's name: the side, and what is unlike the usual run of it."""
    length = [] if minutes == usual else [f"{minutes:g}min"]
    return "-".join([side, *length, *(word.replace("/", "_") for word in overrides)])


def train_ours(minutes: float, unconditional: bool, overrides: list[str]) -> tuple[dict[str, Tensor], int]:
    """The recipe as it is, stopped when its CPU time is spent; samples of its average."""
    from nanodiffusion.cli.train import plan
    from nanodiffusion.distributed import world
    from nanodiffusion.fast import tune_cpu
    from nanodiffusion.runner import Runner

    tune_cpu()
    limits = ["overwrite=true", "out=runs/quality", "validate_every=0"]
    config = plan("fashion-mnist", [*limits, *(["net.num_classes=0"] * unconditional), *overrides])[0].config
    with world("cpu") as here:
        runner = Runner(config, here)
        end = time.process_time() + minutes * 60
        for _ in runner.trainer:
            if time.process_time() > end:
                break
        model, like = runner.trainer.denoiser, (config, runner.data.shape, runner.fixed)
        with runner.trainer.emas[0].swap(model.net):
            parts = [runner.task.pictures(model, *like, range(k, k + 250)) for k in range(0, 2000, 250)]
        return {"ema": torch.cat(parts)}, runner.trainer.step


def train_peer(minutes: float, batch: int) -> tuple[dict[str, Tensor], int]:
    """examples/fashion_mnist_unet.py: Scaled U-Net, lr 7e-4, log-linear .01-20, EMA .999; 20 steps with gam 1.6."""
    from nanodiffusion.data import fashion_mnist
    from nanodiffusion.ema import EMA, ramped
    from tests.reference import smalldiffusion

    sd = smalldiffusion()
    torch.manual_seed(0)
    x, _ = fashion_mnist(split="train").batch(torch.arange(60000))
    flips = sd.MappedDataset(
        torch.utils.data.TensorDataset(x), lambda row: row[0] if torch.rand(()) < 0.5 else row[0].flip(-1)
    )
    loader = torch.utils.data.DataLoader(flips, batch_size=batch, shuffle=True)
    schedule = sd.ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    model = sd.Scaled(sd.Unet)(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
    average, step, end = EMA(model, ramped(0.999)), 0, time.process_time() + minutes * 60
    for _ in sd.training_loop(loader, model, schedule, epochs=300, lr=7e-4):
        if step:
            average.update(step)  # the loop yields before its optimiser step
        step += 1
        if time.process_time() > end:
            break

    def pictures() -> Tensor:
        torch.manual_seed(0)
        draw = lambda: list(sd.samples(model, schedule.sample_sigmas(20), gam=1.6, batchsize=250))[-1]
        return torch.cat([draw() for _ in range(8)])

    raw = pictures()
    with average.swap(model):
        return {"raw": raw, "ema": pictures()}, step


def measure(side: str, minutes: float, overrides: list[str]) -> dict:
    """Train one side, draw 2,000 samples, and give distances, updates and times."""
    from benchmarks.frechet import accuracy, load_classifier, statistics
    from nanodiffusion.data import fashion_mnist
    from nanodiffusion.evaluate import frechet
    from nanodiffusion.show import grid, save_png

    start = time.perf_counter()
    if side.startswith("ours"):
        samples, steps = train_ours(minutes, side == "ours-unconditional", overrides)
    else:
        samples, steps = train_peer(minutes, 1024 if side == "peer-1024" else 64)
    net, digest = load_classifier()
    data = fashion_mnist(split="test")
    real = statistics(net, data.batch(torch.arange(len(data)))[0])
    name = named(side, minutes, MINUTES, overrides)
    save_png(grid(samples["ema"][:100], 10), RESULTS / f"quality-{name}.png")
    return {
        "side": side,
        "distance": {name: round(frechet(statistics(net, x), real), 3) for name, x in samples.items()},
        "minutes": minutes,
        "updates": steps,
        "seconds_in_all": round(time.perf_counter() - start),
        "samples": 2000,
        "classifier_accuracy": round(accuracy(net), 4),
        "classifier_sha256": digest,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "command": "python -m benchmarks.quality " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", choices=SIDES)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("overrides", nargs="*", help="of our recipe, key=value")
    args = parser.parse_args()
    if args.side:
        result = measure(args.side, args.minutes, args.overrides)
        name = named(args.side, args.minutes, MINUTES, args.overrides)
        (RESULTS / f"quality-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
        return
    command = [sys.executable, "-m", "benchmarks.quality"]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([*command, s, "--minutes", str(args.minutes)], env=one_core) for s in ("ours", "peer")]
    sys.exit(max(p.wait() for p in both))


if __name__ == "__main__":
    main()
