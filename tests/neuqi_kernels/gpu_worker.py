"""A test's side of a worker process: Triton works in a process of its own, either interpreting or compiling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


class Worker:
    """Runs ``<script>`` of this folder, which reads a JSON request per line and writes a JSON result per line."""

    def __init__(self, script: str, scratch: Path, **environment: str) -> None:
        self.log = scratch / "errors.txt"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(FOLDER / script)],
                env={**os.environ, "TRITON_CACHE_DIR": str(scratch / "cache"), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the result of one request; an exception in the worker fails the test with its traceback."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        result: dict[str, Any] = json.loads(line)
        assert "exception" not in result, result["exception"]
        return result

    def close(self) -> None:
        """End the process by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
