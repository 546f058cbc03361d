"""Write what is made from other files: the dashboards from the panels below, prometheusrule.yaml from rules.yaml.

``python deploy/monitoring/render.py`` writes them; a test holds them to what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RULES = "rules.yaml"
WINDOW = "$__rate_interval"


def quantile(share: float, metric: str) -> str:
    """Quantile of a histogram, per model."""
    return f'histogram_quantile({share}, sum by (model_name, le) (rate({metric}_bucket{{job="neuqi-serve"}}[{WINDOW}])))'


def latency(title: str, metric: str) -> dict[str, Any]:
    """p50, p95 and p99 of a latency."""
    queries = {
        f"p{100 * share:.0f} {{{{model_name}}}}": quantile(share, metric) for share in (0.5, 0.95, 0.99)
    }
    return {"title": title, "unit": "s", "queries": queries}


def rate(metric: str, by: str, selector: str = "") -> str:
    """Increase a second of a counter."""
    inside = ", ".join(filter(None, ['job="neuqi-serve"', selector]))
    return f"sum by ({by}) (rate({metric}{{{inside}}}[{WINDOW}]))"


def here(metric: str, selector: str = "") -> str:
    """A gauge of the servers."""
    return metric + "{" + ", ".join(filter(None, ['job="neuqi-serve"', selector])) + "}"


def status(metric: str) -> str:
    """A gauge of the status port."""
    return metric + '{job="neuqi-serve-status"}'


DASHBOARDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "service": (
        "NeUQI serve: service",
        [
            {"title": "Ready servers", "kind": "stat", "queries": {"": f'count({status("neuqi_load_phase")[:-1]}, phase="ready"}})'}},
            {"title": "Slow first tokens (over 2.5 s)", "unit": "percentunit", "kind": "stat", "queries": {"{{model_name}}": "neuqi:slow_first_tokens:ratio5m"}},
            {"title": "Slow tokens (over 0.1 s)", "unit": "percentunit", "kind": "stat", "queries": {"{{model_name}}": "neuqi:slow_tokens:ratio5m"}},
            {"title": "Failed requests", "unit": "percentunit", "kind": "stat", "queries": {"": "neuqi:http_errors:ratio5m"}},
            latency("Time to first token", "vllm:time_to_first_token_seconds"),
            latency("Time between tokens", "vllm:inter_token_latency_seconds"),
            latency("Whole request", "vllm:e2e_request_latency_seconds"),
            {"title": "Tokens", "unit": "short", "queries": {"generated {{model_name}}": rate("vllm:generation_tokens_total", "model_name"), "prompt {{model_name}}": rate("vllm:prompt_tokens_total", "model_name")}},
            {"title": "Finished requests", "unit": "reqps", "queries": {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason")}},
            {"title": "Answers by status", "unit": "reqps", "queries": {"{{code}}": rate("neuqi_http_requests_total", "code")}},
        ],
    ),
    "saturation": (
        "NeUQI serve: saturation",
        [
            {"title": "Requests", "queries": {"running {{instance}}": here("vllm:num_requests_running"), "waiting {{instance}}": here("vllm:num_requests_waiting")}},
            {"title": "KV cache in use", "unit": "percentunit", "queries": {"{{instance}}": here("vllm:kv_cache_usage_perc")}},
            latency("Time in the queue", "vllm:request_queue_time_seconds"),
            {"title": "Preemptions", "unit": "ops", "queries": {"{{instance}}": rate("vllm:num_preemptions_total", "instance")}},
            {"title": "Refused requests", "unit": "reqps", "queries": {"{{reason}}": rate("neuqi_requests_rejected_total", "reason")}},
            {"title": "Refused for a full queue, by vLLM", "unit": "reqps", "queries": {"{{reason}}": rate("vllm:admission_rejections_total", "reason")}},
            {"title": "Prefix cache: share of tokens found", "unit": "percentunit", "queries": {"{{model_name}}": f'{rate("vllm:prefix_cache_hits_total", "model_name")} / {rate("vllm:prefix_cache_queries_total", "model_name")}'}},
            {"title": "Memory of the processes", "unit": "bytes", "queries": {"{{instance}} {{process}}": here("neuqi_process_resident_bytes")}},
        ],
    ),
    "start": (
        "NeUQI serve: start and quantization",
        [
            {"title": "Phase", "kind": "table", "queries": {"{{instance}} {{phase}}": status("neuqi_load_phase")}},
            {"title": "Progress of the phase", "unit": "percentunit", "queries": {"{{instance}}": status("neuqi_load_progress_ratio")}},
            {"title": "Seconds of each phase", "unit": "s", "kind": "bargauge", "queries": {"{{instance}} {{phase}}": status("neuqi_load_phase_duration_seconds")}},
            {"title": "Peak memory", "unit": "bytes", "queries": {"{{instance}} {{process}}": here("neuqi_process_peak_resident_bytes")}},
            {"title": "Starts", "unit": "dateTimeAsIso", "kind": "stat", "queries": {"{{instance}}": f'1000 * {here("process_start_time_seconds")}'}},
            {"title": "Versions", "kind": "table", "queries": {"": here("neuqi_build_info")}},
        ],
    ),
    "quality": (
        "NeUQI serve: weights",
        [
            {"title": "Model", "kind": "table", "queries": {"": here("neuqi_model_info")}},
            {"title": "Bits per weight", "kind": "stat", "queries": {"{{instance}}": here("neuqi_bits_per_weight")}},
            {"title": "Bytes of weights", "unit": "bytes", "kind": "bargauge", "queries": {"{{kind}}": "max by (kind) (" + here("neuqi_weight_bytes") + ")"}},
            {"title": "Smaller by", "unit": "bytes", "kind": "stat", "queries": {"": "max(" + here("neuqi_weight_bytes", 'kind="original"') + ") - sum(max by (kind) (" + here("neuqi_weight_bytes", 'kind!="original"') + "))"}},
            {"title": "Layers by kernel", "kind": "table", "queries": {"{{backend}} {{bits}}": here("neuqi_kernel_info")}},
        ],
    ),
}  # fmt: skip


def panel(number: int, described: dict[str, Any]) -> dict[str, Any]:
    """One panel of a dashboard, three in a row."""
    kind = described.get("kind", "timeseries")
    instant = kind in ("stat", "table", "bargauge")
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "expr": expression,
            "legendFormat": legend or "__auto",
            "instant": instant,
            "range": not instant,
            **({"format": "table"} if kind == "table" else {}),
        }
        for i, (legend, expression) in enumerate(described["queries"].items())
    ]
    return {
        "id": number + 1,
        "type": kind,
        "title": described["title"],
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": 8 * (number % 3), "y": 8 * (number // 3), "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": described.get("unit", "short"), "min": 0}, "overrides": []},
        "options": {},
        "targets": targets,
    }


def dashboard(uid: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    """A whole dashboard, as Grafana imports it."""
    return {
        "uid": f"neuqi-{uid}",
        "title": title,
        "tags": ["neuqi-serve", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
            ]
        },
        "panels": [panel(number, described) for number, described in enumerate(panels)],
    }


def rendered() -> dict[str, str]:
    """Path below this folder → content, of everything that is made here."""
    made = {
        f"dashboards/{uid}.json": json.dumps(dashboard(uid, title, panels), indent=1) + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }
    groups = (HERE / RULES).read_text().partition("groups:\n")[2]
    indented = "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))
    made["prometheusrule.yaml"] = (
        "# Written by render.py from rules.yaml.\n"
        "apiVersion: monitoring.coreos.com/v1\n"
        "kind: PrometheusRule\n"
        "metadata:\n"
        "  name: neuqi-serve\n"
        "spec:\n"
        "  groups:\n" + indented
    )
    return made


def main() -> None:
    """Write the files."""
    for name, content in rendered().items():
        (HERE / name).write_text(content)
        print(name)


if __name__ == "__main__":
    main()
