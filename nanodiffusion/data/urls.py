"""Pictures from a table of addresses and captions, fetched by img2dataset, which is run as a program of its own.

img2dataset pins old versions of many packages, so it lives in an environment of its own and is never imported. It writes
00000.tar, 00000_stats.json and 00000.parquet for every shard, the stats last; it takes every shard with stats, and every other
.json of the folder, for done, also one of which no picture came, and it ends with 0 when it is interrupted. So what it left is
looked at before it starts and after it ended.
"""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from nanodiffusion.data.shards import PICTURES, member_names, shard_name
from nanodiffusion.errors import UserError, lookup, nearest, need

TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")
RESIZES = ("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop")
DISTRIBUTORS = ("multiprocessing", "pyspark", "ray")
ENCODINGS = ("jpg", "png", "webp")
URLS = ("url", "image_url", "link", "image", "file_url")  # names that columns have, the likeliest first
CAPTIONS = ("caption", "text", "alt_text", "prompt", "description", "title")
MAX_JSON = 1 << 30  # bytes of a .json table, which is read whole
INSTALL = "python3 -m venv ~/img2dataset && ~/img2dataset/bin/pip install img2dataset"


class Table(NamedTuple):
    """A table of addresses: its columns, how many rows it has, and the first of them."""

    file: Path
    columns: tuple[str, ...]
    rows: int
    first: dict[str, Any]


class Fetch(NamedTuple):
    """What is asked of img2dataset."""

    table: Table
    url: str
    caption: str
    out: Path
    size: int = 256
    resize: str = "center_crop"
    encode: str = "jpg"
    per_shard: int = 10000
    processes: int = 1
    threads: int = 64
    distributor: str = "multiprocessing"
    timeout: int = 10
    retries: int = 1

    @property
    def shards(self) -> int:
        """How many shards there will be."""
        return -(-self.table.rows // self.per_shard)


# ---- the table


def read_table(file: Path) -> Table:
    """The columns, the number of rows and the first row of a table. UserError: it is none, or is empty."""
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".json": _json, ".jsonl": _json_lines}
    try:
        table = lookup(readers, file.suffix.lower(), "table")(file)
    except UnicodeDecodeError as e:
        raise UserError("the table cannot be read", file=file, expected="UTF-8", found=str(e)[:200]) from e
    except (OSError, ValueError, csv.Error, RecursionError) as e:
        raise UserError("the table cannot be read", file=file, expected=" ".join(TABLES), found=str(e)[:200]) from e
    if not table.rows or not table.columns:
        raise UserError("the table has no rows", file=file, expected="a row of names, then one row a picture")
    return table


def _csv(file: Path) -> Table:
    """Rows are lines, as img2dataset reads them: it lets no line break into a value."""
    tab = "\t" if file.suffix.lower() == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as f:
        head = [f.readline(1 << 20), f.readline(1 << 20)]
        rows = sum(1 for line in chain([head[1]], _lines(f)) if line.strip())
    names, first = (next(csv.reader(io.StringIO(line), delimiter=tab), []) for line in head)
    return Table(file, tuple(names), rows, dict(zip(names, first)))


def _lines(f: io.TextIOBase | Any) -> Iterator[str]:
    while line := f.readline(1 << 20):
        yield line


def _parquet(file: Path) -> Table:
    parquet = need("pyarrow.parquet", extra="data").ParquetFile(file)  # its errors are ValueErrors and OSErrors
    first = next(parquet.iter_batches(1), None)
    row = first.to_pylist()[0] if first is not None and len(first) else {}
    return Table(file, tuple(parquet.schema_arrow.names), parquet.metadata.num_rows, row)


