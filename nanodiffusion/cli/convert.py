"""`nanodiffusion convert IN OUT`: pickles to safetensors, one layout of a checkpoint to the other, trained parts into one.

A pickle can run code. It is read here and nowhere else: in a process of its own, with limits on memory and time, by torch's
reader of weights alone, and with every door that a pickle has been seen to use shut as well.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nanodiffusion.cli.words import parse_value, read_pairs
from nanodiffusion.errors import UserError, lookup
from nanodiffusion.pretrained.weights import DTYPES, PICKLES, disk_errors, read_json, save, source_of, weight_map

if TYPE_CHECKING:
    from nanodiffusion.pretrained import Bundle

USAGE = "nanodiffusion convert IN OUT [dtype=fp16] [unet=FOLDER] [vae=...] [text_encoder=...] [lora=FILE:1.0] [key=value ...]"
KEYS = {"dtype": str, "prediction": str, "tokenizer": str, "family": str, "memory": float, "seconds": float}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # which may be replaced
LORA = re.compile("lora=")  # given once or several times
NESTS = ("state_dict", "model_state_dict", "module", "model", "params_ema", "params")  # where trainers put the weights
# Pickled training states name these libraries' classes. They are not imported: an empty stand-in takes their place.
INERT = re.compile(
    r"(pytorch_lightning|lightning\w*|omegaconf|numpy|argparse|pathlib|ldm|sgm|diffusers|transformers)\..+"
)
NAMED = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed global|whose module)")
SAID = re.compile(r"WeightsUnpickler error:\s*(.+)")
SHUT = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.", "socket.", "pty.")
BASE_GIB, PER_BYTE = 4.0, 3.0  # what the reader may take: torch itself, and some copies of the file
BYTES_PER_SECOND = 20e6  # the slowest disk it is given time for


class Order(NamedTuple):
    """What the command line asks for."""

    source: Path
    target: Path
    dtype: str = "keep"
    prediction: str | None = None
    tokenizer: str | None = None
    memory: float | None = None  # GiB
    seconds: float | None = None
    family: str | None = None  # of a VAE alone
    parts: tuple[tuple[str, str], ...] = ()  # what is put in place of a part: its name, and where it is
    loras: tuple[tuple[str, float], ...] = ()  # what is fused: files and strengths

    @property
    def relays(self) -> bool:
        """Whether the numbers change too, and not the pickle alone."""
        return self.dtype != "keep" or bool(self.parts or self.loras)


def main(args: Namespace) -> int:
    """Convert, and say what was written."""
    order = read_order(args.words)
    if order.target.exists():
        raise UserError("this is there already, and is not written over", file=order.target, fix="another name")
    for line in convert(order):
        print(line)
    print(f"wrote {order.target}")
    return 0


def read_order(words: Sequence[str]) -> Order:
    """The command's words. UserError: not two paths, or keys that there are not."""
    if len(words) < 2:
        raise UserError("this command takes two paths", expected=USAGE, found=" ".join(words) or "none")
    loras = tuple(map(_lora, filter(LORA.match, words[2:])))
    texts = read_pairs(itertools.filterfalse(LORA.match, words[2:]), {**KEYS, **dict.fromkeys((*PARTS, "lora"), str)})
    parts = tuple((name, texts.pop(name)) for name in PARTS if name in texts)
    if empty := next((name for name, where in parts if not where), None):
        raise UserError("which one?", key=empty, expected=f"{empty}=FOLDER, FILE.safetensors or OWNER/NAME")
    given: dict[str, Any] = {key: parse_value(text) for key, text in texts.items()}
    for key, value in given.items():
        number = KEYS[key] is float
        if number and (type(value) not in (int, float) or value <= 0):
            raise UserError("not a positive number", key=key, found=value)
        given[key] = value if number else str(value)
    order = Order(Path(words[0]), Path(words[1]), **given, parts=parts, loras=loras)
    lookup(DTYPES, order.dtype, "dtype")
    if not order.source.exists():
        raise UserError("there is nothing to convert", file=order.source, fix="check the path")
    return order


