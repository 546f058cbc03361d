"""`neuqi eval` as a command; the figures are tested in tests/quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.cli.main import main

PNG = b"\x89PNG\r\n"


def report(name: str, kld: float, nbytes: int) -> dict[str, Any]:
    estimate = {"value": kld, "standard_error": 0.1 * kld, "low": 0.8 * kld, "high": 1.2 * kld}
    keys = ("kld_mean", "kld_median", "kld_99", "top1_agreement", "perplexity", "perplexity_ratio")
    metrics = dict.fromkeys(keys, estimate)
    model = {"name": name, "packed": True, "bytes": nbytes, "bits_per_weight": 3.0, "average_bits": 3.5}
    return {
        "format": "neuqi-eval",
        "format_version": 1,
        "model": {**model, "dtype": "bfloat16"},
        "base": {"name": "base", "bytes": 100},
        "metrics": metrics,
        "noise_floor": metrics,
    }


def test_earlier_results_make_one_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    files = []
    for number, kld in enumerate((0.5, 0.1)):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(report(f"m{number}", kld, 1 << (20 + number))))
    assert main(["eval", "--plot", str(tmp_path / "p.png"), "--results", *map(str, files)]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    assert "plot written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "p.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "expected a MODEL"),
        (["--plot", "x.png"], 2, "expected a MODEL"),
        (["model"], 2, "--against"),
        (["model", "--against", "base"], 2, "--text"),
        (["model", "--against", "base", "--text", "t", "--json", "no/such/folder/x"], 2, "existing folder"),
        (["no-model", "--against", "no-base", "--text", "t"], 4, "no such folder"),
        (["--plot", "x.png", "--results", "none.json"], 2, "no such file"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    assert main(["eval", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
