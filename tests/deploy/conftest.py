from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes/overlays").iterdir())


Render = Callable[[str], tuple[dict[str, Any], ...]]


def _tool(name: str) -> str:
    """Path of a checking tool; without it a test is skipped, or fails with NEUQI_REQUIRE_TOOLS."""
    own = Path(sys.prefix) / "deploy/bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        message = f"{name} is not installed: make deployment-tools"
        if os.environ.get("NEUQI_REQUIRE_TOOLS"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def _run_tool(name: str, *arguments: str | Path, cwd: Path = DEPLOY) -> subprocess.CompletedProcess[str]:
    command = [_tool(name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)


@functools.cache
def _kustomized(name: str) -> tuple[dict[str, Any], ...]:
    done = _run_tool("kubectl", "kustomize", f"kubernetes/overlays/{name}")
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@pytest.fixture
def deploy() -> Path:
    return DEPLOY


@pytest.fixture
def overlays() -> list[str]:
    return OVERLAYS


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_tool(name, *arguments, cwd=deploy)``; what it printed is the message of a failed assertion."""
    return _run_tool


@pytest.fixture
def render() -> Render:
    """``render(overlay)`` → the objects of an overlay."""
    return _kustomized


@pytest.fixture(scope="session")
def crd_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) → JSON Schema of the custom resources."""
    bodies = [json.loads(path.read_text()) for path in sorted((DEPLOY / "crds").glob("*.json"))]
    return {(body["apiVersion"], body["kind"]): body["schema"] for body in bodies}
