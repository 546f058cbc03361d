"""The endpoint plugin against a stand-in for vLLM's engine client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from neuqi_serve.server import endpoints
from neuqi_serve.server.listen_address import ListenAddress
from neuqi_serve.server.metrics import NeuqiMetrics


class _Client:
    """Answers ``collective_rpc`` from a list; an exception in it is raised, the last answer repeats."""

    errored = False

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[str] = []

    async def collective_rpc(self, method: str) -> Any:
        self.calls.append(method)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if answer == "never":
            await asyncio.sleep(600)
        return answer


def _reports(packed: int, resident: int) -> list[dict[str, Any]]:
    return [
        {
            "rank": 0,
            "source": "on-the-fly",
            "bits": 4,
            "group_size": 128,
            "scale_dtype": "float16",
            "bits_per_weight": 4.25,
            "weight_bytes": {"packed": packed, "scale_zero": 1, "unquantized": 2, "original": 3},
            "kernels": [{"backend": "reference", "bits": 4, "layers": 5}],
            "phases": {"read": 0.25},
            "rss_bytes": resident,
            "peak_rss_bytes": resident,
        }
    ]


def _publish(client: _Client, seconds: float = 0.2) -> CollectorRegistry:
    registry = CollectorRegistry()

    async def run() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await endpoints._publish(client, NeuqiMetrics(registry), "m", "api", [])

    asyncio.run(run())
    return registry


def test_what_was_loaded_is_asked_for_by_name_and_published() -> None:
    client = _Client(_reports(packed=77, resident=10))
    registry = _publish(client)
    assert client.calls == ["neuqi_load_report"]
    assert registry.get_sample_value("neuqi_weight_bytes", {"kind": "packed"}) == 77
    assert registry.get_sample_value("neuqi_process_resident_bytes", {"process": "engine"}) == 10
    assert (registry.get_sample_value("neuqi_process_resident_bytes", {"process": "api"}) or 0) > 1 << 20


def test_memory_is_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "REFRESH_SECONDS", 0.01)
    registry = _publish(_Client(_reports(77, resident=10), _reports(77, resident=20)))
    assert registry.get_sample_value("neuqi_process_resident_bytes", {"process": "engine"}) == 20


def test_a_slow_engine_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(endpoints, "REPORT_TIMEOUT_SECONDS", 0.01)
    registry = _publish(_Client("never", _reports(packed=77, resident=10)))
    assert registry.get_sample_value("neuqi_weight_bytes", {"kind": "packed"}) == 77


def test_a_worker_without_the_method_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoints, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(endpoints.logger, "propagate", True)
    client = _Client(NotImplementedError("no neuqi_load_report"))
    with caplog.at_level(logging.WARNING, logger=endpoints.logger.name):
        _publish(client)
    assert [record.getMessage() for record in caplog.records] == [
        "neuqi: no neuqi_* metrics of the weights: NotImplementedError: no neuqi_load_report"
    ]
    assert len(client.calls) == 1


def test_an_engine_that_stops_is_not_complained_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoints, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(endpoints.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=endpoints.logger.name):
        _publish(_Client(_reports(1, 1), RuntimeError("Server shutting down")))
    assert not caplog.records


class _Rank(_Client):
    """One of several API processes."""

    def __init__(self, rank: int) -> None:
        super().__init__([])
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(_api_process_rank=rank))


def _watch(args: Namespace, timeout: int | None, client: _Client | None = None) -> Any:
    server = SimpleNamespace(
        config=SimpleNamespace(timeout_graceful_shutdown=timeout, http_protocol_class=object), started=False
    )
    state = SimpleNamespace()

    async def run() -> None:
        plugin = endpoints.NeuqiEndpoints()
        await plugin.init_state(client, state, args)
        await asyncio.sleep(0.1)
        state.server = server
        await asyncio.sleep(0.1)
        server.started = True
        await asyncio.sleep(0.2)

    asyncio.run(run())
    return server


ARGS = Namespace(
    host="127.0.0.1",
    port=8123,
    uds=None,
    ssl_keyfile=None,
    served_model_name=["m"],
    model="x",
    api_server_count=None,
)


def test_the_server_gets_a_deadline_and_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    server = _watch(ARGS, timeout=None)
    assert server.config.timeout_graceful_shutdown == endpoints.GRACEFUL_SHUTDOWN_SECONDS
    assert capsys.readouterr().out.count("ready: http://127.0.0.1:8123/v1 serves 'm'") == 1


def test_a_deadline_that_is_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert _watch(ARGS, timeout=77).config.timeout_graceful_shutdown == 77


def test_of_several_api_processes_the_first_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(**{**vars(ARGS), "api_server_count": 2})
    for rank in (1, 0, 2):
        _watch(args, timeout=None, client=_Rank(rank))
    assert capsys.readouterr().out.count("ready:") == 1


def test_the_request_to_try_is_a_shell_command_with_valid_json() -> None:
    for address in (ListenAddress("0.0.0.0", 8000), ListenAddress("", 0, "/run/s")):
        words = shlex.split(endpoints.ready_message(address, "demo").splitlines()[-1])
        assert words[0] == "curl"
        assert json.loads(words[words.index("-d") + 1])["model"] == "demo"
    assert "--unix-socket" in words
