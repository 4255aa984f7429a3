"""`nanodiffusion prepare SOURCE out=DIR`: URLs, captioned folders and published sets to shards, and what is in them."""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nanodiffusion import prepare
from nanodiffusion.cli.words import parse_value, read_pairs
from nanodiffusion.data import urls
from nanodiffusion.data.captions import TEMPLATE
from nanodiffusion.data.shards import expand_shards, plain, read_shards
from nanodiffusion.errors import UserError, few, lookup, nearest
from nanodiffusion.tensors import file_sha256

USAGE = "nanodiffusion prepare SOURCE out=DIR [key=value ...]"
SHARED = ("out", "per_shard", "threads", "size", "resize", "encode")
KEYS = {  # which keys a kind of source knows
    "table": (*SHARED, "url", "caption", "processes", "distributor", "timeout", "retries", "img2dataset", "dry"),
    "folder": (*SHARED, "template", "format", "census"),
    "set": (*SHARED, "template", "format", "split", "n"),
    "shards": ("out", "threads", "census"),
}
LEAST = {"size": 0, "n": 0, "threads": 0, "retries": 0, "per_shard": 1, "processes": 1, "timeout": 1}


@dataclass
class Order:
    """What the command line asks for; None where nothing was said."""

    source: str
    kind: str
    out: str | None = None
    per_shard: int = 10000
    threads: int | None = None
    size: int | None = None
    resize: str = "center_crop"
    encode: str = ""
    url: str = ""
    caption: str = ""
    processes: int = 1
    distributor: str = "multiprocessing"
    timeout: int = 10
    retries: int = 1
    img2dataset: str = ""
    dry: bool = False
    template: str = TEMPLATE
    format: str = "shards"
    split: str = "train"
    n: int = 0
    census: bool = False
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.out or ".")


def main(args: Namespace) -> int:
    """Prepare, and say what there is now."""
    order = read_order(args.words)
    if order.kind == "table":
        return from_urls(order)
    if order.census:
        return count(order)
    return from_pictures(order)


# ---- the command line


def read_order(words: Sequence[str]) -> Order:
    """The command's words. UserError: no source, keys that its kind does not know, values of another kind."""
    if not words:
        known = f"a table of URLs, a captioned folder, shards, or one of {', '.join(prepare.SETS)}"
        raise UserError("prepare what?", expected=USAGE, fix=known)
    kind = kind_of(words[0])
    given = read_pairs(words[1:], {key: None for keys in KEYS.values() for key in keys})
    for key in given:
        if key not in KEYS[kind]:
            raise UserError(f"{key} says nothing of a {kind}", key=key, fix=nearest(key, KEYS[kind]))
    order = Order(words[0], kind, **{key: _value(key, text) for key, text in given.items()})
    _check(order)
    return order


def kind_of(source: str) -> str:
    """Whether a source is a table, a folder, a set's name or shards. UserError: nothing of these."""
    path = Path(source)
    if source in prepare.SETS:
        return "set"
    if path.suffix.lower() in urls.TABLES:
        if not path.is_file():
            raise UserError("there is no such table", file=source, expected="a file of addresses and captions")
        return "table"
    if path.is_dir():
        return "shards" if any(path.glob("*.tar")) else "folder"
    if ".tar" in source or "::" in source:
        return "shards"
    fix = nearest(source, prepare.SETS)
    raise UserError("there is nothing to prepare", file=source, expected="a file, a folder, or a set's name", fix=fix)


def _value(key: str, text: str) -> Any:
    """A key's value, of the kind that its field has."""
    kind = next(str(f.type) for f in fields(Order) if f.name == key)
    value: Any = text if "str" in kind else parse_value(text)
    wanted = (int,) if "int" in kind else (bool,) if "bool" in kind else (str,)
    if type(value) not in wanted or (key in LEAST and value < LEAST[key]):
        expected = {"int": f"a whole number from {LEAST.get(key, 0)}", "bool": "true or false", "str": "a text"}
        raise UserError(f"not a value of {key}", key=key, expected=expected[wanted[0].__name__], found=text)
    return value


