"""What the page shows beside the chat, as JSON: the weights, how loading went, and the latency of all requests.

The numbers are those of ``/metrics``, for clients that may ask the API but not the metrics.
"""

from __future__ import annotations

import math
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

STATS_PATH = "/v1/neuqi/stats"
LATENCIES = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
_INFO_LABELS = ("model_name", "bits", "group_size", "source", "scale_dtype")


def attach_stats(app: Any) -> None:
    """Serve the numbers as JSON under :data:`STATS_PATH` of a FastAPI ``app``; a client's key is enough."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    async def stats() -> dict[str, Any]:
        return live_stats(get_prometheus_registry())

    app.add_api_route(STATS_PATH, stats, methods=["GET"], summary="Weights, loading and latency as JSON")


def live_stats(registry: CollectorRegistry) -> dict[str, Any]:
    """Return the numbers in a registry; what it does not have is null or an empty object.

    Bytes in ``weight_bytes``; seconds in ``load_seconds`` and ``latency_seconds``, whose histograms hold ``count``,
    ``sum`` and cumulative ``buckets`` of [upper bound or null for infinity, count], over all engines.
    """
    metrics = {metric.name: metric for metric in registry.collect()}
    info = _labels(metrics.get("neuqi_model_info"))
    return {
        "model_info": {name: info[name] for name in _INFO_LABELS if name in info} or None,
        "bits_per_weight": _total(metrics.get("neuqi_bits_per_weight")),
        "weight_bytes": _by_label(metrics.get("neuqi_weight_bytes"), "kind"),
        "load_seconds": _by_label(metrics.get("neuqi_load_phase_duration_seconds"), "phase"),
        "requests_running": _total(metrics.get("vllm:num_requests_running")),
        "requests_waiting": _total(metrics.get("vllm:num_requests_waiting")),
        "kv_cache_usage": _largest(metrics.get("vllm:kv_cache_usage_perc")),
        "generation_tokens": _total(metrics.get("vllm:generation_tokens")) or 0,
        "latency_seconds": {name: _histogram(metrics.get(f"vllm:{name}_seconds")) for name in LATENCIES},
    }


def _values(metric: Metric | None) -> list[float]:
    # Counters and histograms also have a sample of the time when they were made.
    samples = metric.samples if metric is not None else ()
    return [sample.value for sample in samples if not sample.name.endswith("_created")]


def _total(metric: Metric | None) -> float | None:
    values = _values(metric)
    return _whole(sum(values)) if values else None


def _largest(metric: Metric | None) -> float | None:
    return max(_values(metric), default=None)


def _labels(metric: Metric | None) -> dict[str, str]:
    return dict(metric.samples[0].labels) if metric is not None and metric.samples else {}


def _by_label(metric: Metric | None, label: str) -> dict[str, float]:
    return {sample.labels[label]: _whole(sample.value) for sample in metric.samples} if metric else {}


def _histogram(metric: Metric | None) -> dict[str, Any] | None:
    if metric is None or not metric.samples:
        return None
    buckets: dict[float, float] = {}
    sums = {"count": 0.0, "sum": 0.0}
    for sample in metric.samples:
        suffix = sample.name.removeprefix(f"{metric.name}_")
        if suffix == "bucket":
            bound = float(sample.labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
        elif suffix in sums:
            sums[suffix] += sample.value
    pairs = [
        [None if math.isinf(bound) else bound, _whole(count)] for bound, count in sorted(buckets.items())
    ]
    return {"count": _whole(sums["count"]), "sum": sums["sum"], "buckets": pairs}


def _whole(value: float) -> float:
    """Return whole numbers as ``int``, so that JSON shows bytes and counts without a fraction."""
    return int(value) if value.is_integer() else value
