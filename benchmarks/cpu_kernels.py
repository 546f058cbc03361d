"""The C++ kernel against the memory and against torch: ``python benchmarks/cpu_kernels.py``.

Decode: the packed bytes a second that one call reads, as a share of the read bandwidth measured in the same rounds
(`read_bandwidth_ratio`); a good kernel is as fast as reading its weights. The weights of a case rotate through copies
that together are several times the cache, as the layers of a model do. Prefill: the rate against torch's bf16 linear of
the same shape (`prefill_ratio_bf16`). Repack: the bytes a second that one core brings into the kernel's layout.
Every case is first held against float64, so no figure is of a wrong result.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, Record, Timing, report, time_alternating
from torch import Tensor

from neuqi_kernels import dispatch, layout
from neuqi_kernels.backend import Backend
from neuqi_kernels.cpu import library
from neuqi_kernels.spec import GemmSpec

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (5632, 2048))
DECODE_TOKENS = (1, 4, 8)
PREFILL_TOKENS = (128, 512)
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CHUNK_BYTES = 1 << 20
# A result in bf16 is off by half a unit in its last place, 2^-8, and the sums by far less.
TOLERANCE = 1.2 * 2.0**-8


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
        return GemmSpec(self.n, self.k, self.bits, self.group_size, "cpu", torch.bfloat16)

    def record(self) -> dict[str, str | int | float | bool]:
        fields = {"n": self.n, "k": self.k, "bits": self.bits, "group_size": self.group_size}
        return {**fields, "tokens": self.tokens, "threads": torch.get_num_threads()}


class Weights:
    """Copies of one prepared layer, called one after the other so that none is in a cache."""

    def __init__(self, case: Case, backend: Backend, total_bytes: int) -> None:
        self.case, self.backend = case, backend
        generator = torch.Generator().manual_seed(0)
        groups = case.spec.groups
        self.codes = torch.randint(
            0, 1 << case.bits, (case.n, case.k), dtype=torch.uint8, generator=generator
        )
        self.scale = (torch.rand(case.n, groups, generator=generator) * 0.02 + 0.01).half()
        self.zero = (torch.rand(case.n, groups, generator=generator) * (1 << case.bits)).half()
        canonical = (layout.pack(self.codes, case.bits), self.scale, self.zero)
        self.copies = [backend.prepare(*canonical, case.spec)]
        self.bytes = sum(tensor.nbytes for tensor in self.copies[0])
        while len(self.copies) * self.bytes < total_bytes:
            self.copies.append(backend.prepare(*canonical, case.spec))

    def gemm(self, x: Tensor, copy: int = 0) -> Tensor:
        case = self.case
        # As the plugin calls it where nothing is compiled.
        return self.backend.gemm(x, *self.copies[copy], None, case.n, case.bits, case.group_size)

    def pass_over_copies(self, x: Tensor) -> Callable[[], None]:
        def run() -> None:
            for copy in range(len(self.copies)):
                self.gemm(x, copy)

        return run

    def check(self, x: Tensor) -> None:
        """Hold a sample of rows against float64."""
        rows = torch.randperm(self.case.n, generator=torch.Generator().manual_seed(1))[:97]
        codes = self.codes[rows].double().view(len(rows), self.scale.shape[1], -1)
        weight = (codes - self.zero[rows].double().unsqueeze(-1)) * self.scale[rows].double().unsqueeze(-1)
        expected = x.double() @ weight.view(len(rows), -1).t()
        magnitude = x.double().abs() @ weight.abs().view(len(rows), -1).t()
        error = float(((self.gemm(x)[:, rows].double() - expected).abs() / magnitude).max())
        if not error <= TOLERANCE:
            raise SystemExit(f"expected an error of at most {TOLERANCE:.2g}, got {error:.3g} in {self.case}.")


def cache_bytes() -> int:
    """Size of the last-level cache, 32 MiB where the system does not say."""
    try:
        return int(CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def activations(tokens: int, k: int) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def reader(total_bytes: int) -> tuple[Callable[[], int], int]:
    """A function that reads a buffer once with all threads, and how many bytes that are."""
    loaded = library.load()
    if isinstance(loaded, str):
        raise SystemExit(f"expected the C++ kernel, it is {loaded}.")
    size = -(-total_bytes // CHUNK_BYTES) * CHUNK_BYTES
    memory = mmap.mmap(-1, size)
    # As the kernel asks for its weights.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    return lambda: loaded.neuqi_cpu_read(buffer.data_ptr(), size, torch.get_num_threads()), size


def decode(case: Case, backend: Backend, total_bytes: int, repeats: int) -> list[Record]:
    """Bandwidth of each number of tokens against reading, and what more tokens cost against one."""
    weights = Weights(case, backend, total_bytes)
    read, read_bytes = reader(len(weights.copies) * weights.bytes)
    inputs = {tokens: activations(tokens, case.k) for tokens in DECODE_TOKENS}
    for x in inputs.values():
        weights.check(x)
    contenders: dict[str, Callable[[], object]] = {
        str(m): weights.pass_over_copies(x) for m, x in inputs.items()
    }
    timings = time_alternating({"read": read, **contenders}, repeats=repeats)
    size = len(weights.copies) * weights.bytes
    records = [
        Record(case.record(), "read_bandwidth", read_bytes / timings["read"].median_seconds / 1e9, "GB/s")
    ]
    for tokens in DECODE_TOKENS:
        timing, fields = (
            timings[str(tokens)],
            Case(case.n, case.k, case.bits, case.group_size, tokens).record(),
        )
        ratio = timing.ratio_to(timings["read"]) * size / read_bytes
        bandwidth = size / timing.median_seconds / 1e9
        records.append(Record(fields, "packed_bandwidth", bandwidth, "GB/s"))
        records.append(Record(fields, "read_bandwidth_ratio", ratio, "", "read_bandwidth", ratio))
        seconds = timing.median_seconds / len(weights.copies)
        share = 1 / timing.ratio_to(timings["1"])
        records.append(Record(fields, "time", seconds * 1e6, "us", "time of 1 token", share))
    return records


def prefill(case: Case, backend: Backend, repeats: int, tokens: Sequence[int]) -> list[Record]:
    """Time of a prompt against torch's bf16 linear."""
    weights = Weights(case, backend, 0)
    dense = torch.randn(case.n, case.k, generator=torch.Generator().manual_seed(2)).bfloat16()
    records = []
    for count in tokens:
        x = activations(count, case.k)
        weights.check(x)
        timings: dict[str, Timing] = time_alternating(
            {
                "neuqi": lambda x=x: weights.gemm(x),
                "bf16": lambda x=x: torch.nn.functional.linear(x, dense),
            },
            repeats=repeats,
        )
        fields = Case(case.n, case.k, case.bits, case.group_size, count).record()
        rate = 2 * count * case.n * case.k / timings["neuqi"].median_seconds / 1e9
        ratio = timings["neuqi"].ratio_to(timings["bf16"])
        records.append(Record(fields, "prefill_rate", rate, "GFLOP/s"))
        records.append(Record(fields, "prefill_ratio_bf16", ratio, "", "torch bf16 linear", ratio))
    return records


