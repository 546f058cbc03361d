"""Times products on a GPU as a served model runs them: in replays of a CUDA graph, each call on other weights."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from neuqi_kernels.gpu.plan import Plan
from neuqi_kernels.gpu.tune import Product

# The copies of a layer are together several times the L2 cache, as the layers of a model are.
L2_MULTIPLE = 4
# A graph holds so many calls that its launch and the wait for it are a small part of it.
_MIN_CALLS = 32
_REPLAYS = 11


def rotated_bytes(device: torch.device) -> int:
    """Bytes of weights that the calls of a graph must go round."""
    return L2_MULTIPLE * int(torch.cuda.get_device_properties(device).L2_cache_size)


def time_in_graphs(contenders: Mapping[Plan, Sequence[Product]]) -> dict[Plan, float]:
    """Return the median seconds of a call of each contender; the contenders take turns, replay after replay."""
    graphs = {plan: _captured(products) for plan, products in contenders.items()}
    runs: dict[Plan, list[float]] = {plan: [] for plan in contenders}
    for _ in range(_REPLAYS):
        for plan, (graph, calls) in graphs.items():
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            runs[plan].append(begin.elapsed_time(end) / 1e3 / calls)
    return {plan: statistics.median(seconds[1:]) for plan, seconds in runs.items()}


def _captured(products: Sequence[Product]) -> tuple[torch.cuda.CUDAGraph, int]:
    for product in products[:2]:
        product()
    torch.cuda.synchronize()
    rounds = -(-_MIN_CALLS // len(products))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for product in products:
                product()
    return graph, rounds * len(products)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
