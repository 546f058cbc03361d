"""`neuqi eval` from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.cli.main import main
from neuqi_serve.format.reader import open_checkpoint


def test_a_packed_folder_is_measured_and_gets_its_card(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out.json"
    shutil.copytree(made.packed, folder)
    command = ["eval", str(folder), "--against", str(made.base), "--text", str(made.text), "--context", "32"]
    command += ["--tokens", "160", "--device", "cpu"]
    assert main([*command, "--json", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("model against base\n")
    body = json.loads(out.read_text())
    assert json.loads((folder / "neuqi_quality.json").read_text()) == body
    open_checkpoint(folder).verify()

    shutil.rmtree(folder)
    shutil.copytree(made.packed, folder)
    assert main([*command, "--json", "-", "--no-card", "--no-noise-floor"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["noise_floor"] is None
    assert printed["metrics"] == body["metrics"]
    assert not (folder / "README.md").exists()
