"""Which backend a measured table prefers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neuqi_kernels.gpu import preference
from neuqi_kernels.spec import GemmSpec


def spec(group_size: int = 128, **changes: Any) -> GemmSpec:
    fields = {"n": 256, "k": 512, "bits": 3, "device_type": "cuda", "dtype": torch.float16}
    return GemmSpec(group_size=group_size, **(fields | changes))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU of sm_90 and the folder of its tables."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(preference, "_FOLDER", tmp_path)
    monkeypatch.delenv("NEUQI_GPU_TUNING", raising=False)
    preference._fastest.cache_clear()
    return tmp_path


def write(folder: Path, *runs: list[dict[str, Any]], architecture: str = "sm_90") -> None:
    layer = {"bits": 3, "group": 128, "n": 256, "k": 512, "tokens": 1, "plan": {}}
    body = {"architecture": architecture, "runs": [{"entries": [layer | e for e in run]} for run in runs]}
    (folder / "table.json").write_text(json.dumps(body))


def test_without_a_table_none_is_preferred(gpu: Path) -> None:
    assert preference.preferred_backend(spec()) is None


def test_the_entry_of_the_layer_decides(gpu: Path) -> None:
    write(gpu, [{"backend": "humming"}, {"n": 512}, {"group": 0, "backend": "humming"}])
    assert preference.preferred_backend(spec()) == "humming"
    assert preference.preferred_backend(spec(n=512)) == "triton"
    assert preference.preferred_backend(spec(-1)) == "humming"
    assert preference.preferred_backend(spec(512)) == "humming"
    assert preference.preferred_backend(spec(64)) is None
    assert preference.preferred_backend(spec(bits=2)) is None


def test_numbers_of_tokens_that_disagree_prefer_none(gpu: Path) -> None:
    write(gpu, [{"tokens": 1, "backend": "humming"}, {"tokens": 16}])
    assert preference.preferred_backend(spec()) is None


def test_later_entries_replace_earlier_ones(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gpu, [{}], [{"backend": "humming"}])
    assert preference.preferred_backend(spec()) == "humming"
    own = gpu / "own"
    own.mkdir()
    write(own, [{}])
    for named in (own, own / "table.json"):
        monkeypatch.setenv("NEUQI_GPU_TUNING", str(named))
        assert preference.preferred_backend(spec()) == "triton"
    monkeypatch.setenv("NEUQI_GPU_TUNING", str(own / "absent.json"))
    with pytest.raises(
        ValueError, match=r"table of measured GPU plans in .*absent\.json, got FileNotFoundError"
    ):
        preference.preferred_backend(spec())


def test_the_table_of_another_gpu_says_nothing(gpu: Path) -> None:
    write(gpu, [{"backend": "humming"}], architecture="sm_80")
    assert preference.preferred_backend(spec()) is None


def test_only_gpus_have_tables(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gpu, [{"backend": "humming"}])
    assert preference.preferred_backend(spec(device_type="cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert preference.preferred_backend(spec()) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"architecture": "sm_90", "runs": [{"entries": [{"bits": 3}]}]}']
)
def test_a_broken_table_is_an_error_that_names_it(gpu: Path, text: str) -> None:
    (gpu / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"measured GPU plans in .*table\.json, got .* Write it again"):
        preference.preferred_backend(spec())
