"""Quantize a weight matrix under the full Hessian of its inputs: initialise, round with feedback, refit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from neuqi_serve.config import DEFAULT_PRESET, WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, dequantize
from neuqi_serve.quant.descent import descend
from neuqi_serve.quant.hessian import DEFAULT_DAMPING, FeedbackFactor, damped, feedback_factor, proxy_loss
from neuqi_serve.quant.ldlq import round_with_factor
from neuqi_serve.quant.magr import reduce_magnitude
from neuqi_serve.quant.quantize import quantize_weight
from neuqi_serve.quant.refit import refit

ROUNDINGS = ("rtn", "ldlq")


@dataclass(frozen=True)
class RoundingRecipe:
    """How a weight is quantized under a Hessian.

    ``preset``: the search of the initial scales and zero-points; ``minmax`` with ``refit`` and ``sweeps`` off is GPTQ.
    ``rounding``: ``ldlq`` (with feedback) or ``rtn`` (to nearest). ``refit``: fit scales and zero-points to the codes
    afterwards. ``rounds``: how often rounding and refit alternate. ``sweeps``: of coordinate descent after a rounding.
    ``magr``: strength of the magnitude reduction before all that, 0 for none. ``damping``: share of the Hessian's mean
    diagonal added to its diagonal.

    Raises:
        UsageError: an unknown rounding, or a number that is too small.
    """

    preset: str = DEFAULT_PRESET
    rounding: str = "ldlq"
    refit: bool = True
    rounds: int = 1
    sweeps: int = 0
    magr: float = 0.0
    damping: float = DEFAULT_DAMPING

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding must be one of {ROUNDINGS}, got {self.rounding!r}. Try 'ldlq'.")
        if self.rounds < 1 or self.sweeps < 0 or self.magr < 0 or self.damping < 0:
            raise UsageError(
                "expected at least one round, and sweeps, strength and damping of at least 0, got "
                f"{self.rounds}, {self.sweeps}, {self.magr} and {self.damping}."
            )


class LayerHessian:
    """The Hessian of an input, ``XᵀX/T`` ``[K, K]``, prepared for all layers that read the input."""

    def __init__(self, hessian: Tensor, damping: float = DEFAULT_DAMPING) -> None:
        self.matrix = damped(hessian, damping)

    @property
    def importance(self) -> Tensor:
        """Its diagonal, float32 ``[K]``."""
        return self.matrix.diagonal().float()

    @cached_property
    def factor(self) -> FeedbackFactor:
        """What rounding with feedback needs."""
        return feedback_factor(self.matrix)


def quantize_calibrated(
    weight: Tensor, spec: WeightSpec, hessian: LayerHessian, recipe: RoundingRecipe
) -> QuantizedWeight:
    """Codes, scales and zero-points of a weight ``[N, K]`` for small ``tr((Ŵ − W) H (Ŵ − W)ᵀ)``.

    Rows are independent of one another, so that layers of one input give the same together and apart. Of several
    rounds each row keeps its best.

    Raises:
        UsageError: as ``quantize_weight``; a Hessian of another size.
    """
    target = weight.detach().float()
    start = target
    if recipe.magr > 0:
        start = reduce_magnitude(target, hessian.matrix, spec.group_size, recipe.magr)
    found = quantize_weight(start, spec, hessian.importance, recipe.preset)
    best: QuantizedWeight | None = None
    for _ in range(recipe.rounds):
        found = _rounded(target, start, found, spec, hessian, recipe)
        best = found if best is None else _better(target, best, found, hessian)
    assert best is not None
    return best


def _rounded(
    target: Tensor,
    start: Tensor,
    found: QuantizedWeight,
    spec: WeightSpec,
    hessian: LayerHessian,
    recipe: RoundingRecipe,
) -> QuantizedWeight:
    """One round: codes under the scales of ``found``, then scales for the codes; ``start`` is what is rounded."""
    codes = found.codes
    if recipe.rounding == "ldlq":
        codes = round_with_factor(start, found.scale, found.zero, hessian.factor, spec.bits, spec.group_size)
    found = QuantizedWeight(codes, found.scale, found.zero)
    if recipe.sweeps:
        codes = descend(target, found, hessian.matrix, spec.bits, recipe.sweeps)
        found = QuantizedWeight(codes, found.scale, found.zero)
    if recipe.refit:
        params: AffineParams = refit(target, found, hessian.matrix)
        found = QuantizedWeight(codes, params.scale, params.zero)
    return found


def _better(
    target: Tensor, first: QuantizedWeight, second: QuantizedWeight, hessian: LayerHessian
) -> QuantizedWeight:
    """Row by row the one of smaller loss."""
    losses = [proxy_loss(dequantize(one) - target, hessian.matrix) for one in (first, second)]
    wins = (losses[1] < losses[0]).unsqueeze(1)
    return QuantizedWeight(
        torch.where(wins, second.codes, first.codes),
        torch.where(wins, second.scale, first.scale),
        torch.where(wins, second.zero, first.zero),
    )
