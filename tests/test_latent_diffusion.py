"""examples/latent_diffusion.py goes its whole way, at a size that is over in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import latent_diffusion

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_become_shards_latents_models_samples_and_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home, before = tmp_path / "home", torch.get_float32_matmul_precision()
    monkeypatch.setenv("NANODIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["latent_diffusion", "--setting", "tiny", "--out", str(home)])
    latent_diffusion.main()
    torch.set_float32_matmul_precision(before)

    manifest = json.loads((home / "latents/manifest.json").read_text())
    assert manifest["count"] == 120 and manifest["shape"] == [4, 8, 8] and manifest["labels"]
    captions = (home / "captions.txt").read_text().splitlines()
    assert "a handwritten 3" in captions and "a photo of a Sneaker" in captions and len(captions) == 20
    for run in ("tld", "latent-dit"):
        with np.load(home / f"{run}.npz") as arrays:
            assert arrays["arr_0"].shape == (16, 32, 32, 3) and arrays["arr_0"].std() > 0
        found = json.loads((home / f"{run}.json").read_text())
        assert found["reference"]["n"] == 120 and found["metrics"]["frechet_distance (features: random)"]["value"] > 0
    for picture in ("walk.png", "trajectories.png", "runs/autoencoder/samples.png", "runs/tld/samples.png"):
        assert Image.open(home / picture).size > (32, 32)
