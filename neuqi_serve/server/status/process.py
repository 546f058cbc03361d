"""The status process: forked before anything is imported, so that its port is open within the first second.

It is a process of its own because the server's must have a single thread until the engine is forked from it, and
because imports hold Python's lock for seconds. It ends with the server, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from neuqi_serve import load_status
from neuqi_serve.env import STATUS_SOCKET
from neuqi_serve.errors import NeuqiError, PortInUseError
from neuqi_serve.server.engine_process import reason_not_to_fork
from neuqi_serve.server.listen_address import ListenAddress
from neuqi_serve.server.status.answering import Channels, answer_until_the_end

END_SECONDS = 2.0
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StatusProcess:
    """Use as a context manager around the whole life of the server; an error inside is what ``/livez`` then says."""

    def __init__(self, address: ListenAddress | None, required: bool = False) -> None:
        self._address, self._required = address, required
        self._pid: int | None = None
        self._folder: Path | None = None
        self.line = ""

    def __enter__(self) -> StatusProcess:
        if self._address is not None:
            self._start(self._address)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._pid is None:
            return
        if error is not None and not isinstance(error, SystemExit):
            load_status.failed(str(error) or type(error).__name__)
        load_status.ended(getattr(error, "exit_code", 1) if error is not None else 0)
        self._wait()
        os.environ.pop(STATUS_SOCKET, None)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, address: ListenAddress) -> None:
        reason = reason_not_to_fork()
        if reason is not None:
            self.line = f"no status port: {reason}"
            return
        try:
            listener = address.listen()
        except NeuqiError as error:
            if self._required or not isinstance(error, PortInUseError):
                raise
            self.line = f"no status port: {address.port} is in use (--status-port chooses another)"
            return
        self._folder = Path(tempfile.mkdtemp(prefix="neuqi-status-"))
        messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = str(self._folder / "socket")
        messages.bind(path)
        server = os.getpid()
        # A signal to the whole group must not end the child before it ignores it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        self._pid = os.fork()
        if self._pid == 0:
            _child(Channels(listener, messages, server), self._folder)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        listener.close()
        messages.close()
        os.environ[STATUS_SOCKET] = path
        self.line = f"status: {address.url}/startupz, /readyz, /livez, /metrics"

    def _wait(self) -> None:
        assert self._pid is not None
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(self._pid, signal.SIGKILL)
                    os.waitpid(self._pid, 0)
                    return
                time.sleep(0.005)


def _child(channels: Channels, folder: Path) -> None:
    """Be the status process; never return into the code of the parent."""
    code = 1
    try:
        # While the server drains, the port must say so.
        for number in _GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
        code = answer_until_the_end(channels)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        sys.stderr.flush()
        os._exit(code)
