"""The phases of a start outside the engine: measured where they happen, told to the status port and to the metrics."""

from __future__ import annotations

import contextlib
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from neuqi_serve import load_status

ATTRIBUTE = "neuqi_timeline"


@dataclass
class LoadTimeline:
    """``seconds`` of each phase; ``engine_began``: when vLLM was asked to start its engine, in seconds since 1970.

    ``cache_found``: whether the packed weights were in the cache, None where it was not asked; ``cache_peak_bytes``:
    the peak memory of the process that looked, or packed them. Travels in vLLM's parsed arguments, as the API may run
    in other processes.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    engine_began: float = 0.0
    cache_found: bool | None = None
    cache_peak_bytes: int = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase of this process."""
        load_status.begin(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - started
            load_status.end(name, self.seconds[name])

    def attach(self, args: Namespace) -> None:
        """Begin the phase ``engine``, and let the API processes know of all phases."""
        self.engine_began = time.time()
        load_status.begin("engine")
        setattr(args, ATTRIBUTE, self)


def timeline_of(args: Namespace) -> LoadTimeline | None:
    """Return the timeline of a start by ``neuqi serve``, with the phase ``engine`` as long as it took until now."""
    timeline = getattr(args, ATTRIBUTE, None)
    if not isinstance(timeline, LoadTimeline):
        return None
    seconds = timeline.seconds | {"engine": max(0.0, time.time() - timeline.engine_began)}
    return replace(timeline, seconds=seconds)
