"""The kernels' arithmetic against float64, in Triton's interpreter: no GPU, tiny shapes, every format."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

# Derived in gpu_cases.py, which this process does not import: it would bring in Triton.
TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3}
# Tokens per kernel: decode_mm with 8, 16 and 32 columns, mid_mm.
TOKENS = (1, 3, 8, 17, 40)
DTYPES = ("float16", "bfloat16")
BITS = (2, 3, 4, 8)


def row(bits: int, group_size: int) -> int:
    """One tile of input features and a bit, in whole groups."""
    tile = {2: 256, 3: 512, 4: 128, 8: 64}[bits]
    group = max(group_size, 32)
    return -(-(tile + 32) // group) * group


def layer(
    bits: int, group_size: int, m: int, dtype: str = "float16", n: int = 70, **more: Any
) -> dict[str, Any]:
    """A request for a product with a layer of an odd size."""
    shape = {"m": m, "n": n, "k": row(bits, group_size)}
    return {"bits": bits, "group_size": group_size, "dtype": dtype, **shape, **more}


def check(result: dict[str, Any], dtype: str) -> None:
    assert result["error"] < TOLERANCE[dtype], result
    assert result["counters_zero"]


@pytest.mark.parametrize(
    "case",
    [layer(*format_) for format_ in itertools.product(BITS, (32, 64, 128, -1), TOKENS, DTYPES)],
    ids=str,
)
def test_product_agrees_with_float64(interpreter: Any, case: dict[str, Any]) -> None:
    check(interpreter.run(case), case["dtype"])


@pytest.mark.parametrize(
    "case",
    [layer(bits, 64, m, dtype) for bits, m, dtype in itertools.product((2, 3, 4), (5, 40), DTYPES)],
    ids=str,
)
def test_every_triton_version_computes_the_product(every_interpreter: Any, case: dict[str, Any]) -> None:
    check(every_interpreter.run(case), case["dtype"])


@pytest.mark.parametrize(
    "case",
    [
        layer(bits, 32, 5, dtype, n=66, kernel=kernel, asm=True)
        for bits, dtype, kernel in itertools.product(BITS, DTYPES, ("decode_mm", "prefill_mm", "dequant"))
    ],
    ids=str,
)
def test_the_ptx_computes_what_its_portable_twin_does(interpreter: Any, case: dict[str, Any]) -> None:
    with_ptx = interpreter.run(case)
    check(with_ptx, case["dtype"])
    assert with_ptx["error"] == interpreter.run(case | {"asm": False})["error"]
    assert with_ptx["kernel"] == case["kernel"]


@pytest.mark.parametrize(
    "case",
    [
        {"bits": 3, "group_size": 64, "dtype": dtype, "scale_dtype": scale, "m": m, "n": 65, "k": 576}
        for m, dtype, scale in itertools.product((2, 40), DTYPES, DTYPES)
    ],
    ids=str,
)
def test_scales_are_read_in_their_own_dtype(interpreter: Any, case: dict[str, Any]) -> None:
    check(interpreter.run(case), case["dtype"])


@pytest.mark.parametrize(
    "case",
    [
        {"bits": bits, "group_size": 128, "m": m, "n": 130, "k": 1408, "split_k": split_k, "repeat": True}
        for bits, (m, split_k) in itertools.product((2, 4), ((3, 2), (32, 3), (64, 5)))
    ],
    ids=str,
)
def test_parts_of_k_are_added_in_a_fixed_order(interpreter: Any, case: dict[str, Any]) -> None:
    result = interpreter.run(case)
    check(result, "float16")
    assert result["same_bits_again"]


@pytest.mark.parametrize(
    "case",
    [
        {"bits": bits, "group_size": 64, "dtype": "bfloat16", "m": m, "n": 66, "k": 1600, "repeat": True}
        for bits, m in ((2, 16), (2, 32), (3, 16), (3, 32), (4, 32), (8, 32))
    ],
    ids=str,
)
def test_a_token_gets_the_same_bits_among_few_and_among_many(interpreter: Any, case: dict[str, Any]) -> None:
    result = interpreter.run(case)
    check(result, "bfloat16")
    assert result["same_bits_among_few"]


@pytest.mark.parametrize(
    "case",
    [
        {"bits": bits, "group_size": 64, "m": m, "n": 66, "k": 1600, "invariant": True, "repeat": True}
        for bits, m in ((2, 40), (3, 40), (4, 150))
    ],
    ids=str,
)
def test_batch_invariant_plans_give_a_token_its_bits_in_prompts_too(
    interpreter: Any, case: dict[str, Any]
) -> None:
    result = interpreter.run(case)
    check(result, "float16")
    assert result["same_bits_among_few"]
    assert result["kernel"] == "decode_mm"


@pytest.mark.parametrize(
    "case",
    [
        {
            "bits": 4,
            "group_size": 64,
            "m": m,
            "n": 66,
            "k": 1600,
            "split_k": 3,
            "partial_elements": 3 * 66 * 40,
        }
        for m in (20, 100)
    ],
    ids=str,
)
def test_many_partial_sums_are_further_launches(interpreter: Any, case: dict[str, Any]) -> None:
    result = interpreter.run(case)
    check(result, "float16")
    assert result["error"] == interpreter.run(case | {"partial_elements": 1 << 25})["error"]


@pytest.mark.parametrize("case", [layer(bits, 32, 2050, n=67) for bits in BITS], ids=str)
def test_many_tokens_are_multiplied_with_written_out_weights(interpreter: Any, case: dict[str, Any]) -> None:
    result = interpreter.run(case)
    check(result, "float16")
    assert result["kernel"] == "dequant"


@pytest.mark.parametrize(
    "case",
    [
        {"bits": 4, "group_size": 128, "n": 64, "k": 256, "bias": False, **more}
        for more in ({"m": 2}, {"m": 40}, {"m": 300}, {"m": 2, "kernel": "dequant"})
    ],
    ids=str,
)
def test_a_layer_without_a_bias(interpreter: Any, case: dict[str, Any]) -> None:
    check(interpreter.run(case), "float16")


@pytest.mark.parametrize(
    "case",
    [
        {"task": "repack", "bits": bits, "n": n, "k": k, "experts": experts}
        for (bits, n, k), experts in itertools.product(
            ((2, 70, 288), (3, 129, 544), (3, 64, 512), (4, 1, 32), (4, 70, 160), (8, 64, 96)), (0, 2)
        )
    ],
    ids=str,
)
def test_repacking_equals_its_slow_twin(interpreter: Any, case: dict[str, Any]) -> None:
    assert interpreter.run(case)["equal"]


LAYER = {"bits": 4, "group_size": 32, "n": 64, "k": 128, "dtype": "bfloat16", "bias": False}
WARM_UP = {"task": "warm_up", "layers": [LAYER, LAYER, {**LAYER, "n": 128}, {**LAYER, "bias": True}]}


@pytest.mark.parametrize("case", [WARM_UP], ids=["layers"])
def test_warming_up_compiles_every_planned_kernel_once(interpreter: Any, case: dict[str, Any]) -> None:
    first, again, wider, with_bias = interpreter.run(case)["steps"]
    tiles = [["decode_mm", 8, 1], ["decode_mm", 16, 9], ["decode_mm", 32, 17], ["mid_mm", 64, 33]]
    tiles += [["prefill_mm", 64, 257], ["dequant", 0, 2049]]
    assert first == [[*tile, False] for tile in tiles]
    assert again == []
    # Another number of rows is the same machine code.
    assert wider == []
    assert with_bias == [[*tile, True] for tile in tiles]
