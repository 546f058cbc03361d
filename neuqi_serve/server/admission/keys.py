"""API keys: their file, their names, and the comparison that tells nothing about them.

A key file has one key a line::

    # name: key [admin] [requests-per-minute=N] [tokens-per-minute=N]
    alice: sk-3f9c...
    batch: sk-77ab... requests-per-minute=600 tokens-per-minute=200000
    ops: sha256:9f86d081884c7d65... admin

A key is printable ASCII without spaces; ``sha256:`` and 64 hexadecimal digits stand for a key that the file does not
hold. A name may have two keys while one replaces the other: they share the limits. Only digests are kept in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from neuqi_serve.errors import UsageError

logger = logging.getLogger("vllm.neuqi")

RELOAD_SECONDS = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_COMMENT = re.compile(r"(^|\s)#.*")
_LIMITS = ("requests-per-minute", "tokens-per-minute")
_FORM = "name: key [admin] [requests-per-minute=N] [tokens-per-minute=N]"


@dataclass(frozen=True)
class ApiKey:
    """One key: its owner's ``name``, its SHA-256 ``digest``, and what differs from the server's settings."""

    name: str
    digest: bytes = field(repr=False)
    admin: bool = False
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


def make_key(name: str, secret: str, admin: bool = False) -> ApiKey:
    """Return the key that ``secret`` is, which may be the digest of one (``sha256:…``).

    Raises:
        UsageError: an empty secret, or one that a header cannot carry. The message does not show it.
    """
    digest = _DIGEST.fullmatch(secret)
    if digest is not None:
        return ApiKey(name, bytes.fromhex(digest[1]), admin)
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise UsageError(
            f"expected the key of {name!r} to be printable ASCII without spaces, got {len(secret)} characters that "
            "are not. Choose another, e.g. with: openssl rand -hex 24"
        )
    return ApiKey(name, hashlib.sha256(secret.encode()).digest(), admin)


def parse_keys(text: str, where: str, admin: bool = False) -> tuple[ApiKey, ...]:
    """Read the lines of a key file; ``admin`` makes all of them administrators'.

    Raises:
        UsageError: a line that is none of the form, named by its number, never by its content.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = _COMMENT.sub("", line).replace(":", ": ", 1).split()
        if not words:
            continue
        place = f"{where}, line {number}"
        if len(words) < 2 or not words[0].endswith(":") or not _NAME.fullmatch(words[0][:-1]):
            raise UsageError(f"expected {_FORM!r} in {place}, got something else. Correct that line.")
        key = make_key(words[0][:-1], words[1], admin)
        for word in words[2:]:
            key = _with_option(key, word, place)
        keys.append(key)
    _check_names(keys, where)
    return tuple(keys)


def _with_option(key: ApiKey, word: str, place: str) -> ApiKey:
    if word == "admin":
        return replace(key, admin=True)
    name, _, value = word.partition("=")
    try:
        amount = float(value)
        if name not in _LIMITS or not 0 < amount < float("inf"):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"expected 'admin', 'requests-per-minute=N' or 'tokens-per-minute=N' after the key of {key.name!r} in "
            f"{place}, got another word. Correct that line."
        ) from None
    if name == _LIMITS[0]:
        return replace(key, requests_per_minute=amount)
    return replace(key, tokens_per_minute=amount)


def _check_names(keys: Sequence[ApiKey], where: str) -> None:
    first: dict[str, ApiKey] = {}
    owners: dict[bytes, str] = {}
    for key in keys:
        known = first.setdefault(key.name, key)
        if replace(key, digest=b"") != replace(known, digest=b""):
            raise UsageError(
                f"expected the keys of {key.name!r} in {where} to have the same rights and limits, got different ones."
                " Use another name, or make them alike."
            )
        if owners.setdefault(key.digest, key.name) != key.name:
            raise UsageError(
                f"expected different keys in {where}, got one for both {owners[key.digest]!r} and {key.name!r}."
            )


class KeyFile:
    """A file of keys, read again when it has changed; a file that cannot be read leaves the keys as they were."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._checked = clock()
        self._identity = self._stat()
        self.keys = self._read()

    def refresh(self) -> bool:
        """Look at the file, at most once a second; return whether there are other keys now."""
        now = self._clock()
        if now - self._checked < RELOAD_SECONDS:
            return False
        self._checked = now
        identity = self._stat()
        if identity == self._identity:
            return False
        self._identity = identity
        try:
            keys = self._read()
        except UsageError as error:
            logger.warning("neuqi: the API keys stay as they were: %s", error)
            return False
        if keys == self.keys:
            return False
        logger.info("neuqi: %d API keys read again from %s", len(keys), self.path)
        self.keys = keys
        return True

    def exposure(self) -> str | None:
        """Return a warning when others than the owner may read the file."""
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if not mode & 0o077:
            return None
        return f"{self.path} may be read by others (mode {mode:o}): chmod 600 {self.path}"

    def _stat(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev

    def _read(self) -> tuple[ApiKey, ...]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UsageError(
                f"expected a text file of API keys, got {self.path} ({reason}). Check the path of --api-key-file."
            ) from None
        keys = parse_keys(text, str(self.path))
        if not keys:
            raise UsageError(
                f"expected at least one key in {self.path}, got none. Add a line of the form {_FORM!r}."
            )
        return keys


class KeyRing:
    """All keys of a server: those given at the start, and those of the file."""

    def __init__(self, fixed: Sequence[ApiKey] = (), file: KeyFile | None = None) -> None:
        self._fixed, self._file = tuple(fixed), file
        self.keys = self._all()

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, secret: bytes) -> ApiKey | None:
        """Return the key that ``secret`` is. Takes equally long whichever it is, and for none."""
        if self._file is not None and self._file.refresh():
            self.keys = self._all()
        digest = hashlib.sha256(secret).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _all(self) -> tuple[ApiKey, ...]:
        return (*self._fixed, *(self._file.keys if self._file is not None else ()))
