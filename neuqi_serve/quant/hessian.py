"""The Hessian of a linear layer's output error, ``H = XᵀX/T`` over the T inputs seen, and its factor for rounding.

The loss of a layer is ``tr(E H Eᵀ)`` with ``E = Ŵ − W``. Products are formed in float32, some thousand tokens at a
time, and added up in float64: within a chunk the sums are short, and over the chunks nothing is lost. So a small
activation counts after millions of tokens as it does after the first, which a float32 sum would not grant, at the
speed of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError

# Rows multiplied at a time: float32 sums of this length are exact to some 1e-6.
CHUNK_TOKENS = 2048
DEFAULT_DAMPING = 0.01
# Each failed factorisation multiplies the damping by this.
MORE_DAMPING = 10.0
DAMPING_ATTEMPTS = 10


class HessianSum:
    """Running sum of ``xᵀx`` over inputs, float64 ``[K, K]`` on ``device``."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs ``[…, K]`` of any floating dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        for chunk in torch.split(rows, CHUNK_TOKENS):
            values = chunk.float()
            self.total += values.T @ values
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        """``XᵀX/T``, float64 ``[K, K]``; zeros before any input."""
        return self.total / max(1, self.tokens)


@dataclass(frozen=True)
class FeedbackFactor:
    """``H[order][:, order] = U diag(d) Uᵀ`` with ``U`` unit upper triangular.

    ``order`` int64 ``[K]``: in which the columns are rounded. ``upper`` float64 ``[K, K]``; ``pivots`` d ``[K]``.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor


def damped(hessian: Tensor, ratio: float = DEFAULT_DAMPING) -> Tensor:
    """``H + ratio·mean(diag H)·I`` in float64; the identity where H is zero.

    Raises:
        UsageError: no square matrix, a value that is not finite, a negative diagonal or a negative ratio.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise UsageError(
            f"expected a Hessian [K, K], got {list(hessian.shape)}. Pass XᵀX of the layer's inputs."
        )
    if ratio < 0:
        raise UsageError(f"expected a damping of at least 0, got {ratio}. Try {DEFAULT_DAMPING}.")
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    if not bool(matrix.isfinite().all()) or bool((diagonal < 0).any()):
        raise UsageError(
            "expected a finite Hessian with a diagonal of at least 0, got other values: an activation overflowed. "
            "Run the model in bfloat16 or float32, or check the calibration data."
        )
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    result = matrix.clone()
    result.diagonal().add_(ratio * mean)
    return result


def activation_order(hessian: Tensor) -> Tensor:
    """Columns by falling diagonal, int64 ``[K]``; equal ones keep their order."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def feedback_factor(hessian: Tensor, act_order: bool = True) -> FeedbackFactor:
    """Factor a Hessian ``[K, K]`` for rounding column by column.

    Where it is not positive definite, the diagonal is raised until it is.

    Raises:
        UsageError: it stays indefinite after several attempts, or is no Hessian (:func:`damped`).

    Reference: arXiv:2307.13304 §4 (LDLQ); the order is that of GPTQ's ``act_order``.
    """
    matrix = damped(hessian, 0.0)
    order = activation_order(matrix) if act_order else torch.arange(len(matrix), device=matrix.device)
    matrix = matrix[order][:, order]
    ratio = 1e-8
    for attempt in range(DAMPING_ATTEMPTS):
        # U Uᵀ with U upper triangular is the Cholesky factor L Lᵀ of the matrix read backwards.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)
            root = upper.diagonal().clone()
            return FeedbackFactor(order, upper / root, root.square())
        matrix = damped(matrix, ratio * MORE_DAMPING**attempt)
    raise UsageError(
        f"expected a Hessian that some damping makes positive definite, got one of size {len(matrix)} that stays "
        "indefinite. Check the calibration data, or raise the damping."
    )


def proxy_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """``e H eᵀ`` of every row of ``error`` ``[N, K]``, float64 ``[N]``: the loss that rounding minimises."""
    rows = error.double()
    return ((rows @ hessian.double()) * rows).sum(1)
