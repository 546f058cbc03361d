"""What each width does to the weights themselves: needs no data and one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_kernels.reference import dequantize
from neuqi_serve.config import UNQUANTIZED_BITS, WeightSpec
from neuqi_serve.quant.quantize import quantize_packed

# At 8 bits a step is 17 times finer than at 4, and the loss goes with its square.
_STEPS = {bits: (1 << bits) - 1 for bits in (2, 3, 4, 8)}
_MEASURED_BITS = 4


@dataclass(frozen=True)
class WeightLoss:
    """Sums over the weights of a group: ``squared`` bits → Σ h·(Δw)², ``norm`` Σ h·w², ``weights`` their number."""

    squared: Mapping[int, float]
    norm: float
    weights: int

    def relative(self, bits: int) -> float:
        """Share of the weights' energy that is lost: Σ h·(Δw)² / Σ h·w²."""
        return self.squared[bits] / self.norm if self.norm else 0.0

    def sensitivity(self, bits: int) -> float:
        """Guess what the width costs the model: the relative loss times the square root of the number of weights.

        Without the root small layers count too much, with the number itself too little
        (benchmarks/mixed_bits.py measures what such guesses are worth).
        """
        return self.relative(bits) * self.weights**0.5

    def __add__(self, other: WeightLoss) -> WeightLoss:
        squared = {bits: value + other.squared[bits] for bits, value in self.squared.items()}
        return WeightLoss(squared, self.norm + other.norm, self.weights + other.weights)


@torch.no_grad()
def weight_loss(
    weight: Tensor, specs: Iterable[WeightSpec | None], importance: Tensor | None, preset: str
) -> WeightLoss:
    """Quantize ``weight [N, K]`` to each spec and measure what is lost; None, the weight as it is, loses nothing.

    ``importance``: h ``[K]``, None for ones. 8 bits are not searched: their loss is that of 4 bits times the square of
    the ratio of the steps.
    """
    squared: dict[int, float] = {}
    wanted = {UNQUANTIZED_BITS if spec is None else spec.bits: spec for spec in specs}
    for bits, spec in wanted.items():
        if spec is None:
            squared[bits] = 0.0
        elif bits <= _MEASURED_BITS:
            squared[bits] = _squared_error(weight, spec, importance, preset)
    for bits, spec in wanted.items():
        if spec is not None and bits > _MEASURED_BITS:
            measured = WeightSpec(_MEASURED_BITS, spec.group_size, spec.scale_dtype)
            at_four = squared.get(_MEASURED_BITS)
            if at_four is None:
                at_four = _squared_error(weight, measured, importance, preset)
            squared[bits] = at_four * (_STEPS[_MEASURED_BITS] / _STEPS[bits]) ** 2
    return WeightLoss(squared, _weighed(weight.float(), importance), weight.numel())


def _squared_error(weight: Tensor, spec: WeightSpec, importance: Tensor | None, preset: str) -> float:
    packed = quantize_packed(weight, spec, importance, preset)
    error = dequantize(packed.qweight, packed.scale, packed.zero, spec.bits, spec.group_size)
    return _weighed(error.sub_(weight), importance)


def _weighed(values: Tensor, importance: Tensor | None) -> float:
    columns = values.square().sum(0, dtype=torch.float64)
    return float(columns.sum() if importance is None else columns @ importance.to(columns))
