from __future__ import annotations

import threading

import pytest


def test_a_short_peak_is_seen(load):
    in_use, seen = [3], threading.Event()

    def read() -> int:
        value = in_use[0]
        if value == 9:
            seen.set()
        return value

    with load("peak_sampler").PeakSampler(read, interval_seconds=0.001) as sampler:
        in_use[0] = 9
        assert seen.wait(30)
        in_use[0] = 4
    assert sampler.peak == 9


def test_the_first_and_the_last_reading_count(load):
    readings = iter([7, 2])
    with load("peak_sampler").PeakSampler(lambda: next(readings), interval_seconds=3600) as sampler:
        assert sampler.peak == 7
    assert sampler.peak == 7
    readings = iter([1, 8])
    with load("peak_sampler").PeakSampler(lambda: next(readings), interval_seconds=3600) as sampler:
        pass
    assert sampler.peak == 8


def test_an_error_passes_and_the_thread_ends(load):
    before = threading.active_count()
    with pytest.raises(KeyError), load("peak_sampler").PeakSampler(lambda: 1, interval_seconds=0.001):
        raise KeyError
    assert threading.active_count() == before
