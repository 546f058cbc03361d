"""Progress of a long walk: a live bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts weights (or bytes) done out of ``total`` and tells ``stream`` about it.

    ``clock`` returns seconds; it is a parameter so that the interval can be tested without waiting.
    """

    def __init__(
        self, total: int, unit: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._unit, self._stream, self._clock = total, unit, stream, clock
        self._done = 0
        self._started = self._last_line = clock()
        self._bar = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, unit_scale=True, file=stream, leave=False)

    def advance(self, amount: int, label: str) -> None:
        """Count ``amount`` more as done; ``label`` names what was just finished."""
        self._done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(label, refresh=False)
            self._bar.update(amount)
            return
        now = self._clock()
        if now - self._last_line >= LINE_INTERVAL_SECONDS:
            self._last_line = now
            elapsed = now - self._started
            left = elapsed * (self._total - self._done) / self._done if self._done else 0.0
            percent = 100 * self._done / self._total if self._total else 100.0
            print(
                f"{percent:.0f} % after {elapsed:.0f} s, about {left:.0f} s left: {label}",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
