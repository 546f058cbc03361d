import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "quantize"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = torch.get_num_threads()
    yield importlib.import_module("quantize")
    torch.set_num_threads(before)


def records(folder):
    return json.loads((folder / "quantize.json").read_text())["records"]


def test_parts_add_up_to_one_file(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "BITS", (2,))
    monkeypatch.setattr(benchmark, "DEMO_MODEL", tmp_path)
    benchmark.main(["--quick", "--part", "loss", "--results", str(tmp_path)])
    losses = records(tmp_path)
    assert {record["metric"] for record in losses} == {"loss_ratio_reference"}
    assert {record["case"]["weights"] for record in losses} == {"gaussian", "student-t4", "outliers"}
    assert {record["case"]["over groups"] for record in losses} == {"mean", "99.9 %", "max"}
    means = {
        preset: [
            record["value"]
            for record in losses
            if record["case"]["preset"] == preset and record["case"]["over groups"] == "mean"
        ]
        for preset in ("balanced", "minmax")
    }
    assert max(means["balanced"]) < 1.05 < min(means["minmax"])

    benchmark.main(["--quick", "--part", "speed", "--results", str(tmp_path)])
    both = records(tmp_path)
    assert [record for record in both if record["metric"] == "loss_ratio_reference"] == losses
    assert {record["metric"] for record in both} == {
        "loss_ratio_reference",
        "ns_per_weight_core",
        "speedup_reference",
    }
    benchmark.main(["--quick", "--part", "loss", "--results", str(tmp_path)])
    assert len(records(tmp_path)) == len(both)
