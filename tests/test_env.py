"""The process environment: where the cache is, and how large."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuqi_serve.env import read_environment
from neuqi_serve.errors import UsageError


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/a/b", "/x", "/a/b"),
        ("", "/x", "/x/neuqi"),
        ("", "relative", "/home/me/.cache/neuqi"),
        ("", "", "/home/me/.cache/neuqi"),
        ("~/c", "", "/home/me/c"),
    ],
)
def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, own: str, shared: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("NEUQI_CACHE_DIR", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    assert read_environment().cache_dir == Path(expected)


@pytest.mark.parametrize(("value", "expected"), [("", None), ("2", 2 << 30), ("0.5", 1 << 29), ("0", 0)])
def test_the_limit(monkeypatch: pytest.MonkeyPatch, value: str, expected: int | None) -> None:
    monkeypatch.setenv("NEUQI_CACHE_MAX_GIB", value)
    assert read_environment().cache_max_bytes == expected


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NEUQI_CACHE_MAX_GIB", value)
    with pytest.raises(UsageError, match="NEUQI_CACHE_MAX_GIB must be a number of GiB"):
        read_environment()


def test_settings_of_the_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_BITS", "3")
    monkeypatch.setenv("NEUQI_PRESET", "fast")
    assert read_environment().quantization == {"bits": 3, "preset": "fast"}
    monkeypatch.setenv("NEUQI_GROUP_SIZE", "many")
    with pytest.raises(UsageError, match="NEUQI_GROUP_SIZE must be a whole number, got 'many'"):
        read_environment()
