"""``neuqi cache``: list, remove, verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from neuqi_serve.cache.prepare import prepare
from neuqi_serve.cache.store import Cache
from neuqi_serve.cli.main import main
from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings


@pytest.fixture
def keys(write_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of entries with 2 and 3 bits in the cache of this process."""
    monkeypatch.setenv("NEUQI_CACHE_DIR", str(tmp_path / "cache"))
    model = write_llama()
    cache = Cache(tmp_path / "cache")
    return [
        prepare(model, QuantizationSettings(WeightSpec(bits, 32)), cache, lambda _: None).key
        for bits in (2, 3)
    ]


def _json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, object]:
    assert main(["cache", *words, "--json"]) == code
    body: dict[str, object] = json.loads(capsys.readouterr().out)
    return body


def test_an_empty_cache_has_no_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEUQI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NEUQI_CACHE_MAX_GIB", "1.5")
    body = _json(capsys, "ls")
    assert (body["entries"], body["bytes"], body["limit_bytes"]) == ([], 0, 3 << 29)
    assert main(["cache", "verify"]) == 0


def test_entries_are_listed(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    entries = {entry["key"]: entry for entry in _json(capsys, "ls")["entries"]}  # type: ignore[attr-defined]
    assert set(entries) == set(keys)
    assert [entries[key]["bits"] for key in keys] == [2, 3]
    assert {entry["model"] for entry in entries.values()} == {"tiny-llama"}
    assert main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert any(line.startswith(keys[0][:12]) and "2 bits g32" in line for line in lines)


def test_verify_names_the_damaged_entry(
    keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _json(capsys, "verify") == {"verified": 2, "damaged": {}}
    shard = tmp_path / "cache" / "entries" / keys[1] / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    body = _json(capsys, "verify", code=5)
    assert list(body["damaged"]) == [keys[1]]  # type: ignore[call-overload]
    assert _json(capsys, "verify", keys[0][:10])["verified"] == 1


def test_entries_are_removed_one_by_one_or_all(keys: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _json(capsys, "rm", keys[0][:8]) == {"removed": [keys[0]], "in_use": []}
    assert _json(capsys, "rm", "--all") == {"removed": [keys[1]], "in_use": []}
    assert _json(capsys, "ls")["entries"] == []


def test_an_entry_in_use_stays(keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Cache(tmp_path / "cache").hold(keys[0])
    assert lock is not None
    assert _json(capsys, "rm", "--all") == {"removed": [keys[1]], "in_use": [keys[0]]}
    assert _json(capsys, "rm", keys[0], code=2)["in_use"] == [keys[0]]
    lock.release()


@pytest.mark.parametrize("words", [["rm"], ["rm", "--all", "abcd"], ["rm", "0000"], ["verify", "0000"]])
def test_words_that_name_nothing_are_usage_errors(keys: list[str], words: list[str]) -> None:
    assert main(["cache", *words]) == 2
