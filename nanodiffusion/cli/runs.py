"""A run by the path in a command's first word."""

from pathlib import Path

from nanodiffusion.errors import UserError

SHOWN = 20


def refuse_several(path: str | Path, command: str) -> None:
    """UserError that lists them where a folder holds runs and is none itself."""
    path = Path(path)
    if not path.is_dir() or (path / "checkpoint").is_dir() or (path / "manifest.json").is_file():
        return
    runs = sorted({manifest.parents[2].name for manifest in path.glob("*/checkpoint/*/manifest.json")})
    if runs:
        found = ", ".join(runs[:SHOWN]) + (f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else "")
        fix = f"nanodiffusion {command} {path / runs[0]}"
        raise UserError("this folder holds runs and is none", file=path, expected="one of them", found=found, fix=fix)
