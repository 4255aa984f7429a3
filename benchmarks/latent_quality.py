"""Latent transformers at equal CPU time: the modern preset, the two seed-style ones, and smalldiffusion's DiT.

    python -m benchmarks.latent_quality                       every side for 6 CPU minutes, two at a time, a thread each
    python -m benchmarks.latent_quality modern --minutes 2    one side (of modern, pixart, tld, smalldiffusion)

All learn Fashion-MNIST by class from the same 4 x 8 x 8 latents of one autoencoder (recipe `autoencoder`, made on the first
call in runs/latent-quality), with 3 to 5 million parameters, batches of 128 and lr 1e-3, and draw 2,000 pictures without
guidance. The text model reads the classes' names. The distance is Fréchet's on the features of benchmarks/frechet.py to the
10,000 test images; `codec` is that of the test images through the autoencoder, below which no side can come. A run of
another length has that in the name of its result.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality import named

RESULTS, MINUTES, HOME = Path(__file__).parent / "results", 6.0, Path("runs/latent-quality")
CODEC, LATENTS = HOME / "autoencoder/codec", HOME / "latents"
SAMPLES, BATCH = 2000, 128
SAME = f"data.path={LATENTS} out={HOME} validation=0 validate_every=0 batch_size={BATCH} lr=1e-3 lr_schedule.warmup=100"
OURS = {  # each recipe at this size; guidance is off, and averages span a fraction of what has been trained
    "modern": ("latent-dit", "net.dim=192 net.depth=5 net.heads=6 sample.guidance=1 snapshot_every=0"),
    "pixart": (
        "cifar10-latent",
        "net.in_size=8 net.channels_in=4 net.dim=192 net.depth=8 net.heads=6 lr_schedule.name=constant",
    ),
    "tld": ("tld", "net.in_size=8 net.dim=192 net.depth=6 net.text_dim=256 sample.guidance=1"),
}
SIDES = (*OURS, "smalldiffusion")


def prepare() -> None:
    """The autoencoder and the latents of all training images, once."""
    cli = [sys.executable, "-m", "nanodiffusion"]
    if not CODEC.exists():
        subprocess.run(
            [*cli, "train", "autoencoder", f"out={HOME}", "sample_every=0", "steps=1000", "time_limit=0"], check=True
        )
    source = ["fashion-mnist", f"codec={CODEC}", "text=words:256", "size=32", "flip=true", f"out={LATENTS}"]
    subprocess.run([*cli, "encode", *source], check=True)


def train_ours(side: str, minutes: float) -> tuple[Tensor, int, int]:
    """A recipe, stopped when its CPU time is spent: latents of its average's samples, updates, parameters."""
    from nanodiffusion.cli.train import plan
    from nanodiffusion.data import load_data
    from nanodiffusion.distributed import world
    from nanodiffusion.draw import cycled, draw
    from nanodiffusion.fast import tune_cpu
    from nanodiffusion.nets import net_size
    from nanodiffusion.runner import Runner
    from nanodiffusion.text.pooled import open_text

    tune_cpu()
    recipe, words = OURS[side]
    given = [f"name={side}", "overwrite=true", "ema=[{name: power, sigma_rel: 0.1}]", *SAME.split(), *words.split()]
    config = plan(recipe, given)[0].config
    with world("cpu") as here:
        runner = Runner(config, here)
        end = time.process_time() + minutes * 60
        for _ in runner.trainer:
            if time.process_time() > end:
                break
        model, label = runner.trainer.denoiser, cycled(SAMPLES, 10)
        names = open_text("words:256").encode(load_data("encoded", path=str(LATENTS)).classes)
        cond = {"pooled": names[label]} if side == "tld" else {"label": label}
        parts = []
        with runner.trainer.emas[0].swap(model.net):
            for k in range(0, SAMPLES, 250):
                given_cond = {name: value[k : k + 250] for name, value in cond.items()}
                *_, last = draw(model, runner.data.shape, runner.schedule, config.sample, range(k, k + 250), given_cond)
                parts.append(last.x)
        return torch.cat(parts), runner.trainer.step, net_size(model.net)


