"""Networks that turn images into features, by name; each says which weights it has, and whether its distance is the FID."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nanodiffusion.data.download import Published, cache_dir
from nanodiffusion.data.tensors import order
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.evaluate.images import Images, file_hash
from nanodiffusion.evaluate.inception import FEATURES, Inception
from nanodiffusion.evaluate.resize import RESIZES
from nanodiffusion.tensors import content_hash, load_tensors, load_weights, save_tensors

INCEPTION = Published(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
LARGEST, SIDE = (
    3072,
    32,
)  # numbers of an image that count as features themselves; pixels of a side that a small net sees
STEPS, BATCH, SEED, RATE = 300, 128, 0, 3e-3  # of the small net's training


@dataclass(frozen=True)
class Features:
    """What to call them, the SHA-256 of the weights, how images were resized, how many there are, and the function itself.

    `published`: these are the published Inception weights, by their hash, so that a distance may be called FID.
    """

    name: str
    sha256: str
    resize: str
    dim: int
    of: Callable[[Tensor], Tensor]  # uint8 (b c h w) -> (b d)
    published: bool = False

    @torch.no_grad()
    def __call__(self, images: Images, batch: int = 64) -> Tensor:
        """The features of all images: (n d) float32 on the CPU."""
        parts = tqdm(images.batches(batch), total=-(-images.n // batch), desc="features", unit="batch", disable=None)
        return torch.cat([self.of(x).float().cpu() for x in parts])


# -- Inception ---------------------------------------------------------------------------------------------------------


def converted(tensors: dict[str, Tensor], file: Path) -> None:
    """Keep the tensors of the published pickle as safetensors, with the hash of both. UserError: they do not fit."""
    with torch.device("meta"):
        net = Inception()
    load_weights(net, {k: v.to("meta") for k, v in tensors.items()}, file)
    save_tensors(file, tensors, {"published": INCEPTION.sha256, "content": content_hash(tensors)})


def inception_features(file: Path, resize: str, device: str | torch.device = "cpu") -> Features:
    """Inception with the weights of a safetensors file; they are the published ones where `converted` wrote it."""
    chosen = lookup(RESIZES, resize, "resize")
    tensors, meta = load_tensors(file)
    if "content" in meta and meta["content"] != content_hash(tensors):
        raise UserError("the weights are not what was stored", file=file, fix="delete the file: it is then made again")
    published = meta.get("published") == INCEPTION.sha256
    with torch.device("meta"):
        net = Inception()
    load_weights(net.to_empty(device="cpu"), tensors, file)
    net.eval().to(device)

    def of(x: Tensor) -> Tensor:
        pixels = chosen(x.expand(-1, 3, -1, -1)).to(device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return net.features(pixels)

    name, sha256 = ("inception", INCEPTION.sha256) if published else (file.name, file_hash(file))
    return Features(name, sha256, resize, FEATURES, of, published)


# -- a small net -------------------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Two convolution stages and a hidden layer of 64 features: x (b c h w) in [-1, 1] -> class scores (b k)."""

    def __init__(self, channels: int, places: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 24, 5, padding=2), nn.Conv2d(24, 48, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(24), nn.BatchNorm2d(48)
        self.hidden, self.out = nn.Linear(48 * places, 64), nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        """The hidden layer: x (b c h w) -> (b 64)."""
        h = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        h = F.max_pool2d(F.relu(self.norm2(self.conv2(h))), 2)
        return F.relu(self.hidden(F.dropout(h.flatten(1), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


def _reduced(x: Tensor) -> Tensor:
    """uint8 (b c h w) as floats in [-1, 1] of at most 32 x 32: the mean over the pixels that a new one covers."""
    side = (min(SIDE, x.shape[2]), min(SIDE, x.shape[3]))
    return F.adaptive_avg_pool2d(x.float() / 127.5 - 1, side)


def _fresh(shape: tuple[int, int, int], classes: int) -> SmallNet:
    """With weights that depend on SEED alone. UserError: images of fewer than 4 x 4 pixels."""
    if min(shape[1:]) < 4:
        raise UserError(
            "too small for a small net", expected="4 x 4 pixels or more", found=shape, fix="features=pixels"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return SmallNet(shape[0], min(SIDE, shape[1]) // 4 * (min(SIDE, shape[2]) // 4), classes)


def fit_small(images: Images, steps: int) -> SmallNet:
    """A SmallNet that tells the classes of labelled images apart: AdamW, one cycle, everything from a fixed seed."""
    if images.labels is None:
        raise UserError("a small net is trained on labels, and there are none", file=images.name, fix="features=random")
    x = torch.cat([_reduced(part) for part in images.batches(1024)])
    net = _fresh(images.shape, int(images.labels.max()) + 1).train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for step in tqdm(range(steps), desc="a small net", disable=None):
            index = order(len(x), BATCH, SEED, step)
            loss = F.cross_entropy(net(x[index]), images.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return net.eval()


def load_small(file: Path) -> SmallNet:
    """A stored SmallNet; its file says all its sizes."""
    tensors, _ = load_tensors(file)
    if not {"conv1.weight", "hidden.weight", "out.weight"} <= tensors.keys():
        expected = "weights of Inception, or of a small net that was trained here"
        raise UserError(
            "these are no known features", file=file, key="features", expected=expected, found=[*tensors][:3]
        )
    channels, places, classes = (
        tensors["conv1.weight"].shape[1],
        *tensors["hidden.weight"].shape[1:],
        len(tensors["out.weight"]),
    )
    net = SmallNet(channels, places // 48, classes)
    load_weights(net, tensors, file)
    return net.eval()


def trained_small(images: Images) -> Path:
    """The file of the small net for these images: trained when first asked for, then kept in the cache."""
    key = hashlib.sha256(f"{images.sha256} {STEPS} {BATCH} {SEED} {RATE} {SIDE}".encode()).hexdigest()[:16]
    file = cache_dir() / "evaluate" / f"small-{key}.safetensors"
    if not file.is_file():
        save_tensors(file, fit_small(images, STEPS).state_dict(), {"trained_on": images.sha256, "steps": STEPS})
    return file


def small_features(name: str, net: SmallNet, sha256: str, device: str | torch.device = "cpu") -> Features:
    """The hidden layer of a small net as features."""
    channels, places = net.conv1.in_channels, net.hidden.in_features // 48
    net = net.to(device)

    def of(x: Tensor) -> Tensor:
        side = [min(SIDE, s) // 4 for s in x.shape[2:]]
        if x.shape[1] != channels or side[0] * side[1] != places:
            found = f"{x.shape[1]} channels, {x.shape[2]} x {x.shape[3]}"
            raise UserError(f"{name} was made for images of another size", key="features", found=found)
        return net.features(_reduced(x.to(device)))

    return Features(name, sha256, "", 64, of)


# -- by name -----------------------------------------------------------------------------------------------------------


def _pixels(reference: Images, device: str | torch.device) -> Features:
    dim = torch.Size(reference.shape).numel()
    if dim > LARGEST:
        expected = f"at most {LARGEST} numbers an image"
        raise UserError("too large to be features themselves", key="features", expected=expected, found=dim)
    return Features("pixels", "", "", dim, lambda x: x.flatten(1).float() / 127.5 - 1)


def _random(reference: Images, device: str | torch.device) -> Features:
    net = _fresh(reference.shape, 1).eval()
    return small_features("random", net, content_hash(net.state_dict()), device)


def _small(reference: Images, device: str | torch.device) -> Features:
    file = trained_small(reference)
    return small_features("small", load_small(file), file_hash(file), device)


OWN: dict[str, Callable[..., Features]] = {"small": _small, "random": _random, "pixels": _pixels}


def file_features(file: Path, resize: str, device: str | torch.device = "cpu") -> Features:
    """Features from a safetensors file: Inception's, or a small net's."""
    tensors, _ = load_tensors(file)
    if "Mixed_7c.branch_pool.conv.weight" in tensors:
        return inception_features(file, resize, device)
    return small_features(file.name, load_small(file), file_hash(file), device)
