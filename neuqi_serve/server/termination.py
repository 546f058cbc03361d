"""SIGTERM before there is a server to drain."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

# What a shell shows for a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


def end_on_sigterm() -> None:
    """Let SIGTERM end this process through its exit handlers; vLLM and its event loop replace that later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
