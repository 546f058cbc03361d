from __future__ import annotations

import json
from typing import Any

import pytest


def record(contender: str, bits: int, tokens: int, micros: float, group_size: int = 128) -> dict[str, Any]:
    case = {
        "contender": contender,
        "n": 256,
        "k": 512,
        "bits": bits,
        "group_size": group_size,
        "tokens": tokens,
    }
    return {"case": case, "metric": "time", "value": micros, "unit": "us", "reference": None, "ratio": None}


def entry(bits: int, tokens: int, group: int = 128, **more: str) -> dict[str, Any]:
    return {"bits": bits, "group": group, "n": 256, "k": 512, "tokens": tokens, "plan": {}, **more}


@pytest.fixture
def files(tmp_path):
    records = [
        *(record("neuqi", bits, tokens, 10.0) for bits in (3, 4) for tokens in (1, 16)),
        *(record("Humming", 3, tokens, 9.0) for tokens in (1, 16)),
        record("Humming", 4, 1, 9.9),
        record("neuqi", 3, 1, 10.0, -1),
        record("Humming", 3, 1, 5.0, -1),
    ]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"notes": {"architecture": "sm_90"}, "records": records}))
    entries = [
        entry(3, 1),
        entry(3, 16),
        entry(4, 1, backend="humming"),
        entry(4, 16),
        entry(3, 1, 0),
        entry(2, 1),
    ]
    table = tmp_path / "sm_90.json"
    table.write_text(json.dumps({"version": 1, "architecture": "sm_90", "runs": [{"entries": entries}]}))
    return table, result


def test_entries_are_marked_where_humming_was_faster(load, files, capsys):
    table, result = files
    load("gpu_prefer").main([str(table), "--result", str(result)])
    assert "3 of 4 measured entries are faster with Humming" in capsys.readouterr().out
    body = json.loads(table.read_text())
    assert body["version"] == 1
    marks = [entry.get("backend") for entry in body["runs"][0]["entries"]]
    assert marks == ["humming", "humming", None, None, "humming", None]


def test_what_is_marked_is_what_the_dispatch_reads(load, files, monkeypatch):
    torch = pytest.importorskip("torch")
    from neuqi_kernels.gpu import preference
    from neuqi_kernels.spec import GemmSpec

    table, result = files
    load("gpu_prefer").main([str(table), "--result", str(result)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(preference, "_FOLDER", table.parent / "none")
    monkeypatch.setenv("NEUQI_GPU_TUNING", str(table))
    preference._fastest.cache_clear()
    specs = {bits: GemmSpec(256, 512, bits, 128, "cuda", torch.float16) for bits in (2, 3, 4)}
    chosen = {bits: preference.preferred_backend(spec) for bits, spec in specs.items()}
    assert chosen == {2: "triton", 3: "humming", 4: "triton"}


def test_another_architecture_changes_nothing(load, files):
    table, result = files
    body = json.loads(table.read_text()) | {"architecture": "sm_80"}
    table.write_text(json.dumps(body))
    with pytest.raises(SystemExit, match="expected a result of sm_80, it is one of sm_90"):
        load("gpu_prefer").main([str(table), "--result", str(result)])
    assert json.loads(table.read_text()) == body