def _lora(word: str) -> tuple[str, float]:
    from nanodiffusion.cli.asked import read_lora_word

    found = read_lora_word(word.removeprefix("lora="))
    if not found.file or not Path(found.file).exists():
        expected = "lora=FILE or lora=FILE:STRENGTH"
        raise UserError("no such LoRA", file=found.file or None, key="lora", expected=expected, fix="check the path")
    return found.file, found.strength


def convert(order: Order) -> Iterator[str]:
    """Do it; what there is to say of it. UserError: as the loaders, or a pickle that is more than weights."""
    to_file = order.target.suffix == ".safetensors"
    if order.source.suffix in PICKLES:
        with _beside(order.target) as place:
            weights = place / f"{order.source.stem}.safetensors"
            yield from unpickle(order, [(order.source, weights)])
            yield from _finish(order, weights, place, to_file)
    elif order.source.is_dir() and _pickles(order.source):
        with _beside(order.target) as place:
            folder = place / "folder"
            yield from _unpickle_folder(order, folder)
            yield from _finish(order, folder, place, to_file)
    else:
        yield from _relayout(order, order.source, order.target)


def _finish(order: Order, safe: Path, place: Path, to_file: bool) -> Iterator[str]:
    """Bring what is safe now into the layout asked for, and into place."""
    same = safe.is_file() == to_file
    if same and not order.relays:
        done = safe
    else:
        done = place / ("done.safetensors" if to_file else "done")
        yield from _relayout(order, safe, done)
    with disk_errors(order.target):
        os.replace(done, order.target)


def _relayout(order: Order, source: Path, target: Path) -> Iterator[str]:
    """From a checkpoint in one layout to the other, or the same in another dtype or with other parts."""
    from nanodiffusion.pretrained import load_pretrained
    from nanodiffusion.pretrained.publish import cast, save_diffusers, save_part, save_single

    to_file = target.suffix == ".safetensors"
    if source.is_file() and to_file and not order.parts and not order.loras:
        if order.dtype == "keep":
            fix = "dtype=fp16, unet=FOLDER or a like part, or a folder's name as OUT"
            raise UserError("there is nothing to convert", file=source, fix=fix)
        save(target, cast(source_of(source).tensors(), DTYPES[order.dtype]))
        return
    if not to_file and target.suffix:
        expected = "a name that ends in .safetensors, or a folder's without an ending"
        raise UserError("convert to what?", file=target, expected=expected, found=target.suffix)
    if not order.parts and not order.loras and (net := _one_network(order, source)):
        save_part(net, target)
        return
    bundle = load_pretrained(
        source, order.dtype, "cpu", prediction=order.prediction, tokenizer=order.tokenizer or _near(order.source)
    )
    bundle = yield from _with_parts(order, bundle)
    (save_single if to_file else save_diffusers)(bundle, target)


def _one_network(order: Order, source: Path) -> nn.Module | None:
    """The network of a folder or a file that holds no more than that."""
    from nanodiffusion.pretrained import load_adapter, load_codec, load_controlnet, load_text, load_unet
    from nanodiffusion.pretrained.recognise import detect

    if source.is_dir() and not (source / "config.json").is_file():
        return None
    loaders: dict[str, Callable[..., nn.Module]] = {
        "unet": load_unet,
        "vae": partial(load_codec, family=order.family),
        "text": load_text,
        "controlnet": load_controlnet,
        "adapter": load_adapter,
    }
    load = loaders.get(detect(source_of(source).shapes).kind)
    return load and load(source, order.dtype, "cpu")


def _with_parts(order: Order, bundle: "Bundle") -> Generator[str, None, "Bundle"]:
    """The bundle with the parts that are asked for in place of its own, then the LoRAs fused into them."""
    from nanodiffusion.cli.parts import reading
    from nanodiffusion.lora import add_lora, read_lora
    from nanodiffusion.pretrained.replace import replace_part

    for name, where in order.parts:
        with reading(where, "", name):
            bundle = replace_part(bundle, name, where, order.dtype)
        yield f"{name}: {where}"
    nets = {"unet": bundle.denoiser.net, **dict(zip(("text", "text_2"), (part.net for part in bundle.text.parts)))}
    for file, strength in order.loras:
        with reading(file, "", "lora"):
            add_lora(nets, read_lora(file), strength).fuse()
        yield f"lora: {file}, strength {strength:g}"
    return bundle


