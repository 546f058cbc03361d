from __future__ import annotations

import json

import pytest

from neuqi_serve.cli.doctor import rendered, summary
from neuqi_serve.cli.main import main
from neuqi_serve.doctor import examine as examine_module
from neuqi_serve.doctor.finding import Finding


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_module, "check_imports", list)


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok   python")
    assert lines[-1].startswith("The server runs here")
    # Only a path may be longer than what is left of a line.
    assert [line for line in lines if len(line) > 80 and "/" not in line] == []


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", "0", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is True
    assert "torch" in body["versions"]
    assert {"subject", "level", "found", "remedy"} == set(body["findings"][0])


def test_an_error_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Finding("python", "error", "2.7", "Use another.")
    monkeypatch.setattr(examine_module, "check_python", lambda: bad)
    assert main(["doctor", "--port", "0"]) == 1
    out = capsys.readouterr().out
    assert "FAIL python         2.7" in out
    assert "→ Use another." in out
    assert "1 of these keep" in out


def test_a_port_that_is_no_number_is_a_usage_error() -> None:
    assert main(["doctor", "--port", "many"]) == 2


def test_long_findings_are_wrapped_and_colored_only_if_asked() -> None:
    finding = Finding("address 127.0.0.1:8000", "warning", "word " * 30, "Do this.")
    lines = rendered(finding, color=False).splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    assert rendered(finding, color=True).startswith("\x1b[33mWARN")


def test_the_summary() -> None:
    assert "worse" in summary({"ok": 1, "note": 0, "warning": 2, "error": 0})
