"""From real parameters to stored ones: round scale and zero-point to their dtype, and choose among candidates.

Everything is judged after rounding: codes are computed with the stored scale and zero-point, and so is the loss
that picks the winner. That matters where a group sits far from 0: weights 5 ± 0.001 want a zero-point near −10⁴,
which float16 holds only to several codes.

A tile holds many groups, along ``dim``: ``[n, C]`` with ``dim = 0`` (a group is a column) or ``[C, n]`` with
``dim = −1``. Parameters have the tile's shape with ``dim`` kept as 1, so that they broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.affine import AffineParams, max_code

# Squares of larger weights leave float32.
LARGEST_WEIGHT = 1e18


@dataclass(frozen=True)
class Tile:
    """Groups prepared for a solver: float32 ``weight``, ``importance`` of mean 1 per group or None, ``dim``."""

    weight: Tensor
    importance: Tensor | None
    dim: int

    @property
    def group_size(self) -> int:
        """Weights per group."""
        return self.weight.shape[self.dim]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of each group weighted by importance; ``values`` has the tile's shape."""
        weighted = values if self.importance is None else values * self.importance
        return weighted.sum(self.dim, keepdim=True) / self.group_size


def normalized_importance(importance: Tensor, dim: int) -> Tensor:
    """Importance scaled to mean 1 in every group, float32; a group without any (Σh ≤ 0) gets ones."""
    mean = importance.double().mean(dim, keepdim=True)
    return torch.where(mean > 0, importance.double() / mean, 1.0).float()


def storage_dtype(spec: WeightSpec) -> torch.dtype:
    """Dtype in which scales and zero-points are stored."""
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[spec.scale_dtype]


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale rounded to ``dtype`` and kept in its normal range (no subnormals, no infinity), as float32."""
    limits = torch.finfo(dtype)
    return scale.clamp(limits.tiny, limits.max).to(dtype).float()


def stored_zero(zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero-point rounded to ``dtype``, at most its largest finite value, as float32."""
    limits = torch.finfo(dtype)
    # Adding 0 turns −0 into 0.
    return zero.clamp(-limits.max, limits.max).to(dtype).float() + 0.0


def codes_of(tile: Tile, params: AffineParams, bits: int) -> Tensor:
    """``clip(round(w/scale + zero), 0, 2^b − 1)`` as float32, bit for bit as ``affine.quantize`` does."""
    steps = tile.weight / params.scale
    return steps.add_(params.zero).round_().clamp_(0, max_code(bits))


def stored_loss(tile: Tile, params: AffineParams, bits: int) -> Tensor:
    """Mean over each group of the weighted squared error under stored parameters, float32.

    The slow twin is :func:`neuqi_serve.quant.objective.weighted_loss`, which sums.
    """
    error = codes_of(tile, params, bits)
    error -= params.zero
    error *= params.scale
    error -= tile.weight
    return tile.mean(error.square_())


def refit_zero(tile: Tile, mean: Tensor, params: AffineParams, bits: int, dtype: torch.dtype) -> AffineParams:
    """Stored form of real parameters: the scale rounded, then the zero-point fitted to that scale and rounded.

    At fixed codes the best zero-point is ``mean(q) − mean(w)/s``. ``tile`` and ``params`` may be of weights moved by a
    constant, while ``mean`` is that of the weights as they are: far from 0, the codes of a moved group survive the
    rounding of the scale, which a zero-point of many codes does not.
    """
    scale = stored_scale(params.scale, dtype)
    codes = torch.addcmul(params.zero, tile.weight, scale.reciprocal())
    codes.round_().clamp_(0, max_code(bits))
    return AffineParams(scale, stored_zero(tile.mean(codes) - mean / scale, dtype))


def constant_params(centre: Tensor, dtype: torch.dtype) -> AffineParams:
    """Stored parameters that represent one value per group: ``scale = |c|`` and code 1 (c > 0) or 0.

    The zero-point is 0 or 1, less what the rounding of the scale has to make up for. For ``c = 0``: scale 1, zero 0.
    """
    scale = stored_scale(torch.where(centre == 0, 1.0, centre.abs()), dtype)
    code = (centre > 0).float()
    return AffineParams(scale, stored_zero(code - centre / scale, dtype))


def choose(tile: Tile, candidates: Sequence[AffineParams], bits: int) -> AffineParams:
    """The candidate of least stored loss in each group, of equal ones the first."""
    best = candidates[0]
    least = stored_loss(tile, best, bits)
    for candidate in candidates[1:]:
        loss = stored_loss(tile, candidate, bits)
        better = loss < least
        scale = torch.where(better, candidate.scale, best.scale)
        best = AffineParams(scale, torch.where(better, candidate.zero, best.zero))
        least = torch.minimum(loss, least)
    return best
