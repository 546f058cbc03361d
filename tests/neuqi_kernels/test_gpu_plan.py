"""The rules that choose kernels and tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from neuqi_kernels.gpu.plan import SPLIT_TOKEN_BLOCKS, Target, plan, target_of

H100 = Target(90, 132, 227 * 1024)
RTX_4090 = Target(89, 128, 99 * 1024)
B200 = Target(100, 148, 227 * 1024)
TARGETS = (H100, RTX_4090, B200, Target(0, 304, 64 * 1024, inline_asm=False))


def test_more_tokens_go_from_decode_to_prefill_to_written_out_weights() -> None:
    kernels = [plan(H100, 4, 128, 4096, 4096, m).kernel for m in (1, 32, 33, 2048, 2049)]
    assert kernels == ["decode_mm", "decode_mm", "prefill_mm", "prefill_mm", "dequant"]
    assert plan(B200, 4, 128, 4096, 4096, 257).kernel == "dequant"


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
