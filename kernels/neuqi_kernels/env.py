"""The only reader of the environment in this package."""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """Name of the backend that ``NEUQI_KERNEL_BACKEND`` forces, or None."""
    return os.environ.get("NEUQI_KERNEL_BACKEND") or None


def forced_cpu_isa() -> str | None:
    """Instruction set that ``NEUQI_CPU_ISA`` forces for the C++ kernel, or None."""
    return os.environ.get("NEUQI_CPU_ISA") or None
