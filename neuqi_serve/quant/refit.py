"""Refit scales and zero-points of a row under the whole Hessian, its codes fixed.

The weights that codes stand for are linear in ``(s_g, b_g)`` with ``b_g = −s_g·z_g``: ``ŵ_i = s_g q_i + b_g``. So the
best parameters of all G groups of a row, together, are the solution of a system of 2G equations. They are rounded to
their storage dtype, and a row keeps its old parameters unless the stored new ones have the smaller loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, dequantize
from neuqi_serve.quant.hessian import proxy_loss
from neuqi_serve.quant.storage import stored_scale, stored_zero

# Against equal codes in a group, where scale and offset are one: the change stays small along what the loss ignores.
RIDGE = 1e-9
# Values of the normal matrices held at a time (float64).
CHUNK_VALUES = 1 << 24


def refit(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> AffineParams:
    """Stored scales and zero-points ``[N, G]`` of least ``(ŵ − w) H (ŵ − w)ᵀ`` for the given codes.

    ``weight`` ``[N, K]``, ``hessian`` ``[K, K]`` damped. Never raises the loss of a row; rows are independent.
    """
    groups = quantized.scale.shape[1]
    rows = max(1, CHUNK_VALUES // max(1, (2 * groups) ** 2, weight.shape[1]))
    matrix = hessian.double()
    sums = matrix.view(groups, -1, groups, weight.shape[1] // groups).sum(3)
    parts = [
        _refit_rows(
            weight[start : start + rows],
            QuantizedWeight(*(one[start : start + rows] for one in _fields(quantized))),
            matrix,
            sums,
        )
        for start in range(0, weight.shape[0], rows)
    ]
    return AffineParams(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def _fields(quantized: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return quantized.codes, quantized.scale, quantized.zero


def _refit_rows(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, sums: Tensor) -> AffineParams:
    """``sums`` ``[G, g, G]``: H summed over the columns of each group."""
    count, groups = quantized.scale.shape
    codes = quantized.codes.double()
    error = weight.double() - dequantize(quantized, torch.float64)
    normal = _normal_matrix(codes.view(count, groups, -1), hessian, sums)
    pull = (error @ hessian).view(count, groups, -1)
    right = torch.cat([(pull * codes.view(count, groups, -1)).sum(2), pull.sum(2)], 1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.amax(1, keepdim=True)
    change = torch.linalg.solve(normal, right)
    old_scale, old_zero = quantized.scale.double(), quantized.zero.double()
    scale = old_scale + change[:, :groups]
    offset = change[:, groups:] - old_scale * old_zero
    stored = _stored(scale, offset, codes.view(count, groups, -1), quantized)
    candidate = QuantizedWeight(quantized.codes, stored.scale, stored.zero)
    after = proxy_loss(dequantize(candidate, torch.float64) - weight.double(), hessian)
    better = (after < proxy_loss(error, hessian)).unsqueeze(1)
    return AffineParams(
        torch.where(better, stored.scale, quantized.scale), torch.where(better, stored.zero, quantized.zero)
    )


def _normal_matrix(codes: Tensor, hessian: Tensor, sums: Tensor) -> Tensor:
    """``AᵀHA`` ``[N, 2G, 2G]`` of each row, where A has a group's codes in column g and its ones in column G + g."""
    count, groups, size = codes.shape
    products = torch.empty(count, groups, groups, dtype=torch.float64, device=codes.device)
    rows = hessian.view(groups, size, -1)
    for group in range(groups):
        mixed = (codes[:, group] @ rows[group]).view(count, groups, size)
        products[:, group] = (mixed * codes).sum(2)
    crossed = torch.einsum("ngi,gih->ngh", codes, sums)
    ones = sums.sum(1).expand(count, groups, groups)
    upper = torch.cat([products, crossed], 2)
    return torch.cat([upper, torch.cat([crossed.transpose(1, 2), ones], 2)], 1)


def _stored(scale: Tensor, offset: Tensor, codes: Tensor, old: QuantizedWeight) -> AffineParams:
    """Round to the storage dtype, the scale first; the zero-point keeps the group's mean where it was.

    A group whose solution is no scale keeps its parameters.
    """
    dtype = old.scale.dtype
    rounded = stored_scale(scale.float(), dtype)
    mean = codes.mean(2)
    zero = mean - (scale * mean + offset) / rounded.double()
    usable = (scale > torch.finfo(dtype).tiny) & zero.isfinite()
    return AffineParams(
        torch.where(usable, rounded.to(dtype), old.scale),
        torch.where(usable, stored_zero(zero.float(), dtype).to(dtype), old.zero),
    )
