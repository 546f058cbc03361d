"""Starts the GPU quantizer. Imported at the first matrix, and Triton with it."""

from __future__ import annotations

import contextlib

import torch

from neuqi_kernels.gpu.quantize import quantize_groups
from neuqi_kernels.layout import BLOCK, SUPPORTED_BITS, packed_words
from neuqi_kernels.search_plan import SearchPlan

# A program's tile: as many groups as make this many weights, or one.
_TILE_WEIGHTS = 1024
# More would not fit a program's registers.
LONGEST_GROUP = 1 << 15
_WEIGHTS_PER_WARP = 1024
_FEWEST_WARPS = 4
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuse(weight: torch.Tensor, bits: int, group: int, storage: torch.dtype) -> str | None:
    """Return why the GPU quantizer cannot take this matrix, or None; arguments as :func:`quantize`."""
    if bits not in SUPPORTED_BITS or group % BLOCK or weight.shape[1] % group:
        return f"takes {SUPPORTED_BITS} bits and groups of a multiple of {BLOCK}, not {bits} and {group}"
    if group > LONGEST_GROUP:
        return f"takes groups of at most {LONGEST_GROUP} weights, not {group}"
    if weight.dtype not in _DTYPES or storage not in _DTYPES:
        return f"takes float32, float16 and bfloat16, not {weight.dtype} and {storage}"
    return None if weight.stride(1) == 1 else "takes rows whose weights lie side by side"


def constants(bits: int, group: int, weighted: bool, plan: SearchPlan) -> dict[str, int | float | bool]:
    """Return what the kernel is compiled for, and its warps."""
    block = 1 << (group - 1).bit_length()
    options: dict[str, int | float | bool] = {
        "BITS": bits,
        "SIZE": group,
        "BLOCK": block,
        "ROWS": max(1, _TILE_WEIGHTS // block),
        "WEIGHTED": weighted,
        "HALVINGS": plan.halvings,
        "PHASES": plan.phases,
        "CENTRING": plan.centring,
        "REFINEMENTS": plan.refinements,
        "WINDOW": plan.window,
        "OVERSHOOT": plan.overshoot,
        "NARROWEST": plan.narrowest,
        "num_warps": min(32, max(_FEWEST_WARPS, block // _WEIGHTS_PER_WARP)),
    }
    for index, (kept, passes) in enumerate(zip(plan.kept, plan.passes, strict=True), 1):
        options[f"KEPT_{index}"] = kept
        options[f"WIDTH_{index}"] = 1 << (kept - 1).bit_length()
        options[f"PASSES_{index}"] = passes
    return options


def quantize(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    bits: int,
    group: int,
    storage: torch.dtype,
    plan: SearchPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a matrix where it lies; the slow twin is ``neuqi_serve.quant.torch_solver``.

    ``weight`` ``[N, K]``, as :func:`refuse` takes it. ``importance``: float32 ``[K]`` of mean 1 in every group, or
    None for ones. Returns ``qweight`` int32 ``[N, K·b/32]``, ``scale`` and ``zero`` ``[N, K/group]`` of ``storage``,
    and an int32 of one element that is not 0 where a weight is not finite or too large. The host waits for nothing.
    """
    rows, columns = weight.shape
    qweight = torch.empty(rows, packed_words(columns, bits), dtype=torch.int32, device=weight.device)
    scale = torch.empty(rows, columns // group, dtype=storage, device=weight.device)
    zero = torch.empty_like(scale)
    unusable = torch.zeros(1, dtype=torch.int32, device=weight.device)
    limits = torch.finfo(storage)
    options = constants(bits, group, importance is not None, plan)
    # Triton launches on the current device, which need not be the weight's.
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        quantize_groups[(-(-scale.numel() // int(options["ROWS"])),)](
            weight,
            weight if importance is None else importance.contiguous(),
            qweight,
            scale,
            zero,
            unusable,
            scale.numel(),
            columns // group,
            weight.stride(0),
            limits.tiny,
            limits.max,
            **options,
        )
    return qweight, scale, zero, unusable
