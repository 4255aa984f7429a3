"""Several processes as torchrun starts them: NCCL on GPUs, gloo on CPUs. One process needs none of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanodiffusion.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def max(self, number: int) -> int:
        """The largest number that any process says (a signal may reach one of them only)."""
        if self.size == 1:
            return number
        x = torch.tensor(number, device=self.device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return int(x)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """ "auto" is cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"no device {name!r} here",
            key="device",
            expected="auto, cpu, cuda, cuda:N or mps",
            found=str(e).split("\n")[0],
        ) from None
    return device


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes torchrun started, or be the only one."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(device=where)
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield World(rank, size, where)
    finally:
        dist.destroy_process_group()
