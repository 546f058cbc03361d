import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("harness", "cpu_kernels", "moe", "gpu_moe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("gpu_moe")
    with pytest.raises(SystemExit, match="expected a CUDA GPU, torch sees none"):
        script.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
