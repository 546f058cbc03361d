"""How long the quantizer's search is: numbers that its torch, C++ and Triton forms share."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = 3
# Zero-points side by side of which the scan keeps the best.
NEIGHBOURS = 4
MOST_KEPT = 64


@dataclass(frozen=True)
class SearchPlan:
    """Where the search begins and how the starts are thinned out.

    The scan: ``2**halvings + 1`` scales, in geometric progression from Min-Max's down to ``narrowest`` standard
    deviations of the group over its 2^b − 1 steps. At each of them ``phases`` zero-points (a multiple of
    ``NEIGHBOURS``), spread evenly over a ``window`` of codes around the zero-point that ``centring`` Newton steps
    towards the minimum of the paper's surrogate lead to. From each start ``refinements`` regressions, each going
    ``overshoot`` times as far as it says. The best of ``NEIGHBOURS`` goes on.

    Three stages: how many points are ``kept``, and how many more ``passes`` each gets. Long groups are searched as
    histograms; the last points then get ``final_passes`` on the weights themselves.

    Raises:
        ValueError: numbers that the kernels do not take.
    """

    halvings: int
    phases: int
    centring: int
    refinements: int
    kept: tuple[int, int, int]
    passes: tuple[int, int, int]
    final_passes: int
    window: float
    overshoot: float
    narrowest: float

    def __post_init__(self) -> None:
        if self.phases < NEIGHBOURS or self.phases % NEIGHBOURS or self.refinements < 1 or self.halvings < 0:
            raise ValueError(
                f"expected phases in multiples of {NEIGHBOURS} and at least one regression of each start, got {self}."
            )
        if not all(1 <= kept <= MOST_KEPT for kept in self.kept):
            raise ValueError(f"expected 1 to {MOST_KEPT} points to be kept in each stage, got {self.kept}.")

    @property
    def scales(self) -> int:
        """Number of scales of the scan."""
        return (1 << self.halvings) + 1

    @property
    def sweeps(self) -> int:
        """Passes over a group that the whole search takes, the measure of its cost."""
        scan = self.scales * (self.centring + self.phases * self.refinements)
        return scan + sum(kept * passes for kept, passes in zip(self.kept, self.passes, strict=True))
