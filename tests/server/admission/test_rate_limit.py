"""Requests and tokens per minute."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from neuqi_serve.server.admission.keys import make_key
from neuqi_serve.server.admission.rate_limit import Bucket, RateLimits
from neuqi_serve.server.admission.shared_levels import SharedLevels, create_levels
from neuqi_serve.server.admission.usage import TokenCount


def test_a_bucket_refills_evenly_and_waits_debts_off() -> None:
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    for _ in range(60):
        assert bucket.wait() == 0
        bucket.take(1)
    assert bucket.wait() == pytest.approx(1.0)
    now[0] = 0.5
    assert bucket.wait() == pytest.approx(0.5)
    bucket.take(30)
    assert bucket.wait() == pytest.approx(30.5)
    now[0] = 1e6
    bucket.take(59)
    assert bucket.wait() == 0


def test_a_limit_below_one_a_minute_lets_one_through() -> None:
    now = [0.0]
    bucket = Bucket(0.5, clock=lambda: now[0])
    assert bucket.wait() == 0
    bucket.take(1)
    assert bucket.wait() == pytest.approx(120)


def test_limits_belong_to_names_and_follow_the_file() -> None:
    now = [0.0]
    limits = RateLimits(2, None, clock=lambda: now[0])
    alice, other = make_key("alice", "k1"), make_key("alice", "k2")
    first = limits.of(alice)
    assert first is not None
    assert limits.of(other) is first
    assert limits.of(make_key("bob", "k3")) is not first
    assert first.exceeded() is None
    assert first.exceeded() is None
    assert first.exceeded() == ("requests", 2, pytest.approx(30.0))
    wider = limits.of(replace(alice, requests_per_minute=5))
    assert wider is not None
    assert wider.exceeded() is None


def test_without_limits_nothing_is_counted() -> None:
    assert RateLimits(None, None).of(make_key("a", "k")) is None
    assert RateLimits(None, None).of(None) is None
    assert RateLimits(None, 7).of(None) is not None


def test_used_up_tokens_take_no_request() -> None:
    now = [0.0]
    limits = RateLimits(100, 600, clock=lambda: now[0]).of(None)
    assert limits is not None
    assert limits.tokens is not None
    assert limits.requests is not None
    limits.tokens.take(620)
    assert limits.exceeded() == ("tokens", 600, pytest.approx(2.1))
    assert limits.requests.wait() == 0
    for _ in range(99):
        limits.requests.take(1)
    assert limits.requests.wait() == 0


def _output(*lengths: int) -> SimpleNamespace:
    parts = [SimpleNamespace(index=i, token_ids=[0] * n) for i, n in enumerate(lengths)]
    return SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=parts)


def test_new_tokens_are_added_and_the_prompt_once() -> None:
    count = TokenCount(cumulative=False)
    assert [count.added(_output(n)) for n in (1, 4, 2)] == [4, 4, 2]


def test_cumulative_outputs_are_counted_by_their_growth() -> None:
    count = TokenCount(cumulative=True)
    assert [count.added(_output(*n)) for n in ((1, 1), (3, 1), (3, 5))] == [5, 2, 4]


def test_an_output_without_tokens_counts_its_prompt() -> None:
    pooled = SimpleNamespace(prompt_token_ids=[1, 2], outputs=SimpleNamespace(data=[0.5]))
    assert TokenCount(cumulative=False).added(pooled) == 2


def test_several_processes_share_what_is_left() -> None:
    path = create_levels()
    try:
        program = """
import sys
from pathlib import Path
from neuqi_serve.server.admission.rate_limit import RateLimits
from neuqi_serve.server.admission.shared_levels import SharedLevels
limits = RateLimits(40, None, SharedLevels(Path(sys.argv[1])), clock=lambda: 1000.0).of(None)
sys.stdin.readline()
print(sum(limits.exceeded() is None for _ in range(1000)))
"""
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        granted = sum(int(process.communicate("go\n", timeout=60)[0]) for process in processes)
        # Between looking and taking, the other two may each look once.
        assert 40 <= granted <= 42
    finally:
        path.unlink()


def test_cells_are_told_apart_by_name() -> None:
    path = create_levels()
    try:
        mine, theirs = SharedLevels(path), SharedLevels(path)
        for number in range(200):
            with mine.cell(f"requests {number}") as cell:
                assert cell.read() is None
                cell.write(float(number), 1.0)
        for number in range(200):
            with theirs.cell(f"requests {number}") as cell:
                assert cell.read() == (float(number), 1.0)
    finally:
        path.unlink()