def repack(case: Case, backend: Backend, repeats: int) -> list[Record]:
    """Canonical bytes a second that one core brings into the kernel's layout, as at load."""
    weights = Weights(case, backend, 0)
    canonical = (layout.pack(weights.codes, case.bits), weights.scale, weights.zero)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timing = time_alternating({"repack": lambda: backend.prepare(*canonical, case.spec)}, repeats)["repack"]
    fields = case.record()
    torch.set_num_threads(threads)
    size = sum(tensor.nbytes for tensor in canonical)
    return [Record(fields, "repack_rate_core", size / timing.median_seconds / 1e9, "GB/s")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--quick", action="store_true", help="one small shape, few repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes = ((512, 512),) if options.quick else SHAPES
    prefill_tokens = (48,) if options.quick else PREFILL_TOKENS
    repeats = 3 if options.quick else options.repeats
    total_bytes = 1 << 20 if options.quick else 6 * cache_bytes()
    records: list[Record] = []
    with torch.inference_mode():
        for bits in options.bits:
            for n, k in shapes:
                for group_size in options.group_sizes:
                    case = Case(n, k, bits, group_size)
                    backend = dispatch.choose(case.spec, only="cpu_native")
                    if not records:
                        print(dispatch.explain(case.spec))
                    if options.only != "prefill":
                        records += decode(case, backend, total_bytes, repeats)
                        records += repack(case, backend, repeats)
                    if options.only != "decode" and group_size == options.group_sizes[0]:
                        records += prefill(case, backend, repeats, prefill_tokens)
    report("cpu_kernels", records, options.out)


if __name__ == "__main__":
    main()
