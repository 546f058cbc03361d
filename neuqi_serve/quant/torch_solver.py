"""The quantizer in torch: tiles of groups, one after the other, for any device and every preset.

It is the slow twin of the C++ and Triton quantizers, and what runs where neither does. ``reference`` and ``minmax``
exist in this form only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant import least_squares
from neuqi_serve.quant.affine import AffineParams
from neuqi_serve.quant.minmax import minmax
from neuqi_serve.quant.presets import search_plan
from neuqi_serve.quant.scale_search import search_scale
from neuqi_serve.quant.storage import (
    LARGEST_WEIGHT,
    Tile,
    choose,
    codes_of,
    constant_params,
    refit_zero,
    storage_dtype,
)

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


def solve(
    weight: Tensor,
    spec: WeightSpec,
    importance: Tensor | None,
    preset: str,
    keep: Callable[[slice, Tensor], None],
    chunk_elements: int,
) -> tuple[Tensor, Tensor, bool]:
    """Scales and zero-points ``[N, G]`` of a matrix, and whether all of its weights are usable.

    ``importance``: float32 ``[K]`` of mean 1 in every group, or None. ``keep`` receives the flat index range of the
    groups of each tile and their codes ``[C, g]``. ``chunk_elements``: weights that are cut into tiles at a time.
    """
    rows, columns = weight.shape
    count = spec.groups(columns)
    scale = torch.empty((rows, count), dtype=storage_dtype(spec), device=weight.device)
    zero = torch.empty_like(scale)
    usable = torch.empty((rows, count), dtype=torch.bool, device=weight.device)
    mass = None if importance is None else importance.view(count, -1)
    # The mode belongs to the thread, and a tensor made under it must not be written to from outside.
    inference = torch.is_inference_mode_enabled()

    @torch.inference_mode(inference)
    def work(job: tuple[int, Tensor]) -> None:
        first, groups = job
        part = slice(first, first + len(groups))
        index = torch.arange(first, first + len(groups), device=weight.device) % count
        tile = _tile(groups, None if mass is None else mass[index])
        params = solve_tile(tile, spec, preset)
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
    return scale, zero, bool(usable.all())


def solve_tile(tile: Tile, spec: WeightSpec, preset: str) -> AffineParams:
    """Stored parameters (as float32) of every group of a tile.

    The solver's results compete with Min-Max and with a constant; a group of equal weights gets the constant.
    """
    dtype = storage_dtype(spec)
    best = minmax(tile, spec.bits, dtype)
    if preset != "minmax":
        mean = tile.mean(tile.weight)
        centred = Tile(tile.weight - mean, tile.importance, tile.dim)
        if preset == "reference":
            found = [_reference(centred, spec.bits)]
        else:
            plan = search_plan(preset, spec.bits, tile.importance is not None)
            found = least_squares.search(centred, spec.bits, plan)
        stored = [refit_zero(centred, mean, params, spec.bits, dtype) for params in found]
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
