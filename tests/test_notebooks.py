"""Every notebook runs from its first cell to its last, on something tiny and in a kernel of this very interpreter."""

import ast
import atexit
import base64
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import nbformat
import pytest
import sd_files
import torch
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image, ImageSequence
from torch.testing import assert_close

from nanodiffusion.noise import SCHEDULES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FAMILIES = [pytest.param(family, marks=pytest.mark.slow) for family in ("sd1", "sd2", "sdxl")]
SETTINGS = ("SD_", "TOY_", "SCHEDULES_", "ARCHITECTURE_", "INFERENCE_")  # how the names of variables they read begin
STEPS, SEED = 7, 1632  # the loss guides the first step of every five: two of seven
# What a last cell, added here, reads out of the kernel.
PROBE = """
import json
facts = {
    "ids": list(ids.shape), "context": list(context.shape), "both": list(both["context"].shape),
    "sigmas": sigmas.tolist(), "t": schedule.t(sigmas[:-1]).tolist(), "asked": asked, "eps": eps.flatten().tolist(),
    "eps_shape": list(eps.shape), "difference": difference, "film": len(film), "losses": len(losses), "ladder": len(ladder),
    "token": learned.token, "table": schedule.sigmas.tolist(),
}
print(json.dumps(facts))
"""


# The notebooks that need no checkpoint: the environment that makes them small, how many of their cells show pictures, and what
# a last cell, added here, reads out of the kernel.
SMALL = {
    "toy": {"TOY_STEPS": "60", "TOY_POINTS": "200"},
    "noise_schedules": {"SCHEDULES_SIDE": "64"},
    "architecture": {"ARCHITECTURE_STEPS": "3"},
    "inference": {
        "INFERENCE_TRAIN_STEPS": "4",
        "INFERENCE_CLASSES": "3",
        "INFERENCE_ROWS": "1",
        "INFERENCE_MEASURED": "2",
        "INFERENCE_STEPS": "10",
        "INFERENCE_FINE": "4",
    },
}
SHOWN = {"toy": 10, "noise_schedules": 10, "architecture": 7, "inference": 8}
PROBES = {
    "toy": """
import json
place, spread_of_one = torch.tensor([[0.3, -0.2]]), 0.25
print(json.dumps({
    "data": data.tolist(), "D": ideal(place, at(spread_of_one, 1))[0].tolist(), "floor": floor.tolist(),
    "sigmas": sigmas.tolist(), "loss": loss.tolist(), "excess": excess.tolist(), "ladder": ladder.tolist(),
    "sigma": as_x["sigma"].tolist(), "flow": as_x["flow"].tolist(), "vp": as_x["vp"].tolist(),
}))
""",
    "noise_schedules": """
import json
print(json.dumps({
    "last": {name: float(s[-1]) for name, s in tables.items()}, "decibel": float(decibel(0.1)), "worst": worst,
    "shifted": t_shifted.tolist(), "photo": list(x0.shape), "levels": level,
}))
""",
    "architecture": """
import json
print(json.dumps({
    "sizes": {name: net_size(net) for name, net in large.items()}, 
    "xl": net_flops(large["DiT-XL/2"], {"label": torch.zeros(1, dtype=torch.int64)}),
    "fields": {name: int((influence(*[layer], 48, is_map) > 0).sum()) for name, (layer, is_map) in layers.items()},
    "products": products[center].tolist(), "parts": {name: sum(part.values()) for name, part in shares.items()},
    "small": {name: net_size(net) for name, net in nets.items()},
}))
""",
    "inference": """
import json
print(json.dumps({
    "path": str(path), "shape": list(run.shape), "subjects": subjects, "levels": levels, "seen": len(seen), "known": len(known),
    "guessed": len(guessed), "first": (seen[0] / levels[0])[0].flatten().tolist(), "versions": len(versions),
}))
""",
}


