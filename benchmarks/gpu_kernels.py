"""The Triton kernels against the dense bf16 product of torch, on a GPU: ``python benchmarks/gpu_kernels.py``.

Every contender is captured in a CUDA graph that calls it on one copy of the layer's weights after the other; the copies
together are several times the L2 cache, as the layers of a model are. The graphs are replayed in turn, so that a
change of the clock meets all alike. ``packed_bandwidth`` compares the bytes of the packed weights a second with what
copying memory reaches in the same rounds. Other kernels for real zero-points take part where they are installed
(gemlite: 2, 4 and 8 bits). Before anything is timed, every contender is held against float64: one that is off is an
error where it is ours, and left out with its error where it is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import RESULTS, Record, report, time_alternating
from torch import Tensor

from neuqi_kernels import dispatch, layout, ops
from neuqi_kernels.spec import GemmSpec

# Output by input features: Llama-3.1-8B's four products, and a square one that published tables use.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
DENSE = "torch bf16"
OURS = "neuqi"
L2_MULTIPLE = 4
# A graph holds so many calls that its launch and the wait for it are a small part of it.
MIN_CALLS = 64
# rel-L2 in bf16: half a unit in the last place of the result, and of each weight in the products that round them.
TOLERANCE = 4.8e-3
SAMPLED_ROWS = 97

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer of N by K, its format and the number of tokens."""

    n: int
    k: int
    bits: int
    group_size: int
    tokens: int = 0

    @property
    def spec(self) -> GemmSpec:
        return GemmSpec(self.n, self.k, self.bits, self.group_size, "cuda", torch.bfloat16)

    def record(self, contender: str) -> dict[str, str | int | float | bool]:
        fields = {"n": self.n, "k": self.k, "bits": self.bits, "group_size": self.group_size}
        return {"contender": contender, **fields, "tokens": self.tokens}


@dataclass(frozen=True)
class Layer:
    """Codes and parameters of a random layer; real zero-points all over the range of the codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def random(case: Case) -> Layer:
        generator = torch.Generator("cuda").manual_seed(0)
        size = (case.n, case.spec.groups)
        codes = torch.randint(
            0, 1 << case.bits, (case.n, case.k), dtype=torch.uint8, generator=generator, device="cuda"
        )
        scale = torch.rand(size, generator=generator, device="cuda") * 0.02 + 0.01
        zero = torch.rand(size, generator=generator, device="cuda") * (1 << case.bits)
        return Layer(codes, scale.half(), zero.half())

    def error(self, product: Product, x: Tensor) -> float:
        """rel-L2 of a sample of output features against float64."""
        rows = torch.randperm(len(self.codes), generator=torch.Generator().manual_seed(1))[
            :SAMPLED_ROWS
        ].cuda()
        codes = self.codes[rows].double().view(len(rows), self.scale.shape[1], -1)
        weight = (codes - self.zero[rows].double().unsqueeze(-1)) * self.scale[rows].double().unsqueeze(-1)
        expected = x.double() @ weight.view(len(rows), -1).t()
        return float((product(x)[:, rows].double() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Contender:
    """A kernel on copies of one layer's weights, of ``layer_bytes`` each."""

    copies: Sequence[Product]
    layer_bytes: int


