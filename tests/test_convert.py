"""`nanodiffusion convert`: the one place where pickles are read, and what they cannot do there."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from nanodiffusion.cli import convert, main
from nanodiffusion.cli.convert import Inert, Order, read_order
from nanodiffusion.errors import UserError
from nanodiffusion.pretrained.weights import read_json, source_of

PACKAGE = Path(convert.__file__).parents[1]


def state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=g),
        "a.bias": torch.randn(3, generator=g).half(),
        "n": torch.arange(3),
    }


def same(path: Path, wanted: dict[str, Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, rtol=0, atol=0)


def of_lightning() -> tuple[type, dict[str, types.ModuleType]]:
    """A class as a trainer's checkpoint names it, and the modules it seems to come from."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    kind = type("ModelCheckpoint", (), {"__module__": name})
    modules = {n: types.ModuleType(n) for n in ("pytorch_lightning", "pytorch_lightning.callbacks", name)}
    modules[name].ModelCheckpoint = kind  # type: ignore[attr-defined]
    return kind, modules


class Call:
    """Unpickled by the ordinary way this calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


# -- the command ---------------------------------------------------------------------------------------------------------


def test_a_training_state_becomes_its_weights_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, modules = of_lightning()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    whole = {"state_dict": state(), "global_step": 7, "callbacks": {kind: {"best": 1.0}, "more": kind()}}
    torch.save(whole, tmp_path / "a.ckpt")
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "new" / "a.safetensors")]) == 0
    same(tmp_path / "new" / "a.safetensors", state())
    assert "3 tensors" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_a_payload_is_named_and_neither_run_nor_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "touched"
    torch.save({"state_dict": state(), "x": Call(os.system, f"touch {target}")}, tmp_path / "a.ckpt")
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "out" / "a.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "a.ckpt" in said and "posix.system" in said
    assert not target.exists() and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("limit", "words"),
    [("memory=0.02", "more memory than it is allowed"), ("seconds=0.05", "it took more than 0.05 s")],
)
def test_memory_and_time_are_limited(
    tmp_path: Path, limit: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.zeros(30_000_000)}, tmp_path / "a.ckpt")
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "out.safetensors"), limit]) == 2
    said = capsys.readouterr().err
    assert words in said and limit.split("=")[0] in said
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


BAD: list[tuple[list[str], str]] = [
    ([], "two paths"),
    (["a.ckpt"], "two paths"),
    (["none.ckpt", "b.safetensors"], "nothing to convert"),
    (["a.ckpt", "there.safetensors"], "there already"),
    (["a.ckpt", "b.safetensors", "dtype=fp8"], "unknown dtype"),
    (["a.ckpt", "b.safetensors", "memory=-1"], "not a positive number"),
    (["a.ckpt", "b.safetensors", "speed=3"], "unknown key"),
    (["there.safetensors", "b.safetensors"], "nothing to convert"),
    (["there.safetensors", "b.ckpt"], "convert to what"),
    (["there.safetensors", "folder"], "no whole checkpoint"),
    (["empty", "b.safetensors"], "no checkpoint"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_mistakes_are_told_at_once(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state(), "a.ckpt")
    save_file(state(), "there.safetensors")
    Path("empty").mkdir()
    monkeypatch.setattr(convert, "_child", lambda *_: pytest.fail("a process was started"))
    assert main(["convert", *words]) == 2
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) <= 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "empty", "there.safetensors"]


def test_a_dtype_is_given_to_floats_only(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "dtype=bf16"]) == 0
    same(tmp_path / "b.safetensors", {k: v.bfloat16() if v.is_floating_point() else v for k, v in state().items()})


def test_what_the_child_dies_of_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state(), tmp_path / "a.ckpt")
    monkeypatch.setattr(convert.sys, "executable", shutil.which("false"))
    order = Order(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="its reader ended with 1"):
        list(convert.convert(order))


# -- checkpoints of the family -------------------------------------------------------------------------------------------


def test_of_a_mixed_folder_all_weights_are_kept_and_shards_with_their_index(tmp_path: Path) -> None:
    old, new, weights = tmp_path / "old", tmp_path / "new", state()
    for part in ("unet", "text_encoder", "vae"):
        (old / part).mkdir(parents=True)
    save_file(weights, old / "unet/diffusion_pytorch_model.safetensors")
    shards = {f"pytorch_model-0000{i}-of-00003.bin": {name: weights[name]} for i, name in enumerate(weights, 1)}
    for file, tensors in shards.items():
        torch.save(tensors, old / "text_encoder" / file)
    index = {
        "metadata": {"total_size": 78},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (old / "text_encoder/pytorch_model.bin.index.json").write_text(json.dumps(index))
    save_file({"of another": torch.zeros(1)}, old / "vae/model.safetensors")
    torch.save(weights, old / "vae/pytorch_model.bin")
    assert main(["convert", str(old), str(new)]) == 0
    for part in ("unet", "text_encoder", "vae"):
        assert_close(source_of(new / part).tensors(), weights, rtol=0, atol=0)
    moved = read_json(new / "text_encoder/model.safetensors.index.json")
    assert moved["metadata"] == index["metadata"] and sorted(p.name for p in (new / "text_encoder").iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]


def test_two_pickles_that_would_become_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old/vae").mkdir(parents=True)
    for name in ("model.bin", "pytorch_model.bin"):
        torch.save(state(), tmp_path / "old/vae" / name)
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    assert "found: vae/model.bin and vae/pytorch_model.bin" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_folder_of_pickles_becomes_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("tokenizers")
    import sd_files

    from nanodiffusion.pretrained import load_pretrained

    folder = tmp_path / "safe"
    assert main(["convert", str(sd_files.tree("sd1", safe=False)), str(folder)]) == 0
    ours, wanted = load_pretrained(folder), load_pretrained(sd_files.tree("sd1"))
    for a, b in ((ours.denoiser.net, wanted.denoiser.net), (ours.codec, wanted.codec)):
        for name, tensor in b.state_dict().items():
            assert_close(a.state_dict()[name], tensor, rtol=0, atol=0)
    assert not [f for f in folder.rglob("*") if f.suffix == ".bin"]


def test_layouts_are_converted_there_and_back_bit_exactly(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("tokenizers")
    import sd_files

    shutil.copytree(sd_files.tree("sdxl") / "tokenizer", tmp_path / "tokenizer")
    before = tmp_path / "a.safetensors"
    kept = {k: v for k, v in load_file(sd_files.single("sdxl")).items() if k not in ("betas", "alphas_cumprod")}
    save_file(kept, before)
    assert main(["convert", str(before), str(tmp_path / "folder")]) == 0
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "b.safetensors")]) == 0
    same(tmp_path / "b.safetensors", kept)
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "half"), "dtype=fp16"]) == 0
    same(tmp_path / "half/vae/diffusion_pytorch_model.safetensors",
         {k: v.half() for k, v in load_file(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors").items()})  # fmt: skip


# -- reading, in a process of its own ------------------------------------------------------------------------------------

# Each payload is read with torch's own warnings off, under a hook of the test's own that notes what no weights need.
READ = """
import json, sys, warnings
from pathlib import Path
import torch
from nanodiffusion.cli.convert import read_pickle
from nanodiffusion.errors import UserError
warnings.simplefilter("ignore")
done, reading = [], []
doors = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "os.remove", "os.rename",
         "os.mkdir", "shutil.", "ctypes.dlopen", "os.kill")
