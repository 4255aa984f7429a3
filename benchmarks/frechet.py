"""The small net that Fashion-MNIST is judged by: trained here, stored with its hash; its distance is the package's.

python -m benchmarks.frechet        trains it again (two minutes) and prints accuracy and SHA-256
"""

from pathlib import Path

import torch
from torch import Tensor

from nanodiffusion.data import fashion_mnist
from nanodiffusion.evaluate import Moments, moments, of_data
from nanodiffusion.evaluate.features import SmallNet, fit_small, load_small
from nanodiffusion.evaluate.images import file_hash
from nanodiffusion.tensors import save_tensors

FILE = Path(__file__).parent / "results" / "fashion-classifier.safetensors"
EPOCHS, BATCH = 6, 128


@torch.no_grad()
def accuracy(net: SmallNet) -> float:
    """Share of the 10,000 test images it names rightly."""
    data = fashion_mnist(split="test")
    x, cond = data.batch(torch.arange(len(data)))
    scores = torch.cat([net.eval()(part) for part in x.split(500)])
    return (scores.argmax(1) == cond["label"]).float().mean().item()


def load_classifier() -> tuple[SmallNet, str]:
    """The stored classifier and the SHA-256 of its file."""
    return load_small(FILE), file_hash(FILE)


@torch.no_grad()
def statistics(net: SmallNet, x: Tensor) -> Moments:
    """Of the features (n 64) of images (n 1 28 28) in [-1, 1]."""
    return moments(torch.cat([net.features(part.clamp(-1, 1)) for part in x.split(500)]))


if __name__ == "__main__":
    data = fashion_mnist(split="train")
    save_tensors(
        FILE,
        fit_small(of_data(data, "fashion-mnist"), EPOCHS * len(data) // BATCH).state_dict(),
        {"trained": "python -m benchmarks.frechet"},
    )
    net, digest = load_classifier()
    print(f"test accuracy {accuracy(net):.4f}  sha256 {digest}")
