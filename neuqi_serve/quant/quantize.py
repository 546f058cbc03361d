"""Quantize one weight matrix: the entry to the mathematics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_kernels import layout
from neuqi_kernels.cpu import quantize as cpu
from neuqi_serve.config import DEFAULT_PRESET, PRESETS, WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.quant import torch_solver
from neuqi_serve.quant.affine import QuantizedWeight
from neuqi_serve.quant.presets import search_plan
from neuqi_serve.quant.storage import LARGEST_WEIGHT, normalized_importance, storage_dtype

# Weights looked at together; only a weight of another layout or dtype is copied, that much.
CHUNK_ELEMENTS = 1 << 22
# What the C++ and Triton quantizers search; the others exist in torch only.
SEARCHED_PRESETS = ("balanced", "fast")
# What these read where it lies.
READABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix: ``qweight`` int32 ``[N, K·b/32]``, ``scale`` and ``zero`` ``[N, G]`` in their storage dtype."""

    qweight: Tensor
    scale: Tensor
    zero: Tensor


def quantize_weight(
    weight: Tensor, spec: WeightSpec, importance: Tensor | None = None, preset: str = DEFAULT_PRESET
) -> QuantizedWeight:
    """Codes, scales and zero-points of a weight matrix.

    Minimises ``Σ_i h_i ((q_i − zero)·scale − w_i)²`` in every group, under the stored scale and zero-point; never
    worse than Min-Max. The result of a group depends on nothing but the group.

    Args:
        weight: ``[N, K]`` of any floating dtype, K a multiple of 32 and of the group size.
        spec: bits, group size, storage dtype.
        importance: h, ``[K]``, not negative: the diagonal of the layer's Hessian. None weighs all inputs alike.
        preset: ``"balanced"``; ``"fast"``, some times faster and a little worse; ``"reference"``, the search of the
            paper, hundreds of times slower; or ``"minmax"``, the baseline.

    Raises:
        UsageError: a shape, dtype or option that does not fit, a weight or importance that is not finite.
    """
    packed = quantize_packed(weight, spec, importance, preset)
    return QuantizedWeight(layout.unpack(packed.qweight, spec.bits), packed.scale, packed.zero)


def quantize_packed(
    weight: Tensor,
    spec: WeightSpec,
    importance: Tensor | None = None,
    preset: str = DEFAULT_PRESET,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> PackedWeight:
    """Like :func:`quantize_weight`, with the codes packed; no array of the full size but the result.

    The C++ quantizer works on a CPU and the Triton one on a GPU, torch where neither can.

    ``chunk_elements``: weights looked at together, which bounds the copy of a weight of another layout or dtype; the
    result does not depend on it.

    Raises:
        UsageError: as :func:`quantize_weight`; ``chunk_elements`` below 1.
    """
    _check(weight, spec, importance, preset, chunk_elements)
    weight = weight.detach()
    mass = None
    if importance is not None:
        grouped = importance.detach().to(weight.device).reshape(spec.groups(weight.shape[1]), -1)
        mass = normalized_importance(grouped, -1).view(-1)
    run = _kernel(weight, spec, mass, preset) if preset in SEARCHED_PRESETS else None
    if run is None:
        return quantize_in_torch(weight, spec, mass, preset, chunk_elements)
    if weight.dtype in READABLE and weight.stride(1) == 1:
        return run(weight)
    rows = max(1, chunk_elements // weight.shape[1])
    starts = range(0, weight.shape[0], rows)
    parts = [run(weight[start : start + rows].to(torch.float32).contiguous()) for start in starts]
    return PackedWeight(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("qweight", "scale", "zero"))
    )


def quantize_in_torch(
    weight: Tensor, spec: WeightSpec, mass: Tensor | None, preset: str, chunk_elements: int = CHUNK_ELEMENTS
) -> PackedWeight:
    """The slow twin: what :func:`quantize_packed` does without C++ and Triton.

    ``mass``: importance of mean 1 in every group, float32 ``[K]``, or None.
    """
    words = layout.packed_words(weight.shape[1], spec.bits)
    qweight = torch.empty((weight.shape[0], words), dtype=torch.int32, device=weight.device)

    def keep(part: slice, tile_codes: Tensor) -> None:
        packed = layout.pack(tile_codes, spec.bits)
        qweight.view(-1, packed.shape[-1])[part] = packed

    scale, zero, usable = torch_solver.solve(weight, spec, mass, preset, keep, chunk_elements)
    if not usable:
        raise _unusable(weight)
    return PackedWeight(qweight, scale, zero)


def _kernel(
    weight: Tensor, spec: WeightSpec, mass: Tensor | None, preset: str
) -> Callable[[Tensor], PackedWeight] | None:
    """What quantizes rows of ``weight`` in a readable dtype and layout, or None where only torch does."""
    columns = weight.shape[1]
    group, dtype = columns // spec.groups(columns), storage_dtype(spec)
    plan = search_plan(preset, spec.bits, mass is not None)
    readable = torch.empty((0, columns), dtype=torch.float32)

    def on_cpu(rows: Tensor) -> PackedWeight:
        try:
            return PackedWeight(*cpu.quantize(rows, mass, spec.bits, group, dtype, plan))
        except cpu.UnusableWeightError:
            raise _unusable(weight) from None

    if weight.device.type == "cpu":
        return on_cpu if cpu.refuse(readable, spec.bits, group, dtype) is None else None
    if weight.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from neuqi_kernels.gpu import quantize_launch as gpu

    def on_gpu(rows: Tensor) -> PackedWeight:
        qweight, scale, zero, unusable = gpu.quantize(rows, mass, spec.bits, group, dtype, plan)
        # The only wait for the device, when all is launched.
        if unusable.item():
            raise _unusable(weight)
        return PackedWeight(qweight, scale, zero)

    return on_gpu if gpu.refuse(readable, spec.bits, group, dtype) is None else None


def _check(
    weight: Tensor, spec: WeightSpec, importance: Tensor | None, preset: str, chunk_elements: int
) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise UsageError(
            f"expected a floating-point weight [N, K], got {weight.dtype} {list(weight.shape)}. "
            "Pass one linear layer's weight; experts go one at a time."
        )
    if preset not in PRESETS:
        raise UsageError(f"preset must be one of {PRESETS}, got {preset!r}. Try {DEFAULT_PRESET!r}.")
    if chunk_elements < 1:
        raise UsageError(f"chunk_elements must be at least 1, got {chunk_elements}. Leave it out.")
    spec.groups(weight.shape[1])
    if importance is None:
        return
    if importance.shape != weight.shape[1:]:
        raise UsageError(
            f"expected an importance [K] with K = {weight.shape[1]}, got {list(importance.shape)}. "
            "Pass the mean square of each of the layer's inputs."
        )
    bad = int((~torch.isfinite(importance) | (importance < 0)).sum())
    if bad:
        raise UsageError(
            f"expected a finite importance of at least 0, got {bad} other values. Check the calibration data."
        )


def _unusable(weight: Tensor) -> UsageError:
    per_row = [int((~(row.float().abs() <= LARGEST_WEIGHT)).sum()) for row in weight]
    first = next(row for row, bad in enumerate(per_row) if bad)
    return UsageError(
        f"expected finite weights of at most {LARGEST_WEIGHT:g}, got {sum(per_row)} non-finite or larger values, "
        f"the first in row {first}. The checkpoint is damaged or comes from a diverged training run: fetch it again, "
        "or leave this layer unquantized."
    )
