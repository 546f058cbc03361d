"""Rounding with feedback (LDLQ, the same as GPTQ): what a column's rounding breaks, later columns make up for.

With ``H = U D Uᵀ`` (U unit upper triangular), ``tr(E H Eᵀ) = Σ_i D_i ‖(E U)_i‖²`` for ``E = W − Ŵ``. Column i of
``E U`` is ``w_i + Σ_{j<i} U_ji (w_j − ŵ_j) − ŵ_i``: rounding that sum, rather than ``w_i``, makes its term as small as
a rounding can.

Codes are those of the *stored* scale and zero-point of each column's own group, whatever the order of rounding: nothing
is permuted at inference. The parameters may come from any initialisation; Min-Max ones make it GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError
from neuqi_serve.quant.affine import max_code
from neuqi_serve.quant.hessian import FeedbackFactor, feedback_factor

DEFAULT_BLOCK = 128


def round_ldlq(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = -1,
    act_order: bool = True,
    block_size: int = DEFAULT_BLOCK,
) -> Tensor:
    """Codes uint8 ``[N, K]`` of a weight ``[N, K]`` under given scales and zero-points ``[N, G]``.

    Args:
        weight: any floating dtype; rounded in float32 (float64 stays float64).
        scale: as stored, as is ``zero``.
        zero: real, in code units.
        hessian: ``[K, K]``, damped (``hessian.damped``).
        bits: bits per code.
        group_size: inputs that share a scale, −1 for the whole row.
        act_order: round columns by falling diagonal of H.
        block_size: columns between two updates of all later ones; the result depends on it by rounding errors only.

    Raises:
        UsageError: shapes that do not fit, or a Hessian that cannot be factored.
    """
    return round_with_factor(
        weight, scale, zero, feedback_factor(hessian, act_order), bits, group_size, block_size
    )


def round_with_factor(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    factor: FeedbackFactor,
    bits: int,
    group_size: int = -1,
    block_size: int = DEFAULT_BLOCK,
) -> Tensor:
    """:func:`round_ldlq` with the Hessian factored already, which layers of one input share."""
    _check(weight, scale, zero, factor, group_size, block_size)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    groups = _group_of(factor, weight.shape[1], group_size)
    # Transposed, a column of W is contiguous.
    columns = weight.detach().to(dtype).T[factor.order].contiguous()
    steps, offsets = scale.to(dtype).T.contiguous(), zero.to(dtype).T.contiguous()
    upper = factor.upper.to(dtype)
    error = torch.zeros_like(columns)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    top = max_code(bits)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        target = columns[start:stop].clone()
        if start:
            target.addmm_(upper[:start, start:stop].T, error[:start])
        for i in range(start, stop):
            step, offset = steps[groups[i]], offsets[groups[i]]
            code = torch.addcdiv(offset, target[i - start], step).round_().clamp_(0, top)
            codes[i] = code.to(torch.uint8)
            error[i] = columns[i] - code.sub_(offset).mul_(step)
            if i + 1 < stop:
                target[i + 1 - start :].addr_(upper[i, i + 1 : stop], error[i])
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.T.contiguous()


def round_unblocked(
    weight: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, bits: int, act_order: bool = True
) -> Tensor:
    """The slow twin of :func:`round_ldlq`: the definition, column by column, in float64."""
    factor = feedback_factor(hessian, act_order)
    rows, size = weight.shape
    original, group = weight.double()[:, factor.order], factor.order // (size // scale.shape[1])
    steps, offsets = scale.double()[:, group], zero.double()[:, group]
    rounded = torch.zeros_like(original)
    codes = torch.empty(rows, size, dtype=torch.uint8, device=weight.device)
    for i in range(size):
        target = original[:, i] + (original - rounded)[:, :i] @ factor.upper[:i, i]
        code = torch.round(target / steps[:, i] + offsets[:, i]).clamp(0, max_code(bits))
        rounded[:, i] = (code - offsets[:, i]) * steps[:, i]
        codes[:, factor.order[i]] = code.to(torch.uint8)
    return codes


def _group_of(factor: FeedbackFactor, columns: int, group_size: int) -> list[int]:
    size = columns if group_size == -1 else group_size
    return [int(group) for group in (factor.order // size).tolist()]


def _check(
    weight: Tensor, scale: Tensor, zero: Tensor, factor: FeedbackFactor, group_size: int, block_size: int
) -> None:
    rows, columns = weight.shape
    if factor.upper.shape != (columns, columns):
        raise UsageError(
            f"expected a Hessian [K, K] with K = {columns}, got K = {len(factor.upper)}. "
            "Pass the Hessian of this layer's inputs."
        )
    size = columns if group_size == -1 else group_size
    if columns % size or scale.shape != (rows, columns // size) or zero.shape != scale.shape:
        raise UsageError(
            f"expected scale and zero [{rows}, K/g] with K = {columns} and g = {size}, got {list(scale.shape)} and "
            f"{list(zero.shape)}. Pass the parameters of this very matrix."
        )
    if block_size < 1:
        raise UsageError(f"expected a block of at least 1 column, got {block_size}. Try {DEFAULT_BLOCK}.")
