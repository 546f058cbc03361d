"""A cache in a temporary folder, and entries in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neuqi_serve.cache.prepare import Prepared, prepare
from neuqi_serve.cache.store import Cache
from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", max_bytes=64 << 20)


@pytest.fixture
def make(cache: Cache) -> Callable[..., Prepared]:
    """``make(model, bits=3, told=None) -> Prepared``: prepare a model in the cache; messages go to ``told``."""

    def run(model: Path, bits: int = 3, told: list[str] | None = None) -> Prepared:
        messages: list[str] = [] if told is None else told
        return prepare(model, QuantizationSettings(WeightSpec(bits, 32)), cache, messages.append)

    return run


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << 3
    path.write_bytes(content)


@pytest.fixture(name="flip_bit")
def flip_bit_fixture() -> Callable[[Path, int], None]:
    return flip_bit