def _near(source: Path) -> Path | None:
    """Where the tokenizer of a file lies that was moved to be read."""
    return source.parent if source.is_file() and (source.parent / "tokenizer" / "vocab.json").is_file() else None


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder on the target's disk that is gone afterwards."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".convert-{target.name}-", dir=target.parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# -- a folder of pickles -------------------------------------------------------------------------------------------------

KEPT = (".json", ".txt", ".model", ".safetensors")
TORCH_NAME = re.compile(r"^pytorch_model\b")  # transformers' name of a pickle; that of safetensors is "model"
ENDING = re.compile(rf"({'|'.join(map(re.escape, PICKLES))})(?=$|\.index\.)")


def _pickles(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in PICKLES and file.is_file())


def _unpickle_folder(order: Order, target: Path) -> Iterator[str]:
    """A diffusers folder with its pickles and their indexes of shards converted, and all else that is read beside them."""
    pickles = _pickles(order.source)
    kept = [file for file in sorted(order.source.rglob("*")) if file.suffix in KEPT and file.is_file()]
    place = {f: target / f.relative_to(order.source).with_name(_safe_name(f.name)) for f in [*pickles, *kept]}
    if alike := [(a, b) for a, b in itertools.combinations(pickles, 2) if place[a] == place[b]]:
        found = " and ".join(str(file.relative_to(order.source)) for file in alike[0])
        what = "two pickles would become one file"
        raise UserError(what, file=order.source, expected="one of them", found=found, fix="remove the other")
    converted = {place[file] for file in place if place[file].name != file.name}
    for file in kept:
        place[file].parent.mkdir(parents=True, exist_ok=True)
        if place[file].name != file.name:
            shards = {name: _safe_name(str(shard)) for name, shard in weight_map(file).items()}
            place[file].write_text(json.dumps({**read_json(file), "weight_map": shards}, indent=2) + "\n")
        elif place[file] not in converted:
            shutil.copyfile(file, place[file])
    yield from unpickle(order, [(file, place[file]) for file in pickles])


def _safe_name(name: str) -> str:
    """What a pickle, or an index of such, becomes: pytorch_model.bin.index.json model.safetensors.index.json."""
    return ENDING.sub(".safetensors", TORCH_NAME.sub("model", name)) if ENDING.search(name) else name


# -- the process that reads a pickle: its parent's side ------------------------------------------------------------------


def unpickle(order: Order, pairs: Sequence[tuple[Path, Path]]) -> Iterator[str]:
    """Write the tensors of pickles as safetensors, by another process: (from, to). UserError: refused, too large, too slow."""
    sizes = [source.stat().st_size for source, _ in pairs]
    memory = order.memory or BASE_GIB + PER_BYTE * max(sizes) / 2**30
    seconds = order.seconds or 120 + sum(sizes) / BYTES_PER_SECOND
    for (source, target), said in zip(pairs, _child(pairs, memory, seconds)):
        if "error" in said:
            raise UserError("this pickle is not converted", file=source, found=said["error"], fix=said.get("fix"))
        source_of(target).entries  # noqa: B018  # what was written can be read
        shown = source.relative_to(order.source) if source != order.source else source.name
        if said["left"]:
            yield f"{shown}: left out what are no tensors: {', '.join(said['left'])}"
        yield f"{shown}: {said['tensors']} tensors"


