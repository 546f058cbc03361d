"""How far the quantization of a loading model is, told in the log; and the memory that its end gives back."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from vllm.logger import init_logger

from neuqi_serve import load_status
from neuqi_serve.vllm_plugin import compat

logger = init_logger("vllm.neuqi")

LINE_INTERVAL_SECONDS = 5.0
# Freed weights and work arrays stay in the allocator's arenas; giving them back costs milliseconds, so not each time.
TRIM_BYTES = 256 << 20


class LoadProgress:
    """Counts the layers of one model: ``expect`` when one is made, ``finish`` when it is ready for its kernel.

    ``silent``: only give memory back; a packed model is loaded in seconds.
    """

    def __init__(self, silent: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent, self._clock = silent, clock
        self._layers = self._total = self._done_layers = self._done = self._freed = 0
        self._started = self._last_line = self._made = 0.0
        self._phase = "read" if silent else "quantize"

    def expect(self, nbytes: int) -> None:
        """Count a layer whose unquantized weights have ``nbytes``."""
        if not self._layers:
            self._made = self._clock()
            load_status.begin(self._phase)
        self._layers += 1
        self._total += nbytes

    def forget(self, nbytes: int) -> None:
        """Take back a layer that turned out to have no weights of its own."""
        self._layers -= 1
        self._total -= nbytes

    def begin(self) -> None:
        """Note the time of the first layer that is quantized."""
        if not self._started:
            self._started = self._last_line = self._clock()

    def finish(self, nbytes: int) -> None:
        """Count a layer as done, and say so every few seconds and after the last one."""
        self._done_layers += 1
        self._done += nbytes
        self._freed += nbytes
        last = self._done_layers == self._layers
        if last or self._freed >= TRIM_BYTES:
            self._freed = 0
            return_free_memory()
        now = self._clock()
        load_status.progress(self._phase, self._done_layers, self._layers, self._done, self._total)
        if last:
            load_status.end(self._phase, now - self._made)
            attributes = {"neuqi.layers": self._layers, "neuqi.bytes": self._total}
            compat.record_span(f"neuqi.{self._phase}", now - self._made, attributes)
            load_status.begin("warm-up")
        if not self._silent and (last or now - self._last_line >= LINE_INTERVAL_SECONDS):
            self._last_line = now
            logger.info(
                "neuqi: layer %d of %d quantized, %s",
                self._done_layers,
                self._layers,
                progress_text(self._done, self._total, now - self._started),
            )


def progress_text(done: int, total: int, seconds: float) -> str:
    """Return share, time, GB of unquantized weights per second and the time left."""
    percent = 100 * done / total if total else 100.0
    text = f"{percent:.0f} % after {seconds:.0f} s"
    if seconds > 0:
        text += f", {done / seconds / 1e9:.2f} GB/s"
    if done and done < total:
        text += f", about {seconds * (total - done) / done:.0f} s left"
    return text


def return_free_memory() -> None:
    """Give memory that the C library has free back to the system, where the library can do that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