def _json(file: Path) -> Table:
    """A list of objects."""
    if file.stat().st_size > MAX_JSON:
        raise ValueError(f"above {MAX_JSON} bytes; as .jsonl or .parquet it may be larger")
    rows = json.loads(file.read_text("utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of objects")
    return Table(file, tuple(rows[0]) if rows else (), len(rows), rows[0] if rows else {})


def _json_lines(file: Path) -> Table:
    with open(file, encoding="utf-8-sig") as f:
        line = f.readline(1 << 20)
        first = json.loads(line) if line.strip() else {}
        rows = sum(1 for text in chain([line], _lines(f)) if text.strip())
    if not isinstance(first, dict):
        raise ValueError("not an object a line")
    return Table(file, tuple(first), rows, first)


def choose_column(table: Table, asked: str, likely: Sequence[str], key: str) -> str:
    """The column that is asked for, or else the one with a likely name. UserError: there is none."""
    if asked:
        if asked not in table.columns:
            raise UserError(f"no column {asked!r}", file=table.file, key=key, fix=nearest(asked, table.columns)[:300])
        return asked
    low = {name.lower(): name for name in reversed(table.columns)}
    for name in likely:
        if name in low:
            return low[name]
    fix = f"{key}=COLUMN, one of: {', '.join(table.columns)}"[:300]
    raise UserError(f"which column is the {key}?", file=table.file, key=key, fix=fix)


def check_columns(table: Table, url: str, caption: str) -> None:
    """UserError: both are one, the url is none, or img2dataset would have two columns of a name."""
    if url == caption:
        raise UserError("the address and the caption are one column", file=table.file, key="caption", found=url)
    value = table.first.get(url)
    if not str(value).strip().startswith(("http://", "https://")):
        expected = f"addresses (http://...) in the column {url}"
        raise UserError("these are no addresses", file=table.file, key="url", expected=expected, found=str(value)[:80])
    for mine, name in ((url, "url"), (caption, "caption")):
        if mine != name and name in table.columns and table.file.suffix != ".parquet":
            found = f"another column is called {name}, and img2dataset calls yours so too"
            raise UserError("two columns would have one name", file=table.file, key=name, found=found, fix="rename it")


# ---- the program


def find_program(asked: str) -> str:
    """img2dataset's path, or a UserError that says how to install it."""
    found = shutil.which(os.path.expanduser(asked or "img2dataset"))
    if found is None:
        expected = "a program on PATH, or img2dataset=PATH"
        fix = f"{INSTALL}; then img2dataset=~/img2dataset/bin/img2dataset"
        raise UserError("img2dataset is not here", key="img2dataset", expected=expected, found=asked or None, fix=fix)
    return found


def command(fetch: Fetch, program: str) -> list[str]:
    """The program with all that it is asked."""
    options: dict[str, Any] = {
        "url_list": fetch.table.file.resolve(),
        "input_format": fetch.table.file.suffix.lower()[1:],
        "url_col": fetch.url,
        "caption_col": fetch.caption,
        "output_format": "webdataset",
        "output_folder": fetch.out.resolve(),
        "image_size": fetch.size,
        "resize_mode": fetch.resize,
        "encode_format": fetch.encode,
        "encode_quality": 6 if fetch.encode == "png" else 95,  # of PNG: how hard it is compressed
        "number_sample_per_shard": fetch.per_shard,
        "processes_count": fetch.processes,
        "thread_count": fetch.threads,
        "timeout": fetch.timeout,
        "retries": fetch.retries,
        "distributor": fetch.distributor,
        "incremental_mode": "incremental",
    }
    return [program, *(f"--{key}={value}" for key, value in options.items())]


def shown(words: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(words)


def run(fetch: Fetch, program: str, lock: int) -> int:
    """Run img2dataset to its end; its exit code. It holds the lock of the folder as long as it lives."""
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}  # else a package of its asks the network for news
    with _terminated(), subprocess.Popen(command(fetch, program), env=environment, pass_fds=(lock,)) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the child, too."""

    def leave(*_: Any) -> None:
        raise SystemExit(143)

    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


# ---- what it left


class Shard(NamedTuple):
    """One shard as img2dataset left it: what is wrong with it ("" nothing), and its stats."""

    name: str
    wrong: str
    asked: int = 0
    came: int = 0
    failed: Counter[str] = Counter()  # noqa: RUF012  # nobody changes it


def inspect(fetch: Fetch) -> list[Shard]:
    """Every shard that there should be."""
    return [_inspect(fetch, number) for number in range(fetch.shards)]


def _inspect(fetch: Fetch, number: int) -> Shard:
    tar = fetch.out / shard_name(number)
    stats = _stats_file(fetch, number)
    rows = min(fetch.per_shard, fetch.table.rows - number * fetch.per_shard)
    if not stats.is_file():
        return Shard(tar.name, "begun, not done" if tar.exists() else "not there")
    try:
        said = json.loads(stats.read_text("utf-8"))
        asked, came, status = int(said["count"]), int(said["successes"]), dict(said["status_dict"])
        failed = Counter({str(why): int(n) for why, n in status.items() if why != "success"})
    except (OSError, ValueError, KeyError, TypeError) as e:
        return Shard(tar.name, f"its stats cannot be read: {e}")
    wrong = _wrong(tar, asked, came, rows)
    return Shard(tar.name, wrong, asked, came, failed)


def _wrong(tar: Path, asked: int, came: int, rows: int) -> str:
    if asked != rows:
        return f"{asked} rows, not {rows}"
    if not tar.is_file():
        return "not there"
    members, fault = member_names(tar)
    if fault and came:
        return fault
    pictures = sum(name.rpartition(".")[2] in PICTURES for name in members)
    if pictures != came:
        return f"{pictures} pictures, not {came}"
    return _wrong_rows(tar.with_suffix(".parquet"), asked)


def _wrong_rows(file: Path, rows: int) -> str:
    try:
        found = need("pyarrow.parquet", extra="data").ParquetFile(file).metadata.num_rows
    except (OSError, ValueError) as e:
        return f"its table cannot be read: {e.strerror if isinstance(e, OSError) and e.strerror else 'damaged'}"
    return "" if found == rows else f"its table has {found} rows, not {rows}"


def _stats_file(fetch: Fetch, number: int) -> Path:
    return fetch.out / f"{number:05d}_stats.json"


def clear(fetch: Fetch) -> list[Shard]:
    """Let img2dataset do again what is not whole, or empty because nothing could be fetched; those shards."""
    (fetch.out / "census.json").unlink(missing_ok=True)  # else img2dataset stops at it: no number, it says
    again = []
    for number, shard in enumerate(inspect(fetch)):
        if (shard.wrong or not shard.came) and _stats_file(fetch, number).exists():
            _stats_file(fetch, number).unlink()
            again.append(shard)
    return again
