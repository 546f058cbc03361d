"""Starts the kernels: grids, constants, scratch. The backend imports it at the first product, and Triton with it."""

from __future__ import annotations

import torch

from neuqi_kernels.gpu.decode import decode_mm
from neuqi_kernels.gpu.plan import Plan, Target
from neuqi_kernels.gpu.planar import RUN, TILE_ROWS, tile_features
from neuqi_kernels.gpu.prefill import dequant, prefill_mm

# Weights that are written out at a time before a dense product: bounds its scratch to 128 MiB.
_DENSE_ELEMENTS = 1 << 26


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
    return options | {"BLOCK_N": chosen.block_n} if chosen.kernel == "prefill_mm" else options


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
    m, k = x.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if chosen.kernel == "dequant":
        return _dense(target, x, words, pairs, bias, y, bits, group)
    # From torch's allocator, whose memory belongs to the stream or the graph that uses it; only the counters,
    # which must be zero between calls, live as long as the layer.
    partial = torch.empty(
        chosen.split_k * m * n if chosen.split_k > 1 else 0, dtype=torch.float32, device=x.device
    )
    tensors = (
        x,
        words,
        pairs.view(torch.int32),
        x if bias is None else bias,
        y,
        partial,
        counters,
    )
    options = constants(chosen, target, bits, group, k, pairs.dtype, bias is not None)
    grid = (-(-n // chosen.block_n), -(-m // chosen.block_m), chosen.split_k)
    if chosen.kernel == "decode_mm":
        decode_mm[grid](*tensors, m, n, k, chosen.split_k, **options)
    else:
        prefill_mm[grid](*tensors, m, n, k, words.shape[0], chosen.split_k, **options)
    return y


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
