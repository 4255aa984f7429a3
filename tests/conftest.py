"""What tests share: the process as it was, whatever a test (or a command it runs) sets."""

from collections.abc import Iterator

import pytest
import torch

PRECISION = torch.get_float32_matmul_precision()


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision(PRECISION)  # what is made once for many tests may have run a command
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(PRECISION)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny nets are quicker on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
