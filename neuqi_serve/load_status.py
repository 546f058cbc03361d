"""How far a start is, told to the status process over a socket; without one, or when it is gone, nothing happens.

Every process of the server may tell: the one that packs, the workers that load, the API processes that serve. A
message is one datagram of JSON; it never blocks and never raises.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from neuqi_serve import env

# Between two reports of progress of one process; the first and the last are always sent.
INTERVAL_SECONDS = 0.2

_last_progress = 0.0


def begin(phase: str) -> None:
    """A phase of the load begins: ``import``, ``cache``, ``read``, ``quantize``, ``warm-up``, …"""
    _send({"kind": "begin", "phase": phase})


def end(phase: str, seconds: float) -> None:
    """It is done, and took this long."""
    _send({"kind": "end", "phase": phase, "seconds": seconds})


def progress(phase: str, layer: int, layers: int, done: int, total: int) -> None:
    """``layer`` of ``layers`` and ``done`` of ``total`` bytes of unquantized weights are done."""
    global _last_progress
    now = time.monotonic()
    if layer < layers and now - _last_progress < INTERVAL_SECONDS:
        return
    _last_progress = now
    _send(
        {
            "kind": "progress",
            "phase": phase,
            "layer": layer,
            "layers": layers,
            "bytes": done,
            "total_bytes": total,
        }
    )


def serving(rank: int, count: int, state: str) -> None:
    """Say that API process ``rank`` of ``count`` lives: ``ready``, ``draining`` or ``dead`` (its engine is)."""
    _send({"kind": "serving", "rank": rank, "count": count, "state": state})


def failed(message: str) -> None:
    """Report the error that ends the server."""
    _send({"kind": "failed", "message": message[:1000]})


def ended(code: int) -> None:
    """Report that the server ends with this exit code."""
    _send({"kind": "ended", "code": code})


def _send(message: dict[str, Any]) -> None:
    path = env.status_socket()
    if path is None:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto(json.dumps(message | {"pid": os.getpid()}).encode(), path)
    except OSError:
        # The status process has gone, or its queue is full: serving goes on.
        return
