import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from neuqi_kernels.cpu import library

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason=f"the C++ library: {library.load()}")


@pytest.fixture
def cpu_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "cpu_kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = torch.get_num_threads()
    yield importlib.import_module("cpu_kernels")
    torch.set_num_threads(before)


def test_quick_run_measures_decode_and_prefill(cpu_kernels, tmp_path, capsys):
    cpu_kernels.main(
        ["--quick", "--bits", "3", "--group-sizes", "64", "--threads", "1", "--out", str(tmp_path)]
    )
    assert "cpu_native: runs" in capsys.readouterr().out
    records = json.loads((tmp_path / "cpu_kernels.json").read_text())["records"]
    by_metric = {}
    for record in records:
        by_metric.setdefault(record["metric"], []).append(record)
    decode = {"read_bandwidth", "packed_bandwidth", "read_bandwidth_ratio", "time", "repack_rate_core"}
    assert set(by_metric) == {*decode, "prefill_rate", "prefill_ratio_bf16"}
    assert [record["case"]["tokens"] for record in by_metric["read_bandwidth_ratio"]] == [1, 4, 8]
    assert all(record["value"] > 0 for record in records)
    assert by_metric["time"][0]["ratio"] == 1.0
    assert {record["reference"] for record in by_metric["prefill_ratio_bf16"]} == {"torch bf16 linear"}


def test_a_wrong_result_is_never_timed(cpu_kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="expected an error of at most"):
        cpu_kernels.main(["--quick", "--bits", "2", "--threads", "1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
