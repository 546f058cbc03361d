"""The C++ quantizer: weights of any storage dtype in, packed codes, scales and zero-points out."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import torch

from neuqi_kernels.cpu.library import INSTRUCTION_SETS, KINDS, choose_instruction_set, load
from neuqi_kernels.env import forced_cpu_isa
from neuqi_kernels.layout import BLOCK, SUPPORTED_BITS, packed_words
from neuqi_kernels.search_plan import STAGES, SearchPlan

_UNUSABLE, _OUT_OF_MEMORY = 1, 2
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: tuple[Any, ...] = (_INT, *[_POINTER] * 5, *[_LONG] * 4, *[_INT] * 3, _POINTER, _INT)


class _Plan(ctypes.Structure):
    """``QuantizePlan`` of csrc/quantize.h."""

    _fields_ = (
        ("halvings", ctypes.c_int32),
        ("phases", ctypes.c_int32),
        ("centring", ctypes.c_int32),
        ("refinements", ctypes.c_int32),
        ("kept", ctypes.c_int32 * STAGES),
        ("passes", ctypes.c_int32 * STAGES),
        ("final_passes", ctypes.c_int32),
        ("window", ctypes.c_float),
        ("overshoot", ctypes.c_float),
        ("narrowest", ctypes.c_float),
    )


class UnusableWeightError(ValueError):
    """A weight is not finite, or its square leaves float32."""


def refuse(weight: torch.Tensor, bits: int, group: int, storage: torch.dtype) -> str | None:
    """Return why the C++ quantizer cannot take this matrix, or None.

    ``weight`` ``[N, K]``; ``group``: weights per group, positive; ``storage``: dtype of scales and zero-points.
    """
    if weight.device.type != "cpu":
        return f"runs on the CPU, the weights are on {weight.device.type}"
    loaded = _loaded(forced_cpu_isa())
    if isinstance(loaded, str):
        return loaded
    if bits not in SUPPORTED_BITS or group % BLOCK or weight.shape[1] % group:
        return f"takes {SUPPORTED_BITS} bits and groups of a multiple of {BLOCK}, not {bits} and {group}"
    if weight.dtype not in KINDS or storage not in KINDS:
        return f"takes float32, float16 and bfloat16, not {weight.dtype} and {storage}"
    return None if weight.stride(1) == 1 else "takes rows whose weights lie side by side"


def quantize(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    bits: int,
    group: int,
    storage: torch.dtype,
    plan: SearchPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a matrix on torch's threads; the slow twin is ``neuqi_serve.quant.torch_solver``.

    ``weight`` ``[N, K]``, as :func:`refuse` takes it. ``importance``: float32 ``[K]`` of mean 1 in every group, or
    None for ones. Returns ``qweight`` int32 ``[N, K·b/32]``, ``scale`` and ``zero`` ``[N, K/group]`` of ``storage``.
    The result depends neither on the number of threads nor on the instruction set.

    Raises:
        UnusableWeightError: a weight that is not finite, or too large to be squared.
        MemoryError: no memory for a tile per thread.
        ValueError: the matrix or the importance is refused.
    """
    loaded = _loaded(forced_cpu_isa())
    reason = refuse(weight, bits, group, storage)
    if reason is not None or isinstance(loaded, str):
        raise ValueError(f"expected a matrix that the C++ quantizer takes, it refuses: {reason}.")
    rows, columns = weight.shape
    pointer = None
    if importance is not None:
        if importance.shape != (columns,) or importance.dtype != torch.float32:
            raise ValueError(
                f"expected importance as float32 [{columns}], got {importance.dtype} {list(importance.shape)}."
            )
        importance = importance.contiguous()
        pointer = importance.data_ptr()
    qweight = torch.empty(rows, packed_words(columns, bits), dtype=torch.int32)
    scale = torch.empty(rows, columns // group, dtype=storage)
    zero = torch.empty_like(scale)
    library, isa = loaded
    result = library.neuqi_cpu_quantize(
        isa,
        weight.data_ptr(),
        pointer,
        *(tensor.data_ptr() for tensor in (qweight, scale, zero)),
        rows,
        columns,
        weight.stride(0),
        group,
        bits,
        KINDS[weight.dtype],
        KINDS[storage],
        ctypes.addressof(_structure(plan)),
        torch.get_num_threads(),
    )
    if result == _UNUSABLE:
        raise UnusableWeightError("a weight is not finite or too large")
    if result == _OUT_OF_MEMORY:
        raise MemoryError(f"no memory for tiles of {group} weights on {torch.get_num_threads()} threads")
    return qweight, scale, zero


def instruction_set() -> str | None:
    """Return the name of the instruction set that runs, or None where the C++ quantizer does not."""
    loaded = _loaded(forced_cpu_isa())
    return None if isinstance(loaded, str) else INSTRUCTION_SETS[loaded[1]]


@functools.cache
def _structure(plan: SearchPlan) -> _Plan:
    """Return the plan in C; kept, so that its address stays good during a call."""
    numbers = {name: getattr(plan, name) for name, *_ in _Plan._fields_}
    arrays = ("kept", "passes")
    return _Plan(**{name: tuple(value) if name in arrays else value for name, value in numbers.items()})


@functools.cache
def _loaded(forced: str | None) -> tuple[ctypes.CDLL, int] | str:
    """Return the library and the number of the instruction set, or the reason why there are none."""
    library = load()
    if isinstance(library, str):
        return library
    try:
        plan_bytes = library.neuqi_cpu_quantize_plan_bytes()
        library.neuqi_cpu_quantize.argtypes = _ARGUMENTS
    except AttributeError:
        return "the library was built without the quantizer; install the package again"
    if plan_bytes != ctypes.sizeof(_Plan):
        return "the library was built from other sources; install the package again"
    chosen = choose_instruction_set(library, forced)
    if isinstance(chosen, str):
        return chosen
    if chosen == 0 and forced is None and platform.machine() in ("x86_64", "AMD64"):
        return "this CPU has no fused multiply-add, without which torch is faster"
    return library, chosen
