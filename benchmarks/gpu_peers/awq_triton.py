"""vLLM's Triton kernel for AWQ: 4 bits, integer zero-points, sums in float16."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from gpu_peers import packing
from gpu_peers.contender import Contender, copies_of, needs
from gpu_peers.layer import Case, Layer

MODULE = "vllm.model_executor.layers.quantization.awq_triton"
GROUP_SIZES = (-1, 32, 64, 128)
# What vLLM's AWQ layer calls it with: eight parts of K, and the dense product from so many tokens on.
SPLIT_K = 8
DENSE_TOKENS = 256
# The kernel adds up in the dtype of the result, in eight parts that are rounded before they are added.
TOLERANCE = 2e-2


class AwqTriton:
    name = "vLLM AWQ-Triton"

    def refuse(self, case: Case) -> str | None:
        if case.bits != 4:
            return f"is for 4 bits, the layer has {case.bits}"
        if case.group_size not in GROUP_SIZES:
            return f"takes groups of {GROUP_SIZES}, the layer has {case.group_size}"
        return needs(MODULE)

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        kernel = importlib.import_module(MODULE)
        runs = layer.with_integer_zeros()

        def product(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
            if len(x) >= DENSE_TOKENS:
                return torch.matmul(x, kernel.awq_dequantize_triton(words, scales, zeros))
            return kernel.awq_gemm_triton(x, words, scales, zeros, SPLIT_K)

        return copies_of(runs, prepare(runs), product, rotated_bytes, TOLERANCE, torch.float16)


def prepare(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Words ``[K, N/8]``, scales ``[G, N]`` in float16, zero-points ``[G, N/8]``; all in AWQ's order of columns."""
    zeros = packing.along_n_awq(layer.zero.byte())
    return packing.along_n_awq(layer.codes), layer.scale.half().t().contiguous(), zeros


AWQ_TRITON = AwqTriton()
