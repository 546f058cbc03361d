"""The folder of the cache: entries, their locks, the size limit.

::

    entries/<key>/         a packed checkpoint (format/FORMAT.md), complete or not there
    building/<key>/        one that is being made; what a killed process left is removed before the next is made
    locks/<key>.build      held alone while an entry is made
    locks/<key>.use        shared by the servers that use an entry; its time is that of the last use
    digests/               of source files (cache/digests.py)

An entry is never changed: it appears, is replaced and disappears by a rename.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neuqi_serve.cache.locks import FileLock, lock_exclusive, lock_shared, try_exclusive
from neuqi_serve.errors import DoesNotFitError, IntegrityError, NeuqiError, UnsupportedModelError, UsageError
from neuqi_serve.format.reader import PackedCheckpoint, open_checkpoint

DEFAULT_MAX_BYTES = 50 << 30
# Of the disk that is free or taken by the cache itself.
DEFAULT_DISK_SHARE = 0.2
SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class Entry:
    """One entry: its ``nbytes`` on disk, when it was ``last_used`` (seconds since 1970), whether a server holds it."""

    key: str
    path: Path
    nbytes: int
    last_used: float
    in_use: bool


class Cache:
    """The cache in the folder ``root``, which need not exist; ``max_bytes``: its limit, None for the default."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root = root
        self._max_bytes = max_bytes

    @property
    def digests(self) -> Path:
        """Folder of the digests of source files."""
        return self.root / "digests"

    def entry_path(self, key: str) -> Path:
        """Where the entry of this key is, or would be."""
        return self.root / "entries" / key

    def building_path(self, key: str) -> Path:
        """Where an entry is made."""
        return self.root / "building" / key

    def lock_build(self, key: str, waiting: Callable[[], None]) -> FileLock:
        """Wait to be the only one who makes this entry; ``waiting`` is called if another is at it."""
        return lock_exclusive(self._lock(key, "build"), waiting)

    def hold(self, key: str) -> FileLock | None:
        """Keep an entry from being evicted until the lock is released; None if there is no such entry."""
        lock = lock_shared(self._lock(key, "use"))
        if self.entry_path(key).is_dir():
            return lock
        lock.release()
        return None

    def damage(self, key: str) -> str | None:
        """Read an entry in full; return what is wrong with it, None if it is as it was written.

        Raises:
            FileNotFoundError: there is no such entry, or it has gone while it was read.
        """
        path = self.entry_path(key)
        if not path.is_dir():
            raise FileNotFoundError(path)
        try:
            open_checkpoint(path).verify()
        except (IntegrityError, UnsupportedModelError, OSError) as error:
            if not path.is_dir():
                raise FileNotFoundError(path) from None
            return str(error)
        return None

    def publish(self, key: str) -> None:
        """Give the finished folder at ``building_path`` its place, in that of a damaged entry if there is one."""
        destination = self.entry_path(key)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists():
            self._discard(destination)
        self.building_path(key).rename(destination)

    def entries(self) -> list[Entry]:
        """List the entries, the one used last first."""
        folder = self.root / "entries"
        found = [self._entry(path) for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(found, key=lambda entry: -entry.last_used)

    def find(self, prefix: str) -> Entry:
        """Return the entry whose key begins with ``prefix``.

        Raises:
            UsageError: none, several, or a prefix that is too short.
        """
        found = [entry for entry in self.entries() if entry.key.startswith(prefix)]
        if len(prefix) < SHORTEST_PREFIX or len(found) != 1:
            raise UsageError(
                f"expected the first {SHORTEST_PREFIX} or more characters of one entry's key, got {prefix!r}, which "
                f"fits {len(found)} entries. `neuqi cache ls` lists them."
            )
        return found[0]

    def remove(self, entry: Entry) -> bool:
        """Remove an entry; False if a server uses it."""
        lock = try_exclusive(self._lock(entry.key, "use"))
        if lock is None:
            return False
        with lock:
            self._discard(entry.path)
        return True

    def limit(self) -> int:
        """The bytes that all entries may take together."""
        if self._max_bytes is not None:
            return self._max_bytes
        share = int(DEFAULT_DISK_SHARE * (self._free() + self._used()))
        return min(DEFAULT_MAX_BYTES, share)

    def make_room(self, nbytes: int) -> None:
        """Remove what killed processes left, then the entries used longest ago, until ``nbytes`` more fit.

        Entries in use stay.

        Raises:
            DoesNotFitError: there is no room even so.
        """
        with lock_exclusive(self.root / "locks" / "room"):
            self._remove_leftovers()
            limit = self.limit()
            for entry in reversed(self.entries()):
                if self._used() + nbytes <= limit and nbytes <= self._free():
                    break
                self.remove(entry)
            used, free = self._used(), self._free()
        if used + nbytes > limit or nbytes > free:
            raise DoesNotFitError(
                f"expected room for {_gib(nbytes)} in the cache {self.root}, got {_gib(max(0, limit - used))} of its "
                f"{_gib(limit)} and {_gib(free)} free on the disk. Raise NEUQI_CACHE_MAX_GIB, or remove entries with "
                "`neuqi cache rm`."
            )

    def _entry(self, path: Path) -> Entry:
        lock = self._lock(path.name, "use")
        try:
            last_used = (lock if lock.exists() else path).stat().st_mtime
        except FileNotFoundError:
            last_used = 0.0
        free = try_exclusive(lock)
        if free is not None:
            free.release()
        return Entry(path.name, path, sum(_sizes(path)), last_used, free is None)

    def _lock(self, key: str, purpose: str) -> Path:
        return self.root / "locks" / f"{key}.{purpose}"

    def _free(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    def _used(self) -> int:
        return sum(sum(_sizes(self.root / name)) for name in ("entries", "building"))

    def _discard(self, path: Path) -> None:
        """Take a folder out of its place in one step, then delete it."""
        trash = self.root / "trash"
        trash.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=trash))
        path.rename(place / "entry")
        shutil.rmtree(place, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        shutil.rmtree(self.root / "trash", ignore_errors=True)
        building = self.root / "building"
        for path in list(building.iterdir()) if building.is_dir() else ():
            # "<key>", or ".<key>.partial" while it is written.
            key = path.name.strip(".").removesuffix(".partial").removesuffix(".previous")
            lock = try_exclusive(self._lock(key, "build"))
            if lock is not None:
                with lock:
                    shutil.rmtree(path, ignore_errors=True)


def checkpoint_of(entry: Entry) -> PackedCheckpoint | None:
    """Open an entry without reading its tensors; None if it is damaged."""
    try:
        return open_checkpoint(entry.path)
    except (NeuqiError, OSError):
        return None


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                yield (Path(place) / name).stat().st_size
            except FileNotFoundError:
                continue


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
