"""The offline tuner: times every legal plan of a layer, correct ones only, and keeps the fastest.

Nothing here runs while a model is served. The timer is a parameter: ``graph_timer`` times on a GPU, and a test without
one puts numbers of its own in its place.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from neuqi_kernels import layout
from neuqi_kernels.gpu.backend import TRITON
from neuqi_kernels.gpu.candidates import candidates
from neuqi_kernels.gpu.plan import Plan, Target, plan, rule, target_of
from neuqi_kernels.gpu.tuning_table import Entry, Run
from neuqi_kernels.spec import GemmSpec

Product = Callable[[], torch.Tensor]
# Seconds of a call of each plan, from calls that each use other weights.
Timer = Callable[[Mapping[Plan, Sequence[Product]]], Mapping[Plan, float]]

# rel-L2 against float64: half a unit in the last place of the result and of each weight, and a quarter as much again.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}
# A plan replaces the rule's only where it is faster by more than a measurement repeats itself.
MIN_GAIN = 1.02
_SAMPLED_ROWS = 97
_PACKAGES = ("neuqi-serve", "torch", "triton")


@dataclass(frozen=True)
class Shape:
    """A layer to tune: ``group_size`` −1 is the whole row."""

    bits: int
    group_size: int
    n: int
    k: int

    @property
    def group(self) -> int:
        """The group as plans are kept: 0 for the whole row."""
        return 0 if self.group_size in (-1, self.k) else self.group_size


@dataclass(frozen=True)
class Layer:
    """Copies of a random layer in the kernels' layout, and the exact weights of a sample of its rows."""

    copies: tuple[tuple[torch.Tensor, ...], ...]
    rows: torch.Tensor
    weight: torch.Tensor

    @staticmethod
    def random(shape: Shape, dtype: torch.dtype, device: torch.device, rotated_bytes: int) -> Layer:
        """Make as many copies as fill ``rotated_bytes``, so that no call finds its weights in a cache."""
        spec = GemmSpec(shape.n, shape.k, shape.bits, shape.group_size, device.type, dtype)
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.n, spec.groups)
        codes = torch.randint(
            0, 1 << shape.bits, (shape.n, shape.k), dtype=torch.uint8, generator=generator, device=device
        )
        scale = (torch.rand(size, generator=generator, device=device) * 0.02 + 0.01).half()
        zero = (torch.rand(size, generator=generator, device=device) * (1 << shape.bits)).half()
        rows = torch.arange(0, shape.n, max(1, shape.n // _SAMPLED_ROWS), device=device)
        grouped = codes[rows].double().view(len(rows), spec.groups, -1)
        exact = (grouped - zero[rows].double().unsqueeze(-1)) * scale[rows].double().unsqueeze(-1)
        first = TRITON.prepare(layout.pack(codes, shape.bits), scale, zero, spec)
        count = max(1, -(-rotated_bytes // sum(tensor.nbytes for tensor in first)))
        copies = (first, *(tuple(tensor.clone() for tensor in first) for _ in range(count - 1)))
        return Layer(copies, rows, exact.view(len(rows), -1))

    def error(self, y: torch.Tensor, x: torch.Tensor) -> float:
        """rel-L2 of the sampled rows against float64."""
        expected = x.double() @ self.weight.t()
        return float((y[:, self.rows].double() - expected).norm() / expected.norm())


def tune(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    rotated_bytes: int = 0,
    report: Callable[[str], None] = print,
    search: bool = True,
) -> list[Entry]:
    """Return the fastest correct plan for every shape and token bucket; without ``search``, the plan in force.

    Raises:
        ValueError: the rule's own plan gives a wrong product.
    """
    target = target_of(device)
    entries = []
    for shape in shapes:
        layer = Layer.random(shape, dtype, device, rotated_bytes)
        for m in tokens:
            entry = _tune_case(target, shape, layer, m, timer, dtype, search, report)
            entries.append(entry)
            report(
                f"{shape.bits} bits, group {shape.group_size}, {shape.n}x{shape.k}, {m} tokens: "
                f"{entry.microseconds:.1f} us, {entry.ratio:.2f} times the rule's speed, {entry.plan}"
            )
    return entries


def select(times: Mapping[Plan, float], ruled: Plan) -> tuple[Plan, float]:
    """Return the plan to keep and how many times faster than the rule's it is.

    Raises:
        ValueError: the rule's plan was not timed.
    """
    if ruled not in times:
        raise ValueError(f"expected the rule's plan among those timed, got {list(times)} without {ruled}.")
    fastest = min(times, key=lambda plan: times[plan])
    ratio = times[ruled] / times[fastest]
    return (fastest, ratio) if ratio >= MIN_GAIN else (ruled, 1.0)


def provenance(device: torch.device, entries: Sequence[Entry]) -> Run:
    """Return the entries with the device, versions, commit and date of this process."""
    target = target_of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else target.architecture
    versions = {package: version for package in _PACKAGES if (version := _version(package))}
    if torch.version.cuda or torch.version.hip:
        versions["cuda" if torch.version.cuda else "hip"] = str(torch.version.cuda or torch.version.hip)
    return Run(
        device=name,
        multiprocessors=target.multiprocessors,
        versions=versions,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        entries=tuple(entries),
    )


def _tune_case(
    target: Target,
    shape: Shape,
    layer: Layer,
    m: int,
    timer: Timer,
    dtype: torch.dtype,
    search: bool,
    report: Callable[[str], None],
) -> Entry:
    size = (shape.n, shape.k, m)
    ruled = rule(target, shape.bits, shape.group, *size)
    tried = (
        candidates(target, shape.bits, shape.group, *size)
        if search
        else [plan(target, shape.bits, shape.group, *size), ruled]
    )
    generator = torch.Generator(layer.rows.device).manual_seed(m)
    x = torch.randn(m, shape.k, generator=generator, device=layer.rows.device).to(dtype)
    products: dict[Plan, Sequence[Product]] = {}
    for chosen in dict.fromkeys(tried):
        calls = [_product(chosen, target, x, copy, shape) for copy in layer.copies]
        reason = _wrong(calls[0], layer, x)
        if reason is None:
            products[chosen] = calls
        elif chosen == ruled:
            raise ValueError(
                f"expected the rule's plan {chosen} to be right for {shape}, {m} tokens: {reason}."
            )
        else:
            report(f"left out: {chosen}, {reason}")
    times = timer(products)
    best, ratio = select(times, ruled) if search else (next(iter(times)), 1.0)
    if not search:
        ratio = times[ruled] / times[best]
    return Entry(
        shape.bits, shape.group, shape.n, shape.k, m, best, round(times[best] * 1e6, 3), round(ratio, 3)
    )


def _product(
    chosen: Plan, target: Target, x: torch.Tensor, prepared: tuple[torch.Tensor, ...], shape: Shape
) -> Product:
    from neuqi_kernels.gpu import launch

    words, pairs, counters = prepared
    return lambda: launch.gemm(
        chosen, target, x, words, pairs, counters, None, shape.n, shape.bits, shape.group
    )


def _wrong(product: Product, layer: Layer, x: torch.Tensor) -> str | None:
    """Say why a plan cannot be used, or None."""
    # A plan may ask for more registers or shared memory than there are, in as many kinds of errors as Triton has.
    try:
        error = layer.error(product(), x)
    except Exception as failure:
        return f"does not run: {type(failure).__name__}: {str(failure)[:200]}"
    return None if error <= TOLERANCE[x.dtype] else f"rel-L2 against float64 {error:.3g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, marked where the checkout differs from it."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
