"""Published weights into a network: bit for bit, without a second copy, and every misfit named."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import nanodiffusion.pretrained.weights as weights
from nanodiffusion.errors import UserError
from nanodiffusion.pretrained.layouts import Piece
from nanodiffusion.pretrained.weights import Source, load, save, source_of, variants


class Net(nn.Module):
    """A few weights and a buffer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 2, bias=False)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


def state(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {name: t.shape for name, t in Net().state_dict().items() if name != "steps"}
    return {name: torch.randn(s, generator=g) for name, s in shapes.items()} | {"steps": torch.arange(3)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of the network's weights."""
    save_file(state(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def write_shards(folder: Path, tensors: dict[str, Tensor], stem: str = "model", variant: str = "") -> Path:
    """The tensors in two shards and an index."""
    middle = f".{variant}" if variant else ""
    names, placed = list(tensors), {}
    for i, part in enumerate((names[:2], names[2:]), 1):
        shard = f"{stem}{middle}-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        placed |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.safetensors.index{middle}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index


def equal(net: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = net.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, rtol=0, atol=0)


# -- what is read --------------------------------------------------------------------------------------------------------


def test_every_weight_comes_from_the_file_and_wants_no_gradient(file: Path) -> None:
    net = load(Net, source_of(file))
    equal(net, state())
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_at_the_file_s_own_dtype_the_parameters_are_the_mapped_file(file: Path) -> None:
    parameters = list(load(Net, source_of(file), torch.float32).parameters())
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert all(any(start <= p.data_ptr() < stop for start, stop in spans) for p in parameters)
    with torch.no_grad():
        parameters[0].add_(1)  # a private mapping: the file is not written
    equal(load(Net, source_of(file)), state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_every_float_weight_rounded_once_and_integers_stay(file: Path, dtype: torch.dtype) -> None:
    equal(load(Net, source_of(file), dtype), {k: v if k == "steps" else v.to(dtype) for k, v in state().items()})


def test_a_window_smaller_than_a_tensor_changes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WINDOW", 1)
    equal(load(Net, source_of(file), torch.float64), {k: v if k == "steps" else v.double() for k, v in state().items()})


@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_are_one_source(tmp_path: Path, stem: str, variant: str) -> None:
    index = write_shards(tmp_path, state(), stem, variant)
    for where in (tmp_path, index):
        source = source_of(where, variant or None) if where == tmp_path else source_of(where)
        assert len(source.files) == 2 and source.index == index
        equal(load(Net, source), state())


def test_a_folder_s_variant_is_chosen_by_name(tmp_path: Path) -> None:
    save_file(state(0), tmp_path / "model.safetensors")
    save_file(state(1), tmp_path / "model.fp16.safetensors")
    write_shards(tmp_path, state(2), variant="ema")
    assert variants(tmp_path) == ["ema", "fp16"]
    for seed, variant in enumerate([None, "fp16", "ema"]):
        equal(load(Net, source_of(tmp_path, variant)), state(seed))


def test_pieces_are_read_transposed_thirded_and_flattened(tmp_path: Path) -> None:
    own = state()
    fused = torch.cat([torch.randn(6, 4), own["first.weight"], torch.randn(6, 4)])
    theirs = {"qkv": fused, "b": own["first.bias"], "out": own["last.weight"].T.contiguous(), "n": own["steps"]}
    save_file(theirs, tmp_path / "a.safetensors")
    pieces = {"first.weight": Piece("qkv", "third 1"), "first.bias": Piece("b"), "steps": Piece("n")}
    pieces["last.weight"] = Piece("out", "transpose")
    for dtype in (None, torch.float64):
        net = load(Net, source_of(tmp_path / "a.safetensors"), dtype, rename=lambda names: pieces)
        equal(net, {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in own.items()})
        assert all(p.is_contiguous() for p in net.parameters())


PEAK = """
import sys, torch
from torch import nn
from nanodiffusion.pretrained.weights import load, source_of
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
build = lambda: nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(32)])
torch.zeros(8).bfloat16()
before = peak()
net = load(build, source_of(sys.argv[1]), {"bf16": torch.bfloat16, "fp32": torch.float32}[sys.argv[2]])
print((peak() - before) / sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_float32_file_becomes_bfloat16_at_a_peak_of_the_result_and_a_third(tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(32)])  # 134 MB
    save_file(dict(net.state_dict()), tmp_path / "a.safetensors")
    ratios = []
    for dtype in ("bf16", "fp32"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.safetensors"), dtype]
        ratios.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert ratios[0] <= 1.3
    assert ratios[1] <= 0.1  # mapped, and nothing touched


# -- what does not fit ---------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_mis_shaped_names_are_in_one_message(tmp_path: Path) -> None:
    tensors = state()
    tensors["firstt.weight"] = tensors.pop("first.weight")
    tensors["last.weight"] = torch.zeros(2, 9)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        load(Net, source_of(tmp_path / "a.safetensors"))
    message = str(error.value)
    assert "1 missing: first.weight" in message
    assert "1 unexpected: firstt.weight" in message
    assert "1 of another shape: last.weight (2, 9) for (2, 6)" in message
    assert "firstt.weight for first.weight" in message
    assert "a.safetensors" in message and len(message.splitlines()) <= 6


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    save_file({f"x{i}": torch.zeros(1) for i in range(500)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="500 unexpected: x0, x1, x10") as error:
        load(Net, source_of(tmp_path / "a.safetensors"))
    assert len(str(error.value)) < 600


def test_nothing_stays_without_values(file: Path) -> None:
    class Forgetful(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(3), persistent=False)

    with pytest.raises(UserError, match="positions"):
        load(Forgetful, source_of(file))


def lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut(folder: Path) -> None:
    save_file(state(), folder / "model.safetensors")
    os.truncate(folder / "model.safetensors", 300)


def lost_shard(folder: Path) -> None:
    write_shards(folder, state())
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    write_shards(folder, state())
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def broken_promise(folder: Path) -> None:
    index = write_shards(folder, state())
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


def other_shard(folder: Path) -> None:
    index = write_shards(folder, state())
    content = json.loads(index.read_text())
    content["weight_map"]["first.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))


def twice(folder: Path) -> None:
    index = write_shards(folder, state())
    save_file(state(), folder / "model-00001-of-00002.safetensors")
    assert index.is_file()


def index_of(content: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    return write


def touch(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"PK\x03\x04" + bytes(60))

    return write


SHARD = "model-00002-of-00002.safetensors"
BROKEN: list[tuple[str, Callable[[Path], object], str | None, list[str]]] = [
    ("no folder", shutil.rmtree, None, ["cannot load tensors", "nothing"]),
    ("empty", lambda f: None, None, ["holds no weights", "an empty folder"]),
    ("other files", touch("a.txt", "b.txt"), None, ["holds no weights", "a.txt, b.txt"]),
    ("pickle only", touch("pytorch_model.bin"), None, ["pytorch_model.bin", "nanodiffusion convert"]),
    ("Git LFS", lfs, None, ["model.safetensors", "git lfs pull"]),
    ("truncated", cut, None, ["model.safetensors", "truncated or damaged"]),
    ("renamed pickle", touch("model.safetensors"), None, ["model.safetensors", "pickle"]),
    ("missing shard", lost_shard, None, [SHARD, "1 of 2 shards"]),
    ("truncated shard", cut_shard, None, [SHARD, "truncated or damaged"]),
    ("shard without a promised tensor", broken_promise, None, ["model-00001-of-00002", "more", "in no shard"]),
    ("tensor in another shard", other_shard, None, ["first.weight", "it is in model-00001"]),
    ("tensor twice", twice, None, ["two files hold this tensor"]),
    ("index of nothing", index_of({"weight_map": {}}), None, ["names no tensors"]),
    ("index without a map", index_of({}), None, ["no index of shards", "weight_map"]),
    ("index of a list", index_of([1]), None, ["index.json", "a JSON object"]),
    (
        "index pointing elsewhere",
        index_of({"weight_map": {"a": "../../x.safetensors"}}),
        None,
        ["points elsewhere", "../"],
    ),
    ("index naming a number", index_of({"weight_map": {"a": 3}}), None, ["points elsewhere"]),
    ("index cut", index_of('{"weight_map": {'), None, ["no sound JSON"]),
    ("index too deep", index_of("[" * 100_000), None, ["index.json"]),
    (
        "no such variant",
        lambda f: save_file(state(), f / "model.safetensors"),
        "fp16",
        ["no such variant", "leave variant out"],
    ),
    (
        "only a variant",
        lambda f: save_file(state(), f / "model.fp16.safetensors"),
        None,
        ["variants fp16", "variant=fp16"],
    ),
]


@pytest.mark.parametrize(("prepare", "variant", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_source_that_is_none_says_which_file_and_what(
    tmp_path: Path, prepare: Callable[[Path], object], variant: str | None, words: list[str]
) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(UserError) as error:
        load(Net, source_of(folder, variant))
    message = str(error.value)
    assert all(word in message for word in [*words, "unet"]), message
    assert len(message.splitlines()) <= 6


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a.pth"])
def test_a_pickle_is_named_and_never_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"nanodiffusion convert .*{name} a.safetensors"):
        source_of(tmp_path / name)


def test_damage_anywhere_is_a_user_error_or_other_numbers(file: Path, tmp_path: Path) -> None:
    whole, rng = bytearray(file.read_bytes()), random.Random(0)
    place, messages = tmp_path / "x.safetensors", []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(len(damaged) // 2)] = rng.randrange(256)
        place.write_bytes(damaged[: rng.choice([len(whole), rng.randrange(len(whole))])])
        try:
            load(Net, source_of(place))
        except UserError as e:
            messages.append(str(e))
    assert len(messages) > 200
    assert all("x.safetensors" in message for message in messages)


# -- what is written -----------------------------------------------------------------------------------------------------


def test_what_is_saved_others_read(tmp_path: Path) -> None:
    whole = torch.randn(6, 6)
    tensors = {"a": whole, "same": whole, "part": whole[:2], "turned": whole.T, "none": torch.zeros(0)}
    path = save(tmp_path / "new" / "a.safetensors", tensors)
    found = load_file(path)
    for name, tensor in tensors.items():
        assert_close(found[name], tensor, rtol=0, atol=0)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("where", ["save_file", "sync", "replace"])
def test_a_file_is_whole_or_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = file.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    places = {"save_file": (safetensors.torch, "save_file"), "sync": (weights, "sync"), "replace": (os, "replace")}
    monkeypatch.setattr(*places[where], fail)
    with pytest.raises(UserError, match="No space left"):
        save(file, {"a": torch.zeros(3)})
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_weights_loaded_from_a_file_can_be_saved_over_it(file: Path) -> None:
    net = load(Net, source_of(file))
    save(file, net.state_dict())
    equal(net, state())
    equal(load(Net, Source((file,))), state())
