"""The GPU quantizer in Triton's interpreter, against its torch twin; and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
# Mean over a few dozen groups of the loss ÷ the twin's. Their sums differ in order, so that a group may end in another
# minimum nearby; with importance that leaves few weights that count, minima are many.
MEAN, MEAN_WEIGHTED = 1.005, 1.05

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its interpreter runs these"
)


def workers(script: str, scratch: Path, interpret: str) -> Any:
    pool = runpy.run_path(str(FOLDER / "gpu_worker.py"))["Pool"]
    return pool(script, scratch, TRITON_INTERPRET=interpret)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    process = workers("quantize_interpreter.py", tmp_path_factory.mktemp("interpreter"), "1")
    yield process
    process.close()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    process = workers("quantize_compile.py", tmp_path_factory.mktemp("compile"), "0")
    yield process
    process.close()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "storage"),
    [
        (2, 32, "float16"),
        (3, 64, "bfloat16"),
        (4, 128, "float16"),
        (3, -1, "float32"),
        (4, -1, "float16"),
        (8, 64, "float16"),
    ],
)
def test_the_kernel_is_as_good_as_its_twin(
    interpreter: Any, bits: int, group_size: int, storage: str, weighted: bool
) -> None:
    # 17 groups per row leave a tile unfilled, and a row of 544 weights is no power of two.
    columns = 3 * 128 if group_size == 128 else 17 * max(32, group_size)
    result = interpreter.run(
        {
            "rows": 3,
            "columns": columns,
            "bits": bits,
            "group_size": group_size,
            "storage": storage,
            "weighted": weighted,
        }
    )
    assert result["codes_are_of_the_stored_parameters"]
    assert result["worse_than_minmax"] == 0
    assert result["mean_ratio"] <= (MEAN_WEIGHTED if weighted else MEAN)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_balanced_is_as_good_as_its_twin(interpreter: Any, bits: int) -> None:
    result = interpreter.run(
        {
            "rows": 2,
            "columns": 128,
            "bits": bits,
            "group_size": 64,
            "preset": "balanced",
            "dtype": "bfloat16",
        }
    )
    assert result["codes_are_of_the_stored_parameters"]
    assert result["mean_ratio"] <= MEAN


def test_groups_far_from_zero_are_no_worse_than_min_max(interpreter: Any) -> None:
    result = interpreter.run({"rows": 4, "columns": 64, "bits": 4, "group_size": 32, "kind": "far"})
    assert result["codes_are_of_the_stored_parameters"]
    assert result["worse_than_minmax"] == 0


def test_constant_groups_are_exact(interpreter: Any) -> None:
    case = {
        "rows": 4,
        "columns": 64,
        "bits": 2,
        "group_size": 32,
        "kind": "constant",
        "dtype": "float16",
    }
    result = interpreter.run(case)
    assert result["codes_are_of_the_stored_parameters"]
    assert result["exact"]


def test_a_weight_that_is_not_finite_is_reported(interpreter: Any) -> None:
    result = interpreter.run({"rows": 3, "columns": 64, "bits": 4, "group_size": 32, "kind": "broken"})
    assert result["unusable"]


@pytest.mark.parametrize(
    ("arch", "bits", "group", "weighted"),
    [
        ("sm_80", 4, 128, True),
        ("sm_89", 3, 64, False),
        ("sm_90", 4, 128, False),
        ("sm_90", 2, 32, True),
        ("sm_80", 3, 4096, False),
        ("sm_90", 4, 14336, True),
    ],
)
def test_the_kernel_stays_in_registers(
    compiler: Any, arch: str, bits: int, group: int, weighted: bool
) -> None:
    result = compiler.run({"arch": arch, "bits": bits, "group": group, "weighted": weighted})
    assert not result["trap"]
    assert result["shared"] <= result["shared_limit"]
    registers = int(re.findall(r"REG:(\d+)", result["usage"])[0])
    stack = int(re.findall(r"STACK:(\d+)", result["usage"])[0])
    assert registers <= 255
    # Words that spill: none of the tile, at most what a loop keeps beside it.
    assert stack <= 64
