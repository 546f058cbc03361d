"""Data-parallel training processes of one machine.

On a CPU that other programs use too, processes of one thread each that meet once a step lose less time than threads
that meet in every operation.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist


def place() -> tuple[int, int]:
    """(rank of this process from 0, number of processes); (0, 1) outside of ``run_workers``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(values: list[Tensor]) -> None:
    """Replace every float32 tensor by its sum over the processes, in place; two processes give exact repeats."""
    if place()[1] == 1:
        return
    flat = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(flat)
    totals = torch.split(flat, [value.numel() for value in values])
    for value, total in zip(values, totals, strict=True):
        value.copy_(total.view_as(value))


def run_workers(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``count`` processes that can ``add_up``; count 1 calls it here."""
    if count == 1:
        work(*arguments)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A terminated parent must end in the ordinary way: only then are its daemon processes terminated too.
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            meeting = (Path(scratch) / "meeting").as_uri()
            processes: Any = multiprocessing  # its functions are not typed
            processes.spawn(_join, args=(count, meeting, work, arguments), nprocs=count, daemon=True)
    finally:
        signal.signal(signal.SIGTERM, former)


def _join(rank: int, count: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()
