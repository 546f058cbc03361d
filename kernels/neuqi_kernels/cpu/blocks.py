"""The CPU path in plain torch: unpack a block of rows that fits the cache, multiply, go on.

No full de-quantized matrix ever exists. It runs wherever torch runs; the C++ kernel replaces it where it is built.
"""

from __future__ import annotations

import torch

from neuqi_kernels import reference
from neuqi_kernels.backend import Prepared
from neuqi_kernels.spec import GemmSpec

# Float32 weights of one block: 256 Ki of them are 1 MiB, which stays in a core's L2 while it is multiplied.
_BLOCK_ELEMENTS = 1 << 18


class BlocksBackend:
    """Row blocks in float32: the arithmetic of the reference, a block at a time."""

    name = "cpu_blocks"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Take every layer on the CPU."""
        return (
            None if spec.device_type == "cpu" else f"runs on the CPU, the weights are on {spec.device_type}"
        )

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Keep the canonical layout."""
        return qweight, scale, zero

    def gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``x·Ŵᵀ + bias``; the slow twin is ``reference.gemm``."""
        k = x.shape[-1]
        tokens = x.reshape(-1, k).to(torch.float32)
        y = torch.empty(tokens.shape[0], n, dtype=x.dtype, device=x.device)
        rows = max(1, _BLOCK_ELEMENTS // k)
        for start in range(0, n, rows):
            block = slice(start, min(start + rows, n))
            weight = reference.dequantize(qweight[block], scale[block], zero[block], bits, group_size)
            part = tokens @ weight.t()
            if bias is not None:
                part += bias[block]
            y[:, block] = part
        return y.view(*x.shape[:-1], n)

    def embedding(
        self,
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return ``reference.embedding``."""
        return reference.embedding(ids, qweight, scale, zero, bits, group_size, dtype)

    def dequantize(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> torch.Tensor:
        """Return ``Ŵ [N, K]`` in float32."""
        return reference.dequantize(qweight, scale, zero, spec.bits, spec.group_size)


BLOCKS = BlocksBackend()