def _child(pairs: Sequence[tuple[Path, Path]], memory: float, seconds: float) -> list[dict[str, Any]]:
    """What the process says of each pickle, up to the first that it refuses."""
    root = str(Path(__file__).parents[2])
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT", "LANG")
    environment = {key: os.environ[key] for key in keep if key in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    files = [str(file) for pair in pairs for file in pair]
    command = [sys.executable, "-m", "nanodiffusion.cli.convert", str(memory), *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return [{"error": f"it took more than {seconds:g} s", "fix": "seconds=N, if it is known to be sound"}]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if len(said) == len(pairs) or (said and "error" in said[-1]):
        return said
    words = (done.stderr.strip().splitlines() or ["nothing said"])[-1][:200]
    died = {"error": f"its reader ended with {done.returncode}: {words}", "fix": "memory=GIB allows it more"}
    return [*said, died]


# -- its own side --------------------------------------------------------------------------------------------------------


class Inert:
    """What stands for a training library's object: it takes anything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Nothing."""

    def extend(self, items: Any) -> None:
        """Nothing."""


def child(memory: str, *files: str) -> int:
    """Read and write each pair of files, and say in one line of JSON how it went; stop at the first that is refused."""
    _limit(float(memory))
    for source, target in zip(files[::2], files[1::2]):
        said = _convert_one(Path(source), Path(target))
        print(json.dumps(said), flush=True)
        if "error" in said:
            break
    return 0


def _convert_one(source: Path, target: Path) -> dict[str, Any]:
    try:
        tensors, left = read_pickle(source)
        save(target, tensors)
    except UserError as e:
        found = " ".join(filter(None, [e.what, str(e.details["found"] or "")]))
        return {"error": found[:400], "fix": e.details["fix"]}
    except (MemoryError, RuntimeError) as e:
        fix = "memory=GIB allows it more, if it is known to be sound"
        return {"error": (str(e).splitlines() or [type(e).__name__])[0][:300], "fix": fix}
    return {"tensors": len(tensors), "left": left[:6]}


def _limit(gib: float) -> None:
    try:
        import resource

        most = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # a system without such limits has the time limit only
        pass


def read_pickle(source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickle by name, and the names of what are none. Only for a process of its own."""
    with _shut_doors():
        loaded = _weights_only(source)
    left: list[str] = []
    tensors = dict(_flat(_unwrapped(loaded), "", left))
    if not tensors:
        raise UserError("it holds no tensors", found=", ".join(left[:6]) or type(loaded).__name__)
    return tensors, left


@contextmanager
def _shut_doors() -> Iterator[None]:
    """While this lasts no process can be started, no connection made and no file written: the second lock, behind torch's."""
    shut = [True]

    def guard(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if shut and (writes or event.startswith(SHUT)):
            raise UserError("it tried to do more than give weights:", found=event)

    sys.addaudithook(guard)  # it cannot be taken out again, so it is told when to sleep
    try:
        yield
    finally:
        shut.clear()


def _weights_only(source: Path) -> Any:
    """torch's restricted reading; the classes of INERT libraries, and no others, are stood in for."""
    stood_in: list[Any] = []
    with open(source, "rb") as file:
        head = file.read(4)
    zipped = head == b"PK\x03\x04"
    if not zipped and head[:1] != b"\x80":  # torch would also try it as a tar, which it unpacks
        raise UserError("it is no pickle", found=f"{source.stat().st_size} bytes of something else")
    while True:
        try:
            with torch.serialization.safe_globals(stood_in):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        except UserError:
            raise
        except Exception as e:  # a damaged or hostile file raises anything
            name = NAMED.search(str(e))
            if name is None or not INERT.fullmatch(name[1]) or len(stood_in) > 50:
                raise _refused(e, name and name[1]) from None
            stood_in.append((Inert, name[1]))


def _refused(error: Exception, name: str | None) -> UserError:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        raise MemoryError("it needs more memory than it is allowed")
    if name:
        fix = "save its state_dict() with torch instead" if name.startswith("torch.") else "do not trust this file"
        return UserError("it is more than weights: it would call", found=name, fix=fix)
    # torch's first lines advise to read the file without protection
    words = found[1] if (found := SAID.search(text)) else (text.splitlines() or [type(error).__name__])[0]
    return UserError("it cannot be read as weights:", found=words[:200], fix="download it again, or take another file")


def _unwrapped(value: Any) -> Any:
    """The state dict inside a training state; of an A1111 embedding its one tensor, under the name its safetensors have."""
    if isinstance(value, Mapping) and isinstance(value.get("string_to_param"), Mapping):
        return {"emb_params": next(iter(value["string_to_param"].values()), None)}
    while isinstance(value, Mapping) and not any(isinstance(item, Tensor) for item in value.values()):
        inner = next((value[key] for key in NESTS if isinstance(value.get(key), Mapping)), None)
        if inner is None:
            break
        value = inner
    return value


def _flat(value: Any, name: str, left: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by dotted names."""
    if isinstance(value, Tensor):
        yield name or "tensor", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key), left)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}.{i}" if name else str(i), left)
    else:
        left.append(name or type(value).__name__)


if __name__ == "__main__":
    sys.exit(child(*sys.argv[1:]))
