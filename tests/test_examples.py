"""The examples start as their first lines say: what they are told wrongly costs no work and no traceback."""

import json
import runpy
from pathlib import Path

import pytest

from examples import fine_tuning, latent_diffusion

EXAMPLES = Path(__file__).parents[1] / "examples"
HOMES = {"fine_tuning": "runs/fine-tuning", "latent_diffusion": "runs/latent"}
WAYS = [pytest.param(fine_tuning, id="fine_tuning"), pytest.param(latent_diffusion, id="latent_diffusion")]


class Began(Exception):
    """Raised by the first command of an example."""


def begin(example, monkeypatch, *words):
    """An example's call up to its first command, whose words are raised."""

    def call(*command):
        raise Began(" ".join(command))

    monkeypatch.setattr(example, "call", call)
    monkeypatch.setattr("sys.argv", [example.__name__, *words])
    example.main()


@pytest.mark.parametrize("example", WAYS)
def test_every_setting_has_a_folder_of_its_own(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = HOMES[example.__name__.split(".")[1]]
    for words, folder in (([], home), (["--setting", "tiny"], f"{home}-tiny"), (["--out", "x"], "x")):
        with pytest.raises(Began, match=f"out={folder}/"):
            begin(example, monkeypatch, *words)


@pytest.mark.parametrize("example", WAYS)
def test_work_of_another_setting_is_neither_gone_on_with_nor_touched(example, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    with pytest.raises(Began):
        begin(example, monkeypatch, "--setting", "tiny", "--out", str(home))
    with pytest.raises(SystemExit):
        begin(example, monkeypatch, "--out", str(home))
    told = capsys.readouterr().err
    assert "another setting" in told and "tiny" in told and "--out" in told and "Traceback" not in told
    assert {file.name: json.loads(file.read_text()) for file in home.iterdir()} == {"setting.json": {"setting": "tiny"}}
    with pytest.raises(Began):
        begin(example, monkeypatch, "--setting", "tiny", "--out", str(home))


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["draw"], ["draw", "a", "cat"], ["tiny"], ["train", "4"]], ids=" ".join
)
def test_the_script_of_the_latent_transformer_says_how_it_is_called(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["transformer_latent_diffusion.py", *words])
    with pytest.raises(SystemExit, match=r"usage: .* arrays \| train \| draw PROMPT \| tiny VAE"):
        runpy.run_path(str(EXAMPLES / "transformer_latent_diffusion.py"), run_name="__main__")