def note(event, args):
    if reading and (event.startswith(doors) or event == "open" and args[2] & 3):
        done.append([reading[0], event])
sys.addaudithook(note)
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    reading[:] = [path.name]
    try:
        tensors, left = read_pickle(path)
        found[path.name] = [{k: list(v.shape) for k, v in tensors.items()}, left]
    except (UserError, MemoryError, RecursionError) as e:
        found[path.name] = str(e)
    reading.clear()
print(json.dumps([found, done]))
"""


def read_all(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", READ, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    found, events = json.loads(done.stdout.splitlines()[-1])
    assert events == []
    return found


def payloads(folder: Path, target: Path) -> int:
    """Pickles that would do something, each in the formats of torch and by hand."""
    import builtins
    import functools
    import importlib
    import socket

    calls = [
        Call(os.system, f"touch {target}"),
        Call(os.popen, f"touch {target}"),
        Call(os.mkdir, str(target)),
        Call(os.remove, str(folder / "none")),
        Call(os.execv, "/bin/touch", ["touch", str(target)]),
        Call(os.fork),
        Call(os.kill, 1, 0),
        Call(subprocess.Popen, ["touch", str(target)]),
        Call(subprocess.run, ["touch", str(target)]),
        Call(builtins.eval, f"open({str(target)!r}, 'w')"),
        Call(builtins.exec, f"open({str(target)!r}, 'w')"),
        Call(builtins.open, str(target), "w"),
        Call(builtins.getattr, Call(importlib.import_module, "os"), "system"),
        Call(builtins.__import__, "antigravity"),
        Call(importlib.import_module, "this"),
        Call(shutil.rmtree, str(folder / "none")),
        Call(shutil.copyfile, "/etc/hostname", str(target)),
        Call(socket.create_connection, ("127.0.0.1", 9)),
        Call(torch.load, str(folder / "none"), None),
        Call(torch.save, 1, str(target)),
        Call(functools.partial, os.system, f"touch {target}"),
        Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {target}"))),
        Call(Path.touch, target),
    ]
    for i, call in enumerate(calls):
        for form, value in {
            "bare": call,
            "inside": {"state_dict": state(), "x": [call]},
            "key": {call.call[0]: 1},
        }.items():
            torch.save(value, folder / f"{i:02d}-{form}.ckpt")
            torch.save(value, folder / f"{i:02d}-{form}.pt", _use_new_zipfile_serialization=False)
        (folder / f"{i:02d}.bin").write_bytes(pickle.dumps(call, protocol=2))
        (folder / f"{i:02d}-new.bin").write_bytes(pickle.dumps(call))
    return 8 * len(calls)


def test_no_payload_is_executed(tmp_path: Path) -> None:
    folder, target = tmp_path / "payloads", tmp_path / "touched"
    folder.mkdir()
    n = payloads(folder, target)
    found = read_all(folder)
    assert len(found) == n >= 150
    assert all(isinstance(said, str) for said in found.values()), [
        k for k, v in found.items() if not isinstance(v, str)
    ]
    assert not target.exists()


def test_weights_are_found_in_every_wrapping_and_junk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, modules = of_lightning()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    shared = torch.zeros(4)
    good: dict[str, tuple[Any, list[str]]] = {
        "plain": (state(), ["a.weight", "a.bias", "n"]),
        "ordered": (OrderedDict(state()), ["a.weight", "a.bias", "n"]),
        "nested": ({"model": {"module": {"state_dict": state()}}, "step": 3}, ["a.weight", "a.bias", "n"]),
        "optimizer": ({"state_dict": state(), "optimizer": {"lr": 1.0}}, ["a.weight", "a.bias", "n"]),
        "deeper": ({"encoder": {"w": torch.zeros(2)}, "list": [torch.zeros(1)]}, ["encoder.w", "list.0"]),
        "embedding": (
            {"string_to_param": {"*": torch.zeros(2, 8)}, "string_to_token": {"*": torch.tensor(5)}},
            ["emb_params"],
        ),
        "learned": ({"<bird>": torch.zeros(8)}, ["<bird>"]),
        "alone": (torch.zeros(3), ["tensor"]),
        "parameter": ({"w": torch.nn.Parameter(torch.zeros(3))}, ["w"]),
        "shared": ({"a": shared, "b": shared, "c": shared[:2]}, ["a", "b", "c"]),
        "lightning": ({"state_dict": {"w": shared}, "hyper": kind(), kind: kind}, ["w"]),
    }
    for name, (value, _) in good.items():
        torch.save(value, tmp_path / f"{name}.ckpt")
        torch.save(value, tmp_path / f"{name}-old.ckpt", _use_new_zipfile_serialization=False)
    bad = {"empty": {}, "numbers": {"a": 1}, "module": torch.nn.Linear(2, 2)}
    for name, value in bad.items():
        torch.save(value, tmp_path / f"{name}.ckpt")
    whole = (tmp_path / "plain.ckpt").read_bytes()
    for i, content in enumerate(
        [b"", b"PK", whole[:100], whole[: len(whole) // 2], b"\x80\x02", b"GIF89a", bytes(4096)]
    ):
        (tmp_path / f"junk{i}.bin").write_bytes(content)
    found = read_all(tmp_path)
    for name, (_, names) in good.items():
        for form in (f"{name}.ckpt", f"{name}-old.ckpt"):
            assert list(found[form][0]) == names, found[form]
    refused = [name for name, said in found.items() if isinstance(said, str)]
    assert sorted(refused) == sorted([f"{name}.ckpt" for name in bad] + [f"junk{i}.bin" for i in range(7)])
    assert "torch.nn.modules.linear.Linear" in found["module.ckpt"]


def test_the_stand_in_takes_anything_and_does_nothing() -> None:
    thing = Inert(1, a=2)
    thing.__setstate__({"x": 1})
    thing["a"] = 1
    thing.append(1)
    thing.extend([1])
    assert vars(thing) == {}


def test_orders_are_typed() -> None:
    here = str(Path(__file__))
    order = read_order([here, "b.safetensors", "memory=2", "dtype=fp16", "tokenizer=1"])
    assert order == Order(Path(here), Path("b.safetensors"), "fp16", None, "1", 2, None)


# -- the promise ---------------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
CALLS = re.compile(
    r"torch\.(serialization\.|hub\.|jit\.)?load|eval|exec|__import__|.*\.(extractall|load_state_dict_from_url)"
)


def uses(tree: ast.AST) -> set[str]:
    """What a module names of what can run code from a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & MODULES
        elif isinstance(node, ast.Call):
            found |= {name for name in [ast.unparse(node.func)] if CALLS.fullmatch(name)}
            found |= {"allow_pickle" for k in node.keywords if k.arg == "allow_pickle" and _true(k.value)}
    return found


def _true(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is False)


def test_only_the_converter_reads_pickles() -> None:
    found = {str(path.relative_to(PACKAGE)): uses(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {"cli/convert.py": {"torch.load"}}
    source = (PACKAGE / "cli" / "convert.py").read_text()
    assert source.count("torch.load(") == 1 and "weights_only=True" in source
