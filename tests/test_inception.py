"""Inception-v3 and its inputs: every block and the whole net against formulas, resizing against weights written out."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanodiffusion.errors import UserError
from nanodiffusion.evaluate.features import converted, inception_features
from nanodiffusion.evaluate.inception import Inception
from nanodiffusion.evaluate.resize import RESIZES
from nanodiffusion.tensors import content_hash

pytestmark = pytest.mark.usefixtures("one_thread")

State = Mapping[str, Tensor]


def published() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in pt_inception-2015-12-05-6726825d.pth; {a,b} stands for both names."""
    rows = json.loads((Path(__file__).parent / "inception_keys.json").read_text())
    found = {}
    for row, shape in rows.items():
        parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{(.*?)\}", row))]
        found |= {"".join(choice): tuple(shape) for choice in itertools.product(*parts)}
    return found


@pytest.fixture(scope="module")
def net() -> Inception:
    """With random weights that keep the size of what passes through."""
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        found = Inception()
    found.to_empty(device="cpu")
    for name, tensor in found.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=g)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.7, 1.3, generator=g)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=g)
        else:
            tensor.zero_()
    return found.eval()


def test_names_and_shapes_are_those_of_the_published_file(net: Inception):
    found = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert found == published()
    assert (len(found), sum(p.numel() for p in net.parameters())) == (566, 23_850_960)


# ---- the net, by formulas


def conv(x: Tensor, state: State, name: str, stride: int = 1) -> Tensor:
    """(x * w - mean) / sqrt(var + .001) * scale + shift, and its positive part; padded so that an odd kernel keeps the size."""
    w = state[f"{name}.conv.weight"]
    valid = stride == 2 or name in ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
    pad = (0, 0) if valid else (w.shape[2] // 2, w.shape[3] // 2)
    y = F.conv2d(x, w, stride=stride, padding=pad)
    mean, var, scale, shift = (
        state[f"{name}.bn.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return ((y - mean) / (var + 0.001) ** 0.5 * scale + shift).clamp_min(0)


def neighbours(x: Tensor, outside: float) -> Tensor:
    """The nine neighbours of every pixel: (b c h w 9)."""
    x = F.pad(x, (1, 1, 1, 1), value=outside)
    return x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)


def average(x: Tensor) -> Tensor:
    return neighbours(x, 0).sum(4) / neighbours(torch.ones_like(x), 0).sum(4)


def block(x: Tensor, state: State, name: str) -> Tensor:
    """One Mixed block, as the graph of 2015 has it."""

    def chain(*steps: str, of: Tensor = x, last_stride: int = 1) -> Tensor:
        for i, step in enumerate(steps):
            of = conv(of, state, f"{name}.{step}", last_stride if i == len(steps) - 1 else 1)
        return of

    numbered = lambda branch, n: [f"{branch}_{i + 1}" for i in range(n)]
    shrunk = x.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4).amax(4)
    if name == "Mixed_6a":
        return torch.cat(
            [chain("branch3x3", last_stride=2), chain(*numbered("branch3x3dbl", 3), last_stride=2), shrunk], 1
        )
    if name == "Mixed_7a":
        return torch.cat(
            [
                chain(*numbered("branch3x3", 2), last_stride=2),
                chain(*numbered("branch7x7x3", 4), last_stride=2),
                shrunk,
            ],
            1,
        )
    pooled = neighbours(x, -torch.inf).amax(4) if name == "Mixed_7c" else average(x)
    first, last = chain("branch1x1"), chain("branch_pool", of=pooled)
    if name.startswith("Mixed_5"):
        middle = [chain(*numbered("branch5x5", 2)), chain(*numbered("branch3x3dbl", 3))]
    elif name.startswith("Mixed_6"):
        middle = [chain(*numbered("branch7x7", 3)), chain(*numbered("branch7x7dbl", 5))]
    else:
        once, twice = chain("branch3x3_1"), chain(*numbered("branch3x3dbl", 2))
        middle = [chain(f"branch3x3_2{k}", of=once) for k in "ab"] + [
            chain(f"branch3x3dbl_3{k}", of=twice) for k in "ab"
        ]
    return torch.cat([first, *middle, last], 1)


def features(x: Tensor, state: State) -> Tensor:
    shrink = lambda y: y.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4).amax(4)
    x = conv(x, state, "Conv2d_1a_3x3", 2)
    x = shrink(conv(conv(x, state, "Conv2d_2a_3x3"), state, "Conv2d_2b_3x3"))
    x = shrink(conv(conv(x, state, "Conv2d_3b_1x1"), state, "Conv2d_4a_3x3"))
    for name in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split():
        x = block(x, state, f"Mixed_{name}")
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


