"""Requests and tokens per minute."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from neuqi_serve.server.admission.keys import make_key
from neuqi_serve.server.admission.rate_limit import Bucket, RateLimits
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
