"""The loss that initialisation minimises: squared weight error, weighted by the diagonal of the layer's Hessian.

Every solver here is judged by :func:`weighted_loss`, which evaluates the definition directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuqi_serve.quant.affine import max_code


def weighted_loss(
    groups: Tensor,
    importance: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Loss of each group under its scale and zero-point.

    ``L(s, z) = Σ_i h_i (s·(q_i − z) − w_i)²`` with ``q_i = clip(round(w_i/s + z), 0, 2^b − 1)``. A tie of the
    rounding may fall either way: both neighbours have the same error there.

    ``groups`` ``[R, n]``, ``importance`` ``[R, n]`` or ``[n]`` or None for ones, ``scale`` and ``zero`` ``[R]``;
    returns ``[R]`` in ``dtype``, in squared weight units times importance.

    Reference: arXiv:2505.17595 Eq. 5.
    """
    weight = groups.to(dtype)
    step, offset = scale.to(dtype).unsqueeze(-1), zero.to(dtype).unsqueeze(-1)
    codes = torch.round(weight / step + offset).clamp_(0, max_code(bits))
    error = ((codes - offset) * step - weight).square_()
    if importance is not None:
        error *= importance.to(dtype)
    return error.sum(-1)


def surrogate_loss(
    groups: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """Convex bound whose minimiser says where the best zero-point is to be looked for.

    With ``u_i = w_i/s + z`` and ``N = 2^b − 1``: ``L^S = s² Σ_i h_i·φ(u_i)``, where ``φ = u²`` for ``u < −½``, ``¼``
    up to ``N + ½``, and ``(u − N)²`` beyond. Its derivative in z never decreases, so it is convex.

    Shapes as in :func:`weighted_loss`, float64.

    Reference: arXiv:2505.17595 Eq. 8.
    """
    step = scale.double().unsqueeze(-1)
    steps = groups.double() / step + zero.double().unsqueeze(-1)
    top = max_code(bits)
    below, above = steps.square(), (steps - top).square()
    bound = torch.where(steps < -0.5, below, torch.where(steps < top + 0.5, 0.25, above)) * step.square()
    if importance is not None:
        bound *= importance.double()
    return bound.sum(-1)
