"""The kernels compiled for GPUs that are not there: what would run, not how fast it would."""

from __future__ import annotations

import importlib.util
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
TABLE = json.loads((FOLDER / "gpu_instructions.json").read_text())
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# A compilation takes about a second, so that the formats near a limit go to every architecture and the others to one.
LOW_BITS = (2, 3, 4)
# The same source may cost a few instructions more or less with the registers that the assembler happens to pick.
INSTRUCTION_TOLERANCE = 0.05

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it brings the compiler"
)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    worker_class = runpy.run_path(str(FOLDER / "gpu_worker.py"))["Worker"]
    worker = worker_class("gpu_compile.py", tmp_path_factory.mktemp("compile"), TRITON_INTERPRET="0")
    yield worker
    worker.close()


def check(result: dict[str, Any]) -> None:
    # Triton can turn a product that it cannot lower into a kernel that only traps, without an error.
    assert not result["trap"]
    assert result["spills"] == 0
    assert result["shared"] <= result["shared_limit"]


@pytest.mark.parametrize(
    ("arch", "bits"), [*((arch, bits) for arch in ARCHITECTURES for bits in LOW_BITS), ("sm_90", 8)]
)
def test_decode_takes_a_weight_apart_in_as_few_instructions_as_the_table_says(
    compiler: Any, arch: str, bits: int
) -> None:
    result = compiler.run({"arch": arch, "bits": bits})
    check(result)
    assert result["kernel"] == "decode_mm"
    assert result["matrix"] > 0
    assert result["tensor_memory"] == 0
    # Everything arrives by asynchronous copies: a load through registers would stall the loop.
    assert result["synchronous_loads"] == 0
    if result["triton"] not in TABLE:
        pytest.skip(f"no table for Triton {result['triton']}: write it with gpu_compile.py --write")
    expected = TABLE[result["triton"]][arch][str(bits)]
    assert result["instructions_per_weight"] <= expected * (1 + INSTRUCTION_TOLERANCE)


@pytest.mark.parametrize(
    ("arch", "bits"), [("sm_80", 2), ("sm_80", 3), ("sm_90", 2), ("sm_100", 3), ("sm_120", 3)]
)
def test_decode_of_32_tokens_keeps_its_registers(compiler: Any, arch: str, bits: int) -> None:
    result = compiler.run({"arch": arch, "bits": bits, "m": 32})
    check(result)
    assert result["matrix"] > 0
    assert result["tensor_memory"] == 0


@pytest.mark.parametrize(
    ("arch", "bits"),
    [*((arch, 3) for arch in ARCHITECTURES), ("sm_89", 2), ("sm_90", 2), ("sm_90", 4)],
)
def test_prefill_keeps_weights_in_registers(compiler: Any, arch: str, bits: int) -> None:
    result = compiler.run({"arch": arch, "bits": bits, "m": 200})
    check(result)
    assert result["kernel"] == "prefill_mm"
    assert result["matrix"] > 0
    assert result["tensor_memory"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_dequant_compiles(compiler: Any, arch: str) -> None:
    check(compiler.run({"arch": arch, "bits": 3, "kernel": "dequant"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "sm_90", "bits": 3, "dtype": "float16", "group": 32},
        {"arch": "sm_86", "bits": 3, "dtype": "float16", "group": 32},
        {"arch": "sm_86", "bits": 3, "k": 4096 + 32, "group": 0},
        {"arch": "sm_90", "bits": 8, "m": 64, "group": 0},
        {"arch": "sm_90", "bits": 4, "group": 64, "m": 12},
        {"arch": "sm_100", "bits": 4, "m": 200},
    ],
    ids=str,
)
def test_other_formats_compile(compiler: Any, changes: dict[str, Any]) -> None:
    result = compiler.run(changes)
    check(result)
    assert result["matrix"] > 0


def test_the_portable_code_compiles_for_amd(compiler: Any) -> None:
    result = compiler.run({"arch": "gfx942", "bits": 3})
    check(result)
    assert result["matrix"] > 0