def copies_of(tensors: Sequence[Tensor], product: Callable[..., Tensor], rotated_bytes: int) -> Contender:
    """Bind ``product(x, *tensors)`` to as many copies of the tensors as fill ``rotated_bytes``."""
    layer_bytes = sum(tensor.nbytes for tensor in tensors)
    count = max(1, -(-rotated_bytes // layer_bytes))
    bound: list[Product] = []
    for index in range(count):
        copy = [tensor if index == 0 else tensor.clone() for tensor in tensors]
        bound.append(lambda x, copy=copy: product(x, *copy))
    return Contender(bound, layer_bytes)


def ours(case: Case, layer: Layer, rotated_bytes: int) -> Contender:
    backend = dispatch.choose(case.spec, only="triton")
    qweight = layout.pack(layer.codes, case.bits)
    prepared = backend.prepare(qweight, layer.scale, layer.zero, case.spec)

    def product(x: Tensor, words: Tensor, pairs: Tensor, counters: Tensor) -> Tensor:
        return torch.ops.neuqi.gemm(
            x, words, pairs, counters, None, case.n, case.bits, case.group_size, backend.name
        )

    return copies_of(prepared, product, rotated_bytes)


def dense(case: Case, layer: Layer, rotated_bytes: int) -> Contender:
    grouped = layer.codes.float().view(case.n, case.spec.groups, -1)
    weight = (grouped - layer.zero.float().unsqueeze(-1)) * layer.scale.float().unsqueeze(-1)
    return copies_of([weight.view(case.n, case.k).bfloat16()], torch.nn.functional.linear, rotated_bytes)


def gemlite(case: Case, layer: Layer, rotated_bytes: int) -> Contender | str:
    """The peer gemlite, or why it does not take part."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError as error:
        return f"not importable: {error}"
    if case.bits == 3:
        return "has no kernel for 3 bits"
    group = case.spec.group
    bound: list[Product] = []
    layer_bytes = case.n * case.k * case.bits // 8 + 4 * layer.scale.numel()
    for _ in range(max(1, -(-rotated_bytes // layer_bytes))):
        peer = GemLiteLinearTriton(case.bits, group, case.k, case.n, DType.BF16, DType.BF16)
        peer.pack(layer.codes, layer.scale.bfloat16(), layer.zero.bfloat16(), None)
        bound.append(peer)
    return Contender(bound, layer_bytes)


PEERS: dict[str, Callable[[Case, Layer, int], Contender | str]] = {"gemlite": gemlite}


def contenders_of(case: Case, rotated_bytes: int) -> tuple[Layer, dict[str, Contender]]:
    """Ours, the dense product and the peers that can run the layer."""
    layer = Layer.random(case)
    found = {DENSE: dense(case, layer, rotated_bytes), OURS: ours(case, layer, rotated_bytes)}
    for name, build in PEERS.items():
        # A peer may fail in ways of its own: it is then left out, by name.
        try:
            peer = build(case, layer, rotated_bytes)
        except Exception as error:
            peer = f"failed: {error!r}"
        if isinstance(peer, str):
            print(f"{name}, {case.bits} bits: {peer}")
        else:
            found[name] = peer
    return layer, found


def checked(case: Case, layer: Layer, found: dict[str, Contender], x: Tensor) -> dict[str, Contender]:
    """The contenders whose product is right."""
    right = {}
    for name, contender in found.items():
        error = layer.error(contender.copies[0], x)
        if error <= TOLERANCE:
            right[name] = contender
        elif name in (OURS, DENSE):
            raise SystemExit(f"expected a rel-L2 of at most {TOLERANCE}, {name} has {error:.3g} in {case}.")
        else:
            print(f"{name} is left out of {case}: its rel-L2 against float64 is {error:.3g}")
    return right


def captured(contender: Contender, x: Tensor) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that calls every copy in turn, some times over, and how many calls it holds."""
    for product in contender.copies[:2]:
        product(x)
    torch.cuda.synchronize()
    rounds = -(-MIN_CALLS // len(contender.copies))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for product in contender.copies:
                product(x)
    return graph, rounds * len(contender.copies)


def measure(case: Case, layer: Layer, found: dict[str, Contender], repeats: int) -> list[Record]:
    """Time a number of tokens."""
    generator = torch.Generator("cuda").manual_seed(case.tokens)
    x = torch.randn(case.tokens, case.k, generator=generator, device="cuda").bfloat16()
    found = checked(case, layer, found, x)
    graphs = {name: captured(contender, x) for name, contender in found.items()}
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    replays: dict[str, Callable[[], object]] = {name: graph.replay for name, (graph, _) in graphs.items()}
    timings = time_alternating(
        {**replays, "copy": lambda: target.copy_(source)},
        repeats=repeats,
        warmup=3,
        synchronize=torch.cuda.synchronize,
    )
    calls = {name: count for name, (_, count) in graphs.items()}
    copied = 2 * source.nbytes / timings["copy"].median_seconds / 1e9
    records = []
    for name in found:
        microseconds = timings[name].median_seconds / calls[name] * 1e6
        ratio = timings[name].ratio_to(timings[DENSE]) * calls[name] / calls[DENSE]
        records.append(Record(case.record(name), "time", microseconds, "us", DENSE, ratio))
    bandwidth = found[OURS].layer_bytes * calls[OURS] / timings[OURS].median_seconds / 1e9
    share = bandwidth / copied
    records.append(Record(case.record(OURS), "packed_bandwidth", bandwidth, "GB/s", "copying memory", share))
    return records


def require_gpu() -> None:
    """Stop with the reason where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "error: expected a CUDA GPU, torch sees none. Run this benchmark on a machine with one."
        )
    refusal = dispatch.refusal("triton", Case(128, 128, 4, 128).spec)
    if refusal:
        raise SystemExit(f"error: expected the triton backend to run, it refuses: {refusal}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="N x K, as 4096x14336"
    )
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="one small shape, few tokens and repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    require_gpu()
    ops.register()
    shapes = (
        [(512, 1024)] if options.quick else [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    )
    tokens = (1, 64) if options.quick else options.tokens
    repeats = 3 if options.quick else options.repeats
    rotated_bytes = L2_MULTIPLE * torch.cuda.get_device_properties(0).L2_cache_size
    records: list[Record] = []
    with torch.inference_mode():
        for bits in options.bits:
            for group_size in options.group_sizes:
                for n, k in shapes:
                    case = Case(n, k, bits, group_size)
                    layer, found = contenders_of(case, rotated_bytes)
                    for count in tokens:
                        records += measure(replace(case, tokens=count), layer, found, repeats)
    report("gpu_kernels", records, options.out)


if __name__ == "__main__":
    main()
