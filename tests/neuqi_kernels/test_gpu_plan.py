"""The rules that choose kernels and tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from neuqi_kernels import env
from neuqi_kernels.gpu.plan import SPLIT_TOKEN_BLOCKS, Target, moe_block_size, moe_plan, plan, target_of

H100 = Target(90, 132, 227 * 1024)
RTX_4090 = Target(89, 128, 99 * 1024)
B200 = Target(100, 148, 227 * 1024)
MI300 = Target(0, 304, 64 * 1024, inline_asm=False, name="gfx942")
TARGETS = (H100, RTX_4090, B200, MI300)


def test_more_tokens_go_from_decode_to_prefill_to_written_out_weights() -> None:
    kernels = [plan(H100, 4, 128, 4096, 4096, m).kernel for m in (1, 32, 33, 256, 257, 2048, 2049)]
    assert kernels == ["decode_mm", "decode_mm", "mid_mm", "mid_mm", "prefill_mm", "prefill_mm", "dequant"]
    assert [plan(B200, 4, 128, 4096, 4096, m).kernel for m in (64, 65)] == ["decode_mm", "dequant"]


def test_tiles_of_the_middle_follow_the_architecture() -> None:
    def tiles(target: Target, m: int) -> tuple[int, int, int]:
        chosen = plan(target, 4, 128, 4096, 4096, m)
        return chosen.block_m, chosen.block_n, chosen.warps

    assert [tiles(H100, m) for m in (64, 65)] == [(64, 128, 4), (128, 128, 8)]
    assert [tiles(RTX_4090, m) for m in (64, 256)] == [(64, 128, 4), (64, 128, 4)]
    assert tiles(MI300, 64) == (64, 64, 4)
    # The grid of a small layer is filled by parts of K.
    assert plan(H100, 4, 128, 4096, 4096, 64).split_k > 1
    assert plan(H100, 4, 128, 57344, 8192, 256).split_k == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_batch_invariant_plans_depend_on_the_layer_alone(bits: int) -> None:
    for target, (n, k) in itertools.product(TARGETS, ((4096, 4096), (129, 8192), (57344, 8192))):
        plans = {plan(target, bits, 128, n, k, m, batch_invariant=True) for m in (1, 8, 32, 33, 300, 9000)}
        assert len(plans) == 1


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_batch_invariance_is_switched_as_in_vllm(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    assert env.batch_invariant() is expected


@pytest.mark.parametrize("target", [H100, RTX_4090, B200, MI300], ids=lambda target: target.architecture)
def test_experts_have_a_kernel_for_every_block_size_that_is_asked_for(target: Target) -> None:
    for bits, routes in itertools.product((2, 3, 4, 8), (1, 100, 2000, 4000, 100_000)):
        size = moe_block_size(target, bits, routes, 64)
        chosen = moe_plan(target, bits, 128, size, few=False)
        assert size % chosen.block_m == 0
        assert chosen.kernel == ("moe_decode_mm" if size == 16 else "moe_prefill_mm")
    assert moe_block_size(target, 4, 100_000, 64, batch_invariant=True) == 16
    with pytest.raises(ValueError, match="expected a block size of"):
        moe_plan(target, 4, 128, 8, few=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_parts_of_k_in_decode_do_not_depend_on_the_tokens(bits: int) -> None:
    for target, (n, k) in itertools.product(TARGETS, ((4096, 4096), (129, 8192), (57344, 8192))):
        parts = {plan(target, bits, 128, n, k, m).split_k for m in range(1, 33)}
        assert len(parts) == 1


def test_small_layers_are_split_and_large_ones_are_not() -> None:
    assert plan(H100, 4, 128, 1024, 8192, 1).split_k > 1
    assert plan(H100, 4, 128, 57344, 8192, 1).split_k == 1
    assert plan(H100, 4, 128, 64, 128, 1).split_k == 1


def test_every_split_product_has_its_counters() -> None:
    for target, bits, (n, k), m in itertools.product(
        TARGETS,
        (2, 3, 4, 8),
        ((64, 8192), (130, 4096), (4096, 28672)),
        (1, 9, 17, 32, 33, 65, 129, 300, 513, 2048),
    ):
        chosen = plan(target, bits, 128, n, k, m)
        if chosen.split_k > 1:
            tiles = -(-m // chosen.block_m) * -(-n // chosen.block_n)
            assert tiles <= SPLIT_TOKEN_BLOCKS * -(-n // 64), (target, bits, n, k, m)


def test_a_device_without_a_gpu_is_the_interpreter() -> None:
    target = target_of(torch.device("cpu"))
    assert not target.inline_asm
    assert target.architecture == "interpreter"
    assert H100.architecture == "sm_90"
