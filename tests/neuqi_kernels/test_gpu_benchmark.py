"""The GPU benchmark refuses a machine without a GPU, and runs on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = start("--quick", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "expected a CUDA GPU, torch sees none" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_on_a_gpu_it_records_every_case(tmp_path: Path) -> None:
    done = start("--quick", "--bits", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "gpu_kernels.json").read_text())["records"]
    records = [record for record in records if record["case"]["contender"] == "neuqi"]
    assert {record["case"]["tokens"] for record in records} == {1, 64}
    metrics = {"time", "time_p10", "time_p90", "packed_bandwidth", "error"}
    assert {record["metric"] for record in records} == metrics
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
