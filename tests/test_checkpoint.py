"""What is acknowledged is never lost, what is damaged is never loaded, and what is loaded is exactly what was saved."""

import errno
import itertools
import json
import math
import os
import random
import resource
import signal
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from nanodiffusion import checkpoint
from nanodiffusion import tensors as tensor_files
from nanodiffusion.checkpoint import checkpoints, latest, load_best, load_checkpoint, save_best, save_checkpoint, verify
from nanodiffusion.errors import UserError
from nanodiffusion.tensors import DTYPES, load_meta, load_tensors, load_weights, pack_state, save_tensors, unpack_state


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What a process wrote outlives its death without fsync; that it is called where it must be is tested below."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def example(step: int) -> dict[str, tuple[dict, dict]]:
    """Two files whose every number says which step they belong to."""
    model = {"weight": torch.full((40, 25), float(step)), "bias": torch.full((25,), float(step))}
    return {"model": (model, {"net": "mlp", "step": step}), "optimizer": pack_state({"state": {0: {"step": step}}})}


def assert_is(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.state, found.meta["model"]["step"]) == (step, {"epoch": step}, step)
    assert_close(found.files["model"], example(step)["model"][0], rtol=0, atol=0)


def save(root: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(root, step, example(step), {"epoch": step}, keep)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


# ---- one file ------------------------------------------------------------------------------------


EVERY_DTYPE = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("name", EVERY_DTYPE)
def test_file_is_byte_for_byte_what_safetensors_writes(tmp_path, name):
    z, dtype = EVERY_DTYPE[name], EVERY_DTYPE[name].dtype
    tensors = {
        "z": z,
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "b": z[1:].clone(),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"x": 1})
    expected = safetensors.torch.save(tensors, metadata={"nanodiffusion": json.dumps({"x": 1})})
    assert (tmp_path / "a.safetensors").read_bytes() == expected


def test_tensors_and_meta_come_back_exactly(tmp_path):
    tensors = EVERY_DTYPE | {"scalar": torch.tensor(math.nan), "empty": torch.zeros(0, 3)}
    meta = {"sigma_max": math.inf, "name": 'Ünïcode "quoted"', "list": [1, 2.5, None, True]}
    save_tensors(tmp_path / "new" / "a.safetensors", tensors, meta)
    loaded, found = load_tensors(tmp_path / "new" / "a.safetensors")
    assert found == meta == load_meta(tmp_path / "new" / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert names(tmp_path / "new") == ["a.safetensors"]
    by_its_authors = safetensors.torch.load_file(tmp_path / "new" / "a.safetensors")
    assert_close(by_its_authors, loaded, rtol=0, atol=0, equal_nan=True)


def test_shared_and_strided_tensors_are_saved_in_full(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"whole": base, "tied": base, "part": base[1:3], "turned": base.T, "wide": base[:1].expand(9, 4)}
    save_tensors(tmp_path / "a.safetensors", tensors, {})
    assert_close(load_tensors(tmp_path / "a.safetensors")[0], tensors, rtol=0, atol=0)


def test_writing_into_loaded_tensors_leaves_the_file_alone(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1000)}, {})
    load_tensors(tmp_path / "a.safetensors")[0]["x"].zero_()
    assert_close(load_tensors(tmp_path / "a.safetensors")[0]["x"], torch.ones(1000))


@pytest.mark.parametrize(
    ("tensors", "key"),
    [
        ({"z": torch.zeros(2, dtype=torch.complex128)}, "z"),
        ({"s": torch.eye(3).to_sparse()}, "s"),
        ({"__metadata__": torch.zeros(2)}, "__metadata__"),
    ],
)
def test_unstorable_tensor_is_named(tmp_path, tensors, key):
    with pytest.raises(UserError, match=key):
        save_tensors(tmp_path / "a.safetensors", tensors, {})
    assert names(tmp_path) == []


def test_meta_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(UserError, match="JSON"):
        save_tensors(tmp_path / "a.safetensors", {}, {"dtype": torch.float32})


