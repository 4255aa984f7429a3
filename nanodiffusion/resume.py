"""The settings that lie beside work in parts: read back by a later call, and held against its own before it goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanodiffusion.errors import UserError
from nanodiffusion.show import atomic


def keep_settings(file: Path, settings: Mapping[str, Any], what: str, where: Path, fix: str) -> None:
    """Write the settings of the work at `where` into `file`, or hold them against those of an earlier call.

    UserError `what`: they are others. Also: they are damaged, or cannot be written.
    """
    if file.exists():
        return check_same(parse_settings(file.read_bytes(), settings, file, fix), settings, what, where, fix)
    with atomic(file) as part:
        part.write_text(json.dumps(settings, sort_keys=True))


def parse_settings(text: str | bytes, like: Mapping[str, Any], file: Path, fix: str) -> dict[str, Any]:
    """The settings in a file. UserError: no JSON of a mapping, or one that shares no key with settings `like` these."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _damaged(file, str(e), fix) from None
    if not isinstance(found, dict) or not found.keys() & like.keys():
        raise _damaged(file, json.dumps(found)[:200], fix)
    return found


def _damaged(file: Path, found: str, fix: str) -> UserError:
    return UserError("these settings are damaged", file=file, expected="JSON, as it was written", found=found, fix=fix)


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], what: str, file: Path, fix: str) -> None:
    """UserError `what` unless the settings of what lies in `file` are, as JSON has them, those of this call."""
    old, now = (json.loads(json.dumps(side)) for side in (old, new))
    keys = [k for k in (*now, *sorted(old.keys() - now.keys())) if k not in old or k not in now or old[k] != now[k]]
    if keys:
        before, after = ({k: side.get(k) for k in keys} for side in (old, now))
        raise UserError(what, file=file, key=", ".join(keys), expected=before, found=after, fix=fix)
