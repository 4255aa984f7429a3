"""What a run is to draw: classes and texts, from the command line or a file, as conditions of every image."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from nanodiffusion.draw import cycled
from nanodiffusion.errors import UserError, lookup, need
from nanodiffusion.run import Run

LISTS = (".yaml", ".yml", ".txt")  # files of classes or texts
WIDE = 20  # columns of a grid, at most
MOST = 10_000_000  # images that a file may ask for

# The keys that ask for classes and texts, and their types. `class` is no name for a field.
Asked = TypedDict(
    "Asked",
    {
        "class": int | str | list | None,
        "text": str | list | None,
        "negative": str,
        "encoder": str,
    },
    total=False,
)


@dataclass(frozen=True)
class Wanted:
    """n images: cond, each (n ...), what to be led away from (negative), texts (n) where they were drawn from text.

    columns: how many a grid wants, 0 = as square as n allows. told: what goes into the settings.
    """

    n: int
    cond: dict[str, Tensor] = field(default_factory=dict)
    negative: dict[str, Tensor] = field(default_factory=dict)
    texts: tuple[str | None, ...] = ()
    columns: int = 0
    told: dict[str, Any] = field(default_factory=dict)


def choose(run: Run, options: Mapping[str, Any], default: int | None) -> Wanted:
    """The conditions that class=, text= and negative= ask for, n= or `default` of them, None for each once.

    UserError where they cannot be.
    """
    takes, n = getattr(run.denoiser.net, "takes", ()), options.get("n")
    _check_asked(run, options, takes)
    lists = {key: List.read(options[key], key) for key in ("class", "text") if _is_file(options.get(key))}
    n = _agreed(lists, n) if lists else (default or _each_once(run, options)) if n is None else n
    if n < 1:
        raise UserError("must be at least 1", key="n", found=n)
    cond, texts, columns, told = {}, (), 0, {}
    if "label" in takes:
        wanted = lists["class"].values if "class" in lists else options.get("class", "all")
        cond["label"], columns = choose_labels(run, wanted, n)
        told["class"] = lists["class"].told if "class" in lists else wanted
    if "pooled" in takes:
        wanted = lists["text"].values if "text" in lists else options.get("text", run.prompts)
        several = [_text(w) for w in (wanted if isinstance(wanted, list) else [wanted])]
        texts = cycle(several, n, "text")
        columns = columns or (len(several) if 1 < len(several) <= WIDE else 0)
        told["text"] = lists["text"].told if "text" in lists else wanted
        told |= {key: options[key] for key in ("negative", "encoder") if key in options}
    pooled, negative, sha256 = embed(run, texts, options) if texts else ({}, {}, {})
    return Wanted(n, cond | pooled, negative, texts, columns, told | sha256)


def _each_once(run: Run, options: Mapping[str, Any]) -> int:
    every = getattr(run.denoiser.net, "null_label", None) or 1
    count = lambda wanted: len(wanted) if isinstance(wanted, list) else every if wanted == "all" else 1
    return max(count(options.get("class", "all")), count(options.get("text", run.prompts)))


def _check_asked(run: Run, options: Mapping[str, Any], takes: Sequence[str]) -> None:
    """UserError for a class that no net takes, a text that none reads, and a text that is missing."""
    if "class" in options and "label" not in takes:
        other = 'text="..."' if "pooled" in takes else "leave class out"
        raise UserError("this model knows no classes", key="class", found=options["class"], fix=other)
    for key in ("text", "negative", "encoder"):
        if key in options and "pooled" not in takes:
            other = f"class={run.classes[0]}" if run.classes else f"leave {key} out"
            raise UserError("this model reads no text", key=key, found=options[key], fix=other)
    if "pooled" in takes and "text" not in options and not run.prompts:
        raise UserError("this model draws from text", key="text", fix='text="a cat", text=FILE.txt, or text=null')
    if options.get("guidance") == 1 and "negative" in options:
        raise UserError("a negative text works through guidance", key="negative", fix="guidance=4")


def cycle(values: Sequence[Any], n: int, key: str) -> tuple[Any, ...]:
    """n of the values, in turn."""
    if not values:
        raise UserError(f"an empty list for {key}", key=key, expected=f"{key}=[0,1]" if key == "class" else None)
    return tuple(values[i % len(values)] for i in range(n))


@contextmanager
def about(key: str) -> Iterator[None]:
    """A UserError that names no key, or another layer's, is about this one."""
    try:
        yield
    except UserError as e:
        raise UserError(e.what, **{**e.details, "key": key}) from None


# -- classes -----------------------------------------------------------------------------------------------------------


def choose_labels(run: Run, wanted: Any, n: int) -> tuple[Tensor, int]:
    """Labels (n) of classes, and how many columns show them best: a number, a name, a list, None for no class, "all"."""
    null = int(run.denoiser.net.null_label)  # type: ignore[arg-type]
    if wanted == "all":
        return cycled(n, null), null if null <= WIDE else 0
    names = {name: i for i, name in enumerate(run.classes)}
    numbers = [_label(run, names, w, null) for w in (wanted if isinstance(wanted, list) else [wanted])]
    labels = torch.tensor(cycle(numbers, n, "class"))
    return labels, len(numbers) if 1 < len(numbers) <= WIDE else 0


