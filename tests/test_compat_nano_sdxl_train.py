"""nano-diffusion's training as its README has it: its YAML row by row, torchrun, and a Slurm cluster of fake commands."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sd_files
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from nanodiffusion.checkpoint import checkpoints
from nanodiffusion.cli import main as nanodiffusion
from nanodiffusion.cli import train as train_command
from nanodiffusion.cli.recipes import VARIABLE
from nanodiffusion.compat import nano_sdxl_train as theirs
from nanodiffusion.compat.nano_sdxl_train import CONTROLS, TRAIN_TYPES, translate
from nanodiffusion.config import Config, option_types, read_config
from nanodiffusion.data import pictures
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.tensors import load_tensors

pytest.importorskip("hydra")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "nano_sdxl"
SLURM = FOLDER / "train.slurm"
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
CANNY = {"train_type": None, "controlnet": "canny"}
LEAST = {"output_dir": "runs/x", "train_shards": "shards", "train_type": "unet_text_to_image"}


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def translated(**keys: Any) -> dict[str, Any]:
    return translate({k: v for k, v in {**LEAST, **keys}.items() if v is not None})


# -- the table, row by row ---------------------------------------------------------------------------------------------

ROWS = [
    ({}, "name", "x"),
    ({}, "out", "runs"),
    ({"output_dir": "/a/b/c/"}, "out", "/a/b"),
    ({}, "steps", 30000),
    ({"max_train_steps": 7}, "steps", 7),
    ({}, "lr", 1e-5),
    ({"learning_rate": 1}, "lr", 1),
    ({}, "batch_size", 8),
    ({"batch_size": 3, "gradient_accumulation_steps": 4}, "batch_size", 12),
    ({"gradient_accumulation_steps": 4}, "accumulate", 4),
    ({}, "precision", "fp32"),
    ({"mixed_precision": "fp16"}, "precision", "fp16"),
    ({"mixed_precision": "bf16"}, "precision", "bf16"),
    ({}, "clip", 1.0),
    ({}, "optimizer", {"name": "AdamW"}),
    ({"use_8bit_adam": True}, "optimizer", {"name": "AdamW8bit"}),
    ({}, "lr_schedule", {"name": "constant"}),
    ({}, "cond_dropout", 0.1),
    ({"proportion_empty_prompts": 0.2}, "cond_dropout", 0.2),
    ({}, "ema", []),
    ({"train_type": "ema_unet_inpainting"}, "ema", [{"name": "ramped", "decay": 0.9999}]),
    ({"train_type": "ema_unet_inpainting", "ema_decay": 0.9}, "ema", [{"name": "ramped", "decay": 0.9}]),
    (
        {"train_type": "ema_unet_inpainting", "ema_power": 0.75},
        "ema",
        [{"name": "warmup", "decay": 0.9999, "gamma": 1.0, "power": 0.75}],
    ),
    ({}, "sample_every", 500),
    ({"validation_steps": 9}, "sample_every", 9),
    ({"num_validation_timesteps": 9}, "sample.steps", 9),
    ({"num_validation_images": 3}, "sample.n", 3),
    ({"num_validation_images": 3, "validation_prompts": ["a", "b"]}, "sample.n", 6),
    ({"validation_prompts": "a cat"}, "sample.prompts", ["a cat"]),
    ({}, "sample.images", []),
    ({**CANNY, "validation_images": "a.png"}, "sample.images", ["a.png"]),
    ({**CANNY, "validation_images": ["a.png", "b.png"]}, "sample.images", ["a.png", "b.png"]),
    ({**CANNY, "validation_images": ["a.png", "b.png"], "validation_prompts": ["a", "b"]}, "sample.n", 4),
    ({**CANNY, "validation_images": ["a.png", "b.png"]}, "sample.n", 4),
    ({}, "sample.sampler.name", "euler"),
    ({}, "sample.guidance", 5.0),
    ({}, "checkpoint_every", 1000),
    ({"checkpointing_steps": 9}, "checkpoint_every", 9),
    ({}, "keep", 5),
    ({"checkpoints_total_limit": 2}, "keep", 2),
    ({"log_to_wandb": True}, "trackers", ["wandb"]),
    ({"gradient_checkpointing": True}, "task.checkpointing", True),
    ({}, "task.base", "stabilityai/stable-diffusion-xl-base-1.0"),
    ({"base": "folder"}, "task.base", "folder"),
    ({"unet_resume_from": "a/unet.safetensors"}, "init_from", "a/unet.safetensors"),
    ({"seed": 3}, "seed", 3),
    ({}, "data", {"name": "pictures", "path": "shards", "size": 1024}),
    ({"size": 512, "pipes": True}, "data", {"name": "pictures", "path": "shards", "size": 512, "pipes": True}),
    ({}, "prediction", "eps"),
    ({}, "clock", "table"),
    ({}, "schedule.name", "ldm"),
]


@pytest.mark.parametrize(("keys", "ours", "expected"), ROWS, ids=[f"{ours} {keys}" for keys, ours, _ in ROWS])
def test_every_key_becomes_ours(keys, ours, expected):
    found: Any = translated(**keys)
    for part in ours.split("."):
        found = found[part]
    assert found == expected


KINDS = {
    "unet_text_to_image": ("text_to_image", None, None, "wds_dataloader_unet_text_to_image_hq_dataset"),
    "unet_inpainting": ("inpaint", None, "random", "wds_dataloader_unet_inpainting_hq_dataset"),
    "ema_unet_inpainting": ("inpaint", None, "random", "wds_dataloader_unet_inpainting_hq_dataset"),
    "unet_inpainting_cross_attention_conditioning": (
        "inpaint_by_tokens",
        None,
        "random",
        "wds_dataloader_unet_inpainting_hq_dataset",
    ),
    "controlnet canny": ("controlnet", "canny", None, "wds_dataloader_unet_text_to_image_hq_dataset"),
    "controlnet inpainting": ("controlnet", "inpainting", "random", "wds_dataloader_controlnet_inpainting"),
    "adapter canny": ("adapter", "canny", None, "wds_dataloader_unet_text_to_image_hq_dataset"),
    "adapter inpainting": (
        "adapter",
        "inpainting",
        "random",
        "wds_dataloader_controlnet_inpainting_sdxl_synthetic_dataset",
    ),
}


def kind_keys(kind: str) -> dict[str, Any]:
    key, _, value = kind.partition(" ")
    return {"train_type": None, key: value} if value else {"train_type": key}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_task_and_data_of_ours(kind):
    task, control, hole, loader = KINDS[kind]
    made = {"canny": "controlnet_canny", "inpainting": "controlnet_inpainting"}.get(control, "unet_inpainting")
    told = (
        {} if kind == "unet_text_to_image" else {"validation_image_conditioning": f"data.get_{made}_conditioning_image"}
    )
    recipe = translated(**kind_keys(kind), dataloader=f"data.{loader}", **told)
    assert recipe == translated(**kind_keys(kind))  # which implies it
    assert recipe["task"]["name"] == task and recipe["task"].keys() <= option_types(FINETUNES[task]).keys() | {"name"}
    assert recipe["data"].keys() - {"name"} <= option_types(pictures).keys()
    assert recipe["data"].get("control", {}).get("name") == control
    assert recipe["data"].get("hole", {}).get("name") == hole


def test_the_kinds_are_all_there_are():
    assert {kind for kind in KINDS if " " not in kind} == set(TRAIN_TYPES)
    assert {kind.split()[1] for kind in KINDS if " " in kind} == set(CONTROLS)


@pytest.mark.parametrize("task", ["controlnet", "adapter"])
def test_a_helper_network_goes_on_from_its_own_weights(task):
    recipe = translated(train_type=None, **{task: "canny", f"{task}_resume_from": "old.safetensors"})
    assert recipe["task"]["start"] == "old.safetensors" and recipe["init_from"] == ""


def test_the_batch_is_of_all_processes():
    recipe = translate({**LEAST, "batch_size": 3, "gradient_accumulation_steps": 2}, processes=4)
    assert recipe["batch_size"] == 24


def test_what_is_not_used_is_said_in_a_line():
    line = theirs.unused({**LEAST, "shuffle_buffer_size": 10, "with_tqdm": False, "project_name": None})
    assert line.startswith("not used here: shuffle_buffer_size (") and "with_tqdm (" in line and "\n" not in line
    assert "project_name" not in line and theirs.unused(LEAST) == ""


# -- what is refused ---------------------------------------------------------------------------------------------------

BAD = {
    "nothing to train": ({"train_type": None}, "what is to be trained"),
    "two things to train": ({"controlnet": "canny"}, "train_type and controlnet"),
    "an unknown train_type": ({"train_type": "unet_inpaint"}, "unet_inpainting"),
    "an unknown control": ({"train_type": None, "controlnet": "depth"}, "canny"),
    "an unknown key": ({"max_train_step": 3}, "max_train_steps"),
    "a number as text": ({"learning_rate": "fast"}, "learning_rate"),
    "a truth as a number": ({"gradient_checkpointing": 1}, "gradient_checkpointing"),
    "a share above 1": ({"proportion_empty_prompts": 1.5}, "proportion_empty_prompts"),
    "no steps": ({"max_train_steps": 0}, "max_train_steps"),
    "no batch": ({"batch_size": 0}, "batch_size"),
    "a negative rate": ({"learning_rate": -1.0}, "learning_rate"),
    "an unknown precision": ({"mixed_precision": "fp8"}, "mixed_precision"),
    "no folder": ({"output_dir": None}, "output_dir"),
    "no shards": ({"train_shards": None}, "train_shards"),
    "code of the user's": ({"dataloader": "mine.loader"}, "code is not read"),
    "data of another kind": ({"dataloader": "data.wds_dataloader_unet_inpainting_hq_dataset"}, "text_to_image_hq"),
    "canny by the inpainting data": (
        {"train_type": None, "controlnet": "canny", "dataloader": "data.wds_dataloader_controlnet_inpainting"},
        "does not give what is trained on",
    ),
    "an average of nothing": ({"ema_decay": 0.99}, "ema_unet_inpainting"),
    "weights of another thing": ({"controlnet_resume_from": "x.safetensors"}, "unet_resume_from"),
    "a foreign optimizer's state": ({"optimizer_resume_from": "optimizer.bin"}, "leave it out"),
    "a foreign average": ({"ema_unet_resume_from": "ema_unet.bin"}, "leave it out"),
    "a step to start at": ({"start_step": 500}, "leave it out"),
    "pictures for a kind that reads none": ({"validation_images": ["a.png"]}, "validation_images"),
    "pictures made by the user's code": ({**CANNY, "validation_image_conditioning": "my.edges"}, "code is not read"),
    "pictures made into another thing": (
        {**CANNY, "validation_image_conditioning": "data.get_controlnet_inpainting_conditioning_image"},
        "get_controlnet_canny_conditioning_image",
    ),
    "pictures made into a thing where none is read": (
        {"validation_image_conditioning": "data.get_controlnet_canny_conditioning_image"},
        "validation_image_conditioning",
    ),
    "2 pictures and 3 prompts": (
        {**CANNY, "validation_images": ["a.png", "b.png"], "validation_prompts": ["a", "b", "c"]},
        "key validation_images",
    ),
    "prompts that are none": ({"validation_prompts": [1]}, "validation_prompts"),
    "no checkpoints kept": ({"checkpoints_total_limit": 0}, "checkpoints_total_limit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused_in_a_message(name):
    keys, said = BAD[name]
    with pytest.raises(UserError) as e:
        translated(**keys)
    assert said in str(e.value) and len(str(e.value).splitlines()) <= 6


def config_at(folder: Path, text: str = "", name: str = "w.yaml", **keys: Any) -> str:
    """A YAML file of the least keys, these, and lines of text as they stand."""
    given = {k: v for k, v in {**LEAST, "output_dir": str(folder / "run"), **keys}.items() if v is not None}
    (folder / name).write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in given.items()) + "\n" + text)
    return str(folder / name)


@pytest.fixture
def trained_configs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, list[str]]]:
    """What would have been trained."""
    seen: list[tuple[Config, list[str]]] = []
    monkeypatch.setattr(train_command, "train", lambda config, command: seen.append((config, list(command))) or 0)
    return seen


def test_one_source_is_taken_and_none_and_both_are_refused(tmp_path, monkeypatch, capsys, trained_configs):
    file = config_at(tmp_path, "learning_rate: 1e-4\n")  # as YAML 1.2 writes a number
    assert theirs.main(["--config_path", file]) == 0
    monkeypatch.setenv(VARIABLE, file)
    assert theirs.main([]) == 0
    (by_flag, command), (by_environment, _) = trained_configs
    assert by_flag == by_environment and by_flag.lr == 1e-4 and command[-2:] == ["--config_path", file]
    assert theirs.main(["--config_path", file]) == 2
    assert "several configurations" in (said := capsys.readouterr().err) and VARIABLE in said
    monkeypatch.delenv(VARIABLE)
    assert theirs.main([]) == 2
    assert "which recipe?" in capsys.readouterr().err and len(trained_configs) == 2


def test_keys_of_ours_count_more(tmp_path, trained_configs):
    assert theirs.main(["--config_path", config_at(tmp_path), "steps=5", "data.flip=true"]) == 0
    ((config, command),) = trained_configs
    assert config.steps == 5 and config.data["flip"] is True and command[-2:] == ["steps=5", "data.flip=true"]


def test_a_dry_run_prints_a_recipe_of_ours(tmp_path, capsys, trained_configs):
    from nanodiffusion.cli.recipes import find_recipe, read_yaml

    assert theirs.main(["--config_path", config_at(tmp_path), "--dry-run"]) == 0 and not trained_configs
    (tmp_path / "ours.yaml").write_text(capsys.readouterr().out)
    recipe = read_yaml(find_recipe(str(tmp_path / "ours.yaml")))
    assert read_config(recipe) == read_config(translated(output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output_dir: [", "cannot be read"),
        ("- a list", "a mapping"),
        ("train_shards: ${oc.env:HOME}", "its own keys only"),
        ("train_typ: x", "train_type"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, text, said):
    (tmp_path / "bad.yaml").write_text(text)
    assert theirs.main(["--config_path", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error and "bad.yaml" in error and "Traceback" not in error


@pytest.mark.parametrize("where", ["gone.yaml", "w.json"])
def test_a_file_that_is_not_there_or_no_yaml_is_refused(tmp_path, capsys, where):
    assert theirs.main(["--config_path", str(tmp_path / where)]) == 2
    assert where in capsys.readouterr().err


def test_a_recipe_of_ours_comes_by_name_flag_or_environment_alone(tmp_path, monkeypatch, capsys, trained_configs):
    (tmp_path / "mine.yaml").write_text("steps: 7\n")
    mine = str(tmp_path / "mine.yaml")
    assert nanodiffusion(["train", "--config_path", mine, "lr=1e-4"]) == 0
    monkeypatch.setenv(VARIABLE, mine)
    assert nanodiffusion(["train", "lr=1e-4"]) == 0
    by_flag, by_environment = trained_configs
    assert by_flag == by_environment and by_flag[0].steps == 7 and by_flag[0].name == "mine"
    for words in (["digits"], ["--config_path", mine], ["--config-name=digits"]):
        assert nanodiffusion(["train", *words]) == 2
        assert "several configurations" in capsys.readouterr().err
    assert len(trained_configs) == 2


# -- the Slurm script, as text -----------------------------------------------------------------------------------------

OPTIONS = {  # of sbatch, as its manual has them
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+(:\d\d){1,2}",
    "output": r"\S*(%j)\S*",
    "open-mode": r"append|truncate",
    "requeue": r"",
    "signal": r"([RB]+:)?[A-Z0-9]+(@\d{1,5})?",
}


def test_the_header_is_one_that_sbatch_takes():
    lines = SLURM.read_text().splitlines()
    assert lines[0].startswith("#!")
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch reads no further
    found = dict(re.fullmatch(r"#SBATCH --([a-z-]+)=?(.*)", line).groups() for line in lines if "#SBATCH" in line)
    assert found.keys() == OPTIONS.keys()
    assert [key for key, value in found.items() if not re.fullmatch(OPTIONS[key], value)] == []
    grace = int(re.search(r"GRACE:-(\d+)", SLURM.read_text())[1])
    assert grace < int(found["signal"].partition("@")[2]) and found["ntasks-per-node"] == "1"


def test_the_script_is_clean():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck")
    done = subprocess.run([shellcheck, str(SLURM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- trained -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of two photos each, small."""
    place = tmp_path_factory.mktemp("shards")
    for k in range(2):
        with tarfile.open(place / f"0000{k}.tar", "w") as archive:
            for name in PHOTOS[2 * k : 2 * k + 2]:
                out = io.BytesIO()
                Image.fromarray(np.asarray(getattr(skimage.data, name)())[..., :3]).resize((96, 80)).save(out, "PNG")
                for member, data in ((f"{name}.png", out.getvalue()), (f"{name}.txt", b"a photo of the sea")):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(place / "{00000..00001}.tar")


