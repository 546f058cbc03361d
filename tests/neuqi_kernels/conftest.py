"""The processes in which Triton works for the tests: one interpreting pool, one compiling pool per Triton version."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = runpy.run_path(str(Path(__file__).resolve().with_name("gpu_worker.py")))
VERSIONS = WORKER["triton_versions"]() or ["none"]


def started(
    request: pytest.FixtureRequest, fixture: str, scratch: Path, script: str, version: str, **environment: str
) -> Iterator[Any]:
    """A pool that already works on the parameter ``case`` of every selected test that uses the fixture."""
    if version == "none":
        pytest.skip("Triton is not installed: it brings the interpreter and the compiler")
    pool = WORKER["Pool"](script, scratch, version, **environment)
    parameters = [
        item.callspec.params
        for item in request.session.items
        if fixture in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    ]
    pool.prefetch(
        found["case"] for found in parameters if "case" in found and found.get(fixture, version) == version
    )
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def interpreter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Triton's interpreter, of the installed version."""
    scratch = tmp_path_factory.mktemp("interpreter")
    yield from started(
        request, "interpreter", scratch, "gpu_interpreter.py", VERSIONS[0], TRITON_INTERPRET="1"
    )


@pytest.fixture(scope="session", params=VERSIONS)
def every_interpreter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Triton's interpreter, of every version that is there."""
    scratch = tmp_path_factory.mktemp("interpreters")
    yield from started(
        request, "every_interpreter", scratch, "gpu_interpreter.py", request.param, TRITON_INTERPRET="1"
    )


@pytest.fixture(scope="session", params=VERSIONS)
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Triton's compiler, of every version that is there."""
    scratch = tmp_path_factory.mktemp("compiler")
    yield from started(request, "compiler", scratch, "gpu_compile.py", request.param, TRITON_INTERPRET="0")
