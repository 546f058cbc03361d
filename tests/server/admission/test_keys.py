"""API keys: the file, what it may hold, reading it again, and what is never shown."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.server.admission import keys as module
from neuqi_serve.server.admission.keys import ApiKey, KeyFile, KeyRing, make_key, parse_keys

SECRET = "sk-very-secret-4711"


def test_a_line_has_a_name_a_key_and_options() -> None:
    text = f"""
# who      key
alice: {SECRET}
batch:sk-b  requests-per-minute=600 tokens-per-minute=2.5e5   # a comment
ops: sk:with:colons#and-hash admin
"""
    alice, batch, ops = parse_keys(text, "f")
    assert alice == ApiKey("alice", hashlib.sha256(SECRET.encode()).digest())
    assert (batch.name, batch.requests_per_minute, batch.tokens_per_minute) == ("batch", 600, 250000)
    assert ops == make_key("ops", "sk:with:colons#and-hash", admin=True)


def test_a_digest_stands_for_its_key() -> None:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    ring = KeyRing(parse_keys(f"a: sha256:{digest.upper()}", "f"))
    assert ring.find(SECRET.encode()) == ring.keys[0]
    # Knowing the digest is not knowing the key.
    assert ring.find(f"sha256:{digest}".encode()) is None
    assert ring.find(digest.encode()) is None


@pytest.mark.parametrize(
    "line",
    [
        f"{SECRET}",
        f": {SECRET}",
        "alice:",
        f"al ice: {SECRET}",
        f"alice: {SECRET} root",
        f"alice: {SECRET} requests-per-minute=0",
        f"alice: {SECRET} tokens-per-minute=many",
        f"alice: {SECRET} bytes-per-minute=3",
        f"alice: {SECRET}é",
    ],
)
def test_another_line_is_refused_by_its_number_and_never_shown(line: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_keys(f"ok: sk-1\n{line}", "the-file")
    assert SECRET not in str(refused.value)
    assert "line 2" in str(refused.value) or "'alice'" in str(refused.value)


def test_two_keys_of_a_name_have_the_same_rights() -> None:
    assert len(parse_keys("a: k1 admin\na: k2 admin", "f")) == 2
    with pytest.raises(UsageError, match="same rights"):
        parse_keys("a: k1 admin\na: k2", "f")
    with pytest.raises(UsageError, match="'a' and 'b'"):
        parse_keys("a: k1\nb: k1", "f")


def test_a_key_shows_neither_itself_nor_its_digest() -> None:
    key = make_key("alice", SECRET)
    assert SECRET not in repr(key)
    assert key.digest.hex() not in repr(key)
    assert repr(key.digest) not in repr(key)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_changed_file_is_read_again_within_a_second(tmp_path: Path) -> None:
    now = [0.0]
    path = _file(tmp_path, "a: k1")
    ring = KeyRing((make_key("fixed", "k0"),), KeyFile(path, clock=lambda: now[0]))
    # As an editor and as Kubernetes replaces it: another file under the name.
    (tmp_path / "new").write_text("a: k2 admin")
    os.replace(tmp_path / "new", path)
    assert ring.find(b"k1") is not None
    now[0] = module.RELOAD_SECONDS
    assert ring.find(b"k1") is None
    found = ring.find(b"k2")
    assert found is not None
    assert found.admin
    assert ring.find(b"k0") is not None


@pytest.mark.parametrize("text", ["nonsense", "", None])
def test_a_file_that_breaks_leaves_the_keys_as_they_were(
    tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.logger, "propagate", True)
    now = [0.0]
    path = _file(tmp_path, "a: k1")
    ring = KeyRing((), KeyFile(path, clock=lambda: now[0]))
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with caplog.at_level(logging.WARNING, logger=module.logger.name):
        for _ in range(3):
            now[0] += 5
            assert ring.find(b"k1") is not None
    # Once, not at each request.
    assert len(caplog.records) == 1
    path.write_text("a: k3")
    now[0] += 5
    assert ring.find(b"k3") is not None


def test_a_file_that_others_may_read_is_told(tmp_path: Path) -> None:
    path = _file(tmp_path, "a: k1")
    assert KeyFile(path).exposure() is None
    path.chmod(0o644)
    assert "chmod 600" in (KeyFile(path).exposure() or "")


def test_no_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        KeyFile(tmp_path / "absent")
    with pytest.raises(UsageError, match="at least one key"):
        KeyFile(_file(tmp_path, "# nobody"))


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(mine: bytes, theirs: bytes) -> bool:
        compared.append(theirs)
        return mine == theirs

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    ring = KeyRing([make_key(f"n{i}", f"k{i}") for i in range(17)])
    for secret in (b"k0", b"k16", b"none"):
        compared.clear()
        ring.find(secret)
        assert len(compared) == 17
