"""Coordinate descent on codes: each code in turn becomes the best one, all others as they are, under the full Hessian.

Rounding with feedback decides a column once, knowing only what was decided before it. Going over the columns again,
each code can answer to all others. No step raises the loss, so any number of sweeps may follow any rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.quant.affine import QuantizedWeight, dequantize, max_code
from neuqi_serve.quant.hessian import activation_order

DEFAULT_BLOCK = 128


def descend(
    weight: Tensor,
    quantized: QuantizedWeight,
    hessian: Tensor,
    bits: int,
    sweeps: int = 1,
    block_size: int = DEFAULT_BLOCK,
) -> Tensor:
    """Codes uint8 ``[N, K]`` whose ``(w − ŵ) H (w − ŵ)ᵀ`` is at most that of the given ones, row by row.

    With ``p = (w − ŵ) H``, column i alone is best at ``ŵ_i + p_i/H_ii``, which is rounded to a code.

    ``weight`` ``[N, K]`` (float64 stays float64, else float32), ``hessian`` ``[K, K]`` damped; columns go by falling
    diagonal, ``block_size`` of them between two products with all of H.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    order = activation_order(hessian)
    matrix = hessian[order][:, order].to(dtype)
    error = (weight.detach().to(dtype) - dequantize(quantized, dtype)).T[order].contiguous()
    codes = quantized.codes.T[order].contiguous()
    groups = (order // (weight.shape[1] // quantized.scale.shape[1])).tolist()
    steps = quantized.scale.to(dtype).T.contiguous()
    top = max_code(bits)
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, len(codes), block_size):
            stop = min(start + block_size, len(codes))
            pull = matrix[start:stop] @ error
            for i in range(start, stop):
                step = steps[groups[i]]
                old = codes[i].to(dtype)
                moved = pull[i - start] / (step * matrix[i, i])
                code = (old + moved).round_().clamp_(0, top)
                change = code.sub(old).mul_(step)
                codes[i] = code.to(torch.uint8)
                error[i] -= change
                pull.addr_(matrix[start:stop, i], change, alpha=-1.0)
        if torch.equal(before, codes):
            break
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()