def _check(order: Order) -> None:
    table = order.kind == "table"
    lookup(dict.fromkeys(urls.RESIZES if table else prepare.RESIZES), order.resize, "resize")
    lookup(dict.fromkeys(urls.ENCODINGS if table else ("", *prepare.ENCODINGS)), order.encode or "jpg", "encode")
    lookup(dict.fromkeys(urls.DISTRIBUTORS), order.distributor, "distributor")
    lookup(dict.fromkeys(("shards", "folder")), order.format, "format")
    lookup(dict.fromkeys(("train", "test")), order.split, "split")
    if order.kind == "shards" and not order.census:
        fix = "census=true counts what is in them; `nanodiffusion encode` takes them as they are"
        raise UserError("these are shards already", file=order.source, fix=fix)
    if order.out is None and not order.census:
        raise UserError("where to?", key="out", expected=USAGE, fix="out=DIR, a new folder")
    if Path(order.out or "").suffix == ".tar":
        raise UserError("out is a folder", key="out", expected="out=DIR", found=order.out)
    if order.out and order.folder.exists() and not order.folder.is_dir():
        raise UserError("out is a file", key="out", expected="a folder", found=order.out)


# ---- pictures that are here


def from_pictures(order: Order) -> int:
    """A captioned folder or a published set, to shards or to a captioned folder."""
    source = _source(order)
    plan = {
        "source": order.source if order.kind == "set" else "folder",
        "pictures": source.identity,
        "per_shard": order.per_shard,
        "format": order.format,
        **asdict(_form(order)),
    }
    with prepare.at_work(order.folder, plan):
        census = _write(order, source)
        census.faults = [*source.faults, *census.faults]
        prepare.write_census(order.folder, census, source.classes)
    say_census(census, source.classes)
    if not census.samples:
        raise UserError("not one picture could be used", file=order.source, found=census.faults[0])
    print(f"wrote {order.folder}")
    return 0


def _source(order: Order) -> prepare.Source:
    if order.kind == "set":
        return prepare.set_source(order.source, order.split, order.template, order.n, _form(order))
    return prepare.folder_source(order.source, order.template, _form(order))


def _form(order: Order) -> prepare.Form:
    return prepare.Form(order.size or 0, order.resize, order.encode)


def _write(order: Order, source: prepare.Source) -> prepare.Census:
    threads = order.threads or 0
    if order.format == "folder":
        return prepare.prepare_folder(source, order.folder, threads)
    total = prepare.Census()
    for file, census in prepare.prepare_shards(source, order.folder, order.per_shard, threads):
        total.merge(vars(census))
        print(f"{file.name}: {census.samples} pictures", file=sys.stderr)
    return total


# ---- the census alone


def count(order: Order) -> int:
    """What is in shards or in a captioned folder; with out= also as out/census.json."""
    classes: Sequence[str] = ()
    if order.kind == "shards":
        faults: list[str] = []
        samples = read_shards(expand_shards(order.source), faults, need_caption=False, workers=order.threads or 0)
        census = prepare.census_of(samples, faults)
    else:
        source, census = _source(order), prepare.Census()
        for _ in prepare.read_items(source, range(len(source.names)), order.threads or 0, census):
            pass
        census.faults = [*source.faults, *census.faults]
        classes = source.classes
    say_census(census, classes)
    if order.out:
        print(f"wrote {prepare.write_census(order.folder, census, classes)}")
    return 0


