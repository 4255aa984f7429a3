"""Files of an encoding, each there whole or not at all."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanodiffusion.tensors import write_whole


def write(path: Path, chunks: Iterable[bytes | memoryview], work: Path) -> dict[str, Any]:
    """Write a file by way of one of the same name in `work`; its entry of the manifest."""
    return write_whole(path, chunks, work / f".tmp-{path.name}")


def write_npy(path: Path, dtype: Any, shape: Sequence[int], arrays: Iterable[np.ndarray], work: Path) -> dict[str, Any]:
    """Write arrays, one after the other, as one .npy of that shape; its entry of the manifest."""

    def chunks() -> Iterator[bytes | memoryview]:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, header)  # type: ignore[arg-type]
        yield head.getvalue()
        for array in arrays:
            yield np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data

    return write(path, chunks(), work)


def as_json(value: Any) -> bytes:
    """JSON of one text per value."""
    return json.dumps(value, indent=1, sort_keys=True).encode()
