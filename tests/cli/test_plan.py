from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from neuqi_serve.cli.main import main
from neuqi_serve.cli.plan import parse_size
from neuqi_serve.errors import UsageError


def test_a_plan_from_a_folder_is_printed(
    write_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(write_llama()), "--device", "rtx-3060"]) == 0
    out = capsys.readouterr().out
    assert "Run it:\n  neuqi serve" in out


def test_json_holds_the_command(write_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_llama())
    assert main(["plan", model, "--device", "rtx-3060", "--bits", "3", "--group-size", "32", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["chosen"] == {"bits": 3, "group_size": 32}
    assert body["command"][2] == model


def test_nothing_fits_is_exit_code_3_after_the_table(
    write_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(write_llama()), "--device", "rtx-3060", "--fit", "1MiB"]) == 3
    captured = capsys.readouterr()
    assert "bits/weight" in captured.out
    assert captured.err.startswith("error: expected ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "MODEL"),
        (["MODEL", "--bits", "5"], 2, "bits must be one of"),
        (["MODEL", "--fit", "eight"], 2, "8GiB"),
        (["MODEL", "--context", "0"], 2, "--context"),
        (["MODEL", "--device", "toaster"], 2, "rtx-4090"),
        (["MODEL", "--device", "l4", "--tensor-parallel", "7"], 2, "Sizes that do"),
        (["./no-such-folder", "--device", "l4"], 4, "no-such-folder"),
    ],
)
def test_wrong_uses(
    words: list[str],
    code: int,
    message: str,
    write_llama: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(write_llama())
    assert main(["plan", *(model if word == "MODEL" else word for word in words)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("1.5gib", 3 << 29),
        ("500MB", 500_000_000),
        ("42", 42),
        ("2 TiB", 2 << 40),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "8GiBB", "GiB", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        parse_size(text)
