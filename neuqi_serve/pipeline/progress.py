"""Progress of a long walk: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

LINE_INTERVAL_SECONDS = 5.0


class Progress:
    """Counts bytes (or weights, tokens) done out of ``total`` and tells ``stream`` about it.

    ``steps``: how many calls of ``advance`` there will be, if that is known; ``name`` is what one is called, e.g.
    ``layer``. ``clock`` returns seconds; it is a parameter so that the interval can be tested without waiting.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        steps: int = 0,
        name: str = "layer",
    ) -> None:
        self._total, self._unit, self._stream, self._clock = total, unit, stream, clock
        self._steps, self._name = steps, name
        self._done = self._step = 0
        self._started = self._last_line = clock()
        self._bar = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, unit_scale=True, file=stream, leave=False)

    def advance(self, amount: int, label: str) -> None:
        """Count ``amount`` more as done; ``label`` names what was just finished."""
        self._done += amount
        self._step += 1
        if self._steps:
            label = f"{self._name} {self._step} of {self._steps}, {label}"
        if self._bar is not None:
            self._bar.set_postfix_str(label, refresh=False)
            self._bar.update(amount)
            return
        now = self._clock()
        if now - self._last_line >= LINE_INTERVAL_SECONDS:
            self._last_line = now
            line = progress_line(self._done, self._total, now - self._started, self._unit)
            print(f"{line}: {label}", file=self._stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def progress_line(done: int, total: int, seconds: float, unit: str) -> str:
    """Return share, time, time left and, for bytes (``unit`` "B"), GB per second."""
    left = seconds * (total - done) / done if done else 0.0
    percent = 100 * done / total if total else 100.0
    line = f"{percent:.0f} % after {seconds:.0f} s, about {left:.0f} s left"
    if unit == "B" and seconds > 0:
        line += f", {done / seconds / 1e9:.2f} GB/s"
    return line
