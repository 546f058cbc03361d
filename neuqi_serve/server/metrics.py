"""The ``neuqi_*`` metrics: what the weights are, what they cost, how long loading took, what the processes occupy.

They are plain gauges, so that they also work with several API processes (``--api-server-count``), where Prometheus'
own ``Info`` type and custom collectors do not. Latency is vLLM's (``vllm:*``), unchanged.

Bytes of weights and layers by kernel are summed over the ranks: with pipeline or tensor parallelism each rank holds
its slice, and what every rank holds (norms, replicated layers) is counted on each. Load phases are the slowest
rank's, resident memory is per process.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

_WEIGHT_KINDS = ("packed", "scale_zero", "unquantized", "original")
_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "neuqi_build_info": ("Versions in use; always 1.", ("version", "vllm", "torch")),
    "neuqi_model_info": (
        "The model and how its linear layers are stored; always 1. source: on-the-fly, packed or none.",
        ("model_name", "bits", "group_size", "source", "scale_dtype"),
    ),
    "neuqi_weight_bytes": (
        "Bytes of weights, summed over the ranks: packed codes, their scales and zero-points, what is left "
        "unquantized, and all of it in the checkpoint's dtype (original).",
        ("kind",),
    ),
    "neuqi_bits_per_weight": ("Stored bits per quantized weight, scales and zero-points included.", ()),
    "neuqi_kernel_info": ("Layers that run on this kernel, summed over the ranks.", ("backend", "bits")),
    "neuqi_load_phase_duration_seconds": (
        "Seconds of a load phase, of the slowest rank; engine is from its start to its readiness and contains read, "
        "quantize and repack.",
        ("phase",),
    ),
    "neuqi_process_resident_bytes": ("Resident memory of a process.", ("process",)),
    "neuqi_process_peak_resident_bytes": ("Peak resident memory of a process.", ("process",)),
}


@dataclass(frozen=True)
class ProcessMemory:
    """``resident`` and ``peak`` bytes of a process."""

    resident: int
    peak: int


@dataclass(frozen=True)
class LoadSummary:
    """The reports of all workers, put together; ``kernels``: layers by backend and bits."""

    source: str = "none"
    bits: str = ""
    group_size: str = ""
    scale_dtype: str = ""
    bits_per_weight: float | None = None
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    kernels: Mapping[tuple[str, str], int] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    processes: Mapping[str, ProcessMemory] = field(default_factory=dict)


def summarize_reports(reports: Iterable[Mapping[str, Any]]) -> LoadSummary:
    """Put the ``neuqi_load_report`` of every worker together: sums of bytes, the longest phases, memory by process."""
    found = list(reports)
    quantized = [report for report in found if report.get("source", "none") != "none"]
    packed = _total(quantized, "packed") + _total(quantized, "scale_zero")
    # Each rank's bits per weight cover its own number of weights.
    weights = sum(
        8 * (r["weight_bytes"]["packed"] + r["weight_bytes"]["scale_zero"]) / r["bits_per_weight"]
        for r in quantized
    )
    kernels: dict[tuple[str, str], int] = {}
    phases: dict[str, float] = {}
    for report in found:
        for kernel in report.get("kernels", ()):
            label = str(kernel["backend"]), _label(kernel["bits"])
            kernels[label] = kernels.get(label, 0) + int(kernel["layers"])
        for phase, seconds in report.get("phases", {}).items():
            phases[phase] = max(phases.get(phase, 0.0), float(seconds))
    first = quantized[0] if quantized else {}
    return LoadSummary(
        source=str(first.get("source", "none")),
        bits=_label(first.get("bits")),
        group_size=_label(first.get("group_size")),
        scale_dtype=_label(first.get("scale_dtype")),
        bits_per_weight=8 * packed / weights if weights else None,
        weight_bytes={kind: _total(found, kind) for kind in _WEIGHT_KINDS},
        kernels=kernels,
        phases=phases,
        processes={process_name(int(r.get("rank", 0)), len(found)): _memory(r) for r in found},
    )


def process_name(rank: int, ranks: int) -> str:
    """Name a worker in the label ``process``: ``engine``, or ``engine_rank0`` and so on when there are several."""
    return "engine" if ranks == 1 else f"engine_rank{rank}"


class NeuqiMetrics:
    """The gauges of one API process; constructing it again gives the same gauges."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._gauges = {name: _gauge(name, registry) for name, (_, labels) in _GAUGES.items() if labels}

    def set_build(self, version: str, vllm: str, torch: str) -> None:
        """Publish the versions."""
        self._gauges["neuqi_build_info"].labels(version, vllm, torch).set(1)

    def set_phases(self, phases: Mapping[str, float]) -> None:
        """Publish the seconds of load phases."""
        for phase, seconds in phases.items():
            self._gauges["neuqi_load_phase_duration_seconds"].labels(phase).set(seconds)

    def set_load(self, model_name: str, summary: LoadSummary) -> None:
        """Publish what was loaded, and the memory of the processes."""
        self._gauges["neuqi_model_info"].labels(
            model_name, summary.bits, summary.group_size, summary.source, summary.scale_dtype
        ).set(1)
        for kind, size in summary.weight_bytes.items():
            self._gauges["neuqi_weight_bytes"].labels(kind).set(size)
        if summary.bits_per_weight is not None:
            # Without labels a gauge shows 0 from the moment it exists, so it does not before there is a value.
            _gauge("neuqi_bits_per_weight", self._registry).set(summary.bits_per_weight)
        for (backend, bits), layers in summary.kernels.items():
            self._gauges["neuqi_kernel_info"].labels(backend, bits).set(layers)
        self.set_phases(summary.phases)
        self.set_memory(summary.processes)

    def set_memory(self, processes: Mapping[str, ProcessMemory]) -> None:
        """Publish the memory of the processes."""
        for process, memory in processes.items():
            self._gauges["neuqi_process_resident_bytes"].labels(process).set(memory.resident)
            self._gauges["neuqi_process_peak_resident_bytes"].labels(process).set(memory.peak)


def own_memory() -> ProcessMemory:
    """Return resident and peak memory of this process."""
    # ru_maxrss is in kibibytes on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    resident = peak
    if statm.exists():
        resident = int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return ProcessMemory(resident, max(peak, resident))


def _gauge(name: str, registry: CollectorRegistry) -> Gauge:
    text, labels = _GAUGES[name]
    # A second engine in the same process must not register the same name again.
    existing = registry._names_to_collectors.get(name)
    if isinstance(existing, Gauge):
        return existing
    return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")


def _memory(report: Mapping[str, Any]) -> ProcessMemory:
    return ProcessMemory(int(report["rss_bytes"]), int(report["peak_rss_bytes"]))


def _total(reports: Iterable[Mapping[str, Any]], kind: str) -> int:
    return sum(int(report.get("weight_bytes", {}).get(kind, 0)) for report in reports)


def _label(value: object) -> str:
    return "" if value is None else str(value)
