"""The kernels' arithmetic against float64, in Triton's interpreter: no GPU, tiny shapes, every format."""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
# Derived in gpu_cases.py, which this process does not import: it would bring in Triton.
TOLERANCE = {"float16": 6e-4, "bfloat16": 4.8e-3}
# Tokens per kernel: decode_mm with 8, 16 and 32 columns, prefill_mm.
TOKENS = (1, 3, 8, 17, 40)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its interpreter runs these"
)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    worker_class = runpy.run_path(str(FOLDER / "gpu_worker.py"))["Worker"]
    worker = worker_class("gpu_interpreter.py", tmp_path_factory.mktemp("interpreter"), TRITON_INTERPRET="1")
    yield worker
    worker.close()


def row(bits: int, group_size: int) -> int:
    """One tile of input features and a bit, in whole groups."""
    tile = {2: 256, 3: 512, 4: 128, 8: 64}[bits]
    group = max(group_size, 32)
    return -(-(tile + 32) // group) * group


def check(result: dict[str, Any], dtype: str) -> None:
    assert result["error"] < TOLERANCE[dtype], result
    assert result["counters_zero"]


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_agrees_with_float64(
    interpreter: Any, bits: int, group_size: int, dtype: str, m: int
) -> None:
    case = {
        "bits": bits,
        "group_size": group_size,
        "dtype": dtype,
        "m": m,
        "n": 70,
        "k": row(bits, group_size),
    }
    check(interpreter.run(case), dtype)


@pytest.mark.parametrize("kernel", ["decode_mm", "prefill_mm", "dequant"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_ptx_computes_what_its_portable_twin_does(
    interpreter: Any, bits: int, dtype: str, kernel: str
) -> None:
    case = {
        "bits": bits,
        "group_size": 32,
        "dtype": dtype,
        "m": 5,
        "n": 66,
        "k": row(bits, 32),
        "kernel": kernel,
    }
    with_ptx = interpreter.run(case | {"asm": True})
    check(with_ptx, dtype)
    assert with_ptx["error"] == interpreter.run(case)["error"]
    assert with_ptx["kernel"] == kernel


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("m", [2, 40])
def test_scales_are_read_in_their_own_dtype(interpreter: Any, m: int, dtype: str, scale_dtype: str) -> None:
    case = {
        "bits": 3,
        "group_size": 64,
        "dtype": dtype,
        "scale_dtype": scale_dtype,
        "m": m,
        "n": 65,
        "k": 576,
    }
    check(interpreter.run(case), dtype)


@pytest.mark.parametrize(("m", "split_k"), [(3, 2), (32, 3), (64, 5)])
@pytest.mark.parametrize("bits", [2, 4])
def test_parts_of_k_are_added_in_a_fixed_order(interpreter: Any, bits: int, m: int, split_k: int) -> None:
    case = {"bits": bits, "group_size": 128, "m": m, "n": 130, "k": 1408, "split_k": split_k, "repeat": True}
    result = interpreter.run(case)
    check(result, "float16")
    assert result["same_bits_again"]


@pytest.mark.parametrize(("bits", "m"), [(2, 16), (2, 32), (3, 16), (3, 32), (4, 32), (8, 32)])
def test_a_token_gets_the_same_bits_among_few_and_among_many(interpreter: Any, bits: int, m: int) -> None:
    case = {"bits": bits, "group_size": 64, "dtype": "bfloat16", "m": m, "n": 66, "k": 1600, "repeat": True}
    result = interpreter.run(case)
    check(result, "bfloat16")
    assert result["same_bits_among_few"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_tokens_are_multiplied_with_written_out_weights(interpreter: Any, bits: int) -> None:
    case = {"bits": bits, "group_size": 32, "m": 2050, "n": 67, "k": row(bits, 32)}
    result = interpreter.run(case)
    check(result, "float16")
    assert result["kernel"] == "dequant"


def test_a_layer_without_a_bias(interpreter: Any) -> None:
    case = {"bits": 4, "group_size": 128, "m": 2, "n": 64, "k": 256, "bias": False}
    check(interpreter.run(case), "float16")
    check(interpreter.run(case | {"m": 40}), "float16")
    check(interpreter.run(case | {"kernel": "dequant"}), "float16")
