"""Starts the kernels: grids, constants, scratch. The backend imports it at the first product, and Triton with it."""

from __future__ import annotations

import torch

from neuqi_kernels.gpu.decode import decode_mm
from neuqi_kernels.gpu.plan import Plan, Target
from neuqi_kernels.gpu.planar import RUN, RUNS, TILE_ROWS, feature_tiles, row_tiles, tile_features
from neuqi_kernels.gpu.prefill import dequant, prefill_mm
from neuqi_kernels.gpu.repack import repack

# With fewer, the words of a 3-bit tile do not fit into registers beside what is loaded for them.
REPACK_WARPS = 8
# Weights that are written out at a time before a dense product: bounds its scratch to 128 MiB.
_DENSE_ELEMENTS = 1 << 26
# Partial sums of a product that splits K: more tokens than fill 128 MiB of them are further launches.
_PARTIAL_ELEMENTS = 1 << 25


def constants(
    chosen: Plan, target: Target, bits: int, group: int, k: int, pair_dtype: torch.dtype, has_bias: bool
) -> dict[str, int | bool]:
    """Return what a product kernel is compiled for, and its warps."""
    options: dict[str, int | bool] = {
        "BITS": bits,
        "GROUP": group,
        "BLOCK_M": chosen.block_m,
        "TILE_ROWS": TILE_ROWS,
        "RUN": RUN,
        "STAGES": chosen.stages,
        "PAIR_HALF": pair_dtype == torch.float16,
        "HAS_BIAS": has_bias,
        "MASK_K": k % tile_features(bits) != 0,
        "ASM": target.inline_asm,
        "num_warps": chosen.warps,
    }
    return options if "decode" in chosen.kernel else options | {"BLOCK_N": chosen.block_n}


def gemm(
    chosen: Plan,
    target: Target,
    x: torch.Tensor,
    words: torch.Tensor,
    pairs: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group: int,
) -> torch.Tensor:
    """Return ``x [m, k]·Ŵᵀ + bias`` as ``[m, n]``, computed as ``chosen`` says. ``group`` 0 is the whole row."""
    m = x.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if chosen.kernel == "dequant":
        return _dense(target, x, words, pairs, bias, y, bits, group)
    step = m
    if chosen.split_k > 1:
        most = max(1, _PARTIAL_ELEMENTS // (chosen.split_k * n * chosen.block_m))
        step = min(m, most * chosen.block_m)
    for start in range(0, m, step):
        stop = start + step
        _fused(chosen, target, x[start:stop], words, pairs, counters, bias, y[start:stop], bits, group)
    return y


def _fused(
    chosen: Plan,
    target: Target,
    x: torch.Tensor,
    words: torch.Tensor,
    pairs: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    bits: int,
    group: int,
) -> None:
    (m, k), n = x.shape, y.shape[1]
    grid = (-(-n // chosen.block_n), -(-m // chosen.block_m), chosen.split_k)
    # From torch's allocator, whose memory belongs to the stream or the graph that uses it; only the counters,
    # which must be zero between calls, live as long as the layer. Where a product has more tiles than those, it takes
    # counters of its own, which a captured graph sets to zero in each replay.
    partial = torch.empty(
        chosen.split_k * m * n if chosen.split_k > 1 else 0, dtype=torch.float32, device=x.device
    )
    if chosen.split_k > 1 and grid[0] * grid[1] > counters.numel():
        counters = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    tensors = (x, words, pairs.view(torch.int32), x if bias is None else bias, y, partial, counters)
    options = constants(chosen, target, bits, group, k, pairs.dtype, bias is not None)
    if chosen.kernel == "decode_mm":
        decode_mm[grid](*tensors, m, n, k, chosen.split_k, **options)
    else:
        prefill_mm[grid](*tensors, m, n, k, words.shape[0], chosen.split_k, **options)


def to_planar(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Repack ``qweight [(E,) N, K·bits/32]`` into planar words ``int16 [(E,) row tiles, K tiles, runs, 64, 32]``.

    One pass on the GPU, without a temporary; ``planar.to_planar`` is the slow twin.
    """
    qweight = qweight.contiguous()
    *experts, n, stream_words = qweight.shape
    grid = (row_tiles(n), feature_tiles(stream_words * 32 // bits, bits), experts[0] if experts else 1)
    words = torch.empty(
        *experts, *grid[:2], RUNS[bits], TILE_ROWS, RUN, dtype=torch.int16, device=qweight.device
    )
    repack[grid](
        qweight,
        words,
        n,
        stream_words,
        BITS=bits,
        TILE_ROWS=TILE_ROWS,
        RUN=RUN,
        num_warps=REPACK_WARPS,
    )
    return words


def dequantize(
    target: Target,
    words: torch.Tensor,
    pairs: torch.Tensor,
    weight: torch.Tensor,
    n: int,
    first_tile: int,
    bits: int,
    group: int,
) -> None:
    """Write the rows of ``Ŵ`` from ``64·first_tile`` on into ``weight [rows, k]``, rounded once to its dtype."""
    k = weight.shape[1]
    grid = (-(-weight.shape[0] // TILE_ROWS), words.shape[1])
    dequant[grid](
        words,
        pairs.view(torch.int32),
        weight,
        n,
        k,
        words.shape[0],
        first_tile,
        BITS=bits,
        GROUP=group,
        TILE_ROWS=TILE_ROWS,
        RUN=RUN,
        PAIR_HALF=pairs.dtype == torch.float16,
        ASM=target.inline_asm,
        num_warps=4,
    )


def _dense(
    target: Target,
    x: torch.Tensor,
    words: torch.Tensor,
    pairs: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    bits: int,
    group: int,
) -> torch.Tensor:
    """De-quantize a block of rows, multiply with the dense product of torch, go on."""
    n, k = y.shape[1], x.shape[1]
    block = max(1, _DENSE_ELEMENTS // (k * TILE_ROWS)) * TILE_ROWS
    scratch = torch.empty(min(block, n), k, dtype=x.dtype, device=x.device)
    for start in range(0, n, block):
        weight = scratch[: min(block, n - start)]
        dequantize(target, words, pairs, weight, n, start // TILE_ROWS, bits, group)
        out = y[:, start : start + weight.shape[0]]
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias[start : start + weight.shape[0]].to(x.dtype), x, weight.t(), out=out)
    return y
