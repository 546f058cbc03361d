"""Sizes as people write them: ``8GiB``, ``750MB``, ``1073741824``."""

from __future__ import annotations

import re

from neuqi_serve.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_bytes(text: str) -> int:
    """Return a size in bytes.

    Raises:
        UsageError: no positive number with a unit that is known.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        raise UsageError(
            f"expected a size such as 8GiB, 750MB or a number of bytes, got {text!r}. Correct it."
        )
    return int(float(match.group(1)) * unit)


def format_bytes(nbytes: int) -> str:
    """Return a size in MiB or GiB, rounded up in its last digit so that it is enough when it is given back."""
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= unit:
            return f"{-(-nbytes * 1000 // unit) / 1000:.3f} {name}"
    return f"{nbytes} bytes"
