"""Every claim about speed, measured: `python -m benchmarks.bench [names...] [--gpu]` -> results/<device>-<name>.json.

Both sides run in processes of their own, one window at a time, in turn A B B A; a window in which other processes took
more than a tenth of a core is rejected. The figures are medians of the clean windows, the spread their quartiles. Only
ratios within one run mean anything; where fewer than 7 windows of a side were clean, the result says so (`noisy`), and
then the ratio of CPU seconds with --threads 1 is the better one.

Without names all but two kinds are measured on a CPU. `bench tld-36 --rounds 2` takes 20 minutes. The Stable Diffusion
family, with 13 GB of memory: `python -m benchmarks.sd` (accuracy, without which no time counts, 2 minutes), `bench sd-unet
sd-decode sd-text sd-run --rounds 9` (9 minutes), `bench sd-load sd-import` (6 minutes and 9 GB of files in the folder for
temporary ones).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import busy

RESULTS = Path(__file__).parent / "results"
CLEAN, FOREIGN, SECONDS = 7, 0.1, 1.0  # windows wanted, cores others may take, length of a window
APART = ("tld-36", "sd-")  # beginnings of what is measured on a CPU only when it is named
LONG = 60.0  # seconds of a call that needs no warming up
PACKAGES = ("torch", "numpy", "smalldiffusion", "diffusers", "transformers", "accelerate", "webdataset")


@dataclass(frozen=True)
class Bench:
    """Sides by name, each a "module case" of `worker`, in groups that are measured together, each with its peer."""

    groups: dict[str, dict[str, str]]  # the peer's name -> all sides of that group
    unit: str
    gpu: bool = True
    cpu: bool = True
    note: str = ""


def fashion(net: str) -> Bench:
    """A net of 4 million parameters in both precisions; the bf16 ratio is to the peer's fp32, as the goals count."""
    names = {"ours fp32": "fp32", "ours bf16": "bf16", "ours fp32 untuned": "fp32-untuned"}
    sides = {side: f"ours {net}-{case}" for side, case in names.items()}
    sides |= {"smalldiffusion": f"peers {net}-fp32", "smalldiffusion bf16": f"peers {net}-bf16"}
    return Bench({"smalldiffusion": sides}, "images")


def solvers() -> Bench:
    """Each of our solvers, beside the scheduler of diffusers that does the same, where there is one."""
    from benchmarks.peers import SCHEDULERS
    from nanodiffusion.sampler import STEPS

    pair = lambda name: (
        {name: f"ours sampler-{name}"} | ({f"diffusers {name}": f"peers sampler-{name}"} if name in SCHEDULERS else {})
    )
    note = "one unit is one call of the denoiser, which does nothing, on (4, 4, 8, 8); fresh noise is drawn within"
    return Bench({f"diffusers {name}": pair(name) for name in STEPS}, "calls", gpu=False, note=note)


def benches() -> dict[str, Bench]:
    """All benchmarks of running work; `COLD` holds those of fresh processes."""
    peer, readme = "smalldiffusion", "100 points: what the loader of 2,048 in its README yields"
    roll = lambda case: {
        peer: {"ours": f"ours {case}", "ours compat": f"ours {case}-compat", peer: f"peers {case}"},
    }
    points = {peer: {"ours": "ours swissroll-sample", peer: "peers swissroll-sample"}}
    return {
        "swissroll": Bench(roll("swissroll"), "steps", note=readme),
        "swissroll-2048": Bench(roll("swissroll-2048"), "steps"),
        "swissroll-sample": Bench(points, "runs", note="20 steps of 2,000 points"),
        "unet": fashion("unet"),
        "dit": fashion("dit"),
        **latent_transformers(),
        "loader": loader(),
        "sampler": solvers(),
        **stable_diffusion(),
    }


