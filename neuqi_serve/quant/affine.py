"""The quantizer: integer codes, a scale and a real zero-point per group, ``w ≈ (q − zero)·scale``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError


@dataclass(frozen=True)
class AffineParams:
    """Quantization parameters, one pair per group: ``scale`` in weight units, ``zero`` real, in code units."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: ``codes`` uint8 ``[N, K]``, ``scale`` and ``zero`` ``[N, G]`` as stored."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def max_code(bits: int) -> int:
    """Largest code, ``2^b − 1``."""
    return (1 << bits) - 1


def quantize(weight: Tensor, params: AffineParams, bits: int) -> Tensor:
    """Codes of a weight matrix under given parameters.

    ``q = clip(round(w/scale + zero), 0, 2^b − 1)``, computed in float32 from the parameters as stored.

    ``weight`` ``[N, K]``, ``params`` ``[N, G]``; returns uint8 ``[N, K]``.

    Raises:
        UsageError: G does not divide K.

    Reference: arXiv:2505.17595 §2 (levels ``scale·(q − zero)`` with a real zero-point).
    """
    groups = _grouped(weight.float(), params.scale)
    steps = groups / params.scale.float().unsqueeze(-1) + params.zero.float().unsqueeze(-1)
    return steps.round_().clamp_(0, max_code(bits)).to(torch.uint8).view(weight.shape)


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights that the codes stand for: ``(q − zero)·scale``, computed in float32, ``[N, K]`` of ``dtype``.

    Raises:
        UsageError: G does not divide K.
    """
    groups = _grouped(quantized.codes.float(), quantized.scale)
    groups -= quantized.zero.float().unsqueeze(-1)
    groups *= quantized.scale.float().unsqueeze(-1)
    return groups.view(quantized.codes.shape).to(dtype)


def _grouped(matrix: Tensor, scale: Tensor) -> Tensor:
    """View ``[N, K]`` as ``[N, G, g]``."""
    rows, columns = matrix.shape
    if scale.shape[0] != rows or columns % scale.shape[1]:
        raise UsageError(
            f"expected a scale [N, G] with N = {rows} and G dividing K = {columns}, got {list(scale.shape)}. "
            "Pass the scale and zero of this very matrix."
        )
    return matrix.reshape(rows, scale.shape[1], -1)
