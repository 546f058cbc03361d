"""Advisory locks between processes: a lock lasts until its file is closed, also when the process is killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


class FileLock:
    """An open lock file. ``release`` or the end of the process frees it; the file itself stays."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Free the lock; without effect the second time."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def lock_exclusive(path: Path, waiting: Callable[[], None] | None = None) -> FileLock:
    """Wait for the lock, alone; ``waiting`` is called once if another process has it."""
    lock = try_exclusive(path)
    if lock is not None:
        return lock
    if waiting is not None:
        waiting()
    return _locked(path, fcntl.LOCK_EX)


def try_exclusive(path: Path) -> FileLock | None:
    """Take the lock, alone, or return None if any other process has it."""
    try:
        return _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def lock_shared(path: Path) -> FileLock:
    """Wait for the lock, together with other sharers, and note the time in the file's time stamp."""
    lock = _locked(path, fcntl.LOCK_SH)
    os.utime(path)
    return lock


def _locked(path: Path, operation: int) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not inherited by programs that are started later, which would keep the lock beyond our end.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise
    return FileLock(descriptor)
