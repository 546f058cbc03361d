"""The default solver: over-relaxed alternating least squares from many starts.

For fixed codes the best scale and zero-point are a weighted linear regression of the weights on the codes; for
fixed parameters the best codes are a rounding. Alternating the two never increases the loss but creeps: a pass moves
the parameters only as far as the few codes that changed demand. So each pass overshoots, going several times as far
as the regression says, which also carries it over the many shallow minima; the best regression seen is kept.

A pass is eight sweeps over a tile that stays in the processor's cache, and its sums give the exact loss of its codes
as well, so that starts compete at no further cost.

Slow twin: :func:`neuqi_serve.quant.scale_search.search_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.quant.affine import AffineParams, max_code
from neuqi_serve.quant.storage import Tile


@dataclass(frozen=True)
class Plan:
    """Where the search begins and how the starts are thinned out.

    ``scales``: number of scales, in geometric progression up to Min-Max's. ``centres``: the middle code starts on
    the mean of the group (0), on the middle of its range (1) or between. ``shifts``: moves of that start, in codes.
    ``stages``: (starts kept, passes, overshoot), one after the other.
    """

    scales: int
    centres: tuple[float, ...]
    shifts: tuple[float, ...]
    stages: tuple[tuple[int, int, float], ...]


DEFAULT_PLAN = Plan(6, (0.0, 1.0), (-0.25, 0.25), ((24, 1, 3.0), (8, 3, 3.0), (4, 6, 3.0)))
# For long groups, where one pass does not yet rank the starts, and for uneven importance, which leaves few weights
# that count and thereby many separate minima.
THOROUGH_PLAN = Plan(4, (0.0, 1 / 3, 2 / 3, 1.0), (-0.25, 0.25), ((32, 2, 3.0), (12, 3, 3.0), (4, 7, 4.0)))
EIGHT_BIT_PLAN = Plan(3, (1.0,), (-0.25, 0.25), ((6, 2, 2.0), (3, 3, 2.0)))
LONG_GROUP_SIZE = 512
# Smallest scale tried, as (2^b − 1)·s over the standard deviation: below the best one of Gaussian groups of 64,
# and heavier tails or longer groups only want more.
NARROWEST_SPAN = {2: 2.6, 3: 3.2, 4: 3.7, 8: 8.0}
# The first ratio to Min-Max's scale lies between these: starts stay apart in a compact group, and positive in one
# whose spread vanishes.
FIRST_RATIOS = (0.01, 0.9)
SMALLEST_SPAN = 1e-30


def search(tile: Tile, bits: int) -> list[AffineParams]:
    """Best real parameters of every group of a tile that is centred about its weighted mean.

    Returns the solutions of the last stage, best first by the loss of their codes.

    Reference: arXiv:2505.17595 Eq. 5 for the loss; alternating least squares takes the place of Alg. 2.
    """
    plan = _plan(tile, bits)
    regression = _Regression(tile, bits)
    scale, zero = _starts(tile, bits, plan)
    best_scale, best_zero, best_gain = scale, zero, torch.full_like(scale, -1.0)
    for kept, passes, overshoot in plan.stages:
        if kept < len(scale):
            top = best_gain.topk(kept, 0).indices
            scale, zero = scale.gather(0, top), zero.gather(0, top)
            best_scale, best_zero = best_scale.gather(0, top), best_zero.gather(0, top)
            best_gain = best_gain.gather(0, top)
        for _ in range(passes):
            fitted_scale, fitted_zero, gain = regression.fit(scale, zero)
            better = gain > best_gain
            best_scale = torch.where(better, fitted_scale, best_scale)
            best_zero = torch.where(better, fitted_zero, best_zero)
            best_gain = torch.maximum(gain, best_gain)
            scale = torch.maximum(scale.lerp(fitted_scale, overshoot), 0.5 * fitted_scale)
            zero = zero.lerp(fitted_zero, overshoot)
    order = best_gain.sort(dim=0, descending=True, stable=True).indices
    scale, zero = best_scale.gather(0, order), best_zero.gather(0, order)
    return [AffineParams(scale[i], zero[i]) for i in range(len(order))]


def _plan(tile: Tile, bits: int) -> Plan:
    if bits == 8:
        return EIGHT_BIT_PLAN
    thorough = tile.importance is not None or tile.group_size >= LONG_GROUP_SIZE
    return THOROUGH_PLAN if thorough else DEFAULT_PLAN


def _starts(tile: Tile, bits: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """Scales and zero-points of all starts, each ``[starts, …]``."""
    top = max_code(bits)
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    span = (high - low).clamp_(min=SMALLEST_SPAN)
    spread = tile.mean(tile.weight.square()).sqrt_()
    first = (NARROWEST_SPAN[bits] * spread / span).clamp_(*FIRST_RATIOS)
    scales, zeros = [], []
    for i in range(plan.scales):
        scale = span / top * first ** (1.0 - i / (plan.scales - 1))
        for centre in plan.centres:
            zero = 0.5 * top - 0.5 * centre * (high + low) / scale
            for shift in plan.shifts:
                scales.append(scale)
                zeros.append(zero + shift)
    return torch.stack(scales), torch.stack(zeros)


class _Regression:
    """Regression of a tile's weights on their codes; its work arrays serve all passes."""

    def __init__(self, tile: Tile, bits: int) -> None:
        self.tile = tile
        self.top = max_code(bits)
        self.weighted = tile.weight if tile.importance is None else tile.weight * tile.importance
        self.codes = torch.empty_like(tile.weight)
        self.product = torch.empty_like(tile.weight)

    def fit(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters that fit best the codes of each start, and what these take off the loss.

        With means over the group weighted by h, and w of mean 0: ``s = mean(q·w)/var(q)``, ``z = mean(q)``; the loss
        over the group size is ``mean(w²) − s·mean(q·w)``. Where all codes are equal the parameters stay and the gain
        is 0. All arrays ``[starts, …]``.
        """
        first, second, cross = torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(scale)
        inverse = scale.reciprocal()
        for i in range(len(scale)):
            self._sums(inverse[i], zero[i], first[i], second[i], cross[i])
        first /= self.tile.group_size
        cross /= self.tile.group_size
        variance = second.div_(self.tile.group_size).addcmul_(first, first, value=-1.0)
        fits = (variance > 0.0) & (cross > 0.0)
        fitted = cross / variance
        gain = torch.where(fits, fitted * cross, 0.0)
        return torch.where(fits, fitted, scale), torch.where(fits, first, zero), gain

    def _sums(self, inverse: Tensor, zero: Tensor, first: Tensor, second: Tensor, cross: Tensor) -> None:
        """Sums of h·q, h·q² and h·q·w over each group, for one start."""
        tile, codes, product = self.tile, self.codes, self.product
        torch.addcmul(zero, tile.weight, inverse, out=codes)
        codes.round_().clamp_(0, self.top)
        torch.sum(torch.mul(codes, self.weighted, out=product), tile.dim, keepdim=True, out=cross)
        weighted = codes if tile.importance is None else torch.mul(codes, tile.importance, out=product)
        torch.sum(weighted, tile.dim, keepdim=True, out=first)
        torch.sum(torch.mul(weighted, codes, out=product), tile.dim, keepdim=True, out=second)