def _folder(path: Path) -> None:
    path.mkdir()


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


def _truncated(path: Path) -> None:
    save_tensors(path, {"x": torch.ones(1000)}, {})
    os.truncate(path, 3000)


def _nested(path: Path) -> None:
    safetensors.torch.save_file({}, path, metadata={"nanodiffusion": "[" * 100_000})


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "nothing"),
        (_folder, "a folder"),
        (_zip, "pickle"),
        (lambda path: path.write_bytes(b"\x80\x04\x95\x10" + bytes(60)), "pickle"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        (_truncated, "truncated"),
        (_nested, "header"),
    ],
)
def test_what_is_no_safetensors_is_named_for_what_it_is(tmp_path, make, found):
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(UserError, match=found) as e:
        load_tensors(path)
    assert str(path) in str(e.value)
    assert len(str(e.value).splitlines()) <= 6


def test_damaged_files_raise_only_our_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(3), "y": torch.zeros(2, 2)}, {"a": [1]})
    sound = path.read_bytes()
    for _ in range(300):
        data = bytearray(sound[: rng.randrange(len(sound) + 1)] if rng.random() < 0.3 else sound)
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_tensors(path)
        except UserError as e:
            assert str(path) in str(e)  # noqa: PT017


# ---- a folder ------------------------------------------------------------------------------------


def test_checkpoint_comes_back_exactly(tmp_path):
    folder = save(tmp_path / "run", 1000)
    assert folder.name == "step-00001000"
    assert names(folder) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert verify(folder) == []
    assert_is(load_checkpoint(folder), 1000)
    found = latest(tmp_path / "run")
    assert_is(found, 1000)
    assert list(found.files) == ["model", "optimizer"]
    assert unpack_state(found.files["optimizer"], found.meta["optimizer"]) == {"state": {0: {"step": 1000}}}


def test_oldest_are_pruned_and_best_never(tmp_path):
    save_best(tmp_path, 1, example(1), {"epoch": 1})
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
    assert [f.name for f in checkpoints(tmp_path)] == ["step-00000007", "step-00000006", "step-00000005"]
    assert names(tmp_path)[0] == "best"
    assert len(names(tmp_path)) == 4
    assert_is(load_best(tmp_path), 1)


def test_checkpoint_just_saved_outlives_later_ones_of_an_abandoned_run(tmp_path):
    for step in (10, 20, 15):
        save(tmp_path, step, keep=1 if step == 15 else 3)
    assert [f.name for f in checkpoints(tmp_path)] == ["step-00000020", "step-00000015"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {}, {"epoch": -1})
    assert (load_checkpoint(tmp_path / "step-00000005").state, names(tmp_path)) == ({"epoch": -1}, ["step-00000005"])


def test_best_is_replaced(tmp_path):
    for step in (3, 9):
        save_best(tmp_path, step, example(step), {"epoch": step})
    assert_is(load_best(tmp_path), 9)
    assert names(tmp_path) == ["best"]


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    assert load_best(tmp_path) is None


def test_damaged_checkpoint_is_skipped_aloud(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 100)
    (tmp_path / "step-00000002" / "state.json").unlink()
    with pytest.warns(UserWarning, match="step-0000000") as said:
        assert_is(latest(tmp_path), 1)
    texts = [str(w.message) for w in said]
    assert len(texts) == 2
    assert "step-00000003: model.safetensors: 100 bytes instead of" in texts[0]
    assert "step-00000002: state.json: missing" in texts[1]


@pytest.mark.filterwarnings("ignore:skipping damaged")
def test_nothing_sound_left_is_an_error(tmp_path):
    os.truncate(save(tmp_path, 1) / "manifest.json", 10)
    with pytest.raises(UserError, match="every checkpoint here is damaged"):
        latest(tmp_path)
    with pytest.raises(UserError, match="manifest"):
        load_checkpoint(tmp_path / "step-00000001")


@pytest.mark.parametrize("stem", ["../escape", "a/b", "", ".hidden", "model.safetensors"])
def test_file_names_stay_inside_the_folder(tmp_path, stem):
    with pytest.raises(UserError, match="not a name"):
        save_checkpoint(tmp_path, 1, {stem: ({}, {})}, {})


