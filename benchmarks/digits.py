"""Are the digits of a run digits? A classifier of real ones must recognise them, and they must not be copies.

    python -m benchmarks.digits runs/demo [--n 1000]

The classifier is scikit-learn's SVC on the real training digits (its accuracy on held-out real ones is printed).
Copying shows in the distance to the nearest training digit: it is compared with the same distance of real held-out
digits, and the share of samples nearer to a training digit than any held-out digit is counted.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor

from nanodiffusion.data import digits
from nanodiffusion.draw import cycled, draw
from nanodiffusion.run import load_run


def nearest(x: Tensor, others: Tensor) -> Tensor:
    """Distance of each of x (n d) to its nearest neighbour among others (m d): (n)."""
    return torch.cdist(x.flatten(1), others.flatten(1)).min(1).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=1000)
    args = parser.parse_args()

    (real, cond), (held, held_cond) = (d.batch(torch.arange(len(d))) for d in (digits("train"), digits("test")))
    classifier = SVC(gamma=0.02, C=10).fit(real.flatten(1).numpy(), cond["label"].numpy())
    on_real = classifier.score(held.flatten(1).numpy(), held_cond["label"].numpy())

    run = load_run(args.run)
    labels = cycled(args.n, len(run.classes))
    *_, last = draw(
        run.denoiser, run.shape, run.schedule, run.config.sample, range(10_000, 10_000 + args.n), {"label": labels}
    )
    x = last.x.clamp(-1, 1)
    named = torch.from_numpy(classifier.predict(x.flatten(1).numpy()))
    near, usual = nearest(x, real), nearest(held, real)
    spread = torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(float("inf")).min(1).values
    result = {
        "recognised": round((named == labels).float().mean().item(), 4),
        "classifier_on_held_out_real": round(on_real, 4),
        "samples": args.n,
        "nearest_training_digit_median": round(near.median().item(), 3),
        "same_of_held_out_real_median": round(usual.median().item(), 3),
        "share_nearer_than_any_held_out": round((near < usual.min()).float().mean().item(), 4),
        "nearest_other_sample_median": round(spread.median().item(), 3),
        "run": str(args.run),
        "step": run.step,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": "python -m benchmarks.digits " + " ".join(sys.argv[1:]),
    }
    Path("benchmarks/results/digits.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
