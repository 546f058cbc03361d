"""The definition of the operator: unpack, dequantize, multiply, in float32. Every kernel is tested against this."""

from __future__ import annotations

import torch

from neuqi_kernels.layout import unpack


def dequantize(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``Ŵ = (q − zero)·scale`` as ``[N, K]``, computed in float32 and rounded to ``dtype`` last.

    ``qweight [N, K·bits/32]`` int32 in the canonical layout, ``scale, zero [N, G]`` of any floating dtype.

    Raises:
        ValueError: the shapes do not belong together.
    """
    codes = unpack(qweight, bits)
    rows, in_features = codes.shape
    group = in_features if group_size == -1 else group_size
    if (
        group <= 0
        or in_features % group
        or scale.shape != (rows, in_features // group)
        or zero.shape != scale.shape
    ):
        raise ValueError(
            f"expected scale and zero as [N, G] for N={rows}, K={in_features} and group size {group_size}, got "
            f"{list(scale.shape)} and {list(zero.shape)}. Were they packed with another group size?"
        )
    grouped = codes.view(rows, in_features // group, group).to(torch.float32)
    weight = (grouped - zero.to(torch.float32).unsqueeze(-1)) * scale.to(torch.float32).unsqueeze(-1)
    return weight.view(rows, in_features).to(dtype)


def gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Return ``y = x·Ŵᵀ + bias`` as ``[..., N]`` in the dtype of ``x [..., K]``, accumulated in float32."""
    weight = dequantize(qweight, scale, zero, bits, group_size)
    y = torch.matmul(x.to(torch.float32), weight.t())
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def embedding(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the rows ``ids [...]`` (integers below N) of ``Ŵ`` as ``[..., K]`` in ``dtype``."""
    rows = ids.reshape(-1)
    weight = dequantize(qweight[rows], scale[rows], zero[rows], bits, group_size, dtype)
    return weight.view(*ids.shape, weight.shape[-1])