def latent_transformers() -> dict[str, Bench]:
    """PixArt (88.7 M) and TLD (101 M) trained, and 36 guided pictures of TLD, beside plain eager fp32 versions."""
    rows = {"ours fp32": "fp32", "ours bf16": "bf16", "plain": "plain"}
    sides = lambda name: {"plain": {side: f"latent {name}-{case}" for side, case in rows.items()}}
    note = "latents of 36 pictures, 15 steps with guidance; no decoding"
    return {
        "pixart": Bench(sides("pixart"), "images", note="16 x 4 x 4 latents, batch 256"),
        "tld": Bench(sides("tld"), "images", note="4 x 32 x 32 latents, batch 8"),
        "tld-36": Bench(sides("tld-36"), "runs", note=note),
    }


def loader() -> Bench:
    """Batches of stored latents beside webdataset's."""
    sides = {"ours, resident": "loader resident", "ours, mapped": "loader mapped", "webdataset": "loader webdataset"}
    note = "20,000 latents of 4 x 32 x 32 bytes, shuffled, to float32 in batches of 256; webdataset without workers"
    return Bench({"webdataset": sides}, "samples", gpu=False, note=note)


def stable_diffusion() -> dict[str, Bench]:
    """The SD family beside diffusers and transformers, which are measured as they are and at their best."""
    from benchmarks.sd import sides

    alone = lambda case, unit, note: Bench({"diffusers": sides(case)}, unit, note=note)
    both = ("ours", "ours untuned", "diffusers")
    found = {}
    for p in ("fp32", "bf16"):
        found[f"sd-unet-{p}"] = alone(f"unet-{p}", "steps", "SD 1.5, 512², guidance: a batch of two")
        found[f"sd-decode256-{p}"] = alone(f"decode256-{p}", "pictures", "SD's autoencoder, 256²")
        found[f"sd-text-{p}"] = alone(f"text-{p}", "calls", "CLIP-L, two prompts")
    found["sd-decode512-bf16"] = alone("decode512-bf16", "pictures", "SD's autoencoder, 512²")
    small = "prompt to pixels, 20 steps at 256², of a tiny net; untuned: the library around the same kernels"
    found["sd-run"] = Bench({"diffusers": sides("run", both)}, "pictures", note=small)
    large = ("ours", "ours compiled", "diffusers", "diffusers best", "diffusers best compiled")
    found["sdxl"] = Bench({"diffusers best": sides("sdxl", large)}, "pictures", cpu=False, note="1024², 30 steps, bf16")
    found["sdxl-decode"] = Bench({"diffusers": sides("decode1024-bf16")}, "pictures", cpu=False)
    return found


# -- running work --------------------------------------------------------------------------------------------------------


Windows = list[dict[str, float]]  # what a worker answered, one by one


