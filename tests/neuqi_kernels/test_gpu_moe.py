"""The products of experts against float64, in Triton's interpreter; the layout of their routes; the operator."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from neuqi_kernels import layout, moe, moe_reference, ops, reference
from neuqi_kernels.gpu.moe_backend import TRITON_MOE
from neuqi_kernels.spec import GemmSpec

ops.register()

TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3}
DTYPES = ("float16", "bfloat16")
ROWS = {2: 288, 3: 544, 4: 160}
# vLLM's own example: 4 tokens at 3 of the experts 1 to 4, blocks of 4.
TOPK_IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)


def experts(bits: int, group_size: int, dtype: str, block_size: int, **more: Any) -> dict[str, Any]:
    k = -(-ROWS[bits] // max(group_size, 32)) * max(group_size, 32)
    shape = {"tokens": 7, "n": 70, "k": k, "block_size": block_size}
    return {"task": "experts", "bits": bits, "group_size": group_size, "dtype": dtype, **shape, **more}


@pytest.mark.parametrize(
    "case",
    [experts(*format_) for format_ in itertools.product((2, 3, 4), (32, 64, 128, -1), DTYPES, (16, 64))],
    ids=str,
)
def test_experts_agree_with_float64(interpreter: Any, case: dict[str, Any]) -> None:
    assert interpreter.run(case)["error"] < TOLERANCE[case["dtype"]]


@pytest.mark.parametrize(
    "case",
    [
        experts(bits, 64, dtype, block_size, bias=True, weighted=True, absent=2, tokens=tokens, top_k=top_k)
        for (bits, dtype, block_size), (tokens, top_k) in zip(
            itertools.product((2, 4), DTYPES, (16, 64)),
            itertools.cycle(((15, 2), (33, 3), (70, 2), (40, 1), (1, 2))),
            strict=False,
        )
    ],
    ids=str,
)
def test_bias_then_the_routers_weight_and_zeros_for_experts_elsewhere(
    interpreter: Any, case: dict[str, Any]
) -> None:
    assert interpreter.run(case)["error"] < TOLERANCE[case["dtype"]]


def test_a_whole_layer_agrees_with_its_definition_and_warms_up_every_plan(interpreter: Any) -> None:
    """The second product sees routes as rows; experts of another rank count nothing; widths of their own."""
    shape = {"experts": 4, "hidden": 288, "intermediate": 160, "bits": (2, 4), "group_size": 32}
    cases = [
        {"tokens": 1, "top_k": 2, "absent": None},
        {"tokens": 9, "top_k": 3, "absent": 2},
        {"tokens": 70, "top_k": 1, "absent": None},
    ]
    result = interpreter.run({"task": "layer_of_experts", **shape, "cases": cases, "most_tokens": 64})
    # The pairs and the parts are rounded to bf16 too.
    assert max(result["errors"]) < 4 * TOLERANCE["bfloat16"]
    # Few and many routes of small blocks, then large ones, both products each; a second layer of the kind runs nothing.
    kernels = ("moe_decode_mm 8", "moe_decode_mm 16", "moe_prefill_mm 64")
    assert result["warmed"] == [name for name in kernels for _ in range(2)]


def test_routes_are_sorted_as_vllm_documents_it() -> None:
    sorted_ids, expert_ids, total = moe_reference.align_routes(TOPK_IDS, 5, 4)
    assert sorted_ids.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert expert_ids.tolist() == [1, 2, 3, 4]
    assert total.tolist() == [16]
    elsewhere = moe_reference.align_routes(TOPK_IDS, 5, 4, torch.tensor([-1, 0, -1, 1, -1]))
    assert elsewhere[1].tolist() == [0, -1, 1, -1]


def random_experts(bits: int, count: int = 5, n: int = 17, k: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (count * n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(count, n, k // 32, generator=generator) * 0.1 + 0.01).half()
    zero = (torch.rand(count, n, k // 32, generator=generator) * (1 << bits)).half()
    return [layout.pack(codes, bits).view(count, n, -1), scale, zero]


def call(x: torch.Tensor, tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """The operator on the route of vLLM's example, through the reference."""
    return torch.ops.neuqi.moe_gemm(
        x,
        *tensors,
        options.get("bias"),
        options.get("topk_weights"),
        *moe_reference.align_routes(TOPK_IDS, 5, 4),
        17,
        3,
        4,
        3,
        32,
        options.get("backend", "reference"),
    )


def test_the_reference_is_every_routes_own_product() -> None:
    tensors = random_experts(3)
    x = torch.randn(4, 64)
    bias, weights = torch.randn(5, 17), torch.rand(4, 3)
    y = call(x, tensors, bias=bias, topk_weights=weights)
    for route, expert in enumerate(TOPK_IDS.flatten().tolist()):
        token = x[route // 3 : route // 3 + 1]
        one = reference.gemm(token, *(tensor[expert] for tensor in tensors), bias[expert], 3, 32)
        torch.testing.assert_close(y[route], one[0] * weights.flatten()[route])


def test_the_operator_passes_torchs_own_checks_and_compiles() -> None:
    tensors = random_experts(3)
    x = torch.randn(4, 64)
    aligned = moe_reference.align_routes(TOPK_IDS, 5, 4)
    arguments = (x, *tensors, None, None, *aligned, 17, 3, 4, 3, 32, "reference")
    torch.library.opcheck(
        torch.ops.neuqi.moe_gemm.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda x: call(x, tensors) + 1, backend="aot_eager", fullgraph=False)
    torch.testing.assert_close(compiled(x), call(x, tensors) + 1)


def test_without_a_gpu_experts_run_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    spec = GemmSpec(17, 64, 3, 32, "cpu", torch.bfloat16)
    assert moe.choose(spec).name == "reference"
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "triton")
    with pytest.raises(ValueError, match="refuses: runs on CUDA GPUs"):
        moe.choose(spec)
    with pytest.raises(ValueError, match=r"expected a backend for experts of .*'abacus'"):
        call(torch.randn(4, 64), random_experts(3), backend="abacus")


def test_the_block_size_grows_with_the_tokens_of_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    spec = GemmSpec(64, 64, 4, 32, "cpu", torch.bfloat16)
    assert [TRITON_MOE.block_size(spec, 8, tokens, 2) for tokens in (1, 64, 65, 5000)] == [16, 16, 64, 64]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert TRITON_MOE.block_size(spec, 8, 5000, 2) == 16


def test_an_unknown_block_size_is_refused() -> None:
    spec = GemmSpec(17, 64, 3, 32, "cpu", torch.bfloat16)
    prepared = TRITON_MOE.prepare(*random_experts(3), spec)
    aligned = moe_reference.align_routes(TOPK_IDS, 5, 4)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected a block size of .* got 4"):
        TRITON_MOE.moe_gemm(x, *prepared, None, None, *aligned, 17, 3, 4, 3, 32)
