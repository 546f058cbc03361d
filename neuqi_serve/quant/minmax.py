"""Min-Max baselines: the scale comes from the range of the group alone, without looking at the loss."""

from __future__ import annotations

import torch

from neuqi_serve.quant.affine import AffineParams, max_code
from neuqi_serve.quant.storage import Tile, stored_scale, stored_zero


def minmax(tile: Tile, bits: int, dtype: torch.dtype) -> AffineParams:
    """Min-Max with a real zero-point: the baseline that stores exactly as many bytes as NeUQI.

    ``s = (max w − min w)/(2^b − 1)``, ``z = −min w / s``, both rounded to ``dtype``, the scale first.
    """
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    scale = stored_scale((high - low) / max_code(bits), dtype)
    return AffineParams(scale, stored_zero(-low / scale, dtype))


def minmax_integer(tile: Tile, bits: int, dtype: torch.dtype) -> AffineParams:
    """Min-Max as usually deployed: the zero-point is rounded to an integer code within 0 … 2^b − 1.

    The range is widened to include 0, without which no integer zero-point in range fits.
    """
    low = tile.weight.amin(tile.dim, keepdim=True).clamp_(max=0.0)
    high = tile.weight.amax(tile.dim, keepdim=True).clamp_(min=0.0)
    scale = stored_scale((high - low) / max_code(bits), dtype)
    return AffineParams(scale, torch.round(-low / scale).clamp_(0, max_code(bits)))


def minmax_plus(tile: Tile, bits: int, dtype: torch.dtype) -> AffineParams:
    """Min-Max with ``2^b`` cells over the range instead of ``2^b − 1`` steps, best for uniformly spread weights.

    ``s = (max w − min w)/2^b``, ``z = −min w / s − ½``, both rounded to ``dtype``.

    Reference: arXiv:2505.17595 App. A, with a real zero-point.
    """
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    scale = stored_scale((high - low) / (max_code(bits) + 1), dtype)
    return AffineParams(scale, stored_zero(-low / scale - 0.5, dtype))
