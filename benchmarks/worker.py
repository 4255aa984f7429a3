"""One side of a benchmark in a process of its own: builds a case, then runs it as often as each line on stdin says.

python -m benchmarks.worker ours swissroll cpu        answers every number with a line of JSON
"""

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Case(NamedTuple):
    """What is timed: one call of `run` is `units` steps, images or points."""

    run: Callable[[], object]
    units: float = 1


def busy(path: str = "/proc/stat") -> float:
    """Seconds all processors of this machine have worked since it started, stolen time included; 0 where unknown."""
    try:
        with open(path) as f:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, f.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / 100


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def window(case: Case, calls: int, device: str) -> dict[str, float]:
    """Seconds per unit over `calls` calls: by the clock and of this process's CPU; and what others did meanwhile."""
    synchronise(device)
    others, cpu, wall = busy(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        case.run()
    synchronise(device)
    wall, cpu, others = time.perf_counter() - wall, time.process_time() - cpu, busy() - others
    units = calls * case.units
    return {"wall": wall / units, "cpu": cpu / units, "others": max(0.0, others - cpu) / wall, "seconds": wall}


def peak_memory() -> float:
    """Largest resident size of this process so far, MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cases(side: str) -> dict[str, Callable[[str], Case]]:
    """The cases of a module of this package; only that one is imported."""
    if side == "sd":
        from benchmarks.sd import CASES
    elif side == "latent":
        from benchmarks.latent import CASES
    elif side == "loader":
        from benchmarks.loader import CASES
    elif side == "ours":
        from benchmarks.ours import CASES
    else:
        from benchmarks.peers import CASES
    return CASES


def main() -> None:
    side, name, device = sys.argv[1:4]
    torch.manual_seed(0)
    case = cases(side)[name](device)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({**window(case, int(line), device), "peak_mb": peak_memory()}), flush=True)


if __name__ == "__main__":
    main()
