"""Reference implementations that the tests and the benchmarks compare with; none is a dependency of the library."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

TRANSFORMS = ("Compose", "RandomHorizontalFlip", "ToTensor", "Lambda")  # what smalldiffusion calls when imported


def smalldiffusion() -> ModuleType:
    """smalldiffusion itself, also where torchvision is missing: only its image transforms need it.

    The stand-in leaves sys.modules again, where accelerate and diffusers would take it for the real one.
    """
    if "smalldiffusion" in sys.modules or importlib.util.find_spec("torchvision"):
        return importlib.import_module("smalldiffusion")
    stubs = _torchvision()
    sys.modules |= stubs
    try:
        return importlib.import_module("smalldiffusion")
    finally:
        for name in stubs:
            del sys.modules[name]


def _torchvision() -> dict[str, ModuleType]:
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    package.transforms = transforms
    for name in TRANSFORMS:
        setattr(transforms, name, _stub)
    return {"torchvision": package, "torchvision.transforms": transforms}


def _stub(*args: Any, **kwargs: Any) -> None:
    """A transform that no test applies."""


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, the name float32 that diffusers and smalldiffusion use means float64: no rounding is compared."""
    torch_name, numpy_name, default = torch.float32, np.float32, torch.get_default_dtype()
    torch.float32, np.float32 = torch.float64, np.float64
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, np.float32 = torch_name, numpy_name
        torch.set_default_dtype(default)
