"""Best zero-point of a group for a given scale: a convex surrogate, then an exact search around its minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.quant.affine import max_code

# Halvings of the surrogate's bracket, which is at most 65·2^b codes wide: at 4 bits they leave 10^-4 of a code,
# nothing beside the window of one code each way that is then searched exactly.
BISECTIONS = 24


@dataclass(frozen=True)
class SortedGroups:
    """Groups in ascending order with prefix sums, which give the surrogate's slope by two binary searches.

    ``weight`` ``[R, n]`` ascending; ``mass`` and ``moment`` ``[R, n + 1]`` are the sums of h and of h·w over the
    first j weights. The order does not depend on the scale, so one sort serves a whole scale search.
    """

    weight: Tensor
    mass: Tensor
    moment: Tensor

    @classmethod
    def of(cls, groups: Tensor, importance: Tensor) -> SortedGroups:
        """Sort groups ``[R, n]`` with their importance ``[R, n]``; prefix sums are float64."""
        weight, order = groups.double().sort(-1)
        mass = importance.double().gather(-1, order)
        return cls(weight, _prefix(mass), _prefix(mass * weight))


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def surrogate_slope(groups: SortedGroups, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Half the derivative of the surrogate in z, divided by the square of the scale.

    ``Σ_{u<−½} h·u + Σ_{u≥N+½} h·(u − N)`` with ``u = w/s + z``, by two binary searches for each zero-point.

    ``scale`` ``[R, 1]``, ``zero`` ``[R, c]``, float64; returns ``[R, c]``.
    """
    top = max_code(bits)
    low = torch.searchsorted(groups.weight, (-0.5 - zero) * scale)
    high = torch.searchsorted(groups.weight, (top + 0.5 - zero) * scale)
    mass_high = groups.mass[:, -1:] - groups.mass.gather(-1, high)
    moment_high = groups.moment[:, -1:] - groups.moment.gather(-1, high)
    below = groups.moment.gather(-1, low) / scale + zero * groups.mass.gather(-1, low)
    return below + moment_high / scale + (zero - top) * mass_high


def surrogate_zero(groups: SortedGroups, scale: Tensor, bits: int) -> Tensor:
    """Minimiser ``z^S`` of the surrogate, the middle of it where the minimum is flat; float64 ``[R]``.

    Bisects the slope, which never decreases, for the left and the right end of the minimum at once.

    Reference: arXiv:2505.17595 Eq. 8, Alg. 3 (which scans all events instead).
    """
    step = scale.unsqueeze(-1)
    low = (-groups.weight[:, -1:] / step - 1.0).repeat(1, 2)
    high = (max_code(bits) + 1.0 - groups.weight[:, :1] / step).repeat(1, 2)
    right_end = torch.tensor([False, True], device=step.device)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        slope = surrogate_slope(groups, step, middle, bits)
        before = (slope < 0.0) | ((slope == 0.0) & right_end)
        low = torch.where(before, middle, low)
        high = torch.where(before, high, middle)
    return 0.5 * (low + high).mean(-1)


def solve_zero(
    groups: Tensor, importance: Tensor, scale: Tensor, bits: int, prepared: SortedGroups | None = None
) -> tuple[Tensor, Tensor]:
    """Best zero-point of each group for its scale, and the loss there.

    The surrogate's minimiser ``z^S``, then the exact minimum of the loss over ``[z^S − 1, z^S + 1]``.

    ``groups`` and ``importance`` ``[R, n]``, ``scale`` ``[R]``, all of one floating dtype, in which the window is
    searched; ``prepared`` saves the sort when many scales are tried. Returns (zero, loss), each ``[R]``.

    Reference: arXiv:2505.17595 §3.2, Alg. 3 and 4.
    """
    prepared = prepared or SortedGroups.of(groups, importance)
    start = surrogate_zero(prepared, scale.double(), bits).to(groups.dtype)
    offset, loss = window_search(groups / scale.unsqueeze(-1) + start.unsqueeze(-1), importance, bits)
    return start + offset, loss * scale.square()


def window_search(steps: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Exact minimum of ``Σ h (q − u − d)²`` over ``d ∈ [−1, 1]``, where ``u`` = ``steps`` and q rounds ``u + d``.

    Each element crosses at most two rounding boundaries in the window, one apart, so one sort orders all of them.
    Between crossings the loss is ``A d² − 2 B d + C`` with constant A; a crossing at t of an element of weight h adds
    h to B and ``2 h t`` to C.

    ``steps`` and ``importance`` ``[R, n]``; returns (d, loss), each ``[R]``.
    """
    top = max_code(bits)
    # The start codes and the crossings derive from this one rounding. Two separately rounded expressions can
    # disagree on an element that sits on a boundary, which then counts twice or never.
    crossing = torch.ceil(steps - 1.5)
    first = (crossing + 0.5 - steps).clamp_(min=-1.0)
    second = first + 1.0
    gain_first = importance * ((crossing >= 0) & (crossing < top))
    gain_second = importance * ((crossing >= -1) & (crossing < top - 1) & (second <= 1.0))
    centre = crossing.clamp(0, top) - steps
    weighted = importance * centre
    mass = importance.sum(-1, keepdim=True)
    linear, constant = weighted.sum(-1, keepdim=True), (weighted * centre).sum(-1, keepdim=True)

    first, order = first.sort(-1)
    times = torch.cat((first, second.gather(-1, order)), -1)
    gains = torch.cat((gain_first.gather(-1, order), gain_second.gather(-1, order)), -1)
    linear = torch.cat((linear, linear + gains.cumsum(-1)), -1)
    constant = torch.cat((constant, constant + (2.0 * gains * times).cumsum(-1)), -1)
    low = torch.nn.functional.pad(times, (1, 0), value=-1.0)
    high = torch.nn.functional.pad(times, (0, 1), value=1.0)
    offset = torch.minimum(torch.maximum(linear / mass, low), high)
    loss = (mass * offset - 2.0 * linear) * offset + constant
    best = loss.argmin(-1, keepdim=True)
    return offset.gather(-1, best).squeeze(-1), loss.gather(-1, best).squeeze(-1)


def brute_force_zero(groups: Tensor, importance: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Global best zero-point by trying every interval between all ``n·(2^b − 1)`` rounding boundaries.

    The definition that :func:`solve_zero` approximates; time and memory O(R·n²·2^b), for tests on small groups.

    Shapes as in :func:`solve_zero`, float64.

    Reference: arXiv:2505.17595 Alg. 1.
    """
    top = max_code(bits)
    weight, step = groups.double(), scale.double().unsqueeze(-1)
    mass = importance.double().unsqueeze(1)
    steps = (weight / step).unsqueeze(1)
    boundaries = torch.arange(top, dtype=torch.float64, device=groups.device) + 0.5
    times = (boundaries.view(-1, 1) - steps).flatten(1).sort(-1).values
    edge = torch.full_like(times[:, :1], top + 1.0)
    times = torch.cat((times[:, :1] - edge, times, times[:, -1:] + edge), -1)
    low, high = times[:, :-1], times[:, 1:]
    middle = (0.5 * (low + high)).unsqueeze(-1)
    centre = torch.round(steps + middle).clamp_(0, top) - steps
    zero = (mass * centre).sum(-1) / mass.sum(-1)
    zero = torch.minimum(torch.maximum(zero, low), high)
    loss = (mass * (centre - zero.unsqueeze(-1)).square()).sum(-1) * step.square()
    best = loss.argmin(-1, keepdim=True)
    return zero.gather(-1, best).squeeze(-1), loss.gather(-1, best).squeeze(-1)
