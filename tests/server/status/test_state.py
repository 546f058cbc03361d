"""What the status port answers, by the messages so far and the time."""

from __future__ import annotations

from typing import Any

import pytest

from neuqi_serve.server.status import state as module
from neuqi_serve.server.status.answering import response
from neuqi_serve.server.status.state import ServerState


class _Start:
    """A state, and the clock that it reads."""

    def __init__(self) -> None:
        self.now = 100.0
        self.state = ServerState(clock=lambda: self.now)

    def tell(self, kind: str, after: float = 0.0, **fields: Any) -> None:
        self.now += after
        self.state.update({"kind": kind, **fields})

    def serve(self, count: int = 1, state: str = "ready") -> None:
        for rank in range(count):
            self.tell("serving", rank=rank, count=count, state=state)


@pytest.fixture
def start() -> _Start:
    return _Start()


def _progress(layer: int, pid: int = 1, total: int = 1000) -> dict[str, Any]:
    return {
        "phase": "quantize",
        "layer": layer,
        "layers": 10,
        "bytes": layer * 100,
        "total_bytes": total,
        "pid": pid,
    }


def test_a_start_is_alive_and_not_ready(start: _Start) -> None:
    assert start.state.livez().code == 200
    assert start.state.readyz().code == 503
    assert start.state.startupz().body["phase"] == "start"


def test_progress_has_layers_bytes_and_the_time_left(start: _Start) -> None:
    start.tell("begin", phase="quantize")
    start.tell("progress", 4.0, **_progress(2))
    body = start.state.startupz().body
    assert (body["layer"], body["layers"], body["bytes"], body["total_bytes"]) == (2, 10, 200, 1000)
    assert body["eta_seconds"] == 16.0
    assert start.state.progress_ratio() == 0.2
    assert 'neuqi_load_phase{phase="quantize"} 1' in start.state.metrics()
    assert "neuqi_load_progress_ratio 0.2000" in start.state.metrics()


def test_of_several_ranks_the_slowest_counts(start: _Start) -> None:
    for pid, layer in ((1, 9), (2, 3), (3, 10)):
        start.tell("progress", **_progress(layer, pid))
    assert start.state.startupz().body["layer"] == 3


def test_of_two_phases_at_once_the_one_that_tells_is_shown(start: _Start) -> None:
    start.tell("begin", phase="quantize")
    start.tell("begin", phase="import")
    assert start.state.phase == "import"
    start.tell("progress", **_progress(2))
    assert start.state.phase == "quantize"
    start.tell("end", phase="quantize", seconds=7.5)
    assert start.state.phase == "import"
    assert start.state.startupz().body["phases"]["quantize"] == 7.5


def test_ready_is_when_every_api_process_serves(start: _Start) -> None:
    start.tell("begin", phase="engine")
    start.tell("serving", 3.0, rank=1, count=2, state="ready")
    assert start.state.readyz().code == 503
    start.tell("serving", 1.0, rank=0, count=2, state="ready")
    assert start.state.readyz().code == 200
    body = start.state.startupz().body
    assert (body["phase"], body["done"], body["phases"]) == ("ready", True, {"engine": 4.0})
    assert start.state.progress_ratio() == 1.0


def test_silence_is_first_not_ready_and_then_not_alive(start: _Start) -> None:
    start.serve()
    start.now += module.NOT_READY_AFTER_SECONDS + 1
    assert start.state.readyz().code == 503
    assert start.state.livez().code == 200
    start.now += module.NOT_ALIVE_AFTER_SECONDS
    assert start.state.livez().code == 503
    start.serve()
    assert start.state.readyz().code == start.state.livez().code == 200


def test_one_silent_process_of_two_is_enough(start: _Start) -> None:
    start.serve(count=2)
    start.now += module.NOT_READY_AFTER_SECONDS + 1
    start.tell("serving", rank=0, count=2, state="ready")
    assert start.state.readyz().code == 503


def test_a_server_that_drains_lives_and_is_not_ready(start: _Start) -> None:
    start.serve()
    start.serve(state="draining")
    assert start.state.livez().code == 200
    assert start.state.readyz().body == {"ready": False, "reason": "stopping"}
    assert start.state.startupz().code == 200


def test_a_dead_engine_is_neither(start: _Start) -> None:
    start.serve()
    start.serve(state="dead")
    assert [start.state.livez().code, start.state.readyz().code, start.state.startupz().code] == [503] * 3


def test_an_error_is_told(start: _Start) -> None:
    start.tell("failed", message="no room")
    assert start.state.startupz().code == 503
    assert start.state.startupz().body["last_error"] == "no room"
    assert start.state.livez().body["reason"] == "no room"


def test_a_load_that_does_not_move_is_stalled_unless_it_downloads(start: _Start) -> None:
    start.tell("begin", phase="quantize")
    start.now += module.STALLED_AFTER_SECONDS + 1
    assert start.state.startupz().code == 503
    assert start.state.livez().code == 200
    start.tell("progress", **_progress(1))
    assert start.state.startupz().code == 200
    start.tell("begin", phase="download")
    start.tell("end", phase="quantize", seconds=1)
    start.now += module.STALLED_AFTER_SECONDS * 9
    assert start.state.startupz().code == 200


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"kind": "progress"},
        {"kind": "serving", "rank": "x"},
        {"kind": "end", "phase": "a"},
        {"kind": "unknown"},
    ],
)
def test_a_message_of_another_form_changes_nothing(start: _Start, message: dict[str, Any]) -> None:
    start.state.update(message)
    assert start.state.livez().code == 200
    assert start.state.phase in ("start", "a")


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", 200),
        (b"GET /readyz?x=1 HTTP/1.0\r\n\r\n", 503),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET /update HTTP/1.1\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /livez HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01 \xff\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
    ],
)
def test_http_requests(start: _Start, head: bytes, code: int) -> None:
    answer = response(start.state, head)
    assert answer.startswith(f"HTTP/1.1 {code} ".encode())
    headers, body = answer.split(b"\r\n\r\n", 1)
    assert f"Content-Length: {len(body)}".encode() in headers


def test_head_has_the_headers_only(start: _Start) -> None:
    full, head = (response(start.state, m + b" /livez HTTP/1.1\r\n\r\n") for m in (b"GET", b"HEAD"))
    assert full.startswith(head)
    assert head.endswith(b"\r\n\r\n")
