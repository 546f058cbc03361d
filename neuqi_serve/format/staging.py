"""A folder that appears complete or not at all: filled under a temporary name, renamed at the end."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neuqi_serve.errors import UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged_folder(destination: Path, overwrite: bool, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder ``.NAME.partial`` beside the destination; rename it when the block has succeeded.

    An exception removes it. A killed process leaves it behind, and the next run for the same destination
    clears it; a lock keeps two running writers apart. A folder that is replaced stays until the new one is
    complete: the two exchange their names in one step where the file system can do that.

    Raises:
        UsageError: the destination cannot be used, or another process is writing it.
    """
    destination = destination.resolve()
    check_destination(destination, overwrite, may_replace)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.parent / f".{destination.name}.partial"
    lock = _locked_empty(partial, destination)
    try:
        yield partial
        _flush(partial)
        check_destination(destination, overwrite, may_replace)
        if destination.exists() and any(destination.iterdir()):
            _exchange(partial, destination)
        else:
            partial.rename(destination)
            return
        shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_destination(destination: Path, overwrite: bool, may_replace: Callable[[Path], bool]) -> None:
    """Refuse a destination that is taken; ``may_replace`` says which folders ``overwrite`` may remove.

    Raises:
        UsageError: a file, a folder with content and no ``overwrite``, or one that may not be removed.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(
            f"expected a new or empty folder to write to, {destination} is a file. Name another."
        )
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"expected a new or empty folder to write to, {destination} has content. Name another, or "
            "replace a packed checkpoint with --overwrite."
        )
    if not may_replace(destination):
        raise UsageError(
            f"expected a packed checkpoint to overwrite, {destination} is none; it will not be removed. "
            "Name another folder, or empty this one yourself."
        )


def _locked_empty(partial: Path, destination: Path) -> int:
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder locked here can have become the other writer's finished checkpoint in the meantime.
        mine = partial.exists() and os.path.samestat(os.fstat(lock), partial.stat())
    except BlockingIOError:
        mine = False
    if not mine:
        os.close(lock)
        raise UsageError(
            f"expected to be the only writer of {destination}, another process is writing it. "
            "Wait for it, or name another folder."
        )
    for leftover in partial.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return lock


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(partial: Path, destination: Path) -> None:
    if _exchange_names(partial, destination):
        return
    previous = destination.parent / f".{destination.name}.previous"
    destination.rename(previous)
    try:
        partial.rename(destination)
    except OSError:
        previous.rename(destination)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _exchange_names(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(second))
