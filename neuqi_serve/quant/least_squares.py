"""The search of the presets ``balanced`` and ``fast``: over-relaxed alternating least squares from a grid of starts.

For fixed codes the best scale and zero-point are a weighted linear regression of the weights on the codes; for
fixed parameters the best codes are a rounding. Alternating the two never increases the loss but creeps: a pass moves
the parameters only as far as the few codes that changed demand. So each pass overshoots, going several times as far
as the regression says, which also carries it over the many shallow minima; the best regression seen is kept. The sums
of a pass give the exact loss of its codes as well, so that starts compete at no further cost.

Starts are a grid: scales in geometric progression, and at each of them zero-points around the one that balances what
the codes cut off at either end, which is where the paper's convex surrogate is least.

This is the slow twin of ``neuqi_kernels/csrc/quantize_search.h`` and ``neuqi_kernels/gpu/quantize.py``, and what runs
where neither does. What all of them approximate: :func:`neuqi_serve.quant.scale_search.search_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_kernels.search_plan import NEIGHBOURS, SearchPlan
from neuqi_serve.quant.affine import AffineParams, max_code
from neuqi_serve.quant.storage import Tile

# The smallest ratio to Min-Max's scale lies between these: starts stay apart in a compact group, and positive in one
# whose spread vanishes.
RATIOS = (0.01, 0.9)
SMALLEST_SPAN = 1e-30
# Codes hardly vary below this variance: all of them are equal but for rounding.
LEAST_VARIANCE = 1e-12
LONGEST_STEP = 4.0


@dataclass
class _Points:
    """Candidates ``[starts, …]``: parameters, and what they take off the mean square of the weights."""

    scale: Tensor
    zero: Tensor
    gain: Tensor

    def best(self, count: int, dim: int = 0) -> _Points:
        """The ``count`` of largest gain, best first."""
        top = self.gain.topk(count, dim).indices
        return _Points(*(values.gather(dim, top) for values in (self.scale, self.zero, self.gain)))


def search(tile: Tile, bits: int, plan: SearchPlan) -> list[AffineParams]:
    """Best real parameters of every group of a tile that is centred about its weighted mean.

    Returns the solutions of the last stage, best first by the loss of their codes.

    Reference: arXiv:2505.17595 Eq. 5 for the loss, Eq. 8 for the surrogate; alternating least squares takes the place
    of Alg. 2.
    """
    regression = _Regression(tile, bits)
    points = _scan(tile, bits, plan, regression)
    for kept, passes in zip(plan.kept, plan.passes, strict=True):
        points = points.best(min(kept, len(points.scale)))
        points = regression.refine(points, passes, plan.overshoot)
    points = points.best(len(points.scale))
    return [AffineParams(points.scale[i], points.zero[i]) for i in range(len(points.scale))]


def _scan(tile: Tile, bits: int, plan: SearchPlan, regression: _Regression) -> _Points:
    """The best of every few neighbours of the grid."""
    top = max_code(bits)
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    span = (high - low).clamp_(min=SMALLEST_SPAN)
    spread = tile.mean(tile.weight.square()).sqrt_()
    factor = (plan.narrowest * spread / span).clamp_(*RATIOS).pow_(0.5**plan.halvings)
    shifts = [((phase + 0.5) / plan.phases - 0.5) * plan.window for phase in range(plan.phases)]
    scale, centre = span / top, 0.5 * (low + high)
    found = []
    for _ in range(plan.scales):
        zero = 0.5 * top - centre / scale
        for _ in range(plan.centring):
            zero = zero - regression.centring_step(scale, zero)
        # The next scale starts from the same centre, in units of the weight.
        centre = (0.5 * top - zero) * scale
        zeros = torch.stack([zero + shift for shift in shifts])
        scales = scale.expand_as(zeros)
        starts = _Points(scales, zeros, torch.full_like(zeros, -1.0))
        points = regression.refine(starts, plan.refinements, plan.overshoot)
        for first in range(0, plan.phases, NEIGHBOURS):
            part = slice(first, first + NEIGHBOURS)
            neighbours = _Points(points.scale[part], points.zero[part], points.gain[part])
            found.append(neighbours.best(1))
        scale = scale * factor
    return _Points(*(torch.cat([getattr(p, name) for p in found]) for name in ("scale", "zero", "gain")))


class _Regression:
    """Regression of a tile's weights on their codes; its work arrays serve all passes."""

    def __init__(self, tile: Tile, bits: int) -> None:
        self.tile = tile
        self.top = max_code(bits)
        self.weighted = tile.weight if tile.importance is None else tile.weight * tile.importance
        self.codes = torch.empty_like(tile.weight)
        self.product = torch.empty_like(tile.weight)

    def refine(self, points: _Points, passes: int, overshoot: float) -> _Points:
        """``passes`` regressions from each point, with the best that was seen."""
        scale, zero = points.scale, points.zero
        best_scale, best_zero, best_gain = points.scale, points.zero, points.gain
        for _ in range(passes):
            fitted_scale, fitted_zero, gain = self.fit(scale, zero)
            better = gain > best_gain
            best_scale = torch.where(better, fitted_scale, best_scale)
            best_zero = torch.where(better, fitted_zero, best_zero)
            best_gain = torch.maximum(gain, best_gain)
            scale = torch.maximum(scale.lerp(fitted_scale, overshoot), 0.5 * fitted_scale)
            zero = zero.lerp(fitted_zero, overshoot)
        return _Points(best_scale, best_zero, best_gain)

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
        fits = (variance > LEAST_VARIANCE) & (cross > 0.0)
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

    def centring_step(self, scale: Tensor, zero: Tensor) -> Tensor:
        """How far the zero-point is above the one that balances both ends, by Newton's method.

        What lies below the first code and above the last pulls on the zero-point, each by its distance; the pull
        never decreases with the zero-point, so that its root is the minimum of the surrogate. 0 where nothing pulls.
        """
        tile, steps = self.tile, self.codes
        torch.addcmul(zero, tile.weight, scale.reciprocal(), out=steps)
        outside = ((steps < -0.5) | (steps > self.top + 0.5)).float()
        if tile.importance is not None:
            outside *= tile.importance
        steps.sub_((steps > self.top + 0.5).float(), alpha=self.top)
        pull = (steps * outside).sum(tile.dim, keepdim=True)
        curvature = outside.sum(tile.dim, keepdim=True).clamp_(min=1e-6)
        return (pull / curvature).clamp_(-LONGEST_STEP, LONGEST_STEP)
