"""Every notebook runs from its first cell to its last, on a tiny checkpoint and in a kernel of this very interpreter."""

import ast
import atexit
import base64
import io
import json
import re
import shutil
import sys
import tempfile
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

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FAMILIES = ("sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow))
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
    """The notebook after its run, the folder that it ran in, and the facts of the probe."""
    notebook = source(name)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    folder = Path(tempfile.mkdtemp(prefix="nb-"))  # short: the sockets' names have a limit of some hundred letters
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(sd_files.tree(family))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"SD_MODEL": path, "SD_STEPS": str(STEPS), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(key, value)
        for key in ("SD_SIZE", "SD_PHOTO", "SD_INVERSION"):
            patch.delenv(key, raising=False)
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


def test_the_checkpoint_is_named_in_one_cell():
    naming = [cell.source for cell in source("stable_diffusion.ipynb").cells if "SD_MODEL" in cell.source]
    assert naming == ['model = os.environ.get("SD_MODEL", "stable-diffusion-v1-5/stable-diffusion-v1-5")']


# -- as run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_stable_diffusion_runs_and_shows_its_pictures(family):
    notebook, work, _ = executed("stable_diffusion.ipynb", family)
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    ]
    assert not [output.text for output in streams if "Warning" in output.text]
    shown = [cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", [])]
    assert len(shown) == 18
    for cell in shown:
        found = media(cell, "image/png")
        assert found, cell.source
        for data in found:
            low, high = pixels(data).T
            assert (low < high).any(), cell.source  # something is in it
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
