"""The most memory in use while something runs, sampled: vLLM resets the peak that torch keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

INTERVAL_SECONDS = 0.02


class PeakSampler:
    """Context manager that reads a figure again and again in a thread; ``peak`` is the largest one."""

    def __init__(self, read: Callable[[], int], interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._read, self._interval_seconds = read, interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = 0

    def __enter__(self) -> PeakSampler:
        self.peak = self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, self._read())

    def _sample(self) -> None:
        while not self._ended.wait(self._interval_seconds):
            self.peak = max(self.peak, self._read())


def gpu_bytes_in_use() -> int:
    """Bytes of the GPU's memory that are in use, by whomever."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free
