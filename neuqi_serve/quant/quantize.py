"""Quantize one weight matrix: the entry to the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.quant import fast
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight
from neuqi_serve.quant.minmax import minmax
from neuqi_serve.quant.scale_search import search_scale
from neuqi_serve.quant.storage import (
    Tile,
    choose,
    codes_of,
    constant_params,
    normalized_importance,
    refit_zero,
)

SOLVERS = ("fast", "reference", "minmax")
# Rows of about this many weights are cut into tiles at a time; only a non-contiguous weight is copied, that much.
CHUNK_ELEMENTS = 1 << 22
# On a processor a tile and its two work arrays stay in the second-level cache, and below 32768 elements torch runs
# an operation on the calling thread: tiles run side by side instead, one thread each.
CPU_TILE_ELEMENTS = 32767
# A GPU wants few large launches.
DEVICE_TILE_ELEMENTS = 1 << 22
# Short groups lie along columns of a tile, long ones along rows: broadcasting is fast along the long side.
LONGEST_COLUMN = 256
# Columns come in multiples of this, so that vectorised sums treat every column alike and a group's result does not
# depend on its place.
COLUMN_MULTIPLE = 64
# Squares of larger weights leave float32.
LARGEST_WEIGHT = 1e18


@dataclass(frozen=True)
class PackedWeight:
    """A packed matrix: ``qweight`` int32 ``[N, K·b/32]``, ``scale`` and ``zero`` ``[N, G]`` in their storage dtype."""

    qweight: Tensor
    scale: Tensor
    zero: Tensor


def quantize_weight(
    weight: Tensor, spec: WeightSpec, importance: Tensor | None = None, solver: str = "fast"
) -> QuantizedWeight:
    """Codes, scales and zero-points of a weight matrix.

    Minimises ``Σ_i h_i ((q_i − zero)·scale − w_i)²`` in every group, under the stored scale and zero-point; never
    worse than Min-Max. The result of a group depends on nothing but the group.

    Args:
        weight: ``[N, K]`` of any floating dtype, K a multiple of 32 and of the group size.
        spec: bits, group size, storage dtype.
        importance: h, ``[K]``, not negative: the diagonal of the layer's Hessian. None weighs all inputs alike.
        solver: ``"fast"``, ``"reference"`` (slow, the definition of the fast one) or ``"minmax"`` (baseline).

    Raises:
        UsageError: a shape, dtype or option that does not fit, a weight or importance that is not finite.
    """
    rows, columns = _checked(weight, spec, importance, solver).shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)

    def keep(part: slice, tile_codes: Tensor) -> None:
        codes.view(-1, tile_codes.shape[-1])[part] = tile_codes

    scale, zero = _run(weight, spec, importance, solver, keep, CHUNK_ELEMENTS)
    return QuantizedWeight(codes, scale, zero)


def quantize_packed(
    weight: Tensor,
    spec: WeightSpec,
    importance: Tensor | None = None,
    solver: str = "fast",
    chunk_elements: int = CHUNK_ELEMENTS,
) -> PackedWeight:
    """Like :func:`quantize_weight`, with the codes packed tile by tile; no array of the full size but the result.

    ``chunk_elements``: weights looked at together, which bounds the copy of a non-contiguous weight; the result does
    not depend on it.

    Raises:
        UsageError: as :func:`quantize_weight`; ``chunk_elements`` below 1.
    """
    from neuqi_kernels.layout import pack, packed_words

    if chunk_elements < 1:
        raise UsageError(f"chunk_elements must be at least 1, got {chunk_elements}. Leave it out.")
    rows, columns = _checked(weight, spec, importance, solver).shape
    words = packed_words(columns, spec.bits)
    qweight = torch.empty((rows, words), dtype=torch.int32, device=weight.device)

    def keep(part: slice, tile_codes: Tensor) -> None:
        packed = pack(tile_codes, spec.bits)
        qweight.view(-1, packed.shape[-1])[part] = packed

    scale, zero = _run(weight, spec, importance, solver, keep, chunk_elements)
    return PackedWeight(qweight, scale, zero)


def _checked(weight: Tensor, spec: WeightSpec, importance: Tensor | None, solver: str) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise UsageError(
            f"expected a floating-point weight [N, K], got {weight.dtype} {list(weight.shape)}. "
            "Pass one linear layer's weight; experts go one at a time."
        )
    if solver not in SOLVERS:
        raise UsageError(f"solver must be one of {SOLVERS}, got {solver!r}. Try 'fast'.")
    spec.groups(weight.shape[1])
    if importance is None:
        return weight
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
    return weight


def _run(
    weight: Tensor,
    spec: WeightSpec,
    importance: Tensor | None,
    solver: str,
    keep: Callable[[slice, Tensor], None],
    chunk_elements: int,
) -> tuple[Tensor, Tensor]:
    """Quantize tile after tile; ``keep`` receives the flat index range of its groups and their codes ``[C, g]``."""
    weight = weight.detach()
    rows, columns = weight.shape
    count = spec.groups(columns)
    scale = torch.empty((rows, count), dtype=_storage(spec), device=weight.device)
    zero = torch.empty_like(scale)
    usable = torch.empty((rows, count), dtype=torch.bool, device=weight.device)
    mass = None
    if importance is not None:
        mass = normalized_importance(importance.detach().to(weight.device).reshape(count, -1), -1)
    # The mode belongs to the thread, and a tensor made under it must not be written to from outside.
    inference = torch.is_inference_mode_enabled()

    @torch.inference_mode(inference)
    def work(job: tuple[int, Tensor]) -> None:
        first, groups = job
        part = slice(first, first + len(groups))
        index = torch.arange(first, first + len(groups), device=weight.device) % count
        tile = _tile(groups, None if mass is None else mass[index])
        params = solve_tile(tile, spec, solver)
        codes = codes_of(tile, params, spec.bits).to(torch.uint8)
        keep(part, (codes if tile.dim else codes.t())[: len(groups)].contiguous())
        scale.view(-1)[part] = params.scale.view(-1)[: len(groups)]
        zero.view(-1)[part] = params.zero.view(-1)[: len(groups)]
        largest = torch.maximum(tile.weight.amax(tile.dim), -tile.weight.amin(tile.dim))
        usable.view(-1)[part] = (largest <= LARGEST_WEIGHT)[: len(groups)]

    threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
    with ThreadPoolExecutor(threads) as pool:
        for tiles in _chunks(weight, count, chunk_elements):
            for _ in map(work, tiles) if threads == 1 else pool.map(work, tiles):
                pass
    if not usable.all():
        raise _unusable(weight)
    return scale, zero


def _storage(spec: WeightSpec) -> torch.dtype:
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[spec.scale_dtype]


def _unusable(weight: Tensor) -> UsageError:
    per_row = [int((~(row.float().abs() <= LARGEST_WEIGHT)).sum()) for row in weight]
    first = next(row for row, bad in enumerate(per_row) if bad)
    return UsageError(
        f"expected finite weights of at most {LARGEST_WEIGHT:g}, got {sum(per_row)} non-finite or larger values, "
        f"the first in row {first}. The checkpoint is damaged or comes from a diverged training run: fetch it again, "
        "or leave this layer unquantized."
    )


def _tile_groups(size: int, device: torch.device) -> int:
    """Groups per tile: fixed by the group size and the device alone, so that no result depends on the chunking."""
    limit = CPU_TILE_ELEMENTS if device.type == "cpu" else DEVICE_TILE_ELEMENTS
    if size > LONGEST_COLUMN:
        return max(2, limit // size)
    return max(1, limit // size // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def _chunks(weight: Tensor, count: int, chunk_elements: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield the tiles of each chunk of rows: (index of the first group, groups ``[C, g]``), in order."""
    rows, columns = weight.shape
    width = _tile_groups(columns // count, weight.device)
    step = max(1, chunk_elements // columns)
    for row in range(0, rows, step):
        groups = weight[row : row + step].reshape(-1, columns // count)
        starts = range(0, len(groups), width)
        yield [(row * count + first, groups[first : first + width]) for first in starts]


def _tile(groups: Tensor, importance: Tensor | None) -> Tile:
    """Groups ``[C, g]`` as a float32 tile, padded with zeros so that sums are taken as in a full one."""
    count, size = groups.shape
    width = _tile_groups(size, groups.device)
    dim = -1 if size > LONGEST_COLUMN else 0
    if groups.device.type == "cpu":
        width = max(2, count) if dim else -(-count // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def laid_out(values: Tensor, fill: float) -> Tensor:
        shape = (width, size) if dim else (size, width)
        full = torch.full(shape, fill, dtype=torch.float32, device=groups.device)
        (full if dim else full.t())[: len(values)] = values
        return full

    return Tile(laid_out(groups, 0.0), None if importance is None else laid_out(importance, 1.0), dim)


def solve_tile(tile: Tile, spec: WeightSpec, solver: str) -> AffineParams:
    """Stored parameters (as float32) of every group of a tile.

    The solver's results compete with Min-Max and with a constant; a group of equal weights gets the constant.
    """
    dtype = _storage(spec)
    best = minmax(tile, spec.bits, dtype)
    if solver != "minmax":
        mean = tile.mean(tile.weight)
        centred = Tile(tile.weight - mean, tile.importance, tile.dim)
        found = fast.search(centred, spec.bits) if solver == "fast" else [_reference(centred, spec.bits)]
        moved = [AffineParams(params.scale, params.zero - mean / params.scale) for params in found]
        stored = [refit_zero(tile, mean, params, spec.bits, dtype) for params in moved]
        best = choose(tile, [best, *stored, constant_params(mean, dtype)], spec.bits)
    low, high = tile.weight.amin(tile.dim, keepdim=True), tile.weight.amax(tile.dim, keepdim=True)
    constant = constant_params(low, dtype)
    scale = torch.where(low == high, constant.scale, best.scale)
    return AffineParams(scale, torch.where(low == high, constant.zero, best.zero))


def _reference(tile: Tile, bits: int) -> AffineParams:
    weight, importance = tile.weight, tile.importance
    if tile.dim == 0:
        weight, importance = weight.t(), None if importance is None else importance.t()
    params = search_scale(weight.contiguous(), importance, bits)
    return AffineParams(params.scale.unsqueeze(tile.dim), params.zero.unsqueeze(tile.dim))
