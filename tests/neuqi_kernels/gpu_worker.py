"""A test's side of the worker processes: Triton works in processes of its own, either interpreting or compiling."""

from __future__ import annotations

import importlib.metadata
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
# requirements/install puts the other Triton versions of the support window here, a folder each.
OTHER_TRITONS = Path(sys.prefix) / "triton"


def triton_versions() -> list[str]:
    """The Triton versions that can be tested here, the installed one first."""
    try:
        versions = [importlib.metadata.version("triton")]
    except importlib.metadata.PackageNotFoundError:
        versions = []
    others = sorted(folder.parent.name for folder in OTHER_TRITONS.glob("*/triton"))
    return list(dict.fromkeys(versions + others))


class Worker:
    """Runs ``<script>`` of this folder, which reads a JSON request per line and writes a JSON result per line."""

    def __init__(self, script: str, log: Path, **environment: str) -> None:
        self.log = log
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(FOLDER / script)],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, request: str) -> dict[str, Any]:
        """Return the result of one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        """End the process by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Pool:
    """As many workers as there are cores; a request is worked on once, however often its result is asked for."""

    def __init__(self, script: str, scratch: Path, version: str = "", **environment: str) -> None:
        count = os.cpu_count() or 1
        path = OTHER_TRITONS / version
        if version and path.exists():
            environment["PYTHONPATH"] = str(path)
        environment["TRITON_CACHE_DIR"] = str(scratch / "cache")
        self.workers = [Worker(script, scratch / f"errors-{i}.txt", **environment) for i in range(count)]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(count)
        self.results: dict[str, Future[dict[str, Any]]] = {}

    def prefetch(self, requests: Iterable[dict[str, Any]]) -> None:
        """Begin to work on these, in their order."""
        for request in requests:
            self._submit(request)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a request; an exception in the worker fails the test with its traceback."""
        result = self._submit(request).result()
        assert "exception" not in result, result["exception"]
        return result

    def close(self) -> None:
        """End the processes."""
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()

    def _submit(self, request: dict[str, Any]) -> Future[dict[str, Any]]:
        key = json.dumps(request, sort_keys=True)
        if key not in self.results:
            self.results[key] = self.threads.submit(self._work, key)
        return self.results[key]

    def _work(self, request: str) -> dict[str, Any]:
        worker = self.idle.get()
        try:
            return worker.run(request)
        finally:
            self.idle.put(worker)
