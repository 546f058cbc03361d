from __future__ import annotations

import itertools
import os
import random
import sys

import pytest

from neuqi_serve.budget.allocate import allocate
from neuqi_serve.budget.width_group import Choice, WidthGroup
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import DoesNotFitError, UsageError

SCIPY = "needs scipy (requirements/cpu.txt)"
# What the solver proves: losses here differ by twelve decades, and it compares sums of them.
PROVEN = 1e-6


def random_groups(seed: int, count: int) -> list[WidthGroup]:
    draw = random.Random(seed)
    groups = []
    for number in range(count):
        weights = draw.choice([96, 128, 352, 1000, 4096]) * 32
        scale = 10 ** draw.uniform(-9, 3)
        choices = [Choice(WeightSpec(b, 32), weights * (b + 1) // 8, scale * 4.0**-b) for b in (2, 3, 4, 8)]
        if draw.random() < 0.3:
            choices.append(Choice(None, weights * 2, 0.0))
        groups.append(WidthGroup(f"group{number}", (f"layer{number}",), tuple(choices)))
    return groups


def best_by_trying_all(groups: list[WidthGroup], nbytes: int) -> float:
    combinations = itertools.product(*(group.choices for group in groups))
    return min(
        sum(c.loss for c in chosen) for chosen in combinations if sum(c.nbytes for c in chosen) <= nbytes
    )


@pytest.mark.parametrize("seed", range(12))
def test_nothing_that_fits_loses_less(seed: int) -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    groups = random_groups(seed, 6)
    low = sum(min(c.nbytes for c in g.choices) for g in groups)
    high = sum(max(c.nbytes for c in g.choices) for g in groups)
    for share in (0.0, 0.03, 0.2, 0.6, 1.0):
        nbytes = int(low + share * (high - low))
        found = allocate(groups, nbytes)
        assert found.nbytes <= nbytes
        assert found.nbytes == sum(choice.nbytes for choice in found.chosen.values())
        best = best_by_trying_all(groups, nbytes)
        assert found.loss == pytest.approx(best, rel=PROVEN)
        assert found.bound <= found.loss
        assert found.gap < PROVEN


def test_a_large_problem_is_solved_to_the_end_and_always_alike() -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    groups = random_groups(99, 300)
    nbytes = int(sum(g.choices[0].nbytes for g in groups) * 1.2)
    first, second = allocate(groups, nbytes), allocate(groups, nbytes)
    assert first == second
    assert first.gap < PROVEN
    assert first.nbytes <= nbytes


def test_a_budget_is_kept_to_the_byte() -> None:
    pytest.importorskip("scipy", reason=SCIPY)
    big = Choice(WeightSpec(3, 32), 1_000_000_007, 0.0)
    small = Choice(WeightSpec(2, 32), 1_000_000_006, 1.0)
    group = WidthGroup("a", ("a",), (small, big))
    assert allocate([group], 1_000_000_006).chosen["a"] is small
    assert allocate([group], 1_000_000_007).chosen["a"] is big


def test_what_does_not_fit_is_refused() -> None:
    groups = random_groups(0, 4)
    smallest = sum(min(c.nbytes for c in g.choices) for g in groups)
    with pytest.raises(DoesNotFitError, match=str(smallest)):
        allocate(groups, smallest - 1)


def test_without_scipy_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match="pip install scipy"):
        allocate(random_groups(0, 2), 1 << 40)


def test_what_the_solver_prints_does_not_reach_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason=SCIPY)
    solve = optimize.milp

    def talkative(*args: object, **options: object) -> object:
        os.write(1, b"from the solver")
        return solve(*args, **options)

    monkeypatch.setattr(optimize, "milp", talkative)
    allocate(random_groups(0, 2), 1 << 40)
    print("ours", flush=True)
    captured = capfd.readouterr()
    assert captured.out == "ours\n"
    assert "from the solver" in captured.err
