"""Requests by route and status, and refusals by reason; counted in the gate, so that nothing escapes."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from neuqi_serve.server.admission.exchange import Exchange
from neuqi_serve.server.admission.refusal import QUEUE_FULL
from neuqi_serve.server.admission.routes import label

REQUESTS = "neuqi_http_requests_total"
REJECTED = "neuqi_requests_rejected_total"
# The client had gone before an answer began; what nginx writes into its log.
CLIENT_GONE = 499


class HttpMetrics:
    """The counters of one API process; with several processes Prometheus' multiprocess mode adds them up."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = counter(
            REQUESTS,
            "HTTP requests by route template and status, refused ones included.",
            ("route", "code"),
            registry,
        )
        self._rejected = counter(
            REJECTED,
            "Requests that were refused, by reason; also in neuqi_http_requests_total.",
            ("reason",),
            registry,
        )

    def count(self, scope: MutableMapping[str, Any], exchange: Exchange) -> None:
        """Count a request that has been answered."""
        code = exchange.status or CLIENT_GONE
        self._requests.labels(label(scope, exchange.path), str(code)).inc()
        if exchange.refusal is not None:
            self.reject(exchange.refusal.reason)
        elif exchange.queue_was_full:
            self.reject(QUEUE_FULL)

    def reject(self, reason: str) -> None:
        """Count a refusal."""
        self._rejected.labels(reason).inc()


def counter(name: str, text: str, labels: tuple[str, ...], registry: CollectorRegistry) -> Counter:
    """Return the counter of this name, which a second server in the same process must not register again."""
    existing = registry._names_to_collectors.get(name)
    if isinstance(existing, Counter):
        return existing
    return Counter(name, text, labels, registry=registry)
