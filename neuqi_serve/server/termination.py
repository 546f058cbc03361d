"""SIGTERM before there is a server to drain."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType

from neuqi_serve import load_status

# What a shell shows for a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


def end_on_sigterm() -> None:
    """Let SIGTERM end this process at once, until the server's event loop handles it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception would be swallowed wherever an import is tried. Nothing is half written here, and the processes
    # that were forked end with this one, through their own clean-up.
    load_status.ended(TERMINATED)
    for child in multiprocessing.active_children():
        # An engine that is loading finishes that before it looks at signals.
        if child.name.startswith("EngineCore"):
            child.kill()
    os._exit(TERMINATED)
