"""Several processes as torchrun or `launch` starts them: NCCL on GPUs, gloo on CPUs. One process needs none of it."""

import atexit
import json
import math
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def part(self, n: int) -> tuple[Tensor, Tensor]:
        """Which of n >= 1 things this process has (k), as many as every other, and which (k) count: those too many do not."""
        each = -(-n // self.size)
        mine = torch.arange(self.rank * each, (self.rank + 1) * each)
        return mine % n, mine < n

    def max(self, number: int) -> int:
        """The largest number that any process says (a signal may reach one of them only)."""
        return self.largest(number)[0]

    def largest(self, *numbers: int) -> list[int]:
        """The same of several numbers at once, each by itself."""
        if self.size == 1:
            return list(numbers)
        x = torch.tensor(numbers, device=self.device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x.tolist()

    def told(self, what: Any) -> list[Any]:
        """What every process says, in their order."""
        if self.size == 1:
            return [what]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, what)
        return said

    def gather(self, x: Tensor) -> Tensor:
        """Tensors (n ...) of all processes one behind the other, (size n ...), on the first; the others keep their own."""
        if self.size == 1:
            return x
        x = x.to(self.device).contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)] if self.first else None
        dist.gather(x, found)
        return torch.cat(found) if found else x

    @property
    def memory(self) -> int:
        """The most bytes that this process has held so far: on its GPU, or of the machine's memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # which not every system has

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

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
    """Join the processes that torchrun or `launch` started, or be the only one."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield World(device=where)
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", **_meeting(rank, size))
    try:
        yield World(rank, size, where)
    except BaseException as e:
        # the time before this end of its connections closes, which the others die of
        e.at = time.time()  # type: ignore[attr-defined]
        raise
    finally:
        dist.destroy_process_group()


def _meeting(rank: int, size: int) -> dict[str, Any]:
    """Where the processes of this start meet: torchrun's own store, but under names of this start.

    Those of one that died are still in it, and lead nowhere. Agents on several machines may count starts differently: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, in torchrun's own environment, gives each start a new store.
    """
    elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not elastic or os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"start-{start}", store), "rank": rank, "world_size": size}


def end(code: int) -> NoReturn:
    """Leave a process that is one of several, and do not take it apart first, as a process of a fork is not.

    A thread of its process group may still be letting go of the last exchange. Where it needs the interpreter for that while
    the interpreter takes itself apart, the process aborts, although all its work is done. Threads are waited for, exit handlers
    run, and what was printed is written, as ever.
    """
    threading._shutdown()  # type: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -- starting them from Python -------------------------------------------------------------------------------------------

SAVING = 60.0  # that processes have to save in, once they are interrupted
SECONDS = 10.0  # that processes have to end by themselves once another one failed


def launch(function: Callable[..., Any], args: Sequence[Any] = (), processes: int = 2) -> Any:
    """function(*args) in `processes` processes of this machine, each as torchrun would start it, from Python or a notebook.

    What rank 0 returns, where JSON can say it, else None; of one process, which is this one, anything. A script calls it
    under `if __name__ == "__main__"`; a notebook's own functions need a system that can fork, and no GPU used before.
    UserError: one of a rank, or no way to start. RuntimeError: any other error of a rank, and its traceback.
    """
    if processes < 1 or not callable(function):
        found = f"{processes} of {function!r}"
        raise UserError("nothing to launch", expected="a function, and at least 1 process", found=found)
    if "RANK" in os.environ:
        raise UserError("this is one of several processes already", found="RANK", fix="call the function itself")
    if processes == 1:
        return function(*args)
    method = "fork" if _only_here(function) else "spawn"
    if method == "fork" and (torch.cuda.is_initialized() or not hasattr(os, "fork")):
        raise UserError("other processes cannot see this function", found=repr(function), fix="put it into a module")
    # where they meet is kept here, as torchrun does: a port found free and let go could be taken
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        _start_and_wait((function, tuple(args), processes, store.port, folder), processes, method)
        answer = Path(folder) / "0"
        return json.loads(answer.read_text()) if answer.exists() else None


def _only_here(function: Callable[..., Any]) -> bool:
    """Whether no other process could import it: a lambda, a function in a function, one of a notebook."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    typed_in = getattr(module, "__name__", "") == "__main__" and not hasattr(module, "__file__")
    return typed_in or "<" in getattr(function, "__qualname__", "")


def _start_and_wait(told: tuple[Any, ...], processes: int, method: str) -> None:
    from torch.multiprocessing.spawn import ProcessException, start_processes

    folder = Path(told[-1])
    try:
        start = _rank if method == "fork" else _spawned
        context: Any = start_processes(start, told, processes, join=False, start_method=method)
    except Exception as e:  # of many kinds, before any of them runs
        fix = "what a module defines, made of plain values"
        raise UserError("this cannot be sent to another process", found=str(e).split("\n")[0], fix=fix) from None
    left = SECONDS
    try:
        while not context.join(grace_period=SECONDS):
            pass
    except KeyboardInterrupt:  # they were interrupted too, and save; who does it again does not wait
        left = SAVING
        raise
    except ProcessException as e:
        errors = [json.loads(path.read_text()) for path in folder.glob("*.error")]
        silent = {"at": math.inf, "rank": e.error_index, "error": str(e), "trace": ""}
        raise _as_here(min([*errors, silent], key=lambda error: error["at"]), processes) from None
    finally:
        for process in context.processes:
            process.join(left)
            process.kill()


def _rank(rank: int, function: Callable[..., Any], args: tuple[Any, ...], size: int, port: int, folder: str) -> None:
    """One of the processes; an answer or an error is left in `folder`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({k: str(v) for k, v in place.items()})
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        answer = function(*args)
    except BaseException as e:
        said = {"what": e.what, **{k: v and str(v) for k, v in e.details.items()}} if isinstance(e, UserError) else {}
        error = {"at": getattr(e, "at", time.time()), "rank": rank, "error": f"{type(e).__name__}: {e}", "user": said}
        (Path(folder) / f"{rank}.error").write_text(json.dumps({**error, "trace": traceback.format_exc()}))
        sys.exit(1)
    if rank == 0:
        (Path(folder) / "0").write_text(_json(answer))


def _spawned(*told: Any) -> None:
    _rank(*told)
    end(0)


def _json(answer: Any) -> str:
    try:
        return json.dumps(answer)
    except (TypeError, ValueError):
        return "null"


def _as_here(error: dict[str, Any], processes: int) -> Exception:
    """The exception that another process died of."""
    if said := error.get("user"):
        return UserError(f"rank {error['rank']}: {said.pop('what')}", **said)
    return RuntimeError(f"rank {error['rank']} of {processes}: {error['error']}\n\n{error['trace']}".rstrip())
