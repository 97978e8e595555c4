"""The processes of a run: how they find each other, agree, and share the work of a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from roomplan_lib.config import RunConfig

T = TypeVar("T")
TIMEOUT = timedelta(minutes=15)  # of a collective: longer than rank 0 takes to write a checkpoint


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. What it sends goes through the host's memory and waits for no GPU."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, exact for whole numbers below 2**53."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` of the first process, for all; what it raises is raised in all of them."""
        if self.world_size == 1:
            return function(*args)
        outcome: list = [None, None]
        if self.is_first:
            try:
                outcome[0] = function(*args)
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed with this error because another process is gone, or did not come in time."""
    signs = (
        "onnection closed by peer",
        "onnection reset",
        "Broken pipe",
        "Timed out waiting",
        "monitoredBarrier",
        "NCCL",
    )
    own = ("out of memory", "CUDA error", "cuda error")  # of this process, though NCCL or a collective came upon it
    text = str(error)
    return isinstance(error, RuntimeError) and any(s in text for s in signs) and not any(s in text for s in own)


@contextmanager
def join_processes(config: RunConfig) -> Iterator[Processes]:
    """This process's place in its run, by the variables that torchrun and `accelerate launch` set.

    Raises ValueError when the number of processes is another one than the settings say: two processes that do not
    know of each other would both train the whole run and write the same files.
    """
    settings = config.distributed
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = resolve_device(config.training.device)
    expected = settings.num_processes or (max(1, torch.cuda.device_count()) if kind == "cuda" else 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if here != expected:
        raise ValueError(
            f"distributed.num_processes asks for {expected} on each node, but {here} were started (WORLD_SIZE "
            f"{world_size}); start the run with `roomplan train`, which starts as many as the settings say"
        )
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    processes = Processes(device, rank, world_size)
    joined_before = dist.is_initialized()
    if not joined_before and (world_size > 1 or settings.strategy == "zero3"):
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        store = dist.HashStore() if world_size == 1 else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        if dist.is_initialized() and dist.get_world_size() != world_size:
            raise ValueError(f"WORLD_SIZE is {world_size}, but the process group has {dist.get_world_size()} members")
        yield processes
    finally:
        if not joined_before and dist.is_initialized():
            dist.destroy_process_group()


def resolve_device(name: str) -> str:
    """cpu or cuda for auto, cpu or cuda. ValueError for another name, or for cuda where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is asked for, but torch finds no CUDA device; use cpu or auto")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
