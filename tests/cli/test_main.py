from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from neuqi_serve import __version__
from neuqi_serve.cli.main import VERBS, build_parser, main

HEAVY = ("torch", "vllm", "transformers", "numpy")
LOADED = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    script = f"from neuqi_serve.cli.main import main\nassert main(['--help']) == 0\n{LOADED}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert re.search(rf"^    {verb}\s", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("verb", ["quantize", "inspect"])
def test_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    script = f"from neuqi_serve.cli.main import main\nassert main([{verb!r}, '--help']) == 0\n{LOADED}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"usage: neuqi {verb}" in done.stdout


def test_other_verbs_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real = importlib.import_module

    def record(name: str) -> object:
        imported.append(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", record)
    build_parser("inspect")
    assert imported == ["neuqi_serve.cli.inspect"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"neuqi {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["destroy"], ["quantize"], ["inspect", "x", "--sideways"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "error:" in captured.err
    assert captured.out == ""


def test_every_verb_has_a_line_of_help() -> None:
    for module, line in VERBS.values():
        assert module.startswith("neuqi_serve.cli.")
        assert line
