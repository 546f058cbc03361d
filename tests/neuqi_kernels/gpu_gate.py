"""What is compiled for GPUs that are not there: every kernel for every architecture, and the formats near a limit.

A compilation takes a second or more. So ``decode_mm``, which the instructions per weight decide, goes to every
architecture with all low bits, the other kernels with bits that change from one architecture to the next.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
LOW_BITS = (2, 3, 4)
# Kernel, and tokens for which it is planned: one tile of them, or a block of one expert.
KERNELS = (
    ("moe_decode_mm", 8),
    ("moe_decode_mm", 16),
    ("mid_mm", 64),
    ("mid_mm", 200),
    ("prefill_mm", 512),
    ("moe_prefill_mm", 64),
    ("dequant", 0),
    ("repack", 0),
)


def gate_cases() -> list[dict[str, Any]]:
    """Requests for ``gpu_compile.compile_case``, all of which have a line in the table of instructions."""
    cases: list[dict[str, Any]] = [
        {"arch": arch, "bits": bits, "kernel": "decode_mm", "m": 1}
        for arch in ARCHITECTURES
        for bits in LOW_BITS
    ]
    for shift, (kernel, m) in enumerate(KERNELS):
        bits_of = islice(cycle(LOW_BITS), shift, None)
        for arch, bits in zip(ARCHITECTURES, bits_of, strict=False):
            # Dense layers of sm_100 go from decode_mm to written-out weights.
            if not (kernel in ("mid_mm", "prefill_mm") and arch == "sm_100"):
                cases.append({"arch": arch, "bits": bits, "kernel": kernel, "m": m})
    return cases


def other_cases() -> list[dict[str, Any]]:
    """Formats, sizes and groups near a limit of registers or shared memory, outside the table."""
    return [
        {"arch": "sm_90", "bits": 8},
        {"arch": "sm_90", "bits": 8, "m": 64, "group": 0},
        {"arch": "sm_80", "bits": 2, "m": 32},
        {"arch": "sm_80", "bits": 3, "m": 32},
        {"arch": "sm_90", "bits": 2, "m": 32},
        {"arch": "sm_100", "bits": 2, "m": 64},
        {"arch": "sm_120", "bits": 3, "m": 32},
        {"arch": "sm_90", "bits": 3, "m": 200},
        {"arch": "sm_90", "bits": 3, "dtype": "float16", "group": 32},
        {"arch": "sm_86", "bits": 3, "dtype": "float16", "group": 32},
        {"arch": "sm_86", "bits": 3, "k": 4096 + 32, "group": 0},
        {"arch": "sm_90", "bits": 4, "group": 64, "m": 12},
        {"arch": "sm_100", "bits": 3, "dtype": "float16", "group": 32, "kernel": "moe_decode_mm", "m": 16},
        {"arch": "sm_89", "bits": 3, "group": 32, "m": 16},
        {"arch": "sm_90", "bits": 3, "m": 16},
        {"arch": "sm_89", "bits": 3, "group": 32, "kernel": "moe_prefill_mm", "m": 64},
        {"arch": "sm_90", "bits": 3, "kernel": "moe_prefill_mm", "m": 128},
        {"arch": "gfx942", "bits": 3, "dtype": "float16", "group": 32, "k": 4096 + 32},
    ]


def table_key(case: dict[str, Any]) -> str:
    """The line of the table that a case of the gate has within its architecture."""
    return f"{case['kernel']} {case['m']} {case['bits']}"