def config_of(folder: Path, shards: str, name: str = "w.yaml", **keys: Any) -> str:
    """A YAML file that trains a tiny SDXL on them."""
    small = {"train_shards": shards, "base": str(sd_files.tree("sdxl")), "size": 64, "max_train_steps": 3}
    small |= {"batch_size": 2, "validation_steps": 2, "num_validation_timesteps": 2, "learning_rate": 1e-4}
    return config_at(folder, name=name, **{**small, **keys})


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    one = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": ":".join(paths), "PYTHONPATH": str(ROOT)}
    return {**kept, **one, **more}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(checkpoints(run / "checkpoint")[0] / "model.safetensors")[0]


def losses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_e14_to_e17_one_process_and_two_by_the_environment_and_by_the_flag(tmp_path, shards):
    """The README's four commands in the example's folder; both sources give the same weights, and so do 1 and 2 processes."""
    found = {}
    for processes in (1, 2):
        for source in ("environment", "flag"):
            name = f"{source}-{processes}"
            out = str(tmp_path / name)
            file = config_of(tmp_path, shards, f"{name}.yaml", output_dir=out, batch_size=4 // processes)
            torchrun = ["torchrun", "--standalone", f"--nproc_per_node={processes}", "train.py"]
            by_flag = source == "flag"
            command = [*torchrun, *(["--config_path", file] if by_flag else [])]
            given = environment(**({} if by_flag else {VARIABLE: file}))
            done = subprocess.run(command, cwd=FOLDER, env=given, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("trained 3 steps") == 1 and ("x 2" in done.stdout) == (processes == 2)
            found[name] = weights(tmp_path / name)
    for processes in (1, 2):
        assert_close(found[f"environment-{processes}"], found[f"flag-{processes}"], rtol=0, atol=0)
    assert_close(found["flag-1"], found["flag-2"], rtol=0, atol=2e-5)
    start = sd_files.tensors(sd_files.tree("sdxl") / "unet")
    made = load_file(tmp_path / "flag-1" / "unet" / "diffusion_pytorch_model.safetensors")
    assert made.keys() == start.keys() and any(not torch.equal(made[k], start[k]) for k in start)
    names = {path.name for path in (tmp_path / "flag-1").iterdir()}
    assert {"checkpoint", "metrics.jsonl", "samples", "samples.png", "unet", "report.html"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("both", "said"), [(True, "several configurations"), (False, "which recipe?")], ids=["both", "none"]
)
def test_torchrun_with_both_sources_or_none_ends_with_a_message(tmp_path, both, said):
    file = config_at(tmp_path)
    command = ["torchrun", "--standalone", "--nproc_per_node=1", "train.py", *(["--config_path", file] if both else [])]
    given = environment(**({VARIABLE: file} if both else {}))
    done = subprocess.run(command, cwd=FOLDER, env=given, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and f"error: {said}" in done.stderr


MADE = {"text_to_image": "unet", "inpaint": "unet", "inpaint_by_tokens": "tokens.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_leaves_what_it_makes(tmp_path, shards, kind, capsys):
    Image.fromarray(skimage.data.coffee()).save(tmp_path / "coffee.png")
    given = {} if kind == "unet_text_to_image" else {"validation_images": str(tmp_path / "coffee.png")}
    file = config_of(tmp_path, shards, **kind_keys(kind), validation_prompts=["a red cat"], **given)
    assert theirs.main(["--config_path", file]) == 0, capsys.readouterr().err
    run, task = tmp_path / "run", KINDS[kind][0]
    assert (run / MADE.get(task, task)).exists() and (run / "samples.png").exists()
    assert np.isfinite(losses(run)[-1]["loss"]) and losses(run)[-1]["step"] == 3
    assert (checkpoints(run / "checkpoint")[0] / "ema-0.safetensors").exists() == kind.startswith("ema")
    assert theirs.main(["--config_path", file]) == 0 and "is finished" in capsys.readouterr().out
    assert theirs.main(["--config_path", file, "steps=4"]) == 0
    assert "resuming" in capsys.readouterr().out and losses(run)[-1]["step"] == 4


@pytest.mark.slow
def test_training_starts_from_weights_of_an_earlier_one(tmp_path, shards):
    first = config_of(tmp_path, shards, "first.yaml", output_dir=str(tmp_path / "first"))
    assert theirs.main(["--config_path", first]) == 0
    made = tmp_path / "first/unet/diffusion_pytorch_model.safetensors"
    again = config_of(tmp_path, shards, unet_resume_from=str(made), learning_rate=0.0, max_train_steps=1)
    assert theirs.main(["--config_path", again]) == 0
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "first"), rtol=0, atol=0)


@pytest.mark.slow
def test_a_unet_with_tokens_starts_from_a_file_of_both_as_that_system_has_it(tmp_path, shards):
    """The U-Net's names and the tokens' side by side, without what ours put before them; a U-Net alone is told."""
    keys = kind_keys("unet_inpainting_cross_attention_conditioning")
    first = config_of(tmp_path, shards, "first.yaml", output_dir=str(tmp_path / "first"), **keys)
    assert theirs.main(["--config_path", first]) == 0
    left = tmp_path / "first"
    both = load_file(left / "unet/diffusion_pytorch_model.safetensors") | load_file(left / "tokens.safetensors")
    save_file(both, tmp_path / "both.safetensors")
    again = config_of(
        tmp_path,
        shards,
        unet_resume_from=str(tmp_path / "both.safetensors"),
        learning_rate=0.0,
        max_train_steps=1,
        **keys,
    )
    assert theirs.main(["--config_path", again]) == 0
    assert_close(weights(tmp_path / "run"), weights(left), rtol=0, atol=0)


# -- E18: a cluster of two machines that are this one ------------------------------------------------------------------

SRUN = """\
#!/usr/bin/env bash
# Each task in a process group of its own, to all of which USR1 is passed on; the worst exit status.
while [[ "$1" == --* ]]; do shift; done
tasks=() worst=0
trap 'caught=1; for one in "${tasks[@]}"; do kill -USR1 -- "-$one"; done' USR1
for ((i = 0; i < SLURM_NNODES; i++)); do
    SLURM_NODEID=$i setsid "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    while :; do
        caught=0 status=0
        wait "$task" || status=$?
        ((caught)) || break
    done
    worst=$((status > worst ? status : worst))
done
exit "$worst"
"""
SCONTROL = """\
#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") for ((i = 0; i < SLURM_NNODES; i++)); do echo localhost; done ;;
requeue*) echo "$2" >> "$REQUEUED" ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """What sbatch would set in the environment of a job of two machines, srun and scontrol among it."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(10_000 + os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,localhost"}
    given = environment(**job, PROCESSES="1", REQUEUED=str(tmp_path / "requeued"))
    return {**given, "PATH": f"{place}:{given['PATH']}"}


def sbatch(*words: str, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """The script as a batch job, its output to a file."""
    with log.open("ab") as out:
        return subprocess.Popen(["bash", str(SLURM), *words], env=env, cwd=log.parent, stdout=out, stderr=out)


def wait_for(file: Path, job: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.1)


TORCHRUN = """\
#!/usr/bin/env bash
# Writes down how it is called, and ends with status $ENDS; or, where that is empty, by TERM, with status $STOPPED.
if [[ "$1" == --help ]]; then echo "$FLAGS"; exit 0; fi
trap 'echo TERM >> "$CALLS"; exit "$STOPPED"' TERM
echo "$*" >> "$CALLS"
[[ -n "$ENDS" ]] && exit "$ENDS"
while :; do sleep 0.05; done
"""


@pytest.fixture
def quick(tmp_path: Path, cluster: dict[str, str]) -> dict[str, str]:
    """The same cluster with a torchrun that trains nothing."""
    (tmp_path / "bin" / "torchrun").write_text(TORCHRUN)
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    more = {"CALLS": str(tmp_path / "calls"), "FLAGS": "--shutdown-timeout", "ENDS": "0", "STOPPED": "1"}
    return {**cluster, **more}


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_every_machine_runs_the_same_torchrun_that_meets_on_the_first(tmp_path, quick):
    words = ("sd-lora", "data.path=my photos", "sample.prompts=[a cat]")
    assert sbatch(*words, env={**quick, "PROCESSES": "8", "RESTARTS": "2"}, log=tmp_path / "log").wait(30) == 0
    job = int(quick["SLURM_JOB_ID"])
    launch = (
        f"--shutdown-timeout=540 --nnodes=2 --nproc-per-node=8 --max-restarts=2 --rdzv-backend=c10d --rdzv-id={job}-0"
    )
    program = "-m nanodiffusion train sd-lora data.path=my photos sample.prompts=[a cat]"
    assert calls(tmp_path) == [f"{launch} --rdzv-endpoint=localhost:{20000 + job % 10000} {program}"] * 2


def test_a_torchrun_without_the_flag_is_not_given_it(tmp_path, quick):
    assert sbatch(env={**quick, "FLAGS": "", VARIABLE: "w.yaml"}, log=tmp_path / "log").wait(30) == 0
    assert all(call.startswith("--nnodes=2 ") for call in calls(tmp_path))
    assert all(call.endswith("-m nanodiffusion.compat.nano_sdxl_train") for call in calls(tmp_path))


@pytest.mark.parametrize(("stopped", "again"), [("1", True), ("0", False)], ids=["stopped", "done"])
def test_a_warned_job_stops_every_machine_and_is_queued_again_unless_it_is_done(tmp_path, quick, stopped, again):
    job = sbatch("sd-lora", env={**quick, "ENDS": "", "STOPPED": stopped}, log=tmp_path / "log")
    wait_for(tmp_path / "calls", job)
    while len(calls(tmp_path)) < 2:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert calls(tmp_path)[2:] == ["TERM", "TERM"] and (tmp_path / "requeued").exists() == again


def test_a_job_that_fails_ends_with_its_status(tmp_path, quick):
    assert sbatch("sd-lora", env={**quick, "ENDS": "3"}, log=tmp_path / "log").wait(30) == 3
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_e18_two_machines_train_by_the_environment(tmp_path, shards, cluster):
    log = tmp_path / "train.log"
    job = sbatch(env={**cluster, VARIABLE: config_of(tmp_path, shards)}, log=log)
    assert job.wait(300) == 0, log.read_text()
    assert "x 2" in log.read_text() and losses(tmp_path / "run")[-1]["step"] == 3
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_the_script_trains_a_recipe_with_overrides(tmp_path, cluster):
    log = tmp_path / "train.log"
    job = sbatch("swissroll", "steps=9", "out=here", "batch_size=64", env=cluster, log=log)
    assert job.wait(300) == 0, log.read_text()
    assert checkpoints(tmp_path / "here/swissroll/checkpoint")[0].name == "step-00000009"


def test_the_script_without_recipe_and_configuration_says_how_it_is_called(tmp_path, cluster):
    log = tmp_path / "train.log"
    assert sbatch(env=cluster, log=log).wait(60) != 0
    assert "train.slurm RECIPE" in log.read_text()


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_queued_again_and_ends_as_if_nothing_had_been(tmp_path, shards, cluster):
    keys = {"max_train_steps": 24, "validation_steps": 0, "checkpointing_steps": 5}
    log, run = tmp_path / "train.log", tmp_path / "run"
    env = {**cluster, VARIABLE: config_of(tmp_path, shards, **keys)}
    job = sbatch(env=env, log=log)
    wait_for(run / "checkpoint" / "step-00000005", job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, log.read_text()
    assert (tmp_path / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    assert "saved in" in log.read_text()
    stopped = int(checkpoints(run / "checkpoint")[0].name[5:])
    assert 5 <= stopped < 24
    job = sbatch(env={**env, "SLURM_RESTART_COUNT": "1"}, log=log)
    assert job.wait(300) == 0, log.read_text()
    assert f"resuming {run} at step {stopped}" in log.read_text()
    whole = config_of(tmp_path, shards, "whole.yaml", **keys, output_dir=str(tmp_path / "whole"))
    assert sbatch(env={**cluster, VARIABLE: whole}, log=log).wait(300) == 0
    assert_close(weights(run), weights(tmp_path / "whole"), rtol=0, atol=0)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def processes_of(pid: int, command: str) -> list[int]:
    """Descendants of a process whose command line has these words in it."""
    found = []
    for child in children_of(pid):
        words = Path(f"/proc/{child}/cmdline")
        if words.exists() and command in words.read_bytes().replace(b"\0", b" ").decode():
            found.append(child)
        found += processes_of(child, command)
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep")
def test_a_lost_process_is_replaced_and_training_goes_on_from_the_last_checkpoint(tmp_path, shards, cluster):
    keys = {"max_train_steps": 20, "validation_steps": 0, "checkpointing_steps": 5}
    log, run = tmp_path / "train.log", tmp_path / "run"
    job = sbatch(env={**cluster, VARIABLE: config_of(tmp_path, shards, **keys)}, log=log)
    wait_for(run / "checkpoint" / "step-00000005", job)
    lost = processes_of(job.pid, "-u -m nanodiffusion")[-1]
    os.kill(lost, signal.SIGKILL)
    assert job.wait(300) == 0, log.read_text()
    assert "resuming" in log.read_text() and checkpoints(run / "checkpoint")[0].name == "step-00000020"
    steps = [row["step"] for row in losses(run)]
    assert steps == sorted(set(steps))
