"""The kernels compiled for GPUs that are not there: what would run, not how fast it would."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
GATE = runpy.run_path(str(FOLDER / "gpu_gate.py"))
TABLE = json.loads((FOLDER / "gpu_instructions.json").read_text())
# The same source may cost a few instructions more or less with the registers that the assembler happens to pick.
INSTRUCTION_TOLERANCE = 0.05


def check(result: dict[str, Any], arch: str) -> None:
    # Triton can turn a product that it cannot lower into a kernel that only traps, without an error.
    assert not result["trap"]
    assert result["spills"] == 0
    assert result["shared"] <= result["shared_limit"]
    assert result["matrix"] == expected_matrix(result["kernel"], arch)
    if result["kernel"].endswith("decode_mm"):
        # Everything arrives by asynchronous copies: a load through registers would stall the loop.
        assert result["synchronous_loads"] == 0


def expected_matrix(kernel: str, arch: str) -> list[str]:
    """The matrix instruction that takes weights from registers: decoding needs the one with 8 columns."""
    if kernel in ("dequant", "repack"):
        return []
    if arch == "gfx942":
        return ["MFMA"]
    return ["HGMMA"] if arch == "sm_90" and not kernel.endswith("decode_mm") else ["HMMA"]


@pytest.mark.parametrize("case", GATE["gate_cases"](), ids=str)
def test_every_kernel_compiles_for_every_architecture_to_what_the_table_says(
    compiler: Any, case: dict[str, Any]
) -> None:
    result = compiler.run(case)
    check(result, case["arch"])
    assert result["kernel"] == case["kernel"]
    if result["triton"] not in TABLE:
        pytest.skip(f"no table for Triton {result['triton']}: write it with gpu_compile.py --write")
    expected = TABLE[result["triton"]][case["arch"]][GATE["table_key"](case)]
    assert result["instructions_per_weight"] <= expected * (1 + INSTRUCTION_TOLERANCE)


@pytest.mark.parametrize("case", GATE["other_cases"](), ids=str)
def test_formats_near_a_limit_compile(compiler: Any, case: dict[str, Any]) -> None:
    check(compiler.run(case), case["arch"])
