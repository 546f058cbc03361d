"""Rules, dashboards and scalers: whether they are current, well-formed, and fire when they should."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

MONITORING = Path(__file__).parents[2] / "deploy/monitoring"
RunTool = Callable[..., subprocess.CompletedProcess[str]]


def test_rules_are_well_formed(run_tool: RunTool) -> None:
    done = run_tool("promtool", "check", "rules", "rules.yaml", cwd=MONITORING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_fire_when_they_should(run_tool: RunTool) -> None:
    done = run_tool("promtool", "test", "rules", "rules.test.yaml", cwd=MONITORING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((MONITORING / "rules.test.yaml").read_text())["tests"]
    fired = {
        case["alertname"] for one in tests for case in one.get("alert_rule_test", ()) if case["exp_alerts"]
    }
    assert fired == alerts


def test_the_configuration_of_prometheus_is_well_formed(run_tool: RunTool, tmp_path: Path) -> None:
    for name in ("prometheus.yml", "rules.yaml"):
        (tmp_path / name).write_text((MONITORING / name).read_text())
    (tmp_path / "metrics-key").write_text("key")
    done = run_tool("promtool", "check", "config", "prometheus.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_rendered_is_current() -> None:
    spec = importlib.util.spec_from_file_location("render", MONITORING / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, content in module.rendered().items():
        assert (MONITORING / name).read_text() == content, f"run python deploy/monitoring/render.py ({name})"
