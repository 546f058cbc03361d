from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_serve.py"


@pytest.mark.timeout(900)
def test_on_a_processor_it_runs_end_to_end(tmp_path):
    """bf16 and 3 bits through vLLM: two starts of an engine, the longest test of this folder."""
    pytest.importorskip("vllm")
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--device", "cpu", "--bits", "3"]
    command += ["--batches", "1", "3", "--repeats", "1", "--out", str(tmp_path), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_serve_cpu.json"]
    result = json.loads((tmp_path / "gpu_serve_cpu.json").read_text())
    assert result["notes"]["failed"] == {}
    # Seven linear layers of each of the two blocks, some of them fused; the output head and the embedding.
    layers = {entry["bits"]: entry["layers"] for entry in result["notes"]["kernels"]["3 bits, group 128"]}
    assert layers == {3: 2 * 4, 8: 2}
    found = {}
    for record in result["records"]:
        found.setdefault(record["metric"], {})[record["case"]["bits"], record["case"].get("batch")] = record
    metrics = {
        "decode_rate",
        "prefill_rate",
        "weight_bytes",
        "load_peak_bytes",
        "peak_bytes",
        "engine_seconds",
    }
    assert set(found) == metrics | {"read_seconds", "quantize_seconds", "repack_seconds"}
    assert set(found["decode_rate"]) == {(bits, batch) for bits in (16, 3) for batch in (1, 3)}
    assert all(record["value"] > 0 for records in found.values() for record in records.values())
    assert found["weight_bytes"][3, None]["ratio"] < 0.4
    assert found["prefill_rate"][3, 1]["reference"] == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_before_it_writes_a_checkpoint(load, tmp_path):
    with pytest.raises(SystemExit, match="expected a CUDA GPU, torch sees none"):
        load("gpu_serve").main(["--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def serve(load, monkeypatch, tmp_path):
    """The script with a process of a few lines in the place of vLLM."""
    module = load("gpu_serve")

    def use(body: str) -> None:
        script = tmp_path / "once.py"
        script.write_text("import json, sys, time\nbits = sys.argv[sys.argv.index('--bits') + 1]\n" + body)
        monkeypatch.setattr(module, "ONCE", script)

    module.use = use
    return module


RESULT = {
    "engine_seconds": 9.0,
    "phases": {"read": 2.0},
    "kernels": [{"backend": "triton", "bits": 4, "layers": 4}],
    "weight_bytes": 100,
    "load_peak_bytes": 150,
    "peak_bytes": 200,
    "rates": {"1": {"prefill_rate": 50.0, "decode_rate": 5.0}},
}


def test_a_configuration_that_fails_is_a_row_that_says_why(serve, tmp_path, capsys):
    serve.use(
        "if bits == '3':\n    print('loading')\n    raise MemoryError('no room')\n"
        f"open(sys.argv[-2], 'w').write(json.dumps({RESULT!r}))\n"
    )
    out = tmp_path / "out"
    options = ["--shape", "tiny", "--device", "cpu", "--bits", "3", "4", "--batches", "1"]
    assert serve.main([*options, "--out", str(out), "--folder", str(tmp_path)]) == 1
    result = json.loads((out / "gpu_serve_cpu.json").read_text())
    assert result["notes"]["failed"] == {"3 bits, group 128": "ended with 1: MemoryError: no room"}
    assert {record["case"]["bits"] for record in result["records"]} == {16, 4}
    ratios = {record["ratio"] for record in result["records"] if record["case"]["bits"] == 4}
    assert ratios == {1.0, None}
    assert "failed: 3 bits, group 128: ended with 1" in capsys.readouterr().err


def test_without_bf16_there_are_no_ratios(serve, tmp_path):
    serve.use(
        f"if bits == '16':\n    sys.exit('no room')\nopen(sys.argv[-2], 'w').write(json.dumps({RESULT!r}))\n"
    )
    options = ["--shape", "tiny", "--device", "cpu", "--bits", "2", "--out", str(tmp_path), "--batches", "1"]
    assert serve.main(options) == 1
    records = json.loads((tmp_path / "gpu_serve_cpu.json").read_text())["records"]
    assert records
    assert all(record["ratio"] is None and record["reference"] is None for record in records)


def test_a_configuration_that_hangs_is_ended(serve, tmp_path):
    serve.use("time.sleep(60)\n")
    options = serve.parsed(["--shape", "tiny", "--device", "cpu", "--minutes", "0.005"])
    reason = serve.run_one(serve.Configuration(4, 128), tmp_path, options)
    assert reason == "was not done after 0.005 minutes"
