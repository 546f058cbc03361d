"""The status process: open at once, fed by any process, gone with the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.errors import PortInUseError
from neuqi_serve.server.listen_address import ListenAddress
from neuqi_serve.server.status.process import StatusProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

PROGRAM = """
    import os, sys, time
    from neuqi_serve import load_status
    from neuqi_serve.errors import UsageError
    from neuqi_serve.server.listen_address import ListenAddress
    from neuqi_serve.server.status.process import StatusProcess
    with StatusProcess(ListenAddress("127.0.0.1", {port})) as status:
        print(os.getpid(), flush=True)
        {body}
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(port: int, body: str) -> subprocess.Popen[str]:
    program = textwrap.dedent(PROGRAM).format(port=port, body=textwrap.indent(body, " " * 4).strip())
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == str(process.pid)
    return process


def _get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _wait_for(port: int, phase: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    body: dict[str, Any] = {}
    while time.monotonic() < deadline:
        body = _get(port, "/startupz")[1]
        if body["phase"] == phase:
            return body
        time.sleep(0.02)
    raise AssertionError(f"expected the phase {phase}, got {body}")


def _closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_forked_child_and_a_new_process_tell_too() -> None:
    port = _free_port()
    body = """
import subprocess
if os.fork() == 0:
    load_status.progress("quantize", 1, 4, 10, 40)
    os._exit(0)
tell = "from neuqi_serve import load_status; load_status.serving(0, 1, 'ready')"
time.sleep(float(sys.stdin.readline()))
subprocess.run([sys.executable, "-c", tell], check=True)
time.sleep(60)
"""
    program = body.replace("sys.stdin.readline()", "'0.5'")
    process = _start(port, program)
    try:
        assert _wait_for(port, "quantize")["layers"] == 4
        _wait_for(port, "ready")
        assert _get(port, "/readyz")[0] == 200
    finally:
        process.kill()
        process.communicate()


def test_it_survives_signals_to_the_group_and_ends_with_a_killed_server() -> None:
    port = _free_port()
    process = _start(port, "time.sleep(60)")
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGINT)
    assert _get(port, "/livez")[0] == 200
    folder = _socket_of(child)
    process.kill()
    # Its end of the pipe closes when the status process has gone too.
    _, errors = process.communicate(timeout=20)
    assert "died without a word, in phase 'start'" in errors
    assert _closed(port)
    assert not folder.exists()


def _socket_of(pid: int) -> Path:
    table = Path(f"/proc/{pid}/net/unix").read_text()
    links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and f"socket:[{fields[6]}]" in links and "neuqi-status" in fields[7]:
            return Path(fields[7]).parent
    raise AssertionError("no socket")


def test_an_error_is_told_and_the_process_waited_for() -> None:
    port = _free_port()
    process = _start(port, "raise UsageError('too small')")
    _, errors = process.communicate(timeout=20)
    assert "too small" in errors
    assert "without a word" not in errors
    assert _closed(port)


def test_a_silent_client_does_not_block_others() -> None:
    port = _free_port()
    process = _start(port, "time.sleep(60)")
    try:
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.sendall(b"GET /liv")
            assert _get(port, "/livez")[0] == 200
    finally:
        process.kill()
        process.communicate()


def test_a_default_port_in_use_is_done_without_and_a_chosen_one_is_an_error() -> None:
    program = """
        import socket
        from neuqi_serve.errors import PortInUseError
        from neuqi_serve.server.listen_address import ListenAddress
        from neuqi_serve.server.status.process import StatusProcess
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            address = ListenAddress("127.0.0.1", taken.getsockname()[1])
            with StatusProcess(address) as status:
                print(status.line)
            try:
                StatusProcess(address, required=True).__enter__()
            except PortInUseError as error:
                print(error.exit_code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert "is in use (--status-port chooses another)" in done.stdout, done.stderr
    assert done.stdout.splitlines()[1] == str(PortInUseError.exit_code)


def test_a_process_with_threads_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuqi_serve.server.status import process

    monkeypatch.setattr(process, "reason_not_to_fork", lambda: "the process has 2 threads")
    with StatusProcess(ListenAddress("127.0.0.1", _free_port())) as status:
        assert status.line == "no status port: the process has 2 threads"
    with StatusProcess(None) as status:
        assert status.line == ""
