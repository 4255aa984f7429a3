"""What the README says is so: its example runs, its tree names every module, its pictures are there."""

import re
from pathlib import Path

import pytest
import sd_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "steps=10_000" in code
    exec(compile(code.replace("steps=10_000", "steps=20"), "README.md", "exec"), {})
    assert (tmp_path / "swissroll.png").stat().st_size > 10_000


def test_the_stable_diffusion_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert model in code
    exec(compile(code.replace(model, str(sd_files.tree("sd1"))), "README.md", "exec"), {})
    assert (tmp_path / "castle.png").stat().st_size > 1000


@pytest.mark.parametrize("path", sorted((ROOT / "nanodiffusion").rglob("*.py")), ids=lambda p: p.stem)
def test_the_tree_names_every_module(path):
    tree = README.split("## Where things are")[1].split("## Results")[0]
    assert path.stem.startswith("__") or re.search(rf"\b{path.stem}\b", tree)


def test_every_picture_is_there():
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_every_recipe_it_names_is_there():
    for recipe in re.findall(r"nanodiffusion train ([\w-]+)", README):
        assert (ROOT / "nanodiffusion" / "configs" / f"{recipe}.yaml").is_file(), recipe
