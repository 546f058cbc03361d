"""The only reader of the process environment: every ``NEUQI_*`` variable, parsed once, a bad value raises.

Settings that change numerics (bits, group size) are read by `neuqi serve` alone, which hands them on in vLLM's
configuration: that is part of vLLM's compile-cache key, as an environment variable is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuqi_serve.errors import UsageError

STATUS_SOCKET = "NEUQI_STATUS_SOCKET"
SANITY_CHECK = "NEUQI_SANITY_CHECK"
SANITY_MODES = ("refuse", "warn", "off")


@dataclass(frozen=True)
class Environment:
    """``traceback``: show full tracebacks on the command line (``NEUQI_TRACEBACK``).

    ``cache_dir``: packed weights of earlier starts (``NEUQI_CACHE_DIR``, else ``$XDG_CACHE_HOME/neuqi``, else
    ``~/.cache/neuqi``). ``cache_max_bytes``: what they may take together (``NEUQI_CACHE_MAX_GIB``), None for the
    default. ``hub_offline``, ``hub_token``: whether ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are set. ``plain``: no colors
    (``NO_COLOR``, or ``TERM=dumb``). ``quantization``: settings of `neuqi serve` for quantizing while loading, by
    their names there (``QUANTIZATION_VARIABLES``). ``failure_dir``: where a rank of an engine says why it failed, set
    by the process that starts it (``NEUQI_FAILURE_DIR``).
    """

    traceback: bool = False
    cache_dir: Path = Path()
    cache_max_bytes: int | None = None
    hub_offline: bool = False
    hub_token: bool = False
    plain: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    failure_dir: Path | None = None


# Variable → setting, and whether it is a whole number.
QUANTIZATION_VARIABLES = {
    "NEUQI_BITS": ("bits", True),
    "NEUQI_GROUP_SIZE": ("group_size", True),
    "NEUQI_SCALE_DTYPE": ("scale_dtype", False),
    "NEUQI_PRESET": ("preset", False),
    "NEUQI_LM_HEAD_BITS": ("lm_head_bits", True),
    "NEUQI_EMBEDDING_BITS": ("embedding_bits", True),
    "NEUQI_IMPORTANCE": ("importance", False),
}
FAILURE_DIR = "NEUQI_FAILURE_DIR"


def api_keys() -> tuple[str, str]:
    """Return ``NEUQI_API_KEYS`` and ``NEUQI_ADMIN_KEYS``: entries of a key file, separated by commas or lines.

    They are no fields of ``Environment``, so that no representation of it can show them.
    """
    return os.environ.get("NEUQI_API_KEYS", ""), os.environ.get("NEUQI_ADMIN_KEYS", "")


def status_socket() -> str | None:
    """Path of the socket to which a start tells its progress (``NEUQI_STATUS_SOCKET``, set by the server itself)."""
    return os.environ.get(STATUS_SOCKET) or None


def sanity_check() -> str:
    """Return ``NEUQI_SANITY_CHECK``: what to do about a kernel that is wrong, ``refuse`` unless it is set.

    Raises:
        UsageError: another word.
    """
    mode = os.environ.get(SANITY_CHECK) or SANITY_MODES[0]
    if mode not in SANITY_MODES:
        raise UsageError(f"{SANITY_CHECK} must be one of {', '.join(SANITY_MODES)}, got {mode!r}.")
    return mode


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise UsageError(f"{name} must be 0 or 1, got {value!r}. Unset it or give one of these.")


def _cache_dir() -> Path:
    own = os.environ.get("NEUQI_CACHE_DIR", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(shared) if shared and Path(shared).is_absolute() else Path("~/.cache").expanduser()
    return base / "neuqi"


def _cache_max_bytes() -> int | None:
    value = os.environ.get("NEUQI_CACHE_MAX_GIB", "").strip()
    if not value:
        return None
    try:
        gib = float(value)
        if not 0 <= gib < 1 << 30:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"NEUQI_CACHE_MAX_GIB must be a number of GiB, at least 0, got {value!r}. Unset it or give one."
        ) from None
    return int(gib * (1 << 30))


def _quantization() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, (key, is_number) in QUANTIZATION_VARIABLES.items():
        value = os.environ.get(name, "").strip()
        if not value:
            continue
        try:
            settings[key] = int(value) if is_number else value
        except ValueError:
            raise UsageError(f"{name} must be a whole number, got {value!r}. Unset it or give one.") from None
    return settings


def read_environment() -> Environment:
    """Parse the variables of this process.

    Raises:
        UsageError: a variable has a value outside its domain.
    """
    return Environment(
        traceback=_flag("NEUQI_TRACEBACK"),
        quantization=_quantization(),
        failure_dir=Path(os.environ[FAILURE_DIR]) if os.environ.get(FAILURE_DIR) else None,
        cache_dir=_cache_dir(),
        cache_max_bytes=_cache_max_bytes(),
        hub_offline=os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"),
        hub_token=bool(os.environ.get("HF_TOKEN")),
        plain=bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb",
    )