def say_census(census: prepare.Census, classes: Sequence[str] = ()) -> None:
    """The census in a few lines."""
    report = census.report(classes)
    print(f"{census.samples} pictures, {len(census.faults)} faults")
    if census.samples:
        print(f"sizes: {_counts(report['sizes'])} ({report['different_sizes']} different)")
        words = report["captions"]["words"]
        if words:
            print(f"captions: {words['min']} to {words['max']} words, {words['mean']:g} on average")
        if census.without_caption:
            print(f"without a caption: {census.without_caption}")
    if report["classes"]:
        print(f"classes: {plain(_counts(report['classes']))}")
    for reason, n in list(report["faults"]["reasons"].items())[:8]:
        print(f"left out: {n} x {plain(reason)}")
    if census.faults:
        print(f"the first: {plain(census.faults[0])}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in list(counts.items())[:10]) + (", ..." if len(counts) > 10 else "")


# ---- pictures from addresses


def from_urls(order: Order) -> int:
    """A table of addresses, through img2dataset; what came is looked at afterwards."""
    fetch = _fetch(order)
    if order.dry:
        print(urls.shown(urls.command(fetch, order.img2dataset or "img2dataset")))
        print(f"{fetch.table.rows} rows, {fetch.shards} shards; img2dataset comes with: {urls.INSTALL}")
        return 0
    program = urls.find_program(order.img2dataset)
    plan = _plan(fetch)
    with prepare.at_work(fetch.out, plan) as lock:
        again = urls.clear(fetch)
        if again:
            named = few(f"{shard.name} ({shard.wrong or 'nothing came'})" for shard in again)
            print(f"once more: {named}", file=sys.stderr)
        done = urls.inspect(fetch)
        code = urls.run(fetch, program, lock) if any(shard.wrong for shard in done) else 0
        shards = urls.inspect(fetch)
        return _look(fetch, shards, code)


def _fetch(order: Order) -> urls.Fetch:
    table = urls.read_table(Path(order.source))
    url = urls.choose_column(table, order.url, urls.URLS, "url")
    caption = urls.choose_column(table, order.caption, urls.CAPTIONS, "caption")
    urls.check_columns(table, url, caption)
    said = {"size": order.size, "encode": order.encode or None, "threads": order.threads or None}
    given = {key: value for key, value in said.items() if value is not None}
    kept = {
        key: getattr(order, key) for key in ("resize", "per_shard", "processes", "distributor", "timeout", "retries")
    }
    return urls.Fetch(table, url, caption, order.folder, **given, **kept)


def _plan(fetch: urls.Fetch) -> dict[str, Any]:
    """What must be the same for a resumed call."""
    keys = ("url", "caption", "size", "resize", "encode", "per_shard")
    return {"source": "table", "table": file_sha256(fetch.table.file), **{key: getattr(fetch, key) for key in keys}}


def _look(fetch: urls.Fetch, shards: Sequence[urls.Shard], code: int) -> int:
    """Count what came, write the census, and name what is not whole (a UserError)."""
    whole = [shard for shard in shards if not shard.wrong]
    failed: Counter[str] = sum((shard.failed for shard in whole), Counter())
    came = sum(shard.came for shard in whole)
    print(f"{came} of {sum(shard.asked for shard in whole)} pictures came, {failed.total()} did not")
    for why, n in sorted(failed.items(), key=lambda row: (-row[1], row[0]))[:8]:
        print(f"failed: {n} x {plain(why)}")
    faults: list[str] = []
    files = [str(fetch.out / shard.name) for shard in whole if shard.came]
    census = prepare.census_of(read_shards(files, faults, workers=fetch.processes), faults)
    asked = {"asked": sum(s.asked for s in whole), "came": came, "failed": dict(sorted(failed.items()))}
    prepare.write_census(fetch.out, census, download=asked)
    say_census(census)
    if empty := [shard.name for shard in whole if not shard.came]:
        print(f"nothing came for {few(empty)}: the same command tries again")
    if bad := [f"{shard.name} ({shard.wrong})" for shard in shards if shard.wrong]:
        found = f"{few(bad)}" + (f"; img2dataset ended with {code}" if code else "")
        fix = "the same command goes on"
        raise UserError(f"{len(bad)} of {len(shards)} shards are not whole", file=fetch.out, found=found, fix=fix)
    print(f"wrote {fetch.out}")
    return 0