def test_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = save(tmp_path, 1)
    entries = json.loads((folder / "manifest.json").read_bytes())["files"]
    entries["../step-00000001/model.safetensors"] = entries["model.safetensors"]
    (folder / "manifest.json").write_bytes(checkpoint._manifest(entries))
    assert "outside the folder" in verify(folder)[0]


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0]
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


def test_every_single_bit_flip_is_detected(tmp_path):
    rng, folder = random.Random(0), save(tmp_path, 1)
    for _ in range(300):
        path = rng.choice(sorted(folder.iterdir()))
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        assert verify(folder), f"bit {bit} of {path.name}"
        flip(path, bit)
    assert verify(folder) == []


def test_a_bit_flip_anywhere_in_the_manifest_is_detected(tmp_path):
    """No hash covers this file. Every third bit, so that all eight of a byte have their turn."""
    path = save_checkpoint(tmp_path, 1, {"ema-0.1": ({}, {}), "ema-0.0": ({}, {})}, {}) / "manifest.json"
    for bit in range(0, path.stat().st_size * 8, 3):
        flip(path, bit)
        assert verify(path.parent), f"bit {bit}"
        flip(path, bit)


def test_every_truncation_is_detected(tmp_path):
    folder = save(tmp_path, 1)
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        for size in {0, 1, 8, len(sound) // 2, len(sound) - 1}:
            path.write_bytes(sound[:size])
            assert verify(folder)
        path.write_bytes(sound)


@pytest.mark.parametrize("kind", ["step", "best", "file"])
def test_nothing_takes_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch, kind):
    synced, replace, root = [], os.replace, tmp_path / "new" / "run"

    def checked_replace(source: Path, target: Path) -> None:
        inside = list(source.iterdir()) if source.is_dir() else []
        assert {path.stat().st_ino for path in [source, *inside]} <= set(synced)
        replace(source, target)
        synced.append("renamed")

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "replace", checked_replace)
    if kind == "file":
        save_tensors(root / "a.safetensors", example(1)["model"][0], {})
    else:
        (save_best if kind == "best" else save_checkpoint)(root, 1, example(1), {})
    assert synced[-2:] == ["renamed", root.stat().st_ino]
    assert {tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino} <= set(synced)  # the new folders' names


def test_saving_a_small_model_is_quick(tmp_path):
    files = {"model": ({f"w{i}": torch.zeros(50, 100) for i in range(10)}, {})}
    times = []
    for step in range(10):
        start = time.perf_counter()
        save_checkpoint(tmp_path, step, files, {})
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02


# ---- faults --------------------------------------------------------------------------------------


