"""What the presets mean: how long the search is at each of them.

``balanced`` is meant to lose nothing that matters against ``reference``, ``fast`` to cost nothing that matters beside
reading the weights. ``benchmarks/quantize.py`` prints what each loses and costs.
"""

from __future__ import annotations

from neuqi_kernels.search_plan import SearchPlan

# Scales go down to a share of these, as (2^b − 1)·s over the standard deviation: below the best one of Gaussian groups
# of 64, and heavier tails or longer groups only want more.
NARROWEST_SPAN = {2: 2.6, 3: 3.2, 4: 3.7, 8: 8.0}


def search_plan(preset: str, bits: int, weighted: bool) -> SearchPlan:
    """Plan of ``balanced`` or ``fast``.

    ``weighted``: whether the weights differ in importance. If so, few of them count: the minima are many and lie
    apart, the surrogate says less about where, and the best scale can be far smaller. More starts, more spread, find
    them; the more so the more codes there are.
    """
    if bits == 8:
        return _plan(bits, 1.0, 1, 4, 1, 2, (3, 2, 2), (2, 2, 0), window=0.5, overshoot=2.0)
    if preset == "fast":
        if weighted:
            return _plan(bits, 0.5, 4, 8, 1, 1, (12, 4, 2), (2, 4, 2), window=3.0)
        return _plan(bits, 0.9, 3, 4, 1, 1, (4, 2, 2), (3, 4, 0), window=1.0)
    refinements = 3 if bits == 4 else 2
    if not weighted:
        return _plan(bits, 0.8, 4, 8, 2, refinements, (16, 8, 4), (2, 4, 4), window=2.0)
    if bits == 4:
        return _plan(bits, 0.5, 5, 16, 2, refinements, (32, 12, 4), (3, 6, 4), window=5.0)
    return _plan(bits, 0.5, 4, 16, 2, refinements, (16, 8, 4), (3, 5, 4), window=4.0)


def _plan(
    bits: int,
    narrowest: float,
    halvings: int,
    phases: int,
    centring: int,
    refinements: int,
    kept: tuple[int, int, int],
    passes: tuple[int, int, int],
    *,
    window: float,
    overshoot: float = 3.0,
) -> SearchPlan:
    return SearchPlan(
        halvings=halvings,
        phases=phases,
        centring=centring,
        refinements=refinements,
        kept=kept,
        passes=passes,
        final_passes=2,
        window=window,
        overshoot=overshoot,
        narrowest=narrowest * NARROWEST_SPAN[bits],
    )
