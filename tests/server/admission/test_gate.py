"""The gate in front of a small application: who passes, who does not, and what they are told."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from neuqi_serve.errors import UsageError
from neuqi_serve.server.admission import exchange
from neuqi_serve.server.admission.gate import MAX_HEADER_BYTES, Gate
from neuqi_serve.server.admission.keys import make_key
from neuqi_serve.server.admission.routes import Access, access, route_path
from neuqi_serve.server.admission.settings import ATTRIBUTE, AdmissionSettings, collect_keys, is_private
from neuqi_serve.server.http_metrics import REJECTED, REQUESTS

starlette = pytest.importorskip("starlette", reason="needs starlette, which comes with vLLM")

KEYS = (make_key("user", "k-user"), make_key("ops", "k-ops", admin=True))
USER = [(b"authorization", b"Bearer k-user")]
OPS = [(b"x-api-key", b"k-ops")]
MAX_BYTES = 100


class _Server:
    """An application of a few routes behind a gate; ``ask`` is one request."""

    def __init__(self, *keys: Any, **settings: Any) -> None:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, PlainTextResponse
        from starlette.routing import Route

        async def echo(request: Any) -> Any:
            return JSONResponse({"bytes": len(await request.body())})

        async def full(request: Any) -> Any:
            return PlainTextResponse("full", 503)

        paths = (
            "/health",
            "/metrics",
            "/v1/models",
            "/v1/load_lora_adapter",
            "/tokenize",
            "/sleep",
            "/v1/x/{i}",
        )
        routes = [Route(path, echo, methods=["GET", "POST"]) for path in paths]
        app = Starlette(routes=[*routes, Route("/v1/completions", full, methods=["POST"])])
        values = AdmissionSettings(keys, max_request_bytes=MAX_BYTES, **settings)
        args = SimpleNamespace(
            allowed_origins=["https://a.example"],
            allow_credentials=False,
            allowed_methods=["*"],
            allowed_headers=["*"],
            **{ATTRIBUTE: values},
        )
        app.state.args = args
        app.add_middleware(Gate)
        self.app = app

    @property
    def gate(self) -> Gate:
        gate: Gate = self.app.state.neuqi_gate
        return gate

    def ask(
        self,
        path: str,
        headers: Any = (),
        body: tuple[bytes, ...] = (b"",),
        method: str = "GET",
        kind: str = "http",
        **scope: Any,
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        pieces = [{"type": "http.request", "body": p, "more_body": True} for p in body]
        pieces[-1]["more_body"] = False
        sent: list[Any] = []

        async def receive() -> Any:
            if pieces:
                return pieces.pop(0)
            return await asyncio.sleep(600)

        async def send(message: Any) -> None:
            sent.append(message)

        full = {"type": kind, "path": path, "method": method, "headers": list(headers), "query_string": b""}
        asyncio.run(self.app(full | scope, receive, send))
        if kind == "websocket":
            return sent[0]["code"], {}, sent[0]["reason"].encode()
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def _count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def server() -> _Server:
    return _Server(*KEYS)


@pytest.mark.parametrize(
    ("path", "nobody", "user", "ops"),
    [
        ("/health", 200, 200, 200),
        ("/v1/models", 401, 200, 200),
        ("/tokenize", 401, 200, 200),
        ("/metrics", 401, 403, 200),
        ("/sleep", 401, 403, 200),
        ("/v1/load_lora_adapter", 401, 403, 200),
        ("/v1/load_lora_adapter/", 401, 307, 307),
        ("/nothing", 401, 404, 404),
        ("/v1/nothing", 401, 404, 404),
    ],
)
def test_every_route_needs_a_key(server: _Server, path: str, nobody: int, user: int, ops: int) -> None:
    assert server.ask(path)[0] == nobody
    wrong = [(b"authorization", b"Bearer k-nobody")]
    assert server.ask(path, wrong)[0] == nobody
    assert server.ask(path, USER)[0] == user
    assert server.ask(path, OPS)[0] == ops


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"k-user"),
        (b"authorization", b"Basic k-user"),
        (b"authorization", b"Bearer "),
        (b"authorization", b"Bearer k-user k-user"),
        (b"authorization", b"Bearer \xff\xfe"),
        (b"x-api-key", b""),
    ],
)
def test_half_a_key_is_none(server: _Server, header: tuple[bytes, bytes]) -> None:
    assert server.ask("/v1/models", [header])[0] == 401


def test_a_refusal_is_an_error_of_the_api(server: _Server) -> None:
    status, headers, body = server.ask("/v1/models")
    assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "missing_api_key",
        None,
    )
    _, _, body = server.ask("/v1/messages", method="POST")
    assert json.loads(body)["type"] == "error"
    assert json.loads(body)["error"]["type"] == "authentication_error"


def test_a_prefix_of_a_proxy_changes_nothing(server: _Server) -> None:
    assert server.ask("/llm/metrics", USER, root_path="/llm")[0] == 403
    assert server.ask("/llm/v1/models", USER, root_path="/llm")[0] == 200
    assert server.ask("/llm/health", root_path="/llm")[0] == 200
    assert route_path({"path": "/llmore/v1", "root_path": "/llm"}) == "/llmore/v1"


def test_without_keys_others_may_not_change_the_server() -> None:
    private, public = _Server(), _Server(private=False)
    assert [private.ask(path)[0] for path in ("/v1/models", "/metrics", "/sleep")] == [200, 200, 200]
    assert [public.ask(path)[0] for path in ("/v1/models", "/metrics", "/sleep")] == [200, 200, 403]


def test_a_websocket_needs_a_key_too(server: _Server) -> None:
    code, _, reason = server.ask("/v1/realtime", kind="websocket")
    assert code == 1008
    assert b"API key" in reason


def test_a_preflight_passes_only_where_other_origins_may_ask() -> None:
    preflight = [(b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")]
    closed, opened = _Server(*KEYS), _Server(*KEYS, cross_origin=True)
    assert closed.ask("/v1/models", preflight, method="OPTIONS")[0] == 401
    assert opened.ask("/v1/models", preflight, method="OPTIONS")[0] == 405
    assert opened.ask("/v1/models", [preflight[0]], method="OPTIONS")[0] == 401
    # A page sees why it was refused only with this header.
    status, headers, _ = opened.ask("/v1/models", [preflight[0]])
    assert (status, headers[b"access-control-allow-origin"]) == (401, b"https://a.example")


def test_requests_above_the_limit_are_told_when_to_come_back() -> None:
    server = _Server(*KEYS, requests_per_minute=2)
    assert [server.ask("/v1/models", USER)[0] for _ in range(3)] == [200, 200, 429]
    status, headers, body = server.ask("/v1/models", USER)
    assert 1 <= int(headers[b"retry-after"]) <= 30
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    # Whoever looks after the server is not locked out, and a probe costs nothing.
    assert {server.ask("/v1/models", OPS)[0] for _ in range(5)} == {200}
    assert {server.ask("/health", USER)[0] for _ in range(5)} == {200}
    assert status == 429


def test_a_body_is_bounded_whether_announced_or_not(server: _Server) -> None:
    whole = b"x" * MAX_BYTES
    assert json.loads(server.ask("/tokenize", USER, (whole,), "POST")[2]) == {"bytes": MAX_BYTES}
    halves = (whole[:50], whole[50:], b"")
    assert json.loads(server.ask("/tokenize", USER, halves, "POST")[2]) == {"bytes": MAX_BYTES}
    status, headers, body = server.ask("/tokenize", USER, (whole, b"x"), "POST")
    assert (status, headers[b"connection"]) == (413, b"close")
    assert json.loads(body)["error"]["code"] == "request_too_large"
    announced = [*USER, (b"content-length", str(MAX_BYTES + 1).encode())]
    assert server.ask("/tokenize", announced, (b"",), "POST")[0] == 413


def test_a_body_that_does_not_arrive_is_not_waited_for(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.05)

    async def never() -> Any:
        await asyncio.sleep(600)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/tokenize", "method": "POST", "headers": USER, "query_string": b""}
    asyncio.run(server.app(scope, never, send))
    assert sent[0]["status"] == 408


def test_headers_are_bounded(server: _Server) -> None:
    long = [*USER, (b"x-long", b"a" * MAX_HEADER_BYTES)]
    assert server.ask("/v1/models", long)[0] == 431


def test_a_full_queue_says_when_to_come_back(server: _Server) -> None:
    before = _count(REJECTED, reason="queue_full")
    status, headers, _ = server.ask("/v1/completions", USER, method="POST")
    assert status == 503
    assert int(headers[b"retry-after"]) > 0
    assert _count(REJECTED, reason="queue_full") == before + 1


def test_a_server_that_stops_refuses_all_but_the_last_scrape(server: _Server) -> None:
    server.ask("/health")
    server.gate.draining = True
    assert server.ask("/health")[0] == 503
    status, headers, body = server.ask("/v1/models", USER)
    assert (status, json.loads(body)["error"]["code"]) == (503, "server_draining")
    assert headers[b"connection"] == b"close"
    assert server.ask("/metrics", OPS)[0] == 200
    server.gate.dead = True
    assert json.loads(server.ask("/v1/models", USER)[2])["error"]["code"] == "engine_dead"


def test_requests_are_counted_by_template_and_never_by_what_a_client_writes(server: _Server) -> None:
    names = {"route": "/v1/models", "code": "200"}
    before = _count(REQUESTS, **names), _count(REQUESTS, route="other", code="404")
    server.ask("/v1/models", USER)
    server.ask("/v1/whatever-4711", USER)
    server.ask("/v1/x/4711", USER)
    assert _count(REQUESTS, **names) == before[0] + 1
    assert _count(REQUESTS, route="other", code="404") == before[1] + 1
    labels = {s.labels["route"] for m in REGISTRY.collect() for s in m.samples if s.name == REQUESTS}
    assert not [label for label in labels if "4711" in label]
    assert _count(REJECTED, reason="no_key") > 0


def test_a_gate_without_settings_lets_nothing_start() -> None:
    server = _Server()
    delattr(server.app.state.args, ATTRIBUTE)
    with pytest.raises(UsageError, match="settings"):
        server.ask("/health")


def test_unknown_routes_need_an_administrator() -> None:
    assert access("/whatever_vllm_adds") is Access.ADMIN
    assert access("/v1/whatever_openai_adds") is Access.USER
    assert access("/") is Access.ADMIN


@pytest.mark.parametrize(
    ("host", "private"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), (None, False), ("", False)],
)
def test_private_addresses(host: str | None, private: bool) -> None:
    assert is_private(host, None) is private
    assert is_private(host, "/run/socket")


def test_keys_come_from_options_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k0")
    monkeypatch.setenv("NEUQI_API_KEYS", "a:k1,b:k2 requests-per-minute=3\nc:k3")
    monkeypatch.setenv("NEUQI_ADMIN_KEYS", "d:k4")
    keys = collect_keys(None)
    assert [(key.name, key.admin) for key in keys] == [
        ("VLLM_API_KEY", False),
        ("a", False),
        ("b", False),
        ("c", False),
        ("d", True),
    ]
    # As in vLLM the option replaces the variable.
    assert [key.name for key in collect_keys(["x", "y"])[:2]] == ["--api-key 1", "--api-key 2"]
    assert make_key("VLLM_API_KEY", "k0") not in collect_keys(["x"])
