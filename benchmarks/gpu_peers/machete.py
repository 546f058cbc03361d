"""Machete as vLLM builds it: CUTLASS for sm_90, 4 bits, zero-points given as −scale·zero and so real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_peers import packing
from gpu_peers.contender import Contender, capability, copies_of, needs
from gpu_peers.layer import DTYPE, Case, Layer

GROUP_SIZES = (-1, 64, 128)
# bf16 keeps 8 bits of scale and of −scale·zero, and the kernel rounds each weight again.
TOLERANCE = 2e-2


class Machete:
    name = "Machete"

    def refuse(self, case: Case) -> str | None:
        if case.bits != 4:
            return f"has zero-points for 4 and 8 bits, the layer has {case.bits}"
        if case.group_size not in GROUP_SIZES:
            return f"takes groups of {GROUP_SIZES}, the layer has {case.group_size}"
        if case.n % 128 or case.k % 64:
            return f"needs tiles of 128 by 64, the layer is {case.n}x{case.k}"
        if capability() != (9, 0):
            return f"is for compute capability 9.0, the GPU has {capability()}"
        reason = needs("vllm._custom_ops")
        if reason is None and not hasattr(torch.ops._C, "machete_mm"):
            reason = "this build of vLLM has no machete_mm"
        return reason

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        from vllm import _custom_ops as ops
        from vllm.scalar_type import scalar_types

        words = ops.machete_prepack_B(
            column_major(packing.along_k(layer.codes)),
            a_type=DTYPE,
            b_type=scalar_types.uint4,
            group_scales_type=DTYPE,
        )

        def product(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
            return ops.machete_mm(
                x,
                b_q=words,
                b_type=scalar_types.uint4,
                b_group_scales=scales,
                b_group_zeros=zeros,
                b_group_size=case.group_size,
            )

        return copies_of(layer, (words, *prepare_parameters(layer)), product, rotated_bytes, TOLERANCE)


def column_major(words: Tensor) -> Tensor:
    """The same matrix, stored column by column, as the repacking expects it."""
    return words.t().contiguous().t()


def prepare_parameters(layer: Layer) -> tuple[Tensor, Tensor]:
    """Scales and ``−scale·zero``, both ``[G, N]`` in bf16; the product is rounded once."""
    shift = -(layer.scale.float() * layer.zero.float())
    return layer.scale.to(DTYPE).t().contiguous(), shift.to(DTYPE).t().contiguous()


MACHETE = Machete()
