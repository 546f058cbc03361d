from __future__ import annotations

import pytest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(load, clock):
    return load("gpu_budget").Budget(110.0, clock)


def test_the_report_has_its_seconds(budget):
    assert budget.remaining == 100.0


def test_unknown_work_fits_until_the_time_is_over(budget, clock):
    assert budget.fits("layer", 5, "first")
    clock.now += 100
    assert not budget.fits("layer", 5, "second")
    assert budget.left_out == ["second: 0 s expected, 0 s left"]


def test_work_is_expected_to_take_as_long_as_its_kind_did_in_proportion(budget, clock):
    with budget.spend("layer", 2):
        clock.now += 20
    assert budget.fits("layer", 7.9, "small")
    assert not budget.fits("layer", 8, "large")
    assert budget.fits("other", 80, "of another kind")
    assert budget.left_out == ["large: 80 s expected, 80 s left"]


def test_the_first_slow_piece_is_forgotten(budget, clock):
    with budget.spend("layer", 1):
        clock.now += 50
    assert not budget.fits("layer", 1, "too early")
    for _ in range(3):
        with budget.spend("layer", 1):
            clock.now += 1
    assert budget.fits("layer", 1, "now")


def test_a_peer_sits_out_once_its_compilation_took_its_share(budget, clock):
    with budget.setup("slow"):
        clock.now += 16
    assert budget.setup_spent("slow") is None

    def fail() -> None:
        with budget.setup("slow"):
            clock.now += 1
            raise OSError("compiler")

    with pytest.raises(OSError, match="compiler"):
        fail()
    assert budget.setup_spent("slow") == "its compilation took 17 s, more than its share of 16 s"
    assert budget.setup_spent("other") is None
