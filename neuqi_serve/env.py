"""The only reader of the process environment: every ``NEUQI_*`` variable, parsed once, a bad value raises.

Settings that change numerics (bits, group size) are not here on purpose: they travel in vLLM's configuration,
which is part of its compile-cache key, as an environment variable is not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from neuqi_serve.errors import UsageError


@dataclass(frozen=True)
class Environment:
    """``traceback``: show full tracebacks on the command line (``NEUQI_TRACEBACK``)."""

    traceback: bool = False


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise UsageError(f"{name} must be 0 or 1, got {value!r}. Unset it or give one of these.")


def read_environment() -> Environment:
    """Parse the variables of this process.

    Raises:
        UsageError: a variable has a value outside its domain.
    """
    return Environment(traceback=_flag("NEUQI_TRACEBACK"))
