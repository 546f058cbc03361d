"""How a benchmark keeps to its minutes: what still fits, and what was left out."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A part of the time that no single peer's compilation may exceed.
SETUP_SHARE = 0.15
# What the report at the end may take.
RESERVED_SECONDS = 10.0
# The first pieces of work compile kernels that the later ones find: they are soon forgotten.
REMEMBERED = 3


class Budget:
    """Seconds to spend. Work is estimated from work of its kind already done, in proportion to its size."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = seconds
        self._end = clock() + max(0.0, seconds - RESERVED_SECONDS)
        self._seconds_per_size: dict[str, deque[float]] = {}
        self._setup: defaultdict[str, float] = defaultdict(float)
        self.left_out: list[str] = []

    @property
    def remaining(self) -> float:
        """Seconds left for measuring."""
        return self._end - self._clock()

    def fits(self, kind: str, size: float, what: str) -> bool:
        """Whether work of a kind fits in what remains; ``what`` is noted as left out where it does not."""
        expected = max(self._seconds_per_size.get(kind, (0.0,))) * size
        if self.remaining > expected:
            return True
        self.left_out.append(f"{what}: {expected:.0f} s expected, {max(0.0, self.remaining):.0f} s left")
        return False

    @contextmanager
    def spend(self, kind: str, size: float) -> Iterator[None]:
        """Time work of a kind. The next is expected to take as long as the slowest of the last few."""
        start = self._clock()
        yield
        spent = (self._clock() - start) / size
        self._seconds_per_size.setdefault(kind, deque(maxlen=REMEMBERED)).append(spent)

    @contextmanager
    def setup(self, name: str) -> Iterator[None]:
        """Count what a peer takes to compile, tune and repack."""
        start = self._clock()
        try:
            yield
        finally:
            self._setup[name] += self._clock() - start

    def setup_spent(self, name: str) -> str | None:
        """Why a peer sits out the rest: its compilation used up its share. None while it has not."""
        allowed = SETUP_SHARE * self._seconds
        if self._setup[name] <= allowed:
            return None
        return f"its compilation took {self._setup[name]:.0f} s, more than its share of {allowed:.0f} s"
