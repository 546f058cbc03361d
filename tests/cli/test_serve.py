"""The verb ``serve``: words go through untouched, and a wrong start ends quickly with its code."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuqi_serve.cli.main import build_parser, main


@pytest.fixture(autouse=True)
def _environment_of_its_own() -> Iterator[None]:
    """Undo what a start does to the environment of its process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--bits", "3"],
        ["--bits", "3", "demo"],
        ["--help"],
        ["demo", "-q", "x", "--group-size", "-1", "--", "-x"],
        ["demo", "--compilation-config.mode", "3", "-O2"],
        [],
    ],
)
def test_every_word_reaches_the_server_in_its_order(words: list[str]) -> None:
    args = build_parser("serve").parse_args(["serve", *words])
    assert isinstance(args, argparse.Namespace)
    assert args.arguments == words


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["demo", "--bits", "5"], 2, "bits must be one of"),
        (["demo", "--group-size", "100"], 2, "group size must be one of"),
        (["demo", "--host", "192.0.2.1"], 2, "expected an address to listen on"),
        (["/no/such/folder"], 4, "no such folder"),
    ],
)
def test_a_wrong_start_ends_with_its_code_and_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words, "--port", "0"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 4
    assert "config.json" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_vllm() -> None:
    program = (
        "import sys; from neuqi_serve.cli.main import main; code = main(['serve', '--help']); "
        "print(code, 'torch' in sys.modules, 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 False False"
    assert "--group-size" in done.stdout
