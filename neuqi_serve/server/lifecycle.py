"""From ready to the end, in the API process: the heartbeat for the status port, draining, and the engine's death.

vLLM itself stops the engine at SIGTERM and goes on accepting requests, which then fail. Here the gate closes at once,
what runs inside finishes with the engine as it was, and then the HTTP server ends, which ends the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuqi_serve import load_status

logger = logging.getLogger("vllm.neuqi")

POLL_SECONDS = 0.2
HEARTBEAT_SECONDS = 1.0
# For the clients of a dead engine to receive their errors.
FAREWELL_SECONDS = 2.0

_engine_died = False


def engine_died() -> bool:
    """Whether the engine of this process's server has ended while it was needed."""
    return _engine_died


class Lifecycle:
    """Watches one server. ``gate`` is None when another program than ``neuqi serve`` runs it.

    ``worker_pids``: the engine's workers on this machine; filled in as soon as they are known.
    """

    def __init__(
        self,
        server: Any,
        engine_client: Any,
        gate: Any,
        rank: int,
        count: int,
        worker_pids: Sequence[int] = (),
    ) -> None:
        self._server, self._engine, self._gate = server, engine_client, gate
        self._rank, self._count = rank, count
        self._hasten = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._state = "ready"
        self._worker_pids = worker_pids

    def take_signals(self) -> None:
        """Handle SIGTERM and SIGINT instead of vLLM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)

    async def watch(self) -> None:
        """Tell the status port that the server lives, until its engine does no more."""
        spoke = 0.0
        while True:
            now = time.monotonic()
            if now - spoke >= HEARTBEAT_SECONDS:
                spoke = now
                self._tell()
            if self._engine is not None and (self._engine.errored or self._worker_is_gone()):
                await self._engine_gone()
                return
            await asyncio.sleep(POLL_SECONDS)

    def _tell(self) -> None:
        load_status.serving(self._rank, self._count, self._state)

    def _stop(self) -> None:
        if self._drain is not None:
            logger.info("neuqi: told to stop again: not waiting for running requests")
            self._hasten.set()
            return
        self._state = "draining"
        self._gate.draining = True
        self._tell()
        self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        timeout = self._engine.vllm_config.shutdown_timeout if self._engine is not None else 0
        running = self._gate.running
        logger.info("neuqi: stopping; %d running requests get up to %s s to finish", running, timeout)
        deadline = time.monotonic() + timeout
        while self._gate.running and time.monotonic() < deadline and not self._hasten.is_set():
            await asyncio.sleep(POLL_SECONDS / 4)
        if self._gate.running:
            logger.warning("neuqi: %d requests are cut off", self._gate.running)
            if self._engine is not None:
                # They have had their time: the engine must not drain once more.
                self._engine.vllm_config.shutdown_timeout = 0
            self._server.force_exit = True
        self._server.should_exit = True

    def _worker_is_gone(self) -> bool:
        """Whether a worker of the engine on this machine has ended; of several API processes none is its parent."""
        return any(not _is_alive(pid) for pid in self._worker_pids)

    async def _engine_gone(self) -> None:
        global _engine_died
        # Ctrl-C reaches the engine too, which then ends by itself when its work is done.
        if self._drain is not None and await self._all_answered(FAREWELL_SECONDS / 2):
            return
        _engine_died = True
        self._state = "dead"
        self._tell()
        logger.error("neuqi: the engine has died; ending this server")
        if self._gate is not None:
            self._gate.dead = True
        _fail_requests(self._engine)
        await self._all_answered(FAREWELL_SECONDS)
        self._hasten.set()
        self._server.should_exit = True

    async def _all_answered(self, seconds: float) -> bool:
        """Wait until nothing runs, at most this long; return whether nothing does."""
        deadline = time.monotonic() + seconds
        while self._gate is not None and self._gate.running and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS / 4)
        return self._gate is None or not self._gate.running


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    # A process that nobody has waited for still has its number.
    with contextlib.suppress(OSError):
        return stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
    return not Path("/proc/self/stat").exists()


def _fail_requests(engine: Any) -> None:
    """End the requests that wait for an engine of which vLLM does not know that it is dead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    with contextlib.suppress(AttributeError):
        engine.engine_core.resources.engine_dead = True
        engine.output_processor.propagate_error(EngineDeadError())
