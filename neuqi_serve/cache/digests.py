"""SHA-256 of source files, computed once for each state of a file.

Hashing a checkpoint costs as much as reading it. The digest is kept beside size, times, inode and device of the file it
was computed of; a file that has any other of them is hashed again. A file of the Hugging Face hub's cache has its
digest for a name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from neuqi_serve.format.manifest import hash_file

# A file changed this shortly before it was hashed could change again without a new time stamp.
SETTLED_NANOSECONDS = 2_000_000_000
_HASH_THREADS = 4
_SHA256_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileState:
    """What the file system says about a file; another content has another state."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Ask the file system, symbolic links followed."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def digest_files(paths: Sequence[Path], records: Path) -> dict[Path, tuple[str, FileState]]:
    """Return path → (SHA-256, state); digests are kept in the folder ``records``, several files hashed at a time."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(zip(paths, pool.map(lambda path: digest_file(path, records), paths), strict=True))


def digest_file(path: Path, records: Path) -> tuple[str, FileState]:
    """Return the SHA-256 of a file's content and the state of the file when it had that content."""
    real = path.resolve()
    state = FileState.of(real)
    if real.parent.name == "blobs" and _SHA256_NAME.fullmatch(real.name):
        return real.name, state
    record = records / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    known = _known(record, state)
    if known is not None:
        return known, state
    digest = hash_file(real).sha256
    settled = time.time_ns() - max(state.mtime_ns, state.ctime_ns) > SETTLED_NANOSECONDS
    if settled and FileState.of(real) == state:
        _keep(record, real, state, digest)
    return digest, state


def _known(record: Path, state: FileState) -> str | None:
    try:
        body = json.loads(record.read_bytes())
        digest = body["sha256"]
        if body["state"] == asdict(state) and _SHA256_NAME.fullmatch(digest):
            return str(digest)
    except (OSError, ValueError, KeyError, TypeError):
        # Absent or damaged: the file is hashed again.
        pass
    return None


def _keep(record: Path, path: Path, state: FileState, digest: str) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    body = {"path": str(path), "state": asdict(state), "sha256": digest}
    handle, temporary = tempfile.mkstemp(dir=record.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(body, file)
    os.replace(temporary, record)
