"""A layer of experts on a GPU: the Triton kernels against vLLM's bf16 experts, ``python benchmarks/gpu_moe.py``.

Needs a CUDA GPU and vLLM for CUDA, which sorts the routes and brings the peer. Every contender is captured in a CUDA
graph that runs the layer on one set of routes after the other, so that no expert is in the L2 cache; the graphs are
replayed in turn. Metrics: ``time`` against bf16; ``packed_bandwidth``: the bytes a second of the chosen experts,
as a share of what copying memory reaches in the same rounds. Every case is first held against the definition.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moe
import torch
from harness import RESULTS, Record, report, time_alternating
from torch import Tensor

from neuqi_kernels import experts_reference
from neuqi_kernels import moe as products
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.gpu import grouped_experts

SHAPES = (
    moe.Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
    moe.Shape("mixtral-8x7b", 4096, 14336, 8, 2),
    moe.Shape("qwen3-235b-a22b", 4096, 1536, 128, 8),
)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
COPIED_BYTES = 1 << 28
# Roundings to bf16 of pairs, activation, parts and result, relative to the largest result.
TOLERANCE = 2.0**-6

Routes = tuple[Tensor, Tensor]


@dataclass
class Packed:
    """Random experts, prepared for the Triton kernels."""

    shape: moe.Shape
    spec: ExpertsSpec
    canonical: list[tuple[Tensor, Tensor, Tensor]]
    prepared: list[Any]

    @classmethod
    def random(cls, shape: moe.Shape, bits: int, group_size: int) -> Packed:
        on_cpu = shape.spec(bits, group_size)
        first, second = (replace(one, device_type="cuda") for one in (on_cpu.first, on_cpu.second))
        spec = ExpertsSpec(shape.experts, first, second, "silu")
        generator, canonical = torch.Generator("cuda").manual_seed(bits), []
        for one in (first, second):
            words, groups = (shape.experts, one.n, one.k * bits // 32), (shape.experts, one.n, one.groups)
            # All patterns of bits are codes.
            limits = (-(1 << 31), (1 << 31) - 1)
            qweight = torch.randint(*limits, words, dtype=torch.int32, device="cuda", generator=generator)
            scale = torch.rand(groups, device="cuda", generator=generator).add_(0.5)
            zero = torch.rand(groups, device="cuda", generator=generator).mul_(1 << bits)
            canonical.append((qweight, scale.mul_(one.k**-0.5 * 4 / (1 << bits)).half(), zero.half()))
        backend = products.choose(first)
        prepared = [backend.prepare(*w, one) for w, one in zip(canonical, (first, second), strict=True)]
        return cls(shape, spec, canonical, prepared)

    @property
    def bytes_per_expert(self) -> int:
        return sum(tensor.nbytes for kept in self.prepared for tensor in kept) // self.shape.experts

    def run(self, x: Tensor, routes: Routes) -> Tensor:
        aligned = importlib.import_module("vllm.model_executor.layers.fused_moe.moe_align_block_size")

        def align(ids: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
            return aligned.moe_align_block_size(ids, block, self.shape.experts)  # type: ignore[no-any-return]

        def activate(hidden: Tensor, pairs: Tensor) -> None:
            torch.ops._C.silu_and_mul(hidden, pairs)

        backend = products.choose(self.spec.first)
        first, second = self.prepared
        return grouped_experts.run(backend, self.spec, x, first, second, *routes, align, activate)

    def check(self, x: Tensor, routes: Routes) -> None:
        """Hold the first tokens against the definition."""
        first, second, few = *self.canonical, (routes[0][:2], routes[1][:2])
        bits, group_size = self.spec.first.bits, self.spec.first.group_size
        options = (bits, group_size, bits, group_size, "silu")
        expected = experts_reference.experts(x[:2], first, second, None, None, *few, *options).double()
        error = float((self.run(x, routes)[:2].double() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(
                f"error: expected an error of at most {TOLERANCE:.2g}, got {error:.3g}: {self.spec}."
            )


def dense(shape: moe.Shape) -> Callable[[Tensor, Routes], Tensor]:
    """vLLM's bf16 experts, random."""
    fused = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    # Its name since vLLM 0.28, and before.
    run = getattr(fused, "fused_experts_op", None) or fused.fused_experts
    rows = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    weights = [
        torch.empty(shape.experts, n, k, dtype=torch.bfloat16, device="cuda").normal_(std=k**-0.5)
        for n, k in rows
    ]
    return lambda x, routes: run(x.clone(), weights[0], weights[1], routes[0], routes[1])


def captured(
    run: Callable[[Tensor, Routes], Tensor], x: Tensor, routes: list[Routes]
) -> torch.cuda.CUDAGraph:
    """A graph of one call for every set of routes."""
    for one in routes[:2]:
        run(x, one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in routes:
            run(x, one)
    return graph


def measure(packed: Sequence[Packed], bf16: Callable[[Tensor, Routes], Tensor], tokens: int) -> list[Record]:
    """Time a number of tokens at every width."""
    shape = packed[0].shape
    x, drawn = moe.draw(shape, tokens)
    x, routes = x.cuda(), [(weights.cuda(), ids.cuda()) for weights, ids in drawn]
    chosen = sum(int(ids.unique().numel()) for _, ids in routes)
    graphs = {"bf16": captured(bf16, x, routes)}
    for one in packed:
        one.check(x, routes[0])
        graphs[str(one.spec.first.bits)] = captured(one.run, x, routes)
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], Any]] = {name: graph.replay for name, graph in graphs.items()}
    contenders["copy"] = lambda: target.copy_(source)
    timings = time_alternating(contenders, repeats=15, warmup=3, synchronize=torch.cuda.synchronize)
    copied = 2 * COPIED_BYTES / timings["copy"].median_seconds / 1e9
    base = timings["bf16"].median_seconds / len(routes) * 1e6
    records = [Record(moe.fields(shape, 16, 0, tokens), "time", base, "us")]
    for one in packed:
        first, timing = one.spec.first, timings[str(one.spec.first.bits)]
        case = moe.fields(shape, first.bits, first.group_size, tokens)
        seconds = timing.median_seconds / len(routes)
        ratio = timing.ratio_to(timings["bf16"])
        records.append(Record(case, "time", seconds * 1e6, "us", "vLLM bf16", ratio))
        rate = chosen / len(routes) * one.bytes_per_expert / seconds / 1e9
        records.append(Record(case, "packed_bandwidth", rate, "GB/s", "copying memory", rate / copied))
    return records


def require_gpu() -> None:
    """Stop with the reason where there is nothing to measure."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "error: expected a CUDA GPU, torch sees none. Run this benchmark on a machine with one."
        )
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("error: expected vLLM for CUDA, it is not installed. Install requirements/cuda.txt.")
    # Its operators exist when this is imported.
    importlib.import_module("vllm._custom_ops")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--models", nargs="+", default=[shape.model for shape in SHAPES])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    require_gpu()
    records: list[Record] = []
    with torch.inference_mode():
        for shape in (shape for shape in SHAPES if shape.model in options.models):
            packed = [Packed.random(shape, bits, options.group_size) for bits in options.bits]
            bf16 = dense(shape)
            for tokens in options.tokens:
                records += measure(packed, bf16, tokens)
            del packed, bf16
            torch.cuda.empty_cache()
    report("gpu_moe", records, options.out)


if __name__ == "__main__":
    main()
