"""The finished blocks of a calibrated quantization, on disk: an interrupted run goes on behind the last of them.

A folder ``.NAME.journal`` beside the destination holds ``journal.json`` (what the run is: recipe, model, tokens), the
packed weights of each finished block, and the hidden states in front of the next one. The states are stored rather
than computed again: a forward pass gives the same bits only on the same hardware with the same number of threads, and
resuming costs nothing. Each file is written under another name, flushed to the disk and renamed; the states come before
the block, so a block that is there has the states that follow it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.safetensors_file import read_header, read_tensor

IDENTITY_NAME = "journal.json"
_PARTIAL = ".partial"


class Journal:
    """The journal of a destination, locked against a second run until :meth:`close`.

    ``identity``: what makes two runs the same; plain JSON values. ``restart`` discards what another run left.

    Raises:
        UsageError: another process works on the destination, or the journal is that of a run with other settings.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        target = destination.resolve()
        self.folder = target.parent / f".{target.name}.journal"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UsageError(
                f"expected to be the only writer of {destination}, another process is calibrating it. Wait for it, or "
                "name another folder."
            ) from None
        try:
            self._open(destination, identity, restart)
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> int:
        """Number of blocks that are done."""
        count = 0
        while self._block(count).exists():
            count += 1
        return count

    def save(self, block: int, packed: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """Keep the packed tensors of a block and the hidden states behind it; both are durable afterwards."""
        self._write(self._states(block + 1), states)
        self._write(self._block(block), packed)
        self._states(block).unlink(missing_ok=True)

    def packed(self, block: int) -> dict[str, Tensor]:
        """Packed tensors of a finished block.

        Raises:
            IntegrityError: the file is damaged.
        """
        return _read(self._block(block))

    def names(self, block: int) -> list[str]:
        """Names of these tensors.

        Raises:
            IntegrityError: the file is damaged.
        """
        return list(read_header(self._block(block)))

    def states(self) -> dict[str, Tensor]:
        """Hidden states behind the last finished block.

        Raises:
            IntegrityError: the file is missing or damaged.
        """
        return _read(self._states(self.finished))

    def discard(self) -> None:
        """Remove the journal: its content is elsewhere."""
        # The identity goes last: what is left of an interrupted removal is discarded by its next run.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == IDENTITY_NAME):
            path.unlink()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let other processes work on the destination; the journal stays."""
        os.close(self._lock)

    def _open(self, destination: Path, identity: Mapping[str, Any], restart: bool) -> None:
        place = self.folder / IDENTITY_NAME
        wanted = json.dumps(identity, indent=1, sort_keys=True)
        if place.exists() and not restart:
            difference = _difference(place.read_text(encoding="utf-8"), identity)
            if difference and self.finished:
                raise UsageError(
                    f"expected to go on with the interrupted run for {destination}, which has {self.finished} finished "
                    f"blocks, got other settings: {difference}. Repeat the command as it was, or discard the blocks "
                    "with --restart."
                )
            if not difference:
                for path in self.folder.glob(f"*{_PARTIAL}"):
                    path.unlink()
                return
        for path in self.folder.iterdir():
            path.unlink()
        _durable(place, wanted.encode())

    def _block(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.safetensors"

    def _states(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        partial = path.with_name(path.name + _PARTIAL)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        _rename_durably(partial, path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return {name: read_tensor(stored) for name, stored in read_header(path).items()}
    except IntegrityError as error:
        raise IntegrityError(f"{error} Discard the interrupted run with --restart.") from None


def _durable(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_bytes(content)
    _rename_durably(partial, path)


def _rename_durably(partial: Path, path: Path) -> None:
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(text: str, identity: Mapping[str, Any]) -> str:
    """What differs between a stored identity and this one, empty if nothing does."""
    try:
        stored = json.loads(text)
    except ValueError:
        stored = {}
    # As JSON gives it back: tuples become lists.
    before, now = _leaves(stored), _leaves(json.loads(json.dumps(identity)))
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return "; ".join(f"{key} was {before.get(key)!r:.200}, is {now.get(key)!r:.200}" for key in keys)


def _leaves(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values of nested objects under names such as ``recipe.spec.bits``."""
    found: dict[str, Any] = {}
    for key, part in value.items():
        found.update(_leaves(part, f"{path}{key}.") if isinstance(part, dict) else {f"{path}{key}": part})
    return found
