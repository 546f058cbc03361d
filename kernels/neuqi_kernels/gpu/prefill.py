"""Many tokens: ``prefill_mm`` de-quantizes on the way into the product, ``dequant`` writes the weights out."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from neuqi_kernels.gpu.codes import code_offset, load_tokens, plane_value, split_pair
from neuqi_kernels.gpu.finish import finish


@triton.jit
def prefill_tile(
    token_ptr,
    run_ptr,
    pair_ptr,
    tokens,
    first,
    last,
    m,
    k,
    pair_stride,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    MASK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return ``acc [BLOCK_N, BLOCK_M]``: the runs of words from first to last times a block of tokens.

    ``token_ptr [RUN, BLOCK_M]`` points at the first run of each token, ``run_ptr [BLOCK_N, RUN]`` at the first run of
    words of each row, ``pair_ptr [BLOCK_N]`` at its first scale and zero-point. A weight is ``(q − zero)·scale`` in
    float32, rounded once to DTYPE, and stays in registers as the left operand. A step is one run of words: a whole
    tile, or a third of a 3-bit tile, which adds one bit of the sixteenth plane.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE
    OFFSET: tl.constexpr = code_offset(BITS, HALF)
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    STEP_PLANES: tl.constexpr = 5 if BITS == 3 else PLANES
    TILE_K: tl.constexpr = PLANES * RUN

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        words = tl.load(run_ptr + step * (TILE_ROWS * RUN))
        start = (step // RUNS) * TILE_K + (step % RUNS) * (STEP_PLANES * RUN)
        for j in tl.static_range(STEP_PLANES):
            feature = start + j * RUN
            x = load_tokens(token_ptr, feature, tokens, m, k, MASK_K)
            group = feature // GROUP if GROUP > 0 else 0
            scale, zero = split_pair(tl.load(pair_ptr + group * pair_stride), PAIR_HALF)
            value = plane_value(words, j, BITS, HALF, ASM)
            weight = tl.fma(value, scale[:, None], (-scale * (zero + OFFSET))[:, None])
            acc = tl.dot(weight.to(DTYPE), x, acc)
        if BITS == 3:
            # The sixteenth plane: bit i of its codes is bit 15 of run i, and its zero-point goes with the first.
            run = step % RUNS
            feature = (step // RUNS) * TILE_K + 15 * RUN
            x = load_tokens(token_ptr, feature, tokens, m, k, MASK_K)
            group = feature // GROUP if GROUP > 0 else 0
            scale, zero = split_pair(tl.load(pair_ptr + group * pair_stride), PAIR_HALF)
            factor = (1 << run).to(tl.float32)
            shift = tl.where(run == 0, zero, 0.0) + factor * OFFSET
            value = plane_value(words, 15, BITS, HALF, ASM)
            weight = tl.fma(value, (scale * factor)[:, None], (-scale * shift)[:, None])
            acc = tl.dot(weight.to(DTYPE), x, acc)
    return acc


@triton.jit(do_not_specialize=["m", "row_tiles", "split_k"])
def prefill_mm(
    x_ptr,
    words_ptr,
    pair_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    m,
    n,
    k,
    row_tiles,
    split_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """``y [m, n] = x [m, k]·Ŵᵀ + bias``; grid (row blocks, token blocks, split_k). ``mid_mm`` is the same code."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS

    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    lanes = tl.arange(0, RUN)
    # A block of two row tiles may reach beyond the last: it then reads the last one again and writes nothing of it.
    row_tile = tl.minimum(rows // TILE_ROWS, row_tiles - 1)
    steps = tl.cdiv(k, PLANES * RUN) * RUNS
    first_word = (row_tile.to(tl.int64) * steps * TILE_ROWS + rows % TILE_ROWS) * RUN
    acc = prefill_tile(
        x_ptr + tokens[None, :].to(tl.int64) * k + lanes[:, None],
        words_ptr + first_word[:, None] + lanes[None, :],
        pair_ptr + row_tile * TILE_ROWS + rows % TILE_ROWS,
        tokens,
        part * steps // split_k,
        (part + 1) * steps // split_k,
        m,
        k,
        row_tiles * TILE_ROWS,
        DTYPE,
        BITS,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        TILE_ROWS,
        RUN,
        STAGES,
        PAIR_HALF,
        MASK_K,
        ASM,
    )
    finish(
        acc,
        y_ptr,
        bias_ptr,
        partial_ptr,
        counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0),
        tokens,
        rows,
        part,
        split_k,
        m,
        n,
        HAS_BIAS,
    )


@triton.jit(do_not_specialize=["row_tiles", "first_tile"])
def dequant(
    words_ptr,
    pair_ptr,
    weight_ptr,
    n,
    k,
    row_tiles,
    first_tile,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write the rows of ``Ŵ [n, k]`` from the row tile first_tile on to ``weight_ptr``; grid (row tiles, K tiles)."""
    HALF: tl.constexpr = weight_ptr.dtype.element_ty == tl.float16
    OFFSET: tl.constexpr = code_offset(BITS, HALF)
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    TILE_K: tl.constexpr = PLANES * RUN

    row_tile = first_tile + tl.program_id(0)
    tile = tl.program_id(1)
    rows = tl.arange(0, TILE_ROWS)
    lanes = tl.arange(0, RUN)
    in_run = rows[:, None] * RUN + lanes[None, :]
    run_ptr = (
        words_ptr + (row_tile.to(tl.int64) * tl.num_programs(1) + tile) * (RUNS * TILE_ROWS * RUN) + in_run
    )
    out_rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + rows
    out_ptr = weight_ptr + out_rows[:, None] * k + lanes[None, :]

    wa = tl.load(run_ptr)
    wb = wa
    wc = wa
    if BITS == 3:
        wb = tl.load(run_ptr + TILE_ROWS * RUN)
        wc = tl.load(run_ptr + 2 * TILE_ROWS * RUN)
    for j in tl.static_range(PLANES):
        feature = tile * TILE_K + j * RUN
        group = feature // GROUP if GROUP > 0 else 0
        pair = tl.load(pair_ptr + (group * row_tiles + row_tile) * TILE_ROWS + rows)
        scale, zero = split_pair(pair, PAIR_HALF)
        if BITS == 3 and j == 15:
            value = plane_value(wa, 15, BITS, HALF, ASM)
            value += 2.0 * (plane_value(wb, 15, BITS, HALF, ASM) - OFFSET)
            value += 4.0 * (plane_value(wc, 15, BITS, HALF, ASM) - OFFSET)
        elif BITS == 3 and j >= 10:
            value = plane_value(wc, j - 10, BITS, HALF, ASM)
        elif BITS == 3 and j >= 5:
            value = plane_value(wb, j - 5, BITS, HALF, ASM)
        else:
            value = plane_value(wa, j, BITS, HALF, ASM)
        weight = tl.fma(value, scale[:, None], (-scale * (zero + OFFSET))[:, None])
        is_stored = (row_tile * TILE_ROWS + rows < tl.where(feature < k, n, 0))[:, None]
        tl.store(out_ptr + feature, weight.to(weight_ptr.dtype.element_ty), mask=is_stored)
