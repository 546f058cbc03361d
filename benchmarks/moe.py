"""A layer of experts on a CPU against the memory and against vLLM's bf16 kernel: ``python benchmarks/moe.py``.

Decode: the packed bytes a second of the experts that the tokens of a step choose, as a share of the read bandwidth
measured in the same rounds (`read_bandwidth_ratio`), and the time against vLLM's fused bf16 experts on the same routes
(`speed_up_bf16`). Every call takes other routes, so that no expert is in a cache. Prompts: against vLLM's bf16 experts.
Every case is first held against the definition, so no figure is of a wrong result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_kernels import reader
from harness import RESULTS, Record, report, time_alternating
from torch import Tensor

from neuqi_kernels import experts, experts_reference
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec

DECODE_TOKENS = (1, 4, 16)
PREFILL_TOKENS = (128, 512)
# Sets of routes that calls take in turn.
ROUTES = 16
# Two roundings to bf16, 2^-8 each, relative to the largest result.
TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Shape:
    """A layer: ``experts`` are held in memory, of which each token takes ``top_k``."""

    model: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def spec(self, bits: int, group_size: int) -> ExpertsSpec:
        def gemm(n: int, k: int) -> GemmSpec:
            return GemmSpec(n, k, bits, group_size, "cpu", torch.bfloat16)

        first = gemm(2 * self.intermediate, self.hidden)
        return ExpertsSpec(self.experts, first, gemm(self.hidden, self.intermediate), "silu")


# Mixtral's layer has eight experts; four are larger than any cache, and leave memory for bf16.
SHAPES = (Shape("qwen3-30b-a3b", 2048, 768, 128, 8), Shape("mixtral-8x7b", 4096, 14336, 4, 2))
QUICK = Shape("quick", 256, 128, 8, 2)


class Packed:
    """Random experts in canonical and in prepared form."""

    def __init__(self, shape: Shape, bits: int, group_size: int) -> None:
        self.shape, self.spec = shape, shape.spec(bits, group_size)
        self.backend = experts.choose(self.spec)
        generator = torch.Generator().manual_seed(bits)
        self.options = (bits, group_size, bits, group_size, "silu")
        self.canonical = [self._random(s, generator) for s in (self.spec.first, self.spec.second)]
        self.prepared = [
            self.backend.prepare(*w, s)
            for w, s in zip(self.canonical, (self.spec.first, self.spec.second), strict=True)
        ]
        self.bytes_per_expert = sum(p[0].nbytes for p in self.prepared) // shape.experts

    def _random(self, spec: GemmSpec, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        words = (self.shape.experts, spec.n, spec.k * spec.bits // 32)
        groups, high = (self.shape.experts, spec.n, spec.groups), 1 << spec.bits
        # All patterns of bits are codes.
        qweight = torch.randint(-(1 << 31), (1 << 31) - 1, words, dtype=torch.int32, generator=generator)
        scale = torch.rand(groups, generator=generator).add_(0.5).mul_(spec.k**-0.5 * 4 / high).half()
        return qweight, scale, torch.rand(groups, generator=generator).mul_(high).half()

    def run(self, x: Tensor, routes: tuple[Tensor, Tensor]) -> Tensor:
        # As the plugin calls it where nothing is compiled.
        return self.backend.run(
            x, self.prepared[0], self.prepared[1], None, None, *routes, self.shape.intermediate, *self.options
        )

    def check(self, x: Tensor, routes: tuple[Tensor, Tensor]) -> None:
        """Hold the first tokens against the definition."""
        x, few = x[:2], (routes[0][:2], routes[1][:2])
        first, second = self.canonical
        expected = experts_reference.experts(x, first, second, None, None, *few, *self.options).double()
        error = float((self.run(x, few).double() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"expected an error of at most {TOLERANCE:.2g}, got {error:.3g} in {self.spec}.")


class Dense:
    """vLLM's fused experts in bf16, random."""

    def __init__(self, shape: Shape) -> None:
        from vllm import _custom_ops

        self._run, self.isa = _custom_ops.cpu_fused_moe, "vec"
        if torch.cpu._is_amx_tile_supported():
            self.isa = "amx"
        rows = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
        self.weights = []
        for n, k in rows:
            weight = torch.empty(shape.experts, n, k, dtype=torch.bfloat16).normal_(std=k**-0.5)
            self.weights.append(_custom_ops.cpu_prepack_moe_weight(weight, self.isa))
            del weight

    def run(self, x: Tensor, routes: tuple[Tensor, Tensor]) -> Tensor:
        out = torch.empty_like(x)
        self._run(out, x, self.weights[0], self.weights[1], None, None, *routes, "silu", self.isa)
        return out


