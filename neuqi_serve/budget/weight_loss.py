"""What each width does to the weights themselves: needs no data and one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_kernels.reference import dequantize
from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.quantize import quantize_packed

# At 8 bits a step is 17 times finer than at 4, and the loss goes with its square.
_MEASURED_BITS, _FINEST_BITS = 4, 8
_FINER = ((1 << _MEASURED_BITS) - 1) / ((1 << _FINEST_BITS) - 1)
# Rows of a large matrix are alike: so many of its weights tell what all of them lose.
_SAMPLED_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class WeightLoss:
    """Sums over weights: ``squared`` spec → Σ h·(Δw)², ``norm`` Σ h·w². ``weights``: how many there are."""

    squared: Mapping[WeightSpec | None, float]
    norm: float
    weights: int

    def relative(self, spec: WeightSpec | None) -> float:
        """Share of the weights' energy that is lost: Σ h·(Δw)² / Σ h·w²."""
        return self.squared[spec] / self.norm if self.norm else 0.0

    def sensitivity(self, spec: WeightSpec | None) -> float:
        """Guess what the choice costs the model: the relative loss times the square root of the number of weights.

        Without the root small layers count too much, with the number itself too little
        (benchmarks/mixed_bits.py measures what such guesses are worth).
        """
        return self.relative(spec) * self.weights**0.5

    def __add__(self, other: WeightLoss) -> WeightLoss:
        squared = {spec: value + other.squared[spec] for spec, value in self.squared.items()}
        return WeightLoss(squared, self.norm + other.norm, self.weights + other.weights)


@torch.no_grad()
def weight_loss(
    weight: Tensor, specs: Iterable[WeightSpec | None], importance: Tensor | None, preset: str
) -> WeightLoss:
    """Quantize ``weight [N, K]`` to each spec and measure what is lost; None, the weight as it is, loses nothing.

    ``importance``: h ``[K]``, None for ones. Of a large weight every n-th row is measured. 8 bits are not searched:
    their loss is that of 4 bits times the square of the ratio of the steps.
    """
    step = max(1, weight.numel() // _SAMPLED_WEIGHTS)
    rows = weight[::step].contiguous()
    share = weight.shape[0] / rows.shape[0]
    found: dict[WeightSpec, float] = {}

    def measured(spec: WeightSpec) -> float:
        if spec not in found:
            found[spec] = share * _squared_error(rows, spec, importance, preset)
        return found[spec]

    squared: dict[WeightSpec | None, float] = {}
    for spec in specs:
        if spec is None:
            squared[spec] = 0.0
        elif spec.bits <= _MEASURED_BITS:
            squared[spec] = measured(spec)
        else:
            squared[spec] = (
                measured(WeightSpec(_MEASURED_BITS, spec.group_size, spec.scale_dtype)) * _FINER**2
            )
    return WeightLoss(squared, share * _weighed(rows.float(), importance), weight.numel())


def _squared_error(weight: Tensor, spec: WeightSpec, importance: Tensor | None, preset: str) -> float:
    packed = quantize_packed(weight, spec, importance, preset)
    error = dequantize(packed.qweight, packed.scale, packed.zero, spec.bits, spec.group_size)
    return _weighed(error.sub_(weight), importance)


def _weighed(values: Tensor, importance: Tensor | None) -> float:
    columns = values.square().sum(0, dtype=torch.float64)
    return float(columns.sum() if importance is None else columns @ importance.to(columns))