class FaultyFile:
    """A file whose faulty write gets half way."""

    def __init__(self, file: Any, write: Callable) -> None:
        self.file, self.faulty_write = file, write

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.faulty_write()
        self.file.write(data[len(data) // 2 :])


def strike_at(patch: pytest.MonkeyPatch, at: int, strike: Callable[[], None]) -> None:
    """Let `strike` happen at the `at`-th of all file-system calls that change something."""
    calls = itertools.count()

    def faulty(call: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                strike()
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
        patch.setattr(os, name, faulty(getattr(os, name)))
    opened = faulty(open)
    patch.setattr(tensor_files, "open", lambda *a: FaultyFile(opened(*a), faulty(lambda: None)), raising=False)


def failure(call: Callable[[], object]) -> str | None:
    """What the UserError of a call says, None if it succeeds."""
    try:
        call()
    except UserError as e:
        return str(e)


SAVES: dict[str, Callable[[Path, int], Path]] = {
    "next": lambda root, step: save(root, step, keep=2),
    "again": lambda root, step: save_checkpoint(root, 1, example(step), {"epoch": step}),
    "best": lambda root, step: save_best(root, step, example(step), {"epoch": step}),
}


def survivor(root: Path, kind: str) -> int:
    """The epoch of the checkpoint that a user finds now; whole, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_best(root) if kind == "best" else latest(root)
    assert found is not None
    epoch = found.state["epoch"]
    assert_close(found.files["model"], example(epoch)["model"][0], rtol=0, atol=0)
    return epoch


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", SAVES)
def test_fault_at_any_call_leaves_the_previous_checkpoint(tmp_path, kind, error):
    def strike() -> None:
        raise OSError(error, os.strerror(error))

    failed = 0
    for at in range(60):
        root = tmp_path / str(at)
        SAVES[kind](root, 0)
        SAVES[kind](root, 1)
        with pytest.MonkeyPatch.context() as patch:
            strike_at(patch, at, strike)
            said = failure(lambda root=root: SAVES[kind](root, 2))
        failed += said is not None
        assert said is None or "cannot save" in said
        assert survivor(root, kind) in ((2,) if said is None else (1, 2))
        assert said is None or not [name for name in names(root) if name.startswith(".tmp")]
        SAVES[kind](root, 3)
        assert survivor(root, kind) == 3
        assert not [name for name in names(root) if name.startswith(".")]
    assert failed > 15


@pytest.mark.parametrize("kind", SAVES)
def test_death_at_any_call_leaves_the_previous_checkpoint(tmp_path, kind):
    for at in itertools.count():
        root = tmp_path / str(at)
        SAVES[kind](root, 1)
        if (child := os.fork()) == 0:
            strike_at(pytest.MonkeyPatch(), at, lambda: os._exit(9))
            SAVES[kind](root, 2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert survivor(root, kind) in ((1, 2) if status == 9 else (2,))
        SAVES[kind](root, 3)
        assert survivor(root, kind) == 3
        assert not [name for name in names(root) if name.startswith(".")]
        if status == 0:
            break
    assert at > 15


def save_forever(root: Path, start: int, pipe: int) -> None:
    for step in itertools.count(start):
        save(root, step)
        save_best(root, step, example(step), {"epoch": step})
        os.write(pipe, step.to_bytes(8, "little"))


def kill_one(root: Path, start: int, after: float) -> int:
    """Save in a child process, kill -9 it after some seconds; the last step that it acknowledged, or 0."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            save_forever(root, start, write)
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(read, "rb") as acknowledged:
        data = acknowledged.read()
    return int.from_bytes(data[-8:], "little")


@pytest.mark.parametrize("kills", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_nine_never_loses_an_acknowledged_checkpoint(tmp_path, kills):
    rng, last, acknowledged = random.Random(0), 0, 0
    save(tmp_path, 0)
    save_best(tmp_path, 0, example(0), {"epoch": 0})
    for _ in range(kills):
        acknowledged = max(acknowledged, kill_one(tmp_path, last + 1, rng.uniform(0, 0.1)))
        assert survivor(tmp_path, "best") >= acknowledged
        last = survivor(tmp_path, "next")
        assert last >= acknowledged
    assert acknowledged > kills // 4  # or nothing was tested


@pytest.mark.parametrize("room", [0, 7, 500, 4096])
def test_a_file_system_without_room_is_reported_and_cleaned_up(tmp_path, room):
    """The kernel's own refusal, in the middle of a write, instead of a simulated one."""
    save(tmp_path, 1)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            save(tmp_path, 2)
        except UserError as e:
            os._exit(7 if "free some space" in str(e) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert names(tmp_path) == ["step-00000001"]
    assert_is(latest(tmp_path), 1)


def test_root_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot save"):
        save(tmp_path / "run", 1)
    with pytest.raises(UserError, match="cannot save"):
        save_tensors(tmp_path / "run" / "a.safetensors", {}, {})


# ---- states --------------------------------------------------------------------------------------


def assert_same(a: Any, b: Any) -> None:
    """Equal in value and type, at every depth; nan equals nan."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert [(type(k), k) for k in a] == [(type(k), k) for k in b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert repr(a) == repr(b)


def there_and_back(state: dict, path: Path) -> dict:
    save_tensors(path, *pack_state(state))
    return unpack_state(*load_tensors(path))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, history_size=4, max_iter=3),
    "groups": lambda p: torch.optim.AdamW([{"params": [x], "lr": 0.1 * i} for i, x in enumerate(p, 1)]),
}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = torch.linspace(-1, 1, 24).reshape(8, 3), torch.linspace(0, 1, 16).reshape(8, 2)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (net(x) - y).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_resumes_bit_identically(tmp_path, name):
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](list(one.parameters()))
    train(one, optimizer, 3)
    state = there_and_back(optimizer.state_dict(), tmp_path / "a.safetensors")
    assert_same(state, optimizer.state_dict())
    two.load_state_dict(one.state_dict())
    resumed = OPTIMIZERS[name](list(two.parameters()))
    resumed.load_state_dict(state)
    train(one, optimizer, 3)
    train(two, resumed, 3)
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


lr_scheduler = torch.optim.lr_scheduler
SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "chain": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_resumes_identically(tmp_path, name):
    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
        return optimizer, SCHEDULERS[name](optimizer)

    (a, one), (b, two) = build(), build()
    for _ in range(4):
        one.step()
    assert_same(there_and_back(one.state_dict(), tmp_path / "s.safetensors"), one.state_dict())
    two.load_state_dict(there_and_back(one.state_dict(), tmp_path / "s.safetensors"))
    b.load_state_dict(there_and_back(a.state_dict(), tmp_path / "o.safetensors"))
    for _ in range(4):
        one.step()
        two.step()
        assert two.get_last_lr() == one.get_last_lr()


def test_plateau_scheduler_and_scaler_come_back_exactly(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer)  # holds inf
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    state = {"plateau": plateau.state_dict(), "scaler": scaler.state_dict()}
    assert_same(there_and_back(state, tmp_path / "a.safetensors"), state)


def test_every_kind_of_leaf_comes_back_exactly(tmp_path):
    state = {
        "numbers": [0, -1, 2**80, True, False, 0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan],
        "nested": ({"a": (), 3: [], "3": {}}, None, "text", ""),
        "a.b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2), "": torch.zeros(0)},
        "": torch.tensor(True),
        "ordered": OrderedDict(b=torch.randn(2).half(), a=1),
        "counter": Counter({30: 1, 60: 2}),
        "tuple": {"tensor": "not one", "tuple": [1]},
    }
    assert_same(there_and_back(state, tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("leaf", [object(), {1, 2}, b"bytes", torch.float32, 1j, {(1, 2): 3}, {True: 1}, len])
def test_what_cannot_be_saved_is_named(leaf):
    with pytest.raises(UserError, match=r"key param_groups\.0\.odd"):
        pack_state({"param_groups": [{"lr": 0.1, "odd": leaf}]})


@pytest.mark.parametrize(
    "structure",
    [{}, {"tensor": "absent"}, {"object": []}, {"dict": 3}, {"dict": [[[], 1]]}, {"a": 1, "b": 2}, {"float": "x"}],
)
def test_damaged_structure_is_a_user_error(structure):
    with pytest.raises(UserError, match="damaged"):
        unpack_state({}, structure)


# ---- weights -------------------------------------------------------------------------------------


def test_weights_are_loaded_exactly():
    one, two = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_weights(two, one.state_dict())
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_weights_that_do_not_fit_are_named():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    renamed = {name.replace("0.weight", "0.wieght"): t for name, t in net.state_dict().items()}
    with pytest.raises(UserError, match=r"0\.wieght -> 0\.weight") as e:
        load_weights(net, renamed, "x.safetensors")
    assert "1 of them missing: 0.weight" in str(e.value)
    assert "1 of them unexpected: 0.wieght" in str(e.value)
    reshaped = net.state_dict() | {"1.weight": torch.zeros(1, 3)}
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(UserError, match=r"1\.weight") as e:
        load_weights(net, reshaped, "x.safetensors")
    assert "expected: (1, 2)\n  found: (1, 3)" in str(e.value)
    assert_close(net.state_dict(), before, rtol=0, atol=0)
