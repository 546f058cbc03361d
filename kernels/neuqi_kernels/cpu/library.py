"""The C++ kernel library: found, checked, its functions declared."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

# Must be `kAbi` of csrc/entry.cpp.
ABI = 5
PATH = Path(__file__).with_name("libneuqi_cpu.so")
# In the order of `Isa` in csrc/entry.cpp, weakest first within an architecture.
INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "neon")
# `Kind` of csrc/layout.h.
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "neuqi_cpu_built": (_INT, []),
    "neuqi_cpu_supported": (_INT, []),
    "neuqi_cpu_team_is_shared": (_INT, []),
    "neuqi_cpu_tile_bytes": (_LONG, [_LONG, _INT, _LONG, _INT]),
    "neuqi_cpu_repack": (None, [_POINTER] * 4 + [_LONG, _LONG, _INT, _LONG, _INT, _INT]),
    "neuqi_cpu_dequantize": (None, [_POINTER] * 2 + [_LONG, _LONG, _INT, _LONG, _INT, _INT]),
    "neuqi_cpu_gemm": (_INT, [_INT] + [_POINTER] * 4 + [_LONG] * 3 + [_INT, _LONG] + [_INT] * 4),
    "neuqi_cpu_experts": (_INT, [_INT] + [_POINTER] * 8 + [_LONG] * 5 + [_INT, _LONG] * 2 + [_INT] * 5),
    "neuqi_cpu_gather": (_INT, [_POINTER] * 3 + [_LONG] * 3 + [_INT, _LONG] + [_INT] * 3),
    "neuqi_cpu_read": (ctypes.c_uint64, [_POINTER, _LONG, _INT]),
}


def load(path: Path = PATH) -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none."""
    if not path.exists():
        return (
            "built without a C++ compiler; install g++ (9 or newer) or clang++ and install the package again"
        )
    try:
        library = ctypes.CDLL(str(path))
        abi = library.neuqi_cpu_abi()
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load ({error}); install the package again"
    if abi != ABI:
        return (
            f"{path.name} was built from other sources (ABI {abi}, expected {ABI}); install the package again"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def choose_instruction_set(library: ctypes.CDLL, forced: str | None) -> int | str:
    """Return the number of the strongest instruction set that library and CPU share, or of the forced one.

    Returns the reason as text when the forced one is not available.

    Raises:
        ValueError: no instruction set has the forced name.
    """
    usable = library.neuqi_cpu_built() & library.neuqi_cpu_supported()
    if forced is None:
        return usable.bit_length() - 1
    if forced not in INSTRUCTION_SETS:
        raise ValueError(
            f"expected NEUQI_CPU_ISA to be one of {INSTRUCTION_SETS}, got {forced!r}. Choose one of these or unset it."
        )
    number = INSTRUCTION_SETS.index(forced)
    if usable >> number & 1:
        return number
    lacking = "library" if library.neuqi_cpu_supported() >> number & 1 else "CPU"
    return f"NEUQI_CPU_ISA forces {forced}, which this {lacking} does not have"
