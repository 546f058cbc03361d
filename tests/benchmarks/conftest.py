"""The scripts of benchmarks/ import each other by name: their folder is on the path while a test runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """``load(name)``: a module of benchmarks/, new for this test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = {path.stem for path in BENCHMARKS.iterdir() if path.suffix == ".py" or path.is_dir()}

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]

    forget()
    yield importlib.import_module
    forget()
