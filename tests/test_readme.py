"""What the README and the other texts say is so: examples run, commands compose, every module and picture is there."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sd_files

from nanodiffusion.cli import COMMANDS, parse
from nanodiffusion.cli.train import plan
from nanodiffusion.config import make
from nanodiffusion.data import DATASETS
from nanodiffusion.data.controls import check_hole, make_control
from nanodiffusion.draw import check_settings
from nanodiffusion.objective import make_density, make_schedule, make_task

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


MODULES = sorted(path for folder in ("nanodiffusion", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_the_tree_names_every_module(path):
    tree = README.split("## Where things are")[1].split("## Results")[0]
    assert path.stem.startswith("__") or re.search(rf"\b{path.stem}\b", tree)


def test_every_picture_is_there():
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_help_of_train_names_every_recipe_and_where_all_keys_are():
    words = COMMANDS["train"].details.split()
    assert {path.stem for path in (ROOT / "nanodiffusion/configs").glob("*.yaml")} <= {*words}
    assert "(nanodiffusion/configs/full.yaml)" in words and "trackers=[tensorboard]" in words
    assert max(map(len, COMMANDS["train"].details.splitlines())) <= 130


def test_the_demo_is_as_long_as_its_recipe_everywhere():
    assert "time_limit: 120" in (ROOT / "nanodiffusion/configs/digits.yaml").read_text()
    makefile = re.findall("^demo:.*", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in (*re.findall("make demo .*", README), *makefile, COMMANDS["demo"].summary):
        assert re.findall(r"(\w+) minutes", text) == ["two"]


# -- the results -------------------------------------------------------------------------------------------------------

RESULTS = ROOT / "benchmarks/results"
PLAIN_PEERS = {"pixart": "plain", "tld": "plain", "tld-36": "plain", "loader": "webdataset"}
RATIOS = {  # how a row begins: of each ratio in it the file, our side, and the peer's where that is not the usual one
    "Swiss roll, training": [(f"swissroll{n}", side) for side in ("ours", "ours compat") for n in ("", "-2048")],
    "Swiss roll, 2,000": [("swissroll-sample", "ours")],
    "U-Net": [("unet", "ours fp32"), ("unet", "ours bf16")],
    "DiT": [("dit", "ours fp32"), ("dit", "ours bf16")],
    "SD 1.5 step": [("sd-unet-fp32", "ours"), ("sd-unet-fp32", "ours", "diffusers best")],
    "The same in bf16": [("sd-unet-bf16", "ours"), ("sd-unet-bf16", "ours", "diffusers best")],
    "SD's autoencoder": [
        (f"sd-decode256-{p}", "ours", peer) for p in ("fp32", "bf16") for peer in ("diffusers", "diffusers best")
    ],
    "Load a full SDXL": [("sd-load-sdxl-bf16", "ours")],
    "SD 1.5 U-Net": [("sd-load-sd15-fp32", "ours")],
    "PixArt": [(name, f"ours {p}") for name in ("pixart", "tld") for p in ("fp32", "bf16")],
    "TLD, 101 M: 36": [("tld-36", "ours fp32"), ("tld-36", "ours bf16")],
    "Stored latents": [("loader", "ours, resident")],
}


def row(begins: str) -> str:
    (found,) = re.findall(rf"^\| {re.escape(begins)}.*", README, re.MULTILINE)
    return found


@pytest.mark.parametrize("begins", RATIOS)
def test_the_ratios_are_the_files_and_of_cpu_time_with_a_mark_where_those_are_noisy(begins):
    shown = re.findall(r"(~?)(\d+\.?(\d*))x(?! by the clock)", row(begins))
    assert len(shown) == len(RATIOS[begins])
    for (mark, figure, decimals), (name, ours, *peer) in zip(shown, RATIOS[begins], strict=True):
        result = json.loads((RESULTS / f"cpu-{name}.json").read_text())
        usual = PLAIN_PEERS.get(name, "diffusers" if name.startswith("sd-") else "smalldiffusion")
        key = "cpu_seconds" if result["noisy"] else "seconds"
        ratio = result["sides"][peer[0] if peer else usual][key] / result["sides"][ours][key]
        assert (mark == "~") == result["noisy"]
        assert float(figure) == pytest.approx(ratio, rel=0, abs=0.5001 * 10 ** -len(decimals))


@pytest.mark.parametrize(("begins", "precision"), [("SD 1.5 step", "fp32"), ("The same in bf16", "bf16")])
def test_the_error_of_a_step_is_that_of_the_u_net(begins, precision):
    errors = json.loads((RESULTS / "cpu-sd-accuracy.json").read_text())["unet"]["errors"]
    sides = [f"{side} {precision}" for side in ("ours", "diffusers", "diffusers best")]
    assert re.findall(r"\d\.\de-\d", row(begins)) == [f"{errors[side]:.1e}".replace("e-0", "e-") for side in sides]


# -- the trainings that are shown --------------------------------------------------------------------------------------

SLURM = ROOT / "examples/nano_sdxl/train.slurm"
TEXTS = [
    *(ROOT / "README.md", SLURM, ROOT / "nanodiffusion/cli/__init__.py"),
    *(
        path
        for folder, kind in (("docs", "*.md"), ("nanodiffusion/configs", "*.yaml"))
        for path in ROOT.glob(f"{folder}/{kind}")
    ),
]
LINE = r"^#? +(|torchrun .*-m |sbatch .*)(?:nanodiffusion train|train\.slurm) +(.*)$"


def trainings() -> Iterator[tuple[str, int, str]]:
    """Every line that trains a recipe of ours: the text it is in, how many processes it starts, the words of `train`."""
    (gpus,) = re.findall(r"#SBATCH --gpus-per-node=(\d+)", SLURM.read_text())
    for path in TEXTS:
        for before, line in re.findall(LINE, path.read_text(), re.MULTILINE):
            words = re.split(" {3,}", line)[0]  # what it does stands beside it
            started = re.search(r"--(nodes|nproc_per_node)[= ](\d+)", before)
            processes = int(started[2]) * (int(gpus) if started[1] == "nodes" else 1) if started else 1
            if "--config_path" not in words:  # a file of the reader's
                yield path.name, processes, words


TRAININGS = sorted(set(trainings()))
PLAIN = [row for row in TRAININGS if row[1] == 1 and " " not in row[2]]  # which test_cli composes too


def test_the_texts_show_trainings_on_one_process_and_on_many():
    assert len({words.split()[0] for _, _, words in TRAININGS}) > 20
    assert {1, 2, 8, 32} <= {processes for _, processes, _ in TRAININGS}


@pytest.mark.parametrize(
    ("text", "processes", "words"),
    [pytest.param(*row, marks=pytest.mark.slow if row in PLAIN else ()) for row in TRAININGS],
)
def test_a_training_that_is_shown_could_begin(tmp_path, text, processes, words):
    pytest.importorskip("hydra")
    spoken = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], cwd=tmp_path, capture_output=True, check=True)
    args = parse(["train", *spoken.stdout.decode().split("\0")[:-1]])
    named = [args.config_name] if args.config_name else []
    recipe, *words = [*named, *args.words]
    for config, _ in plan(recipe, words, multirun=args.multirun):
        assert config.batch_size % (config.accumulate * processes) == 0
        make_task(config)
        make_density(config)
        check_settings(config.sample, make_schedule(config))
        make(DATASETS, config.data, "data", split="train")
        hole = config.data.get("hole")
        if hole:
            check_hole(hole)
        if "control" in config.data:
            make_control(config.data["control"], bool(hole))
