"""The ``neuqi_*`` metrics: what the weights are, what they cost, how long loading took, what the processes occupy.

They are plain gauges, so that they also work with several API processes (``--api-server-count``), where Prometheus'
own ``Info`` type and custom collectors do not. Latency is vLLM's (``vllm:*``), unchanged.

Bytes of weights and layers by kernel are summed over the ranks: with pipeline or tensor parallelism each rank holds
its slice, and what every rank holds (norms, replicated layers) is counted on each. Load phases are the slowest
rank's, resident memory is per process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Histogram

from neuqi_serve.server.http_metrics import counter
from neuqi_serve.server.process_memory import ProcessMemory

# 4 bits give about 0.08, 3 bits 0.17, 2 bits 0.35.
_ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
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
    "neuqi_load_phase": ("The phase that the server is in; always 1.", ("phase",)),
    "neuqi_load_progress_ratio": ("Share of the load that is done; 1 from here on.", ()),
    "neuqi_load_peak_memory_bytes": (
        "Peak resident memory during the load, of the engine's processes and the one that looks into the cache.",
        ("process",),
    ),
    "neuqi_kv_cache_bytes": ("Bytes of the KV cache, summed over the ranks.", ()),
    "neuqi_accelerator_memory_bytes": ("Memory of a rank's accelerator.", ("process", "kind")),
    "neuqi_process_resident_bytes": ("Resident memory of a process.", ("process",)),
    "neuqi_process_peak_resident_bytes": ("Peak resident memory of a process.", ("process",)),
}


@dataclass(frozen=True)
class LoadSummary:
    """The reports of all workers, put together.

    ``kernels``: layers by backend and bits; ``accelerators``: bytes by process and kind (``used``, ``total``).
    """

    source: str = "none"
    bits: str = ""
    group_size: str = ""
    scale_dtype: str = ""
    bits_per_weight: float | None = None
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    kernels: Mapping[tuple[str, str], int] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    processes: Mapping[str, ProcessMemory] = field(default_factory=dict)
    kv_cache_bytes: int = 0
    accelerators: Mapping[tuple[str, str], int] = field(default_factory=dict)


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
        kv_cache_bytes=sum(int(r.get("kv_cache_bytes", 0)) for r in found),
        accelerators={
            (process_name(int(r.get("rank", 0)), len(found)), kind): int(size)
            for r in found
            for kind, size in r.get("accelerator_memory", {}).items()
        },
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
        for process, memory in summary.processes.items():
            # Once, at the end of the load: what is served later may need more.
            self._gauges["neuqi_load_peak_memory_bytes"].labels(process).set(memory.peak)
        _gauge("neuqi_kv_cache_bytes", self._registry).set(summary.kv_cache_bytes)
        self.set_accelerators(summary)
        self.set_memory(summary.processes)

    def set_accelerators(self, summary: LoadSummary) -> None:
        """Publish the memory of the accelerators."""
        for (process, kind), size in summary.accelerators.items():
            self._gauges["neuqi_accelerator_memory_bytes"].labels(process, kind).set(size)

    def set_loaded(self, phases: Mapping[str, float], cache_peak_bytes: int) -> None:
        """Publish that the load is done."""
        self.set_phases(phases)
        self._gauges["neuqi_load_phase"].labels("ready").set(1)
        _gauge("neuqi_load_progress_ratio", self._registry).set(1)
        if cache_peak_bytes:
            self._gauges["neuqi_load_peak_memory_bytes"].labels("cache").set(cache_peak_bytes)

    def count_cache(self, found: bool) -> None:
        """Count a start that looked into the cache."""
        text = "Starts of this server that found their packed weights in the cache."
        counter("neuqi_quant_cache_hits_total", text, (), self._registry).inc(int(found))

    def set_errors(self, errors: Iterable[tuple[str, float]]) -> None:
        """Count the relative errors of layers by their kind (the last part of a module's name)."""
        histogram = _histogram(self._registry)
        for kind, error in errors:
            histogram.labels(kind).observe(error)

    def set_memory(self, processes: Mapping[str, ProcessMemory]) -> None:
        """Publish the memory of the processes."""
        for process, memory in processes.items():
            self._gauges["neuqi_process_resident_bytes"].labels(process).set(memory.resident)
            self._gauges["neuqi_process_peak_resident_bytes"].labels(process).set(memory.peak)


def _gauge(name: str, registry: CollectorRegistry) -> Gauge:
    text, labels = _GAUGES[name]
    # A second engine in the same process must not register the same name again.
    existing = registry._names_to_collectors.get(name)
    if isinstance(existing, Gauge):
        return existing
    return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")


def _histogram(registry: CollectorRegistry) -> Histogram:
    name = "neuqi_quantize_relative_error"
    existing = registry._names_to_collectors.get(name)
    if isinstance(existing, Histogram):
        return existing
    text = "Relative errors of the packed layers' weights, as the packer measured them."
    return Histogram(name, text, ("layer_kind",), registry=registry, buckets=_ERROR_BUCKETS)


def _memory(report: Mapping[str, Any]) -> ProcessMemory:
    return ProcessMemory(int(report["rss_bytes"]), int(report["peak_rss_bytes"]))


def _total(reports: Iterable[Mapping[str, Any]], kind: str) -> int:
    return sum(int(report.get("weight_bytes", {}).get(kind, 0)) for report in reports)


def _label(value: object) -> str:
    return "" if value is None else str(value)