@torch.no_grad()
@pytest.mark.parametrize("name", "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split())
def test_every_block_is_its_formula(net: Inception, name: str):
    module = net.get_submodule(f"Mixed_{name}")
    first = next(m for m in module.modules() if isinstance(m, torch.nn.Conv2d))
    x = torch.randn(2, first.in_channels, 9, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), block(x, net.state_dict(), f"Mixed_{name}"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_features_of_all_three_resizes_are_the_formulas(net: Inception):
    images = torch.randint(0, 256, (1, 3, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    x = torch.cat([resize(images) for resize in RESIZES.values()])
    expected = features(x, net.state_dict())
    assert expected.std() > 0.05
    torch.testing.assert_close(net.features(x), expected, rtol=1e-5, atol=1e-5)
    scores = expected @ net.fc.weight.T + net.fc.bias
    torch.testing.assert_close(net.fc(net.features(x)), scores, rtol=1e-4, atol=1e-4)


# ---- its input


def by_weights(x: Tensor, weights) -> np.ndarray:
    """(b c h w) resized by a matrix (new old) along either axis, in float64."""
    h, w = (weights(old) for old in x.shape[2:])
    return h @ x.double().numpy() @ w.T


def bicubic(old: int, new: int = 299) -> np.ndarray:
    """Keys' cubic of a = -1/2 about the new pixel's centre, as wide as the pixel where that is wider than an old one."""
    wide = max(1.0, old / new)
    t = np.abs((np.arange(old) + 0.5)[None] - ((np.arange(new) + 0.5) * old / new)[:, None]) / wide
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def linear(shift: float):
    """Between the two old pixels beside (i + shift) old / new - shift, and no further than the last."""
    return lambda old, new=299: np.stack(
        [np.interp((np.arange(new) + shift) * old / new - shift, np.arange(old), row) for row in np.eye(old)], 1
    )


EXPECTED = {
    "clean": lambda x: (by_weights(x, bicubic).clip(0, 255) - 128) / 128,
    "tf1": lambda x: (by_weights(x, linear(0.0)) - 128) / 128,
    "torch": lambda x: by_weights(x, linear(0.5)) / 127.5 - 1,
}


@pytest.mark.parametrize("size", [(8, 8), (28, 32), (299, 299), (301, 420)])
@pytest.mark.parametrize("name", EXPECTED)
def test_each_resize_is_its_weights(name: str, size: tuple[int, int]):
    x = torch.randint(0, 256, (1, 2, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = RESIZES[name](x)
    torch.testing.assert_close(found.double(), torch.from_numpy(EXPECTED[name](x)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(28, 32), (400, 301)])
def test_clean_is_torchs_antialiased_bicubic(size: tuple[int, int]):
    x = torch.randint(0, 256, (1, 2, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    expected = F.interpolate(x.float(), (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(RESIZES["clean"](x), expected / 128 - 1, rtol=0, atol=1e-4)


def test_the_three_resizes_differ():
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    clean, tf1, half = (resize(x) for resize in RESIZES.values())
    assert min(float((a - b).abs().mean()) for a, b in ((clean, tf1), (tf1, half), (clean, half))) > 0.01


# ---- its weights


def test_weights_changed_after_they_were_stored_are_refused(net: Inception, tmp_path: Path):
    file, state = tmp_path / "inception.safetensors", dict(net.state_dict())
    converted(state, file)
    assert inception_features(file, "clean").published
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="not what was stored"):
        inception_features(file, "clean")


def test_another_nets_weights_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="belong to another network"):
        converted({"conv.weight": torch.zeros(1)}, tmp_path / "x.safetensors")


def test_a_hash_of_content_knows_names_shapes_and_numbers():
    zeros = {"a": torch.zeros(2, 2)}
    others = [
        {"b": torch.zeros(2, 2)},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(2, 2).index_fill(0, torch.tensor(0), 1.0)},
    ]
    assert content_hash(zeros) == content_hash({"a": torch.zeros(2, 2)})
    assert content_hash(zeros) not in map(content_hash, others)
