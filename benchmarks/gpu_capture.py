"""A contender as a CUDA graph of its products, which is how a model replays them."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import torch
from gpu_peers.contender import Contender

# A graph runs so long that its launch and the wait for it are a small part of it, and holds so many calls at most.
GRAPH_SECONDS = 2e-3
MAX_CALLS = 64


@dataclass(frozen=True)
class Captured:
    """A graph of ``calls`` products, and what one product takes outside of it."""

    graph: torch.cuda.CUDAGraph
    calls: int
    seconds: float
    error: float


def capture(contender: Contender, x: torch.Tensor) -> Captured | str:
    """A graph that calls the copies in turn; the reason where the product is wrong."""
    x = x.to(contender.dtype)
    error = contender.error(x)
    # Not "error > tolerance", which lets NaN pass.
    if not error <= contender.tolerance:
        return f"its rel-L2 against float64 is {error:.3g}, more than {contender.tolerance}"
    contender.copies[1](x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    contender.copies[0](x)
    contender.copies[1](x)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 2
    calls = call_count(seconds, len(contender.copies))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in itertools.islice(itertools.cycle(contender.copies), calls):
            product(x)
    return Captured(graph, calls, seconds, error)


def call_count(seconds: float, copies: int) -> int:
    """Calls of a graph: enough to fill ``GRAPH_SECONDS``, in whole rounds over the copies; one round at least."""
    wanted = min(MAX_CALLS, math.ceil(GRAPH_SECONDS / seconds))
    # A product of a millisecond and more has outlived its cache: two copies are enough.
    return min(2, copies) if seconds > GRAPH_SECONDS / 2 else max(copies, wanted // copies * copies)