def train_peer(minutes: float) -> tuple[Tensor, int, int]:
    """smalldiffusion's DiT as in its Fashion-MNIST example (lr 1e-3, 20 steps with gam 1.6), on latents; its EMA is .99."""
    from nanodiffusion.data import load_data
    from nanodiffusion.ema import EMA, ramped
    from nanodiffusion.nets import net_size
    from tests.reference import smalldiffusion

    sd = smalldiffusion()
    from smalldiffusion.model import CondEmbedderLabel
    from smalldiffusion.model_dit import DiT

    torch.manual_seed(0)
    data = load_data("encoded", path=str(LATENTS))
    x0, cond = data.batch(torch.arange(len(data)))
    pairs = torch.utils.data.TensorDataset(x0, cond["label"])
    loader = torch.utils.data.DataLoader(pairs, batch_size=BATCH, shuffle=True, drop_last=True)
    schedule = sd.ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    embed = CondEmbedderLabel(192, 10, 0.1)
    model = sd.Scaled(DiT)(in_dim=8, channels=4, patch_size=2, depth=6, head_dim=32, num_heads=6, cond_embed=embed)
    average, step, end = EMA(model, ramped(0.99)), 0, time.process_time() + minutes * 60
    for _ in sd.training_loop(loader, model, schedule, epochs=10**6, lr=1e-3, conditional=True):
        if step:
            average.update(step)  # the loop yields before its optimiser step
        step += 1
        if time.process_time() > end:
            break
    model.eval()
    labels = torch.arange(SAMPLES) % 10
    with average.swap(model), torch.no_grad():
        draw = lambda y: list(sd.samples(model, schedule.sample_sigmas(20), gam=1.6, batchsize=len(y), cond=y))[-1]
        return torch.cat([draw(part) for part in labels.split(250)]), step, net_size(model)


@torch.no_grad()
def decoded(x0: Tensor) -> Tensor:
    """Pictures (n 1 28 28) of latents."""
    from nanodiffusion.pretrained import load_codec

    codec = load_codec(CODEC, device="cpu")
    return torch.cat([codec.decode(part).clamp(-1, 1) for part in x0.split(100)])[..., 2:30, 2:30]


def floor() -> float:
    """The distance of the test images through the autoencoder to themselves."""
    from benchmarks.frechet import load_classifier, statistics
    from nanodiffusion.data import fashion_mnist
    from nanodiffusion.evaluate import frechet
    from nanodiffusion.pretrained import load_codec

    codec, data = load_codec(CODEC, device="cpu"), fashion_mnist("test", pad=2)
    x, _ = data.batch(torch.arange(len(data)))
    net = load_classifier()[0]
    with torch.no_grad():
        through = torch.cat([decoded(codec.encode(part)) for part in x.split(500)])
    return frechet(statistics(net, through), statistics(net, x[..., 2:30, 2:30]))


def measure(side: str, minutes: float) -> dict:
    """Train one side, draw, and give its distance, updates and times."""
    from benchmarks.frechet import load_classifier, statistics
    from nanodiffusion.data import fashion_mnist
    from nanodiffusion.evaluate import frechet
    from nanodiffusion.show import grid, save_png

    start = time.perf_counter()
    latents, updates, parameters = train_peer(minutes) if side == "smalldiffusion" else train_ours(side, minutes)
    images = decoded(latents)
    net, digest = load_classifier()
    data = fashion_mnist(split="test")
    real = statistics(net, data.batch(torch.arange(len(data)))[0])
    save_png(grid(images[:100], 10), RESULTS / f"latent-quality-{named(side, minutes, MINUTES)}.png")
    return {
        "side": side,
        "distance": round(frechet(statistics(net, images), real), 3),
        "codec": round(floor(), 3),
        "minutes": minutes,
        "updates": updates,
        "parameters": parameters,
        "seconds_in_all": round(time.perf_counter() - start),
        "samples": SAMPLES,
        "classifier_sha256": digest,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "command": "python -m benchmarks.latent_quality " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", choices=SIDES)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    args = parser.parse_args()
    prepare()
    if args.side:
        result = measure(args.side, args.minutes)
        name = named(args.side, args.minutes, MINUTES)
        (RESULTS / f"latent-quality-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))
        return
    command, one_core = [sys.executable, "-m", "benchmarks.latent_quality"], {**os.environ, "OMP_NUM_THREADS": "1"}
    begin: Callable[[str], subprocess.Popen] = lambda side: subprocess.Popen(
        [*command, side, "--minutes", str(args.minutes)], env=one_core
    )
    for pair in (SIDES[:2], SIDES[2:]):
        if any(side.wait() for side in [begin(side) for side in pair]):
            sys.exit(1)


if __name__ == "__main__":
    main()
