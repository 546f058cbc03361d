"""vLLM's Triton kernel for 4 bits: integer zero-points, codes packed along the output features."""

from __future__ import annotations

import importlib

from torch import Tensor

from gpu_peers import packing
from gpu_peers.contender import Contender, copies_of, needs
from gpu_peers.layer import DTYPE, Case, Layer

MODULE = "vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16"
GROUP_SIZES = (-1, 32, 64, 128, 256)
# bf16 keeps 8 bits of the scale, and the kernel rounds each weight again.
TOLERANCE = 1e-2


class TritonW4A16:
    name = "vLLM Triton W4A16"

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
            return kernel.triton_w4a16_gemm(x, words, scales, zeros, runs.group, 0)

        return copies_of(runs, prepare(runs), product, rotated_bytes, TOLERANCE)


def prepare(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Words ``[K, N/8]``, scales ``[G, N]``, zero-points packed as ``[G, N/8]``; ``layer`` has integer zero-points."""
    zeros = packing.along_n(layer.zero.byte())
    return packing.along_n(layer.codes), layer.scale.to(DTYPE).t().contiguous(), zeros


TRITON_W4A16 = TritonW4A16()