def source(name):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def kernel(folder):
    """A manager of kernels of this interpreter, which talk through files: neither ports nor the user's own kernels."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "tests"}
    place = folder / "kernels" / "tests"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    return AsyncKernelManager(kernel_name="tests", transport="ipc", connection_file=str(folder / "k.json"))


@cache
def executed(name, family):
    """`stable_diffusion.ipynb` after its run, the folder that it ran in, and the facts of the probe."""
    return run(name, {"SD_MODEL": str(sd_files.tree(family)), "SD_STEPS": str(STEPS)}, PROBE)


@cache
def small(name):
    """The same of a notebook that needs no checkpoint."""
    return run(f"{name}.ipynb", SMALL[name], PROBES[name])


def run(name, environment, probe):
    notebook = source(name)
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    folder = Path(tempfile.mkdtemp(prefix="nb-"))  # short: the sockets' names have a limit of some hundred letters
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith(SETTINGS)]:
            patch.delenv(key)
        for key, value in {**environment, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(key, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        work = folder / "work"
        work.mkdir()
        client = NotebookClient(
            notebook, km=kernel(folder), timeout=120, resources={"metadata": {"path": str(work)}}
        )  # a cell that raises, in an assert too, ends the run and is shown
        client.execute()
    return notebook, work, json.loads(notebook.cells[-1].outputs[0].text)


def media(cell, kind):
    return [output.data[kind] for output in cell.get("outputs", []) if kind in output.get("data", {})]


def pixels(data):
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return torch.tensor(image.convert("RGB").getextrema())


def check_outputs(notebook, count):
    """Nothing warned, and every one of so many cells for pictures shows some with something in them."""
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    ]
    assert not [output.text for output in streams if "Warning" in output.text]
    shown = [cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", [])]
    assert len(shown) == count
    for cell in shown:
        found = media(cell, "image/png")
        assert found, cell.source
        for data in found:
            low, high = pixels(data).T
            assert (low < high).any(), cell.source


# -- as committed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_without_outputs_and_is_sound(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_speaks_the_vocabulary_of_the_library(path):
    text = path.read_text()
    assert not re.findall(r"hidden_states|noise_pred|model_output|latent_model_input|prev_sample", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_names_modules_that_are_there(path):
    said = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    named = re.findall(r"`((?:\w+/)+|(?:\w+/)*\w+\.py)`", said)
    assert [name for name in named if name != "runs/" and not (ROOT / "nanodiffusion" / name).exists()] == []


def test_the_notebook_of_schedules_plots_and_counts_all_of_the_library():
    cells = [cell.source for cell in source("noise_schedules.ipynb").cells]
    (groups,) = (
        re.search(r"^groups = (\{.*?^\})", cell, re.DOTALL | re.MULTILINE) for cell in cells if "groups = {" in cell
    )
    assert groups
    plotted = [name for names in ast.literal_eval(groups[1]).values() for name in names]
    assert sorted(plotted) == sorted(SCHEDULES.keys() - {"sigmas"})
    assert re.findall(r"(\w+) schedules[,.] ", "\n".join(cells)) == ["Ten", "ten"] and len(plotted) == 10
    (end,) = (re.search(r"- (.*) end in \(nearly\) pure noise", cell) for cell in cells if "end in (nearly)" in cell)
    assert end
    last = {name: float(SCHEDULES[name]().sigmas[-1]) for name in plotted}
    said = [name for name in plotted if any(fnmatch(name, like) for like in re.findall("`(.*?)`", end[1]))]
    assert said == [name for name in plotted if last[name] > 1000]


def test_the_checkpoint_is_named_in_one_cell():
    naming = [cell.source for cell in source("stable_diffusion.ipynb").cells if "SD_MODEL" in cell.source]
    assert naming == ['model = os.environ.get("SD_MODEL", "stable-diffusion-v1-5/stable-diffusion-v1-5")']


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_says_first_what_is_known_at_its_end(name):
    first = source(f"{name}.ipynb").cells[0]
    assert first.cell_type == "markdown" and "At the end you will know" in " ".join(first.source.split())


@pytest.mark.parametrize("name", SMALL)
def test_all_settings_of_a_notebook_are_those_that_the_tests_make_small(name):
    code = "\n".join(cell.source for cell in source(f"{name}.ipynb").cells if cell.cell_type == "code")
    read = set(re.findall(r'environ.get\("(\w+)"', code))
    free = {"SCHEDULES_PHOTO", "INFERENCE_RUN", "INFERENCE_GUIDANCE"}
    assert read - free == set(SMALL[name]) and all(key.startswith(SETTINGS) for key in read)


# -- as run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_stable_diffusion_runs_and_shows_its_pictures(family):
    notebook, work, _ = executed("stable_diffusion.ipynb", family)
    check_outputs(notebook, 18)
    (film,) = [cell for cell in notebook.cells if "film" in cell.metadata.get("tags", [])]
    (gif,) = media(film, "image/gif")
    with Image.open(io.BytesIO(base64.b64decode(gif))) as frames:
        assert 1 < len(list(ImageSequence.Iterator(frames))) <= STEPS
    assert sorted(path.suffix for path in (work / "outputs").iterdir()) == [".gif", ".mp4", ".safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_the_walk_are_those_of_the_notes(family):
    _, _, facts = executed("stable_diffusion.ipynb", family)
    width = {"sd1": 64, "sd2": 128, "sdxl": 192}[family]
    assert facts["ids"] == [1, 77]
    assert facts["context"] == [1, 77, width]
    assert facts["both"] == [2, 77, width]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = (1 / (1 - betas).cumprod(0) - 1).sqrt()
    sigmas, t = (torch.tensor(facts[key], dtype=torch.float64) for key in ("sigmas", "t"))
    assert_close(torch.tensor(facts["table"], dtype=torch.float64), table)
    assert len(sigmas) == STEPS + 1 and sigmas[-1] == 0
    assert_close(sigmas[0], table[-1])
    assert_close(t, torch.linspace(999, 0, STEPS, dtype=torch.float64))
    assert facts["asked"] == facts["sigmas"][:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_by_hand_is_the_loop_of_the_library(family):
    assert executed("stable_diffusion.ipynb", family)[2]["difference"] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_seed_s_noise_and_image_to_image_starts_lower(family):
    _, _, facts = executed("stable_diffusion.ipynb", family)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    assert facts["eps_shape"] == [1, 4, 8, 8]
    assert_close(torch.tensor(facts["eps"]), noise.flatten())
    assert facts["ladder"] == round(0.8 * STEPS) + 1
    assert facts["film"] == STEPS and facts["losses"] == 2


def test_the_notebook_asserts_what_it_says():
    cells = [cell.source for cell in source("stable_diffusion.ipynb").cells if cell.cell_type == "code"]
    checks = [node for cell in cells for node in ast.walk(ast.parse(cell)) if _checks(node)]
    assert len(checks) >= 40


def _checks(node):
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "assert_close"
    return isinstance(node, ast.Assert) or named


# -- the four that need no checkpoint ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_and_shows_its_pictures(name):
    notebook, _, _ = small(name)
    check_outputs(notebook, SHOWN[name])


@pytest.mark.slow
def test_the_ideal_denoiser_of_the_toy_is_bayes_rule_and_its_loss_splits_in_two():
    _, _, facts = small("toy")
    points, place, sigma = facts["data"], (0.3, -0.2), 0.25
    weight = [math.exp(-((place[0] - a) ** 2 + (place[1] - b) ** 2) / (2 * sigma**2)) for a, b in points]
    mean = [sum(w * point[axis] for w, point in zip(weight, points)) / sum(weight) for axis in (0, 1)]
    assert facts["D"] == pytest.approx(mean, abs=1e-6)
    assert len(points) == 100 and min(facts["floor"]) >= 0
    assert facts["floor"][-1] < 0.02  # (root mean square of the data, 0.47, over sigma = 8)^2
    assert facts["loss"] == pytest.approx([a + b for a, b in zip(facts["floor"], facts["excess"])], abs=0.3)


@pytest.mark.slow
def test_the_toy_samples_the_same_in_the_coordinates_of_three_families():
    _, _, facts = small("toy")
    sigma, flow, vp = (torch.tensor(facts[key]) for key in ("sigma", "flow", "vp"))
    assert sigma.shape == (21, 14, 2) and sigma[0].std() > 5 > sigma[-1].abs().max() * 0.5
    assert_close(flow, sigma, atol=1e-3, rtol=1e-3)
    assert_close(vp, sigma, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_schedules_end_where_their_papers_say():
    _, _, facts = small("noise_schedules")
    betas = {"ddpm": torch.linspace(1e-4, 0.02, 1000), "ldm": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}
    for name, beta in betas.items():
        left = float((1 - beta.double()).prod())
        assert facts["last"][name] == pytest.approx(math.sqrt((1 - left) / left), rel=1e-3)
    assert facts["last"]["log_linear"] == pytest.approx(10) and facts["decibel"] == pytest.approx(20)
    assert facts["levels"]["gamma_linear"][2] == pytest.approx(1, abs=0.01)  # gamma = 1/2 at half time
    assert facts["levels"]["flow"][4] == pytest.approx(9, rel=0.01)  # 0.9 / 0.1
    assert facts["photo"] == [1, 3, 64, 64]


@pytest.mark.slow
def test_a_larger_picture_is_hidden_by_more_noise_as_the_formula_says():
    _, _, facts = small("noise_schedules")
    assert facts["worst"] < 0.2  # of a correlation, measured on 8 x 8 places of three channels
    t = torch.linspace(1, 0, 9, dtype=torch.float64)[1:]
    shifted = torch.tensor(facts["shifted"], dtype=torch.float64)[1:]
    assert_close(shifted, 4 * t / (1 + 3 * t), atol=2e-3, rtol=0)  # the table's last time is not quite 1


@pytest.mark.slow
def test_the_nets_have_the_published_sizes():
    _, _, facts = small("architecture")
    assert facts["sizes"]["DiT-XL/2"] == pytest.approx(675e6, rel=1e-3)  # Peebles & Xie 2023, table 4
    assert facts["xl"] / 2e9 == pytest.approx(118.6, abs=0.1)  # multiply-adds, the same table
    assert facts["sizes"]["TLD (its default)"] == 101_164_352
    assert facts["parts"] == facts["small"]  # every parameter is in one part


@pytest.mark.slow
def test_receptive_fields_are_those_of_the_kernels():
    _, _, facts = small("architecture")
    assert list(facts["fields"].values()) == [1, 9, 25, 256, 256]
    side = torch.arange(16, dtype=torch.float64)
    angle = (side - 7)[:, None] * 10000.0 ** -(torch.arange(24, dtype=torch.float64) / 24)
    along = angle.cos().sum(1)  # sin a sin b + cos a cos b = cos(a - b)
    assert_close(torch.tensor(facts["products"]), (along[:, None] + along).flatten().float(), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_run_behind_the_inference_notebook_is_made_where_there_is_none():
    _, work, facts = small("inference")
    assert facts["path"] == "runs/notebook-digits" and (work / facts["path"] / "checkpoint").is_dir()
    assert facts["shape"] == [1, 8, 8] and facts["subjects"] == ["0", "1", "2"]
    assert facts["levels"] == sorted(facts["levels"], reverse=True) and facts["levels"][-1] == 0
    assert facts["seen"] == facts["guessed"] == 11 and facts["versions"] == 6
    noise = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(torch.tensor(facts["first"]), noise.flatten())
