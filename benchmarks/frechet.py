"""Fréchet distance on the features of a small Fashion-MNIST classifier, trained here and stored with its hash.

python -m benchmarks.frechet        trains it again (two minutes) and prints accuracy and SHA-256
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor, nn

from nanodiffusion.checkpoint import load_tensors, load_weights, save_tensors
from nanodiffusion.data import fashion_mnist, order

FILE = Path(__file__).parent / "results" / "fashion-classifier.safetensors"


class Classifier(nn.Module):
    """Two convolution stages and a hidden layer of 64 features: x (n 1 28 28) -> class scores (n 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 24, 5, padding=2), nn.Conv2d(24, 48, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(24), nn.BatchNorm2d(48)
        self.hidden, self.out = nn.Linear(48 * 7 * 7, 64), nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """The hidden layer: x (n 1 28 28) in [-1, 1] -> (n 64)."""
        h = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        h = F.max_pool2d(F.relu(self.norm2(self.conv2(h))), 2)
        return F.relu(self.hidden(F.dropout(h.flatten(1), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


@torch.no_grad()
def accuracy(net: Classifier) -> float:
    """Share of the 10,000 test images it names rightly."""
    data = fashion_mnist(split="test")
    x, cond = data.batch(torch.arange(len(data)))
    scores = torch.cat([net.eval()(part) for part in x.split(500)])
    return (scores.argmax(1) == cond["label"]).float().mean().item()


def fit(epochs: int = 6, batch: int = 128) -> Classifier:
    """Train with Adam and one cycle of the learning rate, deterministic on one machine."""
    torch.manual_seed(0)
    data, net = fashion_mnist(split="train"), Classifier()
    steps = epochs * len(data) // batch
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        x, cond = data.batch(order(len(data), batch, 0, step))
        loss = F.cross_entropy(net.train()(x), cond["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return net


def load_classifier() -> tuple[Classifier, str]:
    """The stored classifier and the SHA-256 of its file."""
    net = Classifier()
    load_weights(net, load_tensors(FILE)[0], FILE)
    return net.eval(), hashlib.sha256(FILE.read_bytes()).hexdigest()


@torch.no_grad()
def statistics(net: Classifier, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (64) and covariance (64 64) of the features of images (n 1 28 28) in [-1, 1]."""
    features = torch.cat([net.features(part.clamp(-1, 1)) for part in x.split(500)]).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017)."""
    (m1, c1), (m2, c2) = a, b
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2))))


if __name__ == "__main__":
    classifier = fit()
    save_tensors(FILE, classifier.state_dict(), {"trained": "python -m benchmarks.frechet"})
    net, digest = load_classifier()
    print(f"test accuracy {accuracy(net):.4f}  sha256 {digest}")
