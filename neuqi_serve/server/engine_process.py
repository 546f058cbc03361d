"""The engine process: forked from the imported API process instead of started anew, its failure told to the parent.

A new process imports torch and vLLM once more, which is most of a cold start on two cores. A fork shares them. It is
made while this process has a single thread and no event loop, which is checked, and the child then waits for its job;
without that, and on accelerators, vLLM's own start method is used.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from neuqi_serve.errors import NeuqiError
from neuqi_serve.server.process_environment import adopt_environment, inherited_environment

_TASKS = Path("/proc/self/task")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class EngineFailure:
    """Why the engine process ended: the error's ``kind``, its ``message``, and the exit code it asks for."""

    kind: str
    message: str
    exit_code: int

    @classmethod
    def of(cls, error: BaseException) -> EngineFailure:
        """Describe ``error`` by the deepest cause that is one of ours, or by itself."""
        found: BaseException | None = error
        while found is not None:
            if isinstance(found, NeuqiError):
                return cls(type(found).__name__, str(found), found.exit_code)
            found = found.__cause__ or found.__context__
        return cls(type(error).__name__, str(error), 1)


class EngineProcesses:
    """Stands in for the multiprocessing context from which vLLM takes its engine processes.

    Use as a context manager around the whole life of the server; ``failure`` tells afterwards why the engine ended.
    """

    def __init__(self) -> None:
        self._failures: list[Connection] = []
        self._forked: _ForkedEngine | None = None

    def __enter__(self) -> EngineProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        if self._forked is not None:
            self._forked.release()

    def fork(self) -> str | None:
        """Fork the process of the first engine now; return the reason when that would not be safe."""
        reason = reason_not_to_fork()
        if reason is None:
            self._forked = _ForkedEngine(self._new_failure_pipe())
        return reason

    def context(self, original: Any) -> Any:
        """Return ``original`` with a ``Process`` that uses the forked engine first and always reports failures."""
        return _Context(self, original)

    def failure(self) -> EngineFailure | None:
        """Return what the first engine that failed had to say."""
        for connection in self._failures:
            try:
                if connection.poll():
                    received = connection.recv()
                    return received if isinstance(received, EngineFailure) else None
            except (EOFError, OSError):
                continue
        return None

    def new_process(
        self, original: Any, target: Callable[..., Any], name: str, kwargs: dict[str, Any]
    ) -> Any:
        """Return a process object that vLLM starts, watches and stops."""
        forked, self._forked = self._forked, None
        # Queues for tensors are handed over by inheritance only, which is too late for a process that exists.
        if forked is not None and kwargs.get("tensor_queue") is None:
            forked.assign(target, name, kwargs)
            return forked
        if forked is not None:
            forked.release()
        return original.Process(
            target=run_reporting_failure, name=name, args=(self._new_failure_pipe(), target), kwargs=kwargs
        )

    def _new_failure_pipe(self) -> Connection:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        self._failures.append(receiver)
        return sender


class _Context:
    def __init__(self, processes: EngineProcesses, original: Any) -> None:
        self._processes = processes
        self._original = original

    def Process(self, target: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Any:
        return self._processes.new_process(self._original, target, name, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _ForkedEngine:
    """A process that was forked early and gets its job when vLLM calls ``start``; otherwise a usual process."""

    def __init__(self, failure: Connection) -> None:
        context = multiprocessing.get_context("fork")
        receiver, self._sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_wait_for_job, args=(receiver, self._sender, failure, os.getpid()), name="EngineCore"
        )
        self._job: tuple[Any, ...] | None = None
        self._process.start()
        receiver.close()
        failure.close()

    def assign(self, target: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> None:
        self._process.name = name
        self._job = (target, name, kwargs)

    def start(self) -> None:
        assert self._job is not None
        target, name, kwargs = self._job
        self._sender.send((target, name, kwargs, inherited_environment()))
        self._sender.close()

    def release(self) -> None:
        """Let a process that got no job end; without effect on one that did."""
        if not self._sender.closed:
            self._sender.close()
            self._process.join()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)


def reason_not_to_fork() -> str | None:
    """Return why a fork of this process now could hang: another thread may hold a lock that the child inherits."""
    if sys.platform != "linux":
        return f"forking with libraries loaded is reliable on Linux only, this is {sys.platform}"
    threads = sorted(int(task.name) for task in _TASKS.iterdir())
    if len(threads) > 1:
        return f"the process has {len(threads)} threads"
    return None


def run_reporting_failure(failure: Connection, target: Callable[..., Any], **kwargs: Any) -> None:
    """Run ``target`` and tell the parent when it fails."""
    try:
        target(**kwargs)
    except Exception as error:
        failure.send(EngineFailure.of(error))
        raise


def _wait_for_job(receiver: Connection, sender: Connection, failure: Connection, parent: int) -> None:
    # Our copy of the parent's end would keep the pipe open after the parent has gone.
    sender.close()
    _end_with_parent(parent)
    # Ctrl-C reaches the whole group; until there is an engine to stop, the parent's end of the pipe says enough.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        target, name, kwargs, environment = receiver.recv()
    except EOFError:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_environment(environment)
    multiprocessing.current_process().name = name
    run_reporting_failure(failure, target, **kwargs)


def _end_with_parent(parent: int) -> None:
    """Ask the kernel to stop this process when its parent dies, so that no orphan keeps the memory."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
