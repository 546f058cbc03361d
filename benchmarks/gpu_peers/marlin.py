"""Marlin as vLLM builds it: CUDA, 4 bits, integer zero-points."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_peers import packing
from gpu_peers.contender import Contender, capability, copies_of, needs
from gpu_peers.layer import DTYPE, Case, Layer

GROUP_SIZES = (-1, 32, 64, 128)
# bf16 keeps 8 bits of the scale, and the kernel rounds each weight again.
TOLERANCE = 1e-2


class Marlin:
    name = "Marlin"

    def refuse(self, case: Case) -> str | None:
        if case.bits != 4:
            return f"has integer zero-points for 4 bits only, the layer has {case.bits}"
        if case.group_size not in GROUP_SIZES:
            return f"takes groups of {GROUP_SIZES}, the layer has {case.group_size}"
        if not fits_tiles(case):
            return f"needs tiles of 64 by 128, the layer is {case.n}x{case.k}"
        if capability() < (8, 0):
            return f"needs compute capability 8.0 for bf16, the GPU has {capability()}"
        reason = needs("vllm._custom_ops")
        if reason is None and not hasattr(torch.ops._C, "marlin_gemm"):
            reason = "this build of vLLM has no marlin_gemm"
        return reason

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
        from vllm.scalar_type import scalar_types

        runs = layer.with_integer_zeros()
        workspace = marlin_make_workspace_new(layer.codes.device, 4)

        def product(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
            return ops.marlin_gemm(
                x,
                c=None,
                b_q_weight=words,
                b_bias=None,
                b_scales=scales,
                a_scales=None,
                global_scale=None,
                b_zeros=zeros,
                workspace=workspace,
                b_q_type=scalar_types.uint4,
                size_m=len(x),
                size_n=case.n,
                size_k=case.k,
                use_fp32_reduce=True,
            )

        return copies_of(runs, prepare(runs), product, rotated_bytes, TOLERANCE)


def fits_tiles(case: Case) -> bool:
    return (case.n % 64 == 0 and case.k % 128 == 0) or (case.n % 128 == 0 and case.k % 64 == 0)


def prepare(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and zero-points in the order of Marlin's tiles, brought there by vLLM's own functions."""
    from vllm import _custom_ops as ops

    n, k = layer.codes.shape
    words = ops.gptq_marlin_repack(packing.along_k(layer.codes), size_k=k, size_n=n, num_bits=4)
    return words, *prepare_parameters(layer)


def prepare_parameters(layer: Layer) -> tuple[Tensor, Tensor]:
    """Scales ``[G, N]`` and packed zero-points ``[G, N/8]``."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_permute_scales,
        marlin_zero_points,
    )

    n, k = layer.codes.shape
    scales = marlin_permute_scales(layer.scale.to(DTYPE).t().contiguous(), k, n, layer.group)
    zeros = layer.zero.t().contiguous().int()
    return scales, marlin_zero_points(zeros, len(zeros), n, 4)


MARLIN = Marlin()
