"""Requests and tokens per minute, as leaky buckets that refill continuously."""

from __future__ import annotations

import time
from collections.abc import Callable

from neuqi_serve.server.admission.keys import ApiKey
from neuqi_serve.server.admission.shared_levels import Cell, OwnCell, SharedLevels

# The bucket of requests without a key, where the server has none.
ANYBODY = ApiKey("", b"")


class Bucket:
    """``per_minute`` units, all there at the start, refilled evenly. May go below zero: a debt is waited off.

    ``cell`` holds what is left, in memory or in a file that several processes share.
    """

    def __init__(
        self, per_minute: float, clock: Callable[[], float] = time.monotonic, cell: Cell | None = None
    ) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._cell = OwnCell() if cell is None else cell

    def wait(self) -> float:
        """Seconds until a unit is there; 0 when it is."""
        # A limit below one per minute still lets one through when the bucket is full.
        need = min(1.0, self.per_minute)
        return max(0.0, (need - self._left_after(0)) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take ``amount`` units out, whether they are there or not."""
        self._left_after(amount)

    def _left_after(self, amount: float) -> float:
        now = self._clock()
        with self._cell as cell:
            level, seen = cell.read() or (self.per_minute, now)
            refilled = min(self.per_minute, level + (now - seen) * self.per_minute / 60)
            cell.write(refilled - amount, now)
        return refilled - amount


class KeyLimits:
    """The buckets of one name; None: not limited."""

    def __init__(self, requests: Bucket | None, tokens: Bucket | None) -> None:
        self.requests, self.tokens = requests, tokens

    def exceeded(self) -> tuple[str, float, float] | None:
        """Return what is used up, its limit and the seconds to wait; None after taking one request."""
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            seconds = bucket.wait() if bucket is not None else 0.0
            if bucket is not None and seconds > 0:
                return what, bucket.per_minute, seconds
        if self.requests is not None:
            self.requests.take(1)
        return None


class RateLimits:
    """The limits of all keys: the server's, unless a key has its own; keys of one name share theirs.

    ``levels``: where several API processes keep what is left.
    """

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        levels: SharedLevels | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._levels, self._clock = levels, clock
        self._held: dict[str, tuple[tuple[float | None, float | None], KeyLimits]] = {}

    def of(self, key: ApiKey | None) -> KeyLimits | None:
        """Return the buckets of the key, of everybody together for None; None when nothing limits it."""
        key = key or ANYBODY
        wanted = (
            self._requests if key.requests_per_minute is None else key.requests_per_minute,
            self._tokens if key.tokens_per_minute is None else key.tokens_per_minute,
        )
        if wanted == (None, None):
            return None
        held = self._held.get(key.name)
        # A key file that was read again may have brought other limits.
        if held is None or held[0] != wanted:
            requests = self._bucket(wanted[0], f"requests {key.name}")
            held = wanted, KeyLimits(requests, self._bucket(wanted[1], f"tokens {key.name}"))
            self._held[key.name] = held
        return held[1]

    def _bucket(self, per_minute: float | None, name: str) -> Bucket | None:
        if per_minute is None:
            return None
        return Bucket(per_minute, self._clock, self._levels.cell(name) if self._levels is not None else None)
