"""Digests of source files: right, and right again after every change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from neuqi_serve.cache import digests
from neuqi_serve.cache.digests import FileState, digest_file, digest_files


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time two minutes later, when a file that was just written has settled."""
    later = time.time_ns() + 120 * 10**9
    monkeypatch.setattr(digests.time, "time_ns", lambda: later)


def test_a_known_digest_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, records = tmp_path / "a", tmp_path / "records"
    file.write_bytes(b"content")
    _settle(monkeypatch)
    first = digest_file(file, records)
    assert first == (_sha(b"content"), FileState.of(file))
    monkeypatch.setattr(digests, "hash_file", lambda path: pytest.fail("hashed again"))
    assert digest_file(file, records) == first


def test_a_change_of_equal_size_and_time_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, records = tmp_path / "a", tmp_path / "records"
    file.write_bytes(b"content")
    _settle(monkeypatch)
    state = file.stat()
    assert digest_file(file, records)[0] == _sha(b"content")
    time.sleep(0.02)
    file.write_bytes(b"CONTENT")
    # The time of modification can be set back; that of the change of the inode cannot.
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest_file(file, records)[0] == _sha(b"CONTENT")


def test_a_file_written_just_now_is_not_trusted_to_stay(tmp_path: Path) -> None:
    file, records = tmp_path / "a", tmp_path / "records"
    file.write_bytes(b"content")
    digest_file(file, records)
    assert not records.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"state": {}, "sha256": "x"}'])
def test_a_damaged_record_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    file, records = tmp_path / "a", tmp_path / "records"
    file.write_bytes(b"content")
    _settle(monkeypatch)
    digest_file(file, records)
    (record,) = records.iterdir()
    record.write_bytes(damage)
    assert digest_file(file, records)[0] == _sha(b"content")


def test_a_file_of_the_hubs_cache_is_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / _sha(b"other")
    blob.parent.mkdir()
    blob.write_bytes(b"not read")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "model.safetensors").symlink_to(blob)
    assert digest_file(tmp_path / "snapshots" / "model.safetensors", tmp_path / "r")[0] == _sha(b"other")


def test_several_files(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(7)]
    for file in files:
        file.write_bytes(file.name.encode())
    found = digest_files(files, tmp_path / "records")
    assert {path.name: digest for path, (digest, _) in found.items()} == {
        str(i): _sha(str(i).encode()) for i in range(7)
    }
