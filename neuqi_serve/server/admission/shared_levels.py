"""Where a bucket keeps what is left in it: in memory, or in a mapped file that all API processes of a server share."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import Protocol, Self

# Digest of the bucket's name, level, time of the level (the system's monotonic clock, the same for all processes).
_SLOT = struct.Struct("<8sdd")
SLOTS = 8192
_EMPTY = b"\0" * 8


class Cell(Protocol):
    """The level of one bucket and when it was; used as a context manager, which locks it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self) -> tuple[float, float] | None:
        """Return level and time, None before the first ``write``."""

    def write(self, level: float, seen: float) -> None:
        """Keep level and time."""


class OwnCell:
    """A cell of this process, whose event loop is its lock."""

    def __init__(self) -> None:
        self._held: tuple[float, float] | None = None

    def __enter__(self) -> OwnCell:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> tuple[float, float] | None:
        """Return level and time."""
        return self._held

    def write(self, level: float, seen: float) -> None:
        """Keep level and time."""
        self._held = level, seen


def create_levels() -> Path:
    """Make an empty file of cells, which the processes that are given its name open; it goes with this process."""
    descriptor, name = tempfile.mkstemp(prefix="neuqi-limits-")
    os.truncate(descriptor, SLOTS * _SLOT.size)
    os.close(descriptor)
    atexit.register(Path(name).unlink, missing_ok=True)
    return Path(name)


class SharedLevels:
    """The file of cells, open in this process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        self._memory = mmap.mmap(self._descriptor, SLOTS * _SLOT.size)

    def cell(self, name: str) -> SharedCell:
        """Return the cell of the bucket called ``name``, the same in every process.

        Raises:
            ValueError: more buckets than the file has room for.
        """
        digest = hashlib.sha256(name.encode()).digest()[:8]
        start = int.from_bytes(digest, "little") % SLOTS
        with Locked(self._descriptor):
            for step in range(SLOTS):
                offset = (start + step) % SLOTS * _SLOT.size
                owner = self._memory[offset : offset + 8]
                if owner == _EMPTY:
                    _SLOT.pack_into(self._memory, offset, digest, 0.0, -1.0)
                if owner in (_EMPTY, digest):
                    return SharedCell(self._memory, self._descriptor, offset)
        raise ValueError(f"expected at most {SLOTS} limits, got more. Use fewer keys with limits.")


class Locked:
    """Holds the file's lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class SharedCell:
    """A cell in the file."""

    def __init__(self, memory: mmap.mmap, descriptor: int, offset: int) -> None:
        self._memory, self._offset = memory, offset
        self._lock = Locked(descriptor)

    def __enter__(self) -> SharedCell:
        self._lock.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__()

    def read(self) -> tuple[float, float] | None:
        """Return level and time."""
        _, level, seen = _SLOT.unpack_from(self._memory, self._offset)
        return None if seen < 0 else (level, seen)

    def write(self, level: float, seen: float) -> None:
        """Keep level and time."""
        digest = self._memory[self._offset : self._offset + 8]
        _SLOT.pack_into(self._memory, self._offset, digest, level, seen)
