"""Initialisations that the paper compares NeUQI with, as it defines them, with the stored size that each has.

Reference: arXiv:2505.17595, Tables 4 and 9, App. A, App. D.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, max_code, quantize
from neuqi_serve.quant.minmax import minmax_integer
from neuqi_serve.quant.quantize import quantize_weight
from neuqi_serve.quant.storage import Tile, storage_dtype, stored_scale

# Scales of the grid: s_max·i/T for i = 1 … T.
SCALES = 2048
CHUNK = 1 << 24

# (weight [N, K], spec, importance [K] or None) → what is stored.
Initialisation = Callable[[Tensor, WeightSpec, Tensor | None], QuantizedWeight]


def minmax_plus_integer(tile: Tile, bits: int, dtype: torch.dtype) -> AffineParams:
    """Min-Max+: ``s = (max w − min w)/2^b``, ``z = −⌊min w/s + ½⌉``."""
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    scale = stored_scale((high - low) / (max_code(bits) + 1), dtype)
    return AffineParams(scale, -torch.round(low / scale + 0.5))


def integer_search(tile: Tile, bits: int, dtype: torch.dtype, scales: int = SCALES) -> AffineParams:
    """Int-Search (NeUQI_int): the best of all scales of the grid and all integer zero-points 0 … 2^b − 1.

    ``tile`` ``[C, n]`` with ``dim`` −1.
    """
    rows = max(1, CHUNK // tile.weight.shape[1])
    limit = max_code(bits)
    largest = (tile.weight.amax(-1, keepdim=True) - tile.weight.amin(-1, keepdim=True)) / limit
    best_scale, best_zero = largest.clone(), torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for start in range(0, len(tile.weight), rows):
        part = slice(start, start + rows)
        weight = tile.weight[part]
        mass = None if tile.importance is None else tile.importance[part]
        for number in range(1, scales + 1):
            scale = stored_scale(largest[part] * (number / scales), dtype)
            steps = weight / scale
            for zero in range(limit + 1):
                error = (steps + zero).round_().clamp_(0, limit).sub_(zero).mul_(scale).sub_(weight).square_()
                loss = (error if mass is None else error * mass).sum(-1, keepdim=True)
                better = loss < least[part]
                least[part] = torch.where(better, loss, least[part])
                best_scale[part] = torch.where(better, scale, best_scale[part])
                best_zero[part] = torch.where(better, float(zero), best_zero[part])
    return AffineParams(best_scale, best_zero)


def _with(
    solve: Callable[[Tile, int, torch.dtype], AffineParams],
    weight: Tensor,
    spec: WeightSpec,
    importance: Tensor | None,
) -> QuantizedWeight:
    count, dtype = spec.groups(weight.shape[1]), storage_dtype(spec)
    groups = weight.float().reshape(weight.shape[0] * count, -1)
    mass = None
    if importance is not None:
        mass = importance.float().view(count, -1).repeat(weight.shape[0], 1)
    params = solve(Tile(groups, mass, -1), spec.bits, dtype)
    stored = AffineParams(*(one.view(-1, count).to(dtype) for one in (params.scale, params.zero)))
    return QuantizedWeight(quantize(weight, stored, spec.bits), stored.scale, stored.zero)


def _neuqi(
    preset: str, weighted: bool, weight: Tensor, spec: WeightSpec, importance: Tensor | None
) -> QuantizedWeight:
    return quantize_weight(weight, spec, importance if weighted else None, preset)


INITIALISATIONS: dict[str, Initialisation] = {
    "min-max integer": partial(_with, minmax_integer),
    "min-max": partial(_neuqi, "minmax", False),
    "min-max+": partial(_with, minmax_plus_integer),
    "integer search": partial(_with, partial(integer_search, scales=256)),
    "neuqi": partial(_neuqi, "balanced", True),
}
INTEGER_ZERO = ("min-max integer", "min-max+", "integer search")


def bits_per_weight(initialisation: str, spec: WeightSpec, columns: int) -> float:
    """Stored bits per weight; an integer zero-point takes as many bits as a code."""
    if initialisation in INTEGER_ZERO:
        return spec.bits + (16 + spec.bits) * spec.groups(columns) / columns
    return spec.bits_per_weight(columns)
