"""The reference solver: NeUQI's coarse-to-fine scale search with an exact zero-point search at every scale.

The definition that the fast solver (:mod:`neuqi_serve.quant.fast`) approximates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.quant.affine import AffineParams, max_code
from neuqi_serve.quant.zero_point import SortedGroups, solve_zero

FINE_STEPS = 2048
COARSE_STEPS = 64
# Weights at a time: the search holds some twenty arrays of this size, in float32 about 20 MB.
CHUNK_ELEMENTS = 1 << 18


def search_scale(
    groups: Tensor, importance: Tensor | None, bits: int, dtype: torch.dtype = torch.float32
) -> AffineParams:
    """Scale and zero-point of every group by 96 zero-point solves.

    With ``s_max = (max w − min w)/(2^b − 1)``: first ``s_max·i/64`` for i = 1 … 64, then ``s_max/2048`` apart on both
    sides of the best of these, 16 steps each way. The best pair of all is kept, of equal ones the first.

    ``groups`` ``[R, n]``, not constant and centred about 0 by the caller where an offset matters; ``importance``
    ``[R, n]`` or None for ones. Searched in ``dtype``; returns scale and zero ``[R]`` in it.

    Reference: arXiv:2505.17595 §3.3, Eq. 9 (T = 2048, T_c = 64).
    """
    rows = max(1, CHUNK_ELEMENTS // groups.shape[-1])
    scale = groups.new_empty(groups.shape[0], dtype=dtype)
    zero = torch.empty_like(scale)
    for start in range(0, groups.shape[0], rows):
        part = slice(start, start + rows)
        weight = groups[part].to(dtype)
        mass = torch.ones_like(weight) if importance is None else importance[part].to(dtype)
        scale[part], zero[part] = _search(weight, mass, bits)
    return AffineParams(scale, zero)


def _search(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    prepared = SortedGroups.of(weight, importance)
    largest = (weight.amax(-1) - weight.amin(-1)) / max_code(bits)
    scale = largest.clone()
    zero = torch.zeros_like(scale)
    loss = torch.full_like(scale, float("inf"))

    def consider(candidate: Tensor) -> None:
        nonlocal scale, zero, loss
        candidate_zero, candidate_loss = solve_zero(weight, importance, candidate, bits, prepared)
        better = candidate_loss < loss
        scale = torch.where(better, candidate, scale)
        zero = torch.where(better, candidate_zero, zero)
        loss = torch.where(better, candidate_loss, loss)

    for i in range(1, COARSE_STEPS + 1):
        consider(largest * (i / COARSE_STEPS))
    coarse = scale
    reach = FINE_STEPS // COARSE_STEPS // 2
    for j in range(-reach, reach + 1):
        if j:
            consider(coarse + largest * (j / FINE_STEPS))
    return scale, zero
