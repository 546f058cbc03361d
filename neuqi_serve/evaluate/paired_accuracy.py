"""Whether one model answers more of the same questions than another, or chance explains the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neuqi_serve.errors import UsageError


@dataclass(frozen=True)
class PairedAccuracy:
    """Two models on the same n questions.

    ``difference``: accuracy of the first less that of the second, from −1 to 1. ``standard_error``: of the difference.
    ``first_only``, ``second_only``: questions that only this model answers. ``p_value``: exact McNemar test, two-sided.
    """

    difference: float
    standard_error: float
    first_only: int
    second_only: int
    p_value: float


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> PairedAccuracy:
    """Compare two models' right and wrong answers to the same questions, in the same order.

    With b and c questions that only the first and only the second answers, of n: ``d = (b − c)/n``,
    ``se = sqrt(b + c − (b − c)²/n)/n``, and ``p`` is the two-sided binomial probability of a split of b + c at least
    this uneven when both sides are equally likely.

    Raises:
        UsageError: no question, or a different number for each model.
    """
    count = len(first)
    if count == 0 or count != len(second):
        raise UsageError(
            f"expected answers of both models to the same questions, got {count} and {len(second)}. Ask both alike."
        )
    ours = sum(a and not b for a, b in zip(first, second, strict=True))
    theirs = sum(b and not a for a, b in zip(first, second, strict=True))
    variance = ours + theirs - (ours - theirs) ** 2 / count
    return PairedAccuracy(
        difference=(ours - theirs) / count,
        standard_error=math.sqrt(variance) / count,
        first_only=ours,
        second_only=theirs,
        p_value=_two_sided_binomial(min(ours, theirs), ours + theirs),
    )


def _two_sided_binomial(smaller: int, trials: int) -> float:
    """``min(1, 2·P(X ≤ smaller))`` for X ~ Binomial(trials, ½), in exact integers."""
    tail = sum(math.comb(trials, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**trials)
