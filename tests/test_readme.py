"""What the README says is so: its example runs, its tree names every module, its pictures are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "steps=10_000" in code
    exec(compile(code.replace("steps=10_000", "steps=20"), "README.md", "exec"), {})
    assert (tmp_path / "swissroll.png").stat().st_size > 10_000


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
