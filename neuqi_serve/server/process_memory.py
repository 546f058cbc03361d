"""Memory of a process, as the system counts it."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessMemory:
    """``resident`` and ``peak`` bytes of a process."""

    resident: int
    peak: int


def own_memory() -> ProcessMemory:
    """Return resident and peak memory of this process."""
    # ru_maxrss is in kibibytes on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    resident = peak
    if statm.exists():
        resident = int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return ProcessMemory(resident, max(peak, resident))
