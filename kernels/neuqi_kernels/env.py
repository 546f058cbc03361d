"""The only reader of the environment in this package."""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """Name of the backend that ``NEUQI_KERNEL_BACKEND`` forces, or None."""
    return os.environ.get("NEUQI_KERNEL_BACKEND") or None


def forced_cpu_isa() -> str | None:
    """Instruction set that ``NEUQI_CPU_ISA`` forces for the C++ kernel, or None."""
    return os.environ.get("NEUQI_CPU_ISA") or None


def batch_invariant() -> bool:
    """Whether vLLM's ``VLLM_BATCH_INVARIANT`` asks for results that do not depend on the batch; read as vLLM does."""
    return bool(int(os.environ.get("VLLM_BATCH_INVARIANT") or "0"))


def tuning_path() -> str | None:
    """File or folder of measured GPU plans that ``NEUQI_GPU_TUNING`` adds to those of the package, or None."""
    return os.environ.get("NEUQI_GPU_TUNING") or None