class Worker:
    """A side's process; `window(n)` runs its case n times."""

    def __init__(self, case: str, device: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", *case.split(), device]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)
        self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a side ended early: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]

    def window(self, calls: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def begin(worker: Worker, seconds: float) -> tuple[int, Windows]:
    """Calls that fill a window, after warming up, and the windows that count already: a call of a minute is one by itself."""
    first = worker.window(1)
    if first["seconds"] > 2 * seconds:
        return 1, [first] if first["seconds"] > LONG else []
    worker.window(1)
    calls = 1
    while (took := worker.window(calls)["seconds"]) < seconds / 4:
        calls *= 4
    return max(1, round(calls * seconds / took)), []


def run(sides: dict[str, str], device: str, threads: int, seconds: float, rounds: int) -> dict[str, Windows]:
    """Windows of every side, in turn and back again, until each has enough clean ones."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    workers = {side: Worker(case, device, environment) for side, case in sides.items()}
    begun = {side: begin(worker, seconds) for side, worker in workers.items()}
    calls, windows = {side: calls for side, (calls, _) in begun.items()}, {side: w for side, (_, w) in begun.items()}
    for i in range(max(len(w) for w in windows.values()), rounds):
        for side in list(workers) if i % 2 == 0 else list(workers)[::-1]:
            windows[side].append(workers[side].window(calls[side]))
        if all(len(clean(w)) >= CLEAN for w in windows.values()):
            break
    for worker in workers.values():
        worker.close()
    return windows


def clean(windows: Windows) -> Windows:
    """The windows in which the machine did nothing else."""
    return [w for w in windows if w["others"] < FOREIGN]


def summary(windows: Windows, noisy: bool) -> dict[str, Any]:
    """Median and quartiles of a side: seconds per unit by the clock, and of CPU."""
    used = windows if noisy else clean(windows)
    low, middle, high = statistics.quantiles([w["wall"] for w in used], n=4)
    return {
        "seconds": middle,
        "quartiles": [low, high],
        "cpu_seconds": statistics.median(w["cpu"] for w in used),
        "least_cpu_seconds": min(w["cpu"] for w in used),
        "windows": len(used),
        "rejected": 0 if noisy else len(windows) - len(used),
        "peak_mb": max(w["peak_mb"] for w in windows),
    }


def compare(groups: dict[str, dict[str, Windows]]) -> dict[str, Any]:
    """A result: all sides and the ratios of the peer's time to the others', above 1 where they are faster."""
    noisy = any(len(clean(w)) < CLEAN for windows in groups.values() for w in windows.values())
    sides: dict[str, dict[str, Any]] = {}
    for peer, windows in groups.items():
        group = {side: summary(w, noisy) for side, w in windows.items()}
        for side, s in group.items():
            if peer in group and side != peer:
                keys = {"wall": "seconds", "cpu": "cpu_seconds", "least_cpu": "least_cpu_seconds"}
                s["ratios"] = {kind: round(group[peer][key] / s[key], 3) for kind, key in keys.items()}
        sides |= group
    return {"noisy": noisy, "sides": sides}


# -- fresh processes -----------------------------------------------------------------------------------------------------

ROLL_OURS = """
import math
from nanodiffusion.data import swiss_roll
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.nets import build_net
from nanodiffusion.noise import log_linear, table_density
from nanodiffusion.config import TrainConfig
from nanodiffusion.train import Trainer
D = Denoiser(build_net("mlp", hidden=[16, 128, 128, 128, 128, 16]))
data = swiss_roll(100, math.pi / 2, 5 * math.pi)
config = TrainConfig(steps=10000, batch_size=100, lr=1e-3, ema=[])
losses = [s.loss.item() for s in Trainer(D, data, table_density(log_linear()), config)]
"""
ROLL_PEER = """
import numpy as np
from torch.utils.data import DataLoader
from tests.reference import smalldiffusion
sd = smalldiffusion()
loader = DataLoader(sd.Swissroll(np.pi / 2, 5 * np.pi, 100), batch_size=2048)
model = sd.TimeInputMLP(hidden_dims=(16, 128, 128, 128, 128, 16))
losses = [n.loss.item() for n in sd.training_loop(loader, model, sd.ScheduleLogLinear(N=200), epochs=10000)]
"""
COLD: dict[str, tuple[dict[str, list[str]], str, int]] = {  # name: sides, peer, repeats
    "import": (
        {
            "import nanodiffusion": ["-c", "import nanodiffusion"],
            "nanodiffusion --help": ["-m", "nanodiffusion", "--help"],
            "import nanodiffusion.train": ["-c", "import nanodiffusion.train"],
            "python": ["-c", "pass"],
            "import torch": ["-c", "import torch"],
            "import smalldiffusion": ["-c", "from tests.reference import smalldiffusion as s; s()"],
            "import diffusers": ["-c", "from diffusers import UNet2DConditionModel"],
        },
        "import torch",
        11,
    ),
    "swissroll-run": ({"ours": ["-c", ROLL_OURS], "smalldiffusion": ["-c", ROLL_PEER]}, "smalldiffusion", 3),
    **{name: ({}, "diffusers", 7) for name in ("sd-load-sdxl-bf16", "sd-load-sd15-fp32")},  # see `commands`
    "sd-import": ({}, "diffusers: SDXL pipeline", 7),
}


def commands(name: str) -> dict[str, list[str]]:
    """The sides of a benchmark of fresh processes; those of the SD family are made when they are wanted."""
    if not name.startswith("sd-"):
        return COLD[name][0]
    from benchmarks import sd

    return sd.IMPORTS if name == "sd-import" else sd.loading(name.removeprefix("sd-load-"))


def once(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (VmHWM, MB) of a fresh interpreter."""
    code = (
        "import json,resource,subprocess,sys,time;t=time.perf_counter();"
        "r=subprocess.call(sys.argv[1:],stdout=subprocess.DEVNULL,stderr=subprocess.DEVNULL);"
        "u=resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps({'wall':time.perf_counter()-t,'cpu':u.ru_utime+u.ru_stime,'peak_mb':u.ru_maxrss/1024,'rc':r}))"
    )
    before = busy()
    answer = json.loads(
        subprocess.check_output([sys.executable, "-c", code, sys.executable, *command], env=environment)
    )
    if answer.pop("rc"):
        raise SystemExit(f"this command failed: python {' '.join(command)}")
    return {**answer, "others": max(0.0, busy() - before - answer["cpu"]) / answer["wall"]}


def run_cold(name: str, threads: int) -> dict[str, Any]:
    """A benchmark of fresh processes, in turn and back again."""
    _, peer, repeats = COLD[name]
    sides = commands(name)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    windows: dict[str, Windows] = {side: [] for side in sides}
    for i in range(repeats):
        for side in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            windows[side].append(once(sides[side], environment))
    return {"unit": "runs", "note": "fresh interpreters"} | compare({peer: windows})


# -- results -------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What was installed."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {p: found[p] for p in PACKAGES if p in found}


def device_name(gpu: bool) -> str:
    """The processor's or the GPU's own name."""
    if gpu:
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(name: str, result: dict[str, Any]) -> None:
    """A result in a few lines."""
    print(f"{name}{'  (noisy: not enough quiet windows)' * result['noisy']}")
    for side, s in result["sides"].items():
        rate, ms = 1 / s["seconds"], s["seconds"] * 1000
        ratios = " ".join(f"{kind} {ratio:.2f}x" for kind, ratio in s.get("ratios", {}).items())
        print(f"  {side:28} {rate:10.1f} {result['unit']}/s  {ms:9.4g} ms  peak {s['peak_mb']:5.0f} MB  {ratios}")


def chosen(names: list[str], known: list[str], gpu: bool) -> list[str]:
    """The benchmarks of these names, or of these beginnings of names; without any those that a machine can bear."""
    if not names:
        return [n for n in known if gpu or not n.startswith(APART)]
    named = {a: [a] if a in known else [n for n in known if n.startswith(a)] for a in names}
    if unknown := [a for a, found in named.items() if not found]:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(known)}")
    return [n for n in known if any(n in found for found in named.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which ones; their beginnings will do")
    parser.add_argument("--gpu", action="store_true", help="what makes sense on CUDA")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a window")
    parser.add_argument("--rounds", type=int, default=21, help="most windows per side")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("quartiles need --rounds 2 at least")
    args.device = "cuda" if args.gpu else "cpu"
    table = {name: b for name, b in benches().items() if (b.gpu if args.gpu else b.cpu)}
    known = [*table, *([] if args.gpu else COLD)]
    wanted = chosen(args.names, known, args.gpu)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        if name in COLD:
            result = run_cold(name, args.threads)
        else:
            bench, options = table[name], (args.device, args.threads, args.seconds, args.rounds)
            result = {"unit": bench.unit, "note": bench.note}
            result |= compare({peer: run(sides, *options) for peer, sides in bench.groups.items()})
        facts = {
            "name": name,
            "device": device_name(args.gpu),
            "threads": args.threads,
            "versions": versions(),
            "command": " ".join(["python -m benchmarks.bench", *sys.argv[1:]]),
            "protocol": " ".join((__doc__ or "").split("\n\n")[1].split()),
        }
        (args.out / f"{args.device}-{name}.json").write_text(json.dumps(facts | result, indent=1) + "\n")
        show(name, result)


if __name__ == "__main__":
    main()
