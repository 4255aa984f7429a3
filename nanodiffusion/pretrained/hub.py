"""Names on the Hugging Face hub as folders on this disk: the commit is found once, and used for every file.

The cache has the layout of the package huggingface_hub, which is needed to download, and only for that.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanodiffusion.errors import UserError, need
from nanodiffusion.pretrained.weights import PICKLES, STEMS

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # a branch, a tag, refs/pr/1 or a commit
ANSWERS = ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError")  # the hub's own no, not a broken line
Choose = Callable[[list[str]], list[str]]  # the names of a repository's files -> those that are needed


@dataclass(frozen=True)
class Place:
    """A file or folder on this disk, the name it was asked for by, and the commit it is of, where it came from the hub."""

    path: Path
    name: str
    commit: str | None = None


def locate(where: str | Path, choose: Choose, revision: str | None = None) -> Place:
    """A path that exists, or a name on the hub ("owner/name", "owner/name/file-or-folder in it"), downloaded if need be.

    choose: which of the repository's files to fetch. UserError: neither, no such name or revision, no network and no cache.
    """
    path = Path(where)
    if path.exists():
        if revision is not None:
            raise UserError("a local path has no revisions", file=path, key="revision", found=revision)
        return Place(path, str(where))
    name, inside = split_name(where)
    if revision is not None and REVISION.fullmatch(revision) is None:
        raise UserError("not a revision", key="revision", expected="a branch, tag or commit", found=repr(revision))
    folder = _snapshot(name, _below(choose, inside), revision)
    if not (folder / inside).exists():
        raise UserError("the repository has no such file", file=name, key=inside, found=f"commit {folder.name}")
    return Place(folder / inside, str(where), folder.name)


def split_name(where: str | Path) -> tuple[str, str]:
    """ "owner/name" and what follows it, "" if nothing. UserError: not of that form."""
    parts = [part for part in str(where).split("/") if part not in ("", ".")]
    name = "/".join(parts[:2])
    if NAME.fullmatch(name) is None or str(where).startswith(("/", ".", "~")) or ".." in parts:
        expected = "a file, a folder, or a name on the hub such as owner/name"
        raise UserError("there is no such model", file=where, expected=expected, found="nothing", fix="check the path")
    return name, "/".join(parts[2:])


def _below(choose: Choose, inside: str) -> Choose:
    """Choose among the files inside a folder of the repository, or that one file."""

    def chosen(files: list[str]) -> list[str]:
        if inside in files or not inside:
            return [inside] if inside else choose(files)
        start = f"{inside}/"
        return [start + file for file in choose([f.removeprefix(start) for f in files if f.startswith(start)])]

    return chosen


def _snapshot(name: str, choose: Choose, revision: str | None) -> Path:
    """The folder of a commit with the chosen files: from the hub, or from the cache where the hub cannot be reached."""
    if is_offline():
        return _cached(name, revision, "HF_HUB_OFFLINE is set")
    if find_spec("huggingface_hub") is None and (found := cached(name, revision)):
        return found
    hub = need("huggingface_hub", "hub")
    try:
        return _download(hub, name, choose, revision)
    except UserError:
        raise
    except Exception as e:  # each of the package's versions, and of the HTTP libraries under it, raises others
        if type(e).__name__ in ANSWERS:
            fix = "check owner, name and revision; for a gated model accept its terms and log in with `hf auth login`"
            raise UserError("the hub has no such model for you", file=name, found=_short(e), fix=fix) from e
        return _cached(name, revision, f"the hub cannot be reached: {_short(e)}")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _download(hub: Any, name: str, choose: Choose, revision: str | None) -> Path:
    info = hub.HfApi().model_info(name, revision=revision)
    files = choose([sibling.rfilename for sibling in info.siblings or []])
    folder = Path(hub.snapshot_download(name, revision=info.sha, allow_patterns=files))
    _remember(folder, revision or "main")
    return folder


def _remember(folder: Path, revision: str) -> None:
    """Note which commit a branch meant, as the package does when asked for a branch: offline, no name is found without it."""
    ref = folder.parent.parent / "refs" / revision
    if revision != folder.name and folder.parent.name == "snapshots":
        with suppress(OSError):  # a cache that is read-only
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(folder.name)


# -- the cache -----------------------------------------------------------------------------------------------------------


def is_offline() -> bool:
    """Whether the environment forbids the network, by the package's own variable."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    environment = os.environ.get
    home = environment("HF_HOME") or os.path.join(environment("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(environment("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def cached(name: str, revision: str | None = None) -> Path | None:
    """The folder of a name's commit in the cache, or None; a branch is the commit it was when last downloaded."""
    repository = cache_folder() / ("models--" + name.replace("/", "--"))
    commits = [revision or "main"]
    with suppress(OSError):
        commits.append((repository / "refs" / commits[0]).read_text().strip())
    found = [repository / "snapshots" / commit for commit in commits if re.fullmatch(r"\w[\w.-]*", commit)]
    return next((folder for folder in found if folder.is_dir()), None)


def at_hand(where: str | Path) -> Path:
    """A path as it is, and of a name on the hub what the cache has of it. UserError: neither path nor name."""
    if Path(where).exists():
        return Path(where)
    name, inside = split_name(where)
    found = cached(name)
    return found / inside if found else Path(where)


def _cached(name: str, revision: str | None, why: str) -> Path:
    found = cached(name, revision)
    if found is None:
        expected = f"a path, or {name}{f' at {revision}' * bool(revision)} in {cache_folder()}"
        fix = "check the path; or download it on a machine with a network"
        raise UserError("there is no such model here", file=name, expected=expected, found=why, fix=fix)
    if not is_offline():
        warnings.warn(f"{why}; using {name} as it is in the cache, commit {found.name}", stacklevel=4)
    return found


# -- which files of a repository are needed ------------------------------------------------------------------------------

SMALL = re.compile(r"(config|\w+_config|model_index|vocab|special_tokens_map|added_tokens|tokenizer)\.json|merges\.txt")


def needed(files: list[str], variant: str | None, folders: Sequence[str]) -> list[str]:
    """Of a repository's files those that a loader reads: configs, vocabularies, one set of weights per component.

    UserError: it holds none, or pickles only.
    """
    by_folder: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        by_folder.setdefault(folder, []).append(name)
    inside = [folder for folder in folders if folder in by_folder]
    weights = [f for f in inside if f != "scheduler"] or [""]  # a repository of one component has it at its root
    chosen = [_join(f, n) for f in ("", *inside) for n in by_folder.get(f, []) if SMALL.fullmatch(n)]
    for folder in weights:
        chosen += [_join(folder, name) for name in _weights(by_folder.get(folder, []), variant)]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise _no_weights(files)
    return chosen


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _weights(names: list[str], variant: str | None) -> list[str]:
    """The weight files among a folder's: of the variant where it has them, whole or in shards."""
    stems = "|".join(STEMS)
    for middle in ([rf"\.{re.escape(variant)}"] if variant else []) + [""]:
        whole = [n for n in names if re.fullmatch(rf"({stems}){middle}\.safetensors", n)]
        shards = [n for n in names if re.fullmatch(rf"({stems}){middle}-\d+-of-\d+\.safetensors", n)]
        index = [n for n in names if re.fullmatch(rf"({stems})\.safetensors\.index{middle}\.json", n)]
        if whole or (index and shards):
            return whole or index + shards
    return []


def _no_weights(files: list[str]) -> UserError:
    alone = [file for file in files if file.endswith(".safetensors")]
    pickles = [file for file in files if file.endswith(PICKLES)]
    found = ", ".join((alone or pickles or files)[:4]) or "nothing"
    fix = (
        f"name the file: OWNER/NAME/{alone[0]}"
        if alone
        else "download one and use nanodiffusion convert"
        if pickles
        else None
    )
    return UserError("this repository has no weights laid out as a checkpoint", found=found, fix=fix)
