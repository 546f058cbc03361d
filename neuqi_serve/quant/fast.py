"""The default solver: alternating least squares from many starts.

For fixed codes the best scale and zero-point are a weighted linear regression of the weights on the codes; for
fixed parameters the best codes are a rounding. Alternating the two never increases the loss. A pass is a few sweeps
over a tile that stays in the processor's cache, and its sums also give the exact loss of its codes, so many starts
are affordable: all of them run one pass, the best few are polished.

Slow twin: :func:`neuqi_serve.quant.scale_search.search_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.quant.affine import AffineParams, max_code
from neuqi_serve.quant.storage import Tile


@dataclass(frozen=True)
class Starts:
    """Where the search begins: ``ratios`` of the Min-Max scale, each with every zero-point of ``shifts``.

    A zero-point start puts the middle of the range (or the mean, see ``centres``) on the middle code, then moves it
    by a fraction of a code. ``kept`` best starts get ``polish`` further passes.
    """

    ratios: tuple[float, ...]
    centres: tuple[float, ...]
    shifts: tuple[float, ...]
    kept: int
    polish: int


def _spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(low + (high - low) * i / (count - 1) for i in range(count))


STARTS = Starts(_spaced(0.3, 1.0, 16), (0.0, 1.0), (-0.25, 0.25), kept=8, polish=4)
STARTS_8_BIT = Starts(_spaced(0.93, 1.0, 4), (1.0,), (0.0,), kept=2, polish=3)


def search(tile: Tile, bits: int) -> list[AffineParams]:
    """Best real parameters of every group of a tile that is centred about its weighted mean.

    Returns the ``kept`` polished solutions, best first by the loss of their codes.

    Reference: arXiv:2505.17595 Eq. 5 for the loss; the search is alternating least squares instead of Alg. 2.
    """
    starts = STARTS_8_BIT if bits == 8 else STARTS
    passes = _Passes(tile, bits)
    scale, zero = _first_params(tile, bits, starts)
    scale, zero, gain = passes.run(scale, zero)
    best = gain.topk(min(starts.kept, len(gain)), 0).indices
    scale, zero = scale.gather(0, best), zero.gather(0, best)
    for _ in range(starts.polish):
        scale, zero, gain = passes.run(scale, zero)
    order = gain.sort(dim=0, descending=True, stable=True).indices
    scale, zero = scale.gather(0, order), zero.gather(0, order)
    return [AffineParams(scale[i], zero[i]) for i in range(len(order))]


def _first_params(tile: Tile, bits: int, starts: Starts) -> tuple[Tensor, Tensor]:
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    largest = ((high - low) / max_code(bits)).clamp_(min=torch.finfo(torch.float32).tiny)
    middle = 0.5 * (high + low)
    scales, zeros = [], []
    for ratio in starts.ratios:
        scale = largest * ratio
        for centre in starts.centres:
            zero = 0.5 * max_code(bits) - centre * middle / scale
            for shift in starts.shifts:
                scales.append(scale)
                zeros.append(zero + shift)
    return torch.stack(scales), torch.stack(zeros)


class _Passes:
    """One pass of alternating least squares for a stack of starts, with buffers reused between passes."""

    def __init__(self, tile: Tile, bits: int) -> None:
        self.tile = tile
        self.top = max_code(bits)
        self.codes = torch.empty_like(tile.weight)
        self.product = torch.empty_like(tile.weight)
        weighted = tile.weight if tile.importance is None else tile.weight * tile.importance
        self.weighted = weighted

    def run(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of each start, then the best parameters for them and what they take off the loss.

        With means over the group weighted by h and w of mean 0: ``s = mean(q·w)/var(q)``, ``z = mean(q)``, and the
        loss is ``mean(w²) − mean(q·w)²/var(q)``. ``scale`` and ``zero`` ``[starts, …]``.
        """
        first, second, cross = torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(scale)
        inverse = scale.reciprocal()
        for i in range(len(scale)):
            self._sums(inverse[i], zero[i], first[i], second[i], cross[i])
        first /= self.tile.group_size
        variance = (second / self.tile.group_size).addcmul_(first, first, value=-1.0)
        cross /= self.tile.group_size
        spread = (variance > 0) & (cross > 0)
        fitted = cross / variance
        gain = torch.where(spread, fitted * cross, 0.0)
        return torch.where(spread, fitted, scale), torch.where(spread, first, zero), gain

    def _sums(self, inverse: Tensor, zero: Tensor, first: Tensor, second: Tensor, cross: Tensor) -> None:
        tile, codes, product = self.tile, self.codes, self.product
        torch.addcmul(zero, tile.weight, inverse, out=codes)
        codes.round_().clamp_(0, self.top)
        torch.sum(torch.mul(codes, self.weighted, out=product), tile.dim, keepdim=True, out=cross)
        weighted = codes if tile.importance is None else torch.mul(codes, tile.importance, out=product)
        torch.sum(weighted, tile.dim, keepdim=True, out=first)
        torch.sum(torch.mul(weighted, codes, out=product), tile.dim, keepdim=True, out=second)
