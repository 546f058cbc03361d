"""The best width for every group under a budget: a multiple-choice knapsack, solved as an integer program."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from neuqi_serve.budget.width_group import Choice, WidthGroup
from neuqi_serve.errors import DoesNotFitError, UsageError

# The solver stops at an absolute gap of 1e-6: losses are scaled so that this is far below any difference.
_LARGEST_LOSS = 1e4


@dataclass(frozen=True)
class Allocation:
    """``chosen``: group → choice. ``loss``, ``nbytes``: their sums. ``bound``: no choice that fits loses less."""

    chosen: Mapping[str, Choice]
    loss: float
    nbytes: int
    bound: float

    @property
    def gap(self) -> float:
        """How much of the loss the bound leaves open, from 0 (proven best) to 1."""
        return 0.0 if self.loss <= 0 else max(0.0, 1 - self.bound / self.loss)


def allocate(groups: Sequence[WidthGroup], nbytes: int) -> Allocation:
    """Choose one width a group so that the sum of losses is least and all together take at most ``nbytes``.

    Solved by branch and bound (HiGHS through scipy), which proves the optimum up to the rounding of its sums; the same
    input gives the same choice.

    Raises:
        DoesNotFitError: even the smallest choices take more.
        UsageError: scipy is not installed.
    """
    smallest = sum(min(choice.nbytes for choice in group.choices) for group in groups)
    if smallest > nbytes:
        raise DoesNotFitError(
            f"expected a budget of at least {smallest} bytes for the layers that can be chosen, got {nbytes}."
        )
    flat = [(group, choice) for group in groups for choice in group.choices]
    picked, bound = _solve(groups, flat, nbytes)
    chosen = {group.name: choice for (group, choice), taken in zip(flat, picked, strict=True) if taken}
    used = sum(choice.nbytes for choice in chosen.values())
    loss = math.fsum(choice.loss for choice in chosen.values())
    assert len(chosen) == len(groups)
    assert used <= nbytes
    return Allocation(chosen, loss, used, min(bound, loss))


def _solve(
    groups: Sequence[WidthGroup], flat: Sequence[tuple[WidthGroup, Choice]], nbytes: int
) -> tuple[list[bool], float]:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise UsageError(
            "expected scipy to choose widths under a budget, it is not installed. Install it (pip install scipy), or "
            "give one width with --bits 2, 3, 4 or 8."
        ) from None
    losses = np.array([choice.loss for _, choice in flat])
    scale = _LARGEST_LOSS / losses.max() if losses.max() > 0 else 1.0
    # Whole numbers, as small as they get: the solver's tolerance is then far below one unit.
    unit = math.gcd(*(choice.nbytes for _, choice in flat))
    sizes = np.array([choice.nbytes // unit for _, choice in flat], dtype=np.float64)
    rows = {group.name: row for row, group in enumerate(groups)}
    owners = np.array([rows[group.name] for group, _ in flat])
    one_each = csr_array((np.ones(len(flat)), (owners, np.arange(len(flat)))), shape=(len(groups), len(flat)))
    limit = nbytes // unit
    # Half a unit of slack, of which no whole number of units can make use.
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(sizes[np.newaxis], -np.inf, limit + 0.5),
    ]
    with _standard_output_to_error():
        found = milp(
            losses * scale,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise RuntimeError(f"expected a choice of widths, the solver found none: {found.message}")
    return [bool(value > 0.5) for value in found.x], float(found.mip_dual_bound) / scale


@contextlib.contextmanager
def _standard_output_to_error() -> Iterator[None]:
    """The solver prints lines of its own now and then, past Python; our standard output may be JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
