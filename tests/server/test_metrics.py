"""Our gauges: values of several ranks put together, and a registry that survives a second engine."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from neuqi_serve.server.metrics import NeuqiMetrics, summarize_reports
from neuqi_serve.server.process_memory import ProcessMemory, own_memory


def _report(rank: int, **changes: Any) -> dict[str, Any]:
    report = {
        "rank": rank,
        "source": "packed",
        "bits": 3,
        "group_size": 64,
        "scale_dtype": "float16",
        "bits_per_weight": 3.5,
        "weight_bytes": {"packed": 300, "scale_zero": 50, "unquantized": 7, "original": 1607},
        "kernels": [
            {"backend": "cpu_blocks", "bits": 3, "layers": 2},
            {"backend": "cpu_blocks", "bits": 8, "layers": 1},
        ],
        "phases": {"read": 1.0 + rank, "quantize": 0.5},
        "rss_bytes": 1000 + rank,
        "peak_rss_bytes": 2000 + rank,
    }
    return report | changes


def _samples(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_one_worker_is_published_as_it_reports() -> None:
    registry = CollectorRegistry()
    NeuqiMetrics(registry).set_load("m", summarize_reports([_report(0)]))
    samples = _samples(registry)
    model = 'bits="3",group_size="64",model_name="m",scale_dtype="float16",source="packed"'
    assert samples[f"neuqi_model_info{{{model}}}"] == 1
    assert samples['neuqi_weight_bytes{kind="packed"}'] == 300
    assert samples['neuqi_weight_bytes{kind="original"}'] == 1607
    assert samples["neuqi_bits_per_weight"] == 3.5
    assert samples['neuqi_kernel_info{backend="cpu_blocks",bits="3"}'] == 2
    assert samples['neuqi_kernel_info{backend="cpu_blocks",bits="8"}'] == 1
    assert samples['neuqi_load_phase_duration_seconds{phase="read"}'] == 1.0
    assert samples['neuqi_process_resident_bytes{process="engine"}'] == 1000
    assert samples['neuqi_process_peak_resident_bytes{process="engine"}'] == 2000


def test_bytes_and_layers_of_ranks_are_summed_and_phases_are_the_slowest() -> None:
    summary = summarize_reports([_report(0), _report(1)])
    assert summary.weight_bytes == {"packed": 600, "scale_zero": 100, "unquantized": 14, "original": 3214}
    assert summary.kernels == {("cpu_blocks", "3"): 4, ("cpu_blocks", "8"): 2}
    assert summary.phases == {"read": 2.0, "quantize": 0.5}
    assert summary.processes == {
        "engine_rank0": ProcessMemory(1000, 2000),
        "engine_rank1": ProcessMemory(1001, 2001),
    }


def test_bits_per_weight_is_weighted_by_the_weights_of_each_rank() -> None:
    wide = _report(1, bits_per_weight=7.0, weight_bytes={"packed": 700, "scale_zero": 0})
    # 800 weights in 350 bytes and 800 weights in 700 bytes.
    assert summarize_reports([_report(0), wide]).bits_per_weight == pytest.approx(8 * 1050 / 1600)


def test_an_unquantized_model_shows_no_bits_per_weight() -> None:
    plain = _report(
        0,
        source="none",
        bits=None,
        group_size=None,
        scale_dtype=None,
        bits_per_weight=None,
        weight_bytes={"packed": 0, "scale_zero": 0, "unquantized": 9, "original": 9},
        kernels=[],
        phases={},
    )
    registry = CollectorRegistry()
    NeuqiMetrics(registry).set_load("m", summarize_reports([plain]))
    samples = _samples(registry)
    assert "neuqi_bits_per_weight" not in samples
    assert samples['neuqi_model_info{bits="",group_size="",model_name="m",scale_dtype="",source="none"}'] == 1


def test_metrics_can_be_made_again_in_the_same_process() -> None:
    registry = CollectorRegistry()
    NeuqiMetrics(registry).set_build("1", "2", "3")
    NeuqiMetrics(registry).set_load("m", summarize_reports([_report(0)]))
    NeuqiMetrics(registry).set_load("m", summarize_reports([_report(0)]))
    samples = _samples(registry)
    assert samples['neuqi_build_info{torch="3",version="1",vllm="2"}'] == 1
    assert samples["neuqi_bits_per_weight"] == 3.5


def test_no_name_is_one_that_vllm_would_remove() -> None:
    registry = CollectorRegistry()
    NeuqiMetrics(registry)
    assert all(name.startswith("neuqi_") for name in registry._names_to_collectors)


def test_gauges_of_several_api_processes_are_one_series(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from neuqi_serve.server.metrics import NeuqiMetrics, ProcessMemory
        metrics = NeuqiMetrics()
        metrics.set_build("1", "2", "3")
        metrics.set_memory({sys.argv[1]: ProcessMemory(5, 6)})
    """)
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": ""}
    for process in ("api_1", "api_2"):
        subprocess.run([sys.executable, "-c", program, process], env=environment, check=True, timeout=60)
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    samples = _samples(registry)
    assert samples['neuqi_build_info{torch="3",version="1",vllm="2"}'] == 1
    assert samples['neuqi_process_resident_bytes{process="api_1"}'] == 5
    assert samples['neuqi_process_peak_resident_bytes{process="api_2"}'] == 6


def test_own_memory_is_at_most_its_peak() -> None:
    memory = own_memory()
    assert 1 << 20 < memory.resident <= memory.peak
