"""Magnitude reduction: weights of a smaller range that give nearly the same outputs, before they are quantized.

Minimises ``½ tr((V − W) Ĥ (V − W)ᵀ) + Σ_groups α·max|v|`` over V, with ``Ĥ = H/λ_max``, by proximal gradient steps.
Inputs are correlated, so many V give nearly the outputs of W; of these, one of a smaller range has the finer
quantization steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError

DEFAULT_STRENGTH = 0.05
DEFAULT_ITERATIONS = 100
POWER_ITERATIONS = 30


def reduce_magnitude(
    weight: Tensor,
    hessian: Tensor,
    group_size: int = -1,
    strength: float = DEFAULT_STRENGTH,
    iterations: int = DEFAULT_ITERATIONS,
) -> Tensor:
    """Weights float32 ``[N, K]`` of smaller range in every group, near ``weight`` in output.

    Args:
        weight: ``[N, K]``.
        hessian: ``[K, K]``, damped.
        group_size: inputs whose largest magnitude counts together, −1 for the whole row.
        strength: α in units of the weights' root mean square, so that scaled weights have the scaled result.
        iterations: proximal gradient steps.

    Raises:
        UsageError: a negative strength, or a group size that does not divide K.

    Reference: arXiv:2406.00800 (MagR), Alg. 1.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if strength < 0 or columns % size:
        raise UsageError(
            f"expected a strength of at least 0 and a group size that divides {columns}, got {strength} and {size}."
        )
    original = weight.detach().float()
    alpha = strength * float(original.square().mean().sqrt())
    matrix = (hessian / largest_eigenvalue(hessian)).float()
    reduced = original
    for _ in range(iterations):
        moved = torch.addmm(reduced, reduced - original, matrix, alpha=-1.0)
        reduced = shrink_largest(moved.view(rows, -1, size), alpha).view(rows, columns)
    return reduced


def largest_eigenvalue(hessian: Tensor) -> float:
    """A bound on λ_max from above that is tight: power iteration, and a margin for what it has not reached yet."""
    matrix = hessian.double()
    vector = matrix.diagonal().clone() + matrix.diagonal().mean()
    vector /= vector.norm()
    for _ in range(POWER_ITERATIONS):
        product = matrix @ vector
        vector = product / product.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return max(float((matrix @ vector).norm()) * 1.02, torch.finfo(torch.float32).tiny)


def shrink_largest(values: Tensor, alpha: float) -> Tensor:
    """Proximal map of ``α·max|v|`` along the last dimension: ``v`` less its projection on the l1 ball of radius α.

    It cuts magnitudes off at a height t with ``Σ max(|v| − t, 0) = α``, or gives zeros where ``Σ|v| ≤ α``.
    """
    if alpha == 0:
        return values
    magnitude = values.abs()
    sorted_values = magnitude.sort(-1, descending=True).values
    counts = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    heights = (sorted_values.cumsum(-1) - alpha) / counts
    # The largest count whose height still lies below its smallest member.
    active = (sorted_values > heights).sum(-1, keepdim=True).clamp(min=1)
    height = heights.gather(-1, active - 1).clamp(min=0)
    return values.sign() * torch.minimum(magnitude, height)
