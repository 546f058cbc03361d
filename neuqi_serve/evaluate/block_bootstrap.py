"""Error bars from whole sequences: tokens of one text are not independent, so the sequences are drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError

RESAMPLES = 1000
LOW, HIGH = 0.025, 0.975
_SEED = 20250517


@dataclass(frozen=True)
class Estimate:
    """A statistic of all tokens, its standard error and the 95 % percentile interval; None for a single sequence."""

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


class BlockBootstrap:
    """Draws S sequences with replacement, ``resamples`` times, always the same draws.

    ``counts`` int64 ``[S]``: tokens of each sequence. All statistics of one instance are of the same draws, so that
    differences of two models on the same tokens are paired.

    Raises:
        UsageError: no sequence, or one without tokens.
    """

    def __init__(self, counts: Tensor, resamples: int = RESAMPLES) -> None:
        if counts.numel() == 0 or int(counts.min()) < 1:
            raise UsageError(
                f"expected sequences of at least one token, got {counts.tolist()[:5]}. Leave empty ones out."
            )
        self._counts = counts.double()
        generator = torch.Generator().manual_seed(_SEED)
        drawn = torch.randint(counts.numel(), (resamples, counts.numel()), generator=generator)
        # [R, S]: how often each sequence is in each resample.
        self._weights = torch.zeros(resamples, counts.numel(), dtype=torch.float64)
        self._weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        self._owner = torch.repeat_interleave(torch.arange(counts.numel()), counts)

    def mean(self, values: Tensor) -> Estimate:
        """Estimate the mean over tokens of ``values`` ``[P]``, in the order of the sequences."""
        sums = torch.zeros_like(self._counts).index_add_(0, self._owner, values.double())
        return self._estimate(
            float(sums.sum() / self._counts.sum()), (self._weights @ sums) / (self._weights @ self._counts)
        )

    def exponential_mean(self, values: Tensor) -> Estimate:
        """Estimate ``exp`` of the mean over tokens: the perplexity of losses in nats."""
        mean = self.mean(values)
        sums = torch.zeros_like(self._counts).index_add_(0, self._owner, values.double())
        resampled = ((self._weights @ sums) / (self._weights @ self._counts)).exp()
        return self._estimate(float(torch.tensor(mean.value, dtype=torch.float64).exp()), resampled)

    def quantiles(self, values: Tensor, shares: Sequence[float]) -> list[Estimate]:
        """Estimate quantiles over tokens of ``values`` ``[P]``; ``shares`` from 0 to 1, e.g. 0.99."""
        ordered, order = values.double().sort()
        owners = self._owner[order]
        wanted = torch.tensor(shares, dtype=torch.float64)
        found = [ordered[_place(torch.arange(1, len(ordered) + 1).double(), wanted)]]
        found += [ordered[_place(weights[owners].cumsum(0), wanted)] for weights in self._weights]
        values_of = torch.stack(found)
        return [self._estimate(float(column[0]), column[1:]) for column in values_of.unbind(1)]

    def _estimate(self, value: float, resampled: Tensor) -> Estimate:
        if len(self._counts) < 2:
            return Estimate(value)
        low, high = (float(torch.quantile(resampled, share)) for share in (LOW, HIGH))
        return Estimate(value, float(resampled.std()), low, high)


def _place(cumulative: Tensor, shares: Tensor) -> Tensor:
    """Where the cumulative weight reaches each share of the total."""
    return torch.searchsorted(cumulative, shares * cumulative[-1]).clamp_(max=len(cumulative) - 1)
