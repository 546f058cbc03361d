"""The folder of the cache: limit, eviction, locks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from neuqi_serve.cache.prepare import Prepared
from neuqi_serve.cache.store import Cache
from neuqi_serve.errors import DoesNotFitError, UsageError


def _age(cache: Cache, key: str, seconds: float) -> None:
    lock = cache.hold(key)
    assert lock is not None
    lock.release()
    path = cache.root / "locks" / f"{key}.use"
    stamp = path.stat().st_mtime - seconds
    os.utime(path, (stamp, stamp))


@pytest.fixture
def three(write_llama: Callable[..., Path], make: Callable[..., Prepared], cache: Cache) -> list[str]:
    """Keys of three entries, the first used longest ago."""
    model = write_llama()
    keys = [make(model, bits=bits).key for bits in (2, 3, 4)]
    for key, age in zip(keys, (300, 200, 100), strict=True):
        _age(cache, key, age)
    return keys


def test_entries_are_listed_by_use(cache: Cache, three: list[str]) -> None:
    assert [entry.key for entry in cache.entries()] == three[::-1]
    held = cache.hold(three[0])
    assert held is not None
    first = cache.entries()[0]
    assert (first.key, first.in_use) == (three[0], True)
    held.release()


def test_the_entry_used_longest_ago_makes_room(cache: Cache, three: list[str]) -> None:
    size = sum(entry.nbytes for entry in cache.entries())
    Cache(cache.root, max_bytes=size).make_room(1)
    assert {entry.key for entry in cache.entries()} == set(three[1:])


def test_an_entry_in_use_is_not_evicted(cache: Cache, three: list[str]) -> None:
    size = sum(entry.nbytes for entry in cache.entries())
    held = cache.hold(three[0])
    assert held is not None
    for key in three[1:]:
        _age(cache, key, 50)
    os.utime(cache.root / "locks" / f"{three[0]}.use", (0, 0))
    Cache(cache.root, max_bytes=size).make_room(1)
    left = {entry.key for entry in cache.entries()}
    assert three[0] in left
    assert len(left) == 2
    with pytest.raises(DoesNotFitError):
        Cache(cache.root, max_bytes=size).make_room(size)
    assert {entry.key for entry in cache.entries()} == {three[0]}
    held.release()


def test_a_held_entry_cannot_be_removed(cache: Cache, three: list[str]) -> None:
    entry = cache.find(three[1][:8])
    held = cache.hold(three[1])
    assert held is not None
    assert not cache.remove(entry)
    held.release()
    assert cache.remove(entry)
    assert cache.hold(three[1]) is None
    assert len(cache.entries()) == 2


def test_an_absent_entry_cannot_be_held(cache: Cache) -> None:
    assert cache.hold("0" * 64) is None
    with pytest.raises(FileNotFoundError):
        cache.damage("0" * 64)


@pytest.mark.parametrize("prefix", ["", "abc", "zzzz"])
def test_a_prefix_has_to_name_one_entry(cache: Cache, three: list[str], prefix: str) -> None:
    with pytest.raises(UsageError, match="first 4 or more characters"):
        cache.find(prefix)


def test_what_a_killed_process_left_is_removed(cache: Cache, three: list[str]) -> None:
    for name in ("building/" + "a" * 64, "building/." + "b" * 64 + ".partial", "trash/x"):
        (cache.root / name).mkdir(parents=True, exist_ok=True)
        (cache.root / name / "model.safetensors").write_bytes(b"half")
    running = cache.lock_build("b" * 64, lambda: None)
    cache.make_room(1)
    assert [path.name for path in (cache.root / "building").iterdir()] == ["." + "b" * 64 + ".partial"]
    assert not (cache.root / "trash").exists()
    running.release()
    cache.make_room(1)
    assert list((cache.root / "building").iterdir()) == []
    assert len(cache.entries()) == 3


def test_the_default_limit_is_a_share_of_the_disk(tmp_path: Path) -> None:
    limit = Cache(tmp_path / "c").limit()
    assert 0 < limit <= 50 << 30