def _label(run: Run, names: Mapping[str, int], wanted: Any, null: int) -> int:
    if wanted is None:
        return null
    if isinstance(wanted, str):
        return lookup(names, wanted, "class")
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted < null:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(run.classes[:20]) if str(i) != name)
        expected = f"0 to {null - 1}{known and f' ({known})'}, or null"
        raise UserError("no such class", key="class", expected=expected, found=wanted)
    return wanted


# -- texts -------------------------------------------------------------------------------------------------------------


def _text(wanted: Any) -> str | None:
    return None if wanted is None else str(wanted)


def embed(
    run: Run, texts: Sequence[str | None], options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """cond and negative of texts (n), each {"pooled": (n d)}, and what tells the encoder.

    No text (None) is zeros, and each text is read once and alone.
    """
    from nanodiffusion.text.pooled import open_text

    where = options.get("encoder") or run.config.text
    if not where:
        raise UserError(
            "this run does not say what reads its texts", key="encoder", fix="encoder=FOLDER or encoder=words"
        )
    with about("encoder"):
        encoder = open_text(where)
    config = run.denoiser.net.config
    wanted = getattr(config, "pooled_dim", getattr(config, "text_dim", encoder.dim))
    if wanted != encoder.dim:
        what = "this text encoder is not the one that the model learnt from"
        raise UserError(what, file=where, key="encoder", expected=f"{wanted} features", found=encoder.dim)
    known = {text: i for i, text in enumerate(dict.fromkeys(t for t in (*texts, _text(options.get("negative"))) if t))}
    table = torch.cat([encoder.encode([text]) for text in known] + [torch.zeros(1, encoder.dim)])
    rows = lambda wanted: table[torch.tensor([known.get(text, -1) for text in wanted])]
    negative = {"pooled": rows([_text(options["negative"])] * len(texts))} if options.get("negative") else {}
    return {"pooled": rows(texts)}, negative, {"encoder_sha256": encoder.sha256}


# -- files -------------------------------------------------------------------------------------------------------------


def _is_file(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.lower().endswith(LISTS)


def _agreed(lists: Mapping[str, "List"], n: int | None) -> int:
    """How many images files ask for, unless n= says so; counts and n= must agree."""
    counts = {entry.counted for entry in lists.values() if entry.counted is not None}
    if n is None:
        n = max(counts, default=max(len(entry.values) for entry in lists.values()))
    if counts - {n}:
        raise UserError("the file's counts say how many", key="n", expected=max(counts), found=n, fix="leave n out")
    return n


@dataclass(frozen=True)
class List:
    """What a file lists: values, in order; counted: their number, where the file gives counts."""

    values: list[Any]
    counted: int | None
    told: dict[str, str]

    @classmethod
    def read(cls, file: str, key: str) -> "List":
        """YAML: a list, or a mapping of each value to its count; .txt: a value a line. UserError: it is neither."""
        try:
            raw = Path(file).read_bytes()
            text = raw.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError("the file cannot be read", file=file, key=key, found=_reason(e)) from None
        if file.lower().endswith(".txt"):
            values, counted = [line.strip() for line in text.splitlines() if line.strip()], None
            values = [int(v) if key == "class" and v.isdecimal() else v for v in values]
        else:
            values, counted = _listed(_parse(text, file, key), file, key)
        if not values:
            raise UserError("the file is empty", file=file, key=key, expected=f"a {key} on every line")
        return cls(values, counted, {"file": Path(file).name, "sha256": hashlib.sha256(raw).hexdigest()})


def _reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or " ".join(str(e).split())


def _parse(text: str, file: str, key: str) -> Any:
    yaml = need("yaml", "train")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_twice(node, file, key)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError("the file is no YAML", file=file, key=key, found=_reason(e)[:200]) from None


def _check_twice(node: Any, file: str, key: str) -> None:
    """UserError for a key given twice, of which YAML's readers keep one."""
    if getattr(node, "id", "") != "mapping":
        return
    names = [getattr(k, "value", k) for k, _ in node.value]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError("the same is counted twice", file=file, key=key, found=twice[0])


def _listed(found: Any, file: str, key: str) -> tuple[list[Any], int | None]:
    """Values in order, and their number if they are counted."""
    if isinstance(found, Mapping):
        counts = {value: _count(count, value, file, key) for value, count in found.items()}
        if (total := sum(counts.values())) > MOST:
            raise UserError("too many images", file=file, key=key, expected=f"at most {MOST:,}", found=f"{total:,}")
        return [_plain(value, file, key) for value, count in counts.items() for _ in range(count)], total
    if found is not None and not isinstance(found, list):
        raise UserError("neither a list nor counts", file=file, key=key, expected="[a, b] or {a: 3, b: 2}", found=found)
    return [_plain(value, file, key) for value in found or []], None


def _count(count: Any, value: Any, file: str, key: str) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        expected = "a whole number, at least 1"
        raise UserError(f"how many of {value!r}?", file=file, key=key, expected=expected, found=repr(count))
    return count


def _plain(value: Any, file: str, key: str) -> Any:
    kinds: tuple[Callable[[Any], bool], ...] = (
        lambda v: v is None,
        lambda v: isinstance(v, str),
        lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    )
    if not any(fits(value) for fits in kinds):
        expected = "a number or a name" if key == "class" else "a text"
        fix = "quotes around it" if isinstance(value, bool) else None
        raise UserError("this cannot be listed", file=file, key=key, expected=expected, found=repr(value)[:80], fix=fix)
    return value
