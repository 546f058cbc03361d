from __future__ import annotations

import subprocess
import sys

import pytest

from neuqi_serve import errors
from neuqi_serve.cli.errors_to_exit import run_to_exit_code


def failing(error: BaseException) -> int:
    raise error


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_TRACEBACK", raising=False)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NeuqiError, 1),
        (errors.UsageError, 2),
        (errors.DoesNotFitError, 3),
        (errors.UnsupportedModelError, 4),
        (errors.IntegrityError, 5),
        (errors.PortInUseError, 6),
    ],
)
def test_error_is_one_message_and_its_code(
    error: type[errors.NeuqiError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_to_exit_code(lambda: failing(error("expected x, got y. Do z."))) == code
    captured = capsys.readouterr()
    assert captured.err == "error: expected x, got y. Do z.\n"
    assert captured.out == ""


def test_result_is_passed_on() -> None:
    assert run_to_exit_code(lambda: 7) == 7


def test_traceback_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEUQI_TRACEBACK", "1")
    assert run_to_exit_code(lambda: failing(errors.IntegrityError("damaged"))) == 5
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "failing" in err
    assert err.endswith("error: damaged\n")


def test_unusable_environment_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEUQI_TRACEBACK", "perhaps")
    assert run_to_exit_code(lambda: 0) == 2
    assert capsys.readouterr().err.startswith("error: NEUQI_TRACEBACK must be")


def test_operating_system_error_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(28, "No space left on device", "/data/out")
    assert run_to_exit_code(lambda: failing(error)) == 1
    assert capsys.readouterr().err == "error: /data/out: No space left on device\n"


def test_error_of_our_own_code_shows_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_to_exit_code(lambda: failing(KeyError("lost"))) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: internal error: KeyError: 'lost'.")
    assert "Traceback" not in err


def test_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_to_exit_code(lambda: failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_reader_that_goes_away_causes_no_complaint() -> None:
    script = (
        "import sys\nfrom neuqi_serve.cli.errors_to_exit import run_to_exit_code\n"
        "def write():\n    for _ in range(100000):\n        print('x' * 100)\n    return 0\n"
        "sys.exit(run_to_exit_code(write))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1