def draw(shape: Shape, tokens: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Activations, and sets of routes."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    routes = []
    for _ in range(ROUTES):
        scores = torch.rand(tokens, shape.experts, generator=generator)
        weights, ids = scores.topk(shape.top_k)
        routes.append((weights.softmax(-1), ids.to(torch.int32)))
    return x, routes


def in_turn(run: Callable[..., Any], x: Tensor, routes: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def call() -> None:
        for one in routes:
            run(x, one)

    return call


def fields(shape: Shape, bits: int, group_size: int, tokens: int) -> dict[str, str | int | float | bool]:
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate, "experts": shape.experts}
    case = {"model": shape.model, **sizes, "top_k": shape.top_k, "bits": bits, "group_size": group_size}
    return {**case, "tokens": tokens, "threads": torch.get_num_threads()}


def decode(packed: Sequence[Packed], dense: Dense, tokens: int, repeats: int) -> list[Record]:
    """Time of a step at every width, against reading the chosen experts and against bf16."""
    shape = packed[0].shape
    x, routes = draw(shape, tokens)
    chosen = sum(int(ids.unique().numel()) for _, ids in routes)
    read, read_bytes = reader(1 << 29)
    contenders: dict[str, Callable[[], Any]] = {"read": read, "bf16": in_turn(dense.run, x, routes)}
    for one in packed:
        one.check(x, routes[0])
        contenders[str(one.options[0])] = in_turn(one.run, x, routes)
    timings = time_alternating(contenders, repeats=repeats)
    bandwidth = read_bytes / timings["read"].median_seconds / 1e9
    records = [Record(fields(shape, 16, 0, tokens), "read_bandwidth", bandwidth, "GB/s")]
    bf16 = timings["bf16"].median_seconds / len(routes)
    records.append(Record(fields(shape, 16, 0, tokens), "time", bf16 * 1e6, "us"))
    for one in packed:
        bits, group_size, *_ = one.options
        case, timing = fields(shape, bits, group_size, tokens), timings[str(bits)]
        seconds = timing.median_seconds / len(routes)
        ratio = timing.ratio_to(timings["read"]) * chosen * one.bytes_per_expert / read_bytes
        speed_up = timing.ratio_to(timings["bf16"])
        records.append(Record(case, "time", seconds * 1e6, "us"))
        records.append(Record(case, "read_bandwidth_ratio", ratio, "", "read_bandwidth", ratio))
        records.append(Record(case, "speed_up_bf16", speed_up, "", f"vLLM bf16 ({dense.isa})", speed_up))
    return records


def prefill(packed: Sequence[Packed], dense: Dense, tokens: int, repeats: int) -> list[Record]:
    """Time of a prompt against bf16."""
    shape = packed[0].shape
    x, routes = draw(shape, tokens)
    contenders: dict[str, Callable[[], Any]] = {"bf16": in_turn(dense.run, x, routes[:1])}
    contenders |= {str(one.options[0]): in_turn(one.run, x, routes[:1]) for one in packed}
    timings = time_alternating(contenders, repeats=repeats)
    records = []
    for one in packed:
        bits, group_size, *_ = one.options
        case, speed_up = fields(shape, bits, group_size, tokens), timings[str(bits)].ratio_to(timings["bf16"])
        records.append(Record(case, "time", timings[str(bits)].median_seconds * 1e6, "us"))
        records.append(Record(case, "prefill_ratio_bf16", speed_up, "", f"vLLM bf16 ({dense.isa})", speed_up))
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=[shape.model for shape in SHAPES])
    parser.add_argument("--quick", action="store_true", help="one small shape, few repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes = (QUICK,) if options.quick else [s for s in SHAPES if s.model in options.models]
    repeats = 2 if options.quick else options.repeats
    records: list[Record] = []
    for shape in shapes:
        packed = [Packed(shape, bits, options.group_size) for bits in options.bits]
        dense = Dense(shape)
        for tokens in DECODE_TOKENS:
            records += decode(packed, dense, tokens, repeats)
        for tokens in PREFILL_TOKENS[:1] if options.quick else PREFILL_TOKENS:
            records += prefill(packed, dense, tokens, max(2, repeats // 2))
    report("moe", records, options.out)


if __name__ == "__main__":
    main()
