"""``decode_mm``: a few tokens times packed weights, bound by how fast words arrive and are taken apart."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from neuqi_kernels.gpu.codes import code_offset, load_tokens, plane_dot, split_pair
from neuqi_kernels.gpu.finish import finish


@triton.jit
def decode_tile(
    token_ptr,
    tile_ptr,
    pair_ptr,
    tokens,
    rows,
    first,
    last,
    m,
    k,
    pair_stride,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    MASK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return ``acc [TILE_ROWS, BLOCK_M]``: the K tiles from first to last of one row tile times a block of tokens.

    ``token_ptr [RUN, BLOCK_M]`` points at the first run of each token, ``tile_ptr [TILE_ROWS, RUN]`` at the words of
    the row tile. The product is computed transposed so that codes are the matrix operand that stays in registers and
    tokens are the short side. Per group, ``Σ scale·(q − zero)·x`` is ``scale·(Σ (q + c)·x − (zero + c)·Σ x)``, c the
    ``code_offset``: codes enter as they are, the real zero-point once, in float32. ``Σ x`` is a product with ones,
    which leaves it in the registers that need it.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE
    OFFSET: tl.constexpr = code_offset(BITS, HALF)
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    TILE_K: tl.constexpr = PLANES * RUN
    GROUP_PLANES: tl.constexpr = GROUP // RUN if (GROUP > 0 and GROUP < TILE_K) else PLANES
    TILE_WORDS: tl.constexpr = RUNS * TILE_ROWS * RUN

    ones = tl.full((TILE_ROWS, RUN), 1.0, DTYPE)
    acc = tl.zeros((TILE_ROWS, BLOCK_M), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        wa = tl.load(tile_ptr + tile * TILE_WORDS)
        wb = wa
        wc = wa
        if BITS == 3:
            wb = tl.load(tile_ptr + tile * TILE_WORDS + TILE_ROWS * RUN)
            wc = tl.load(tile_ptr + tile * TILE_WORDS + 2 * TILE_ROWS * RUN)
        for part_of_tile in tl.static_range(PLANES // GROUP_PLANES):
            code_sum = tl.zeros((TILE_ROWS, BLOCK_M), tl.float32)
            x_sum = tl.zeros((TILE_ROWS, BLOCK_M), tl.float32)
            feature = tile * TILE_K + part_of_tile * (GROUP_PLANES * RUN)
            for j in tl.static_range(GROUP_PLANES):
                x = load_tokens(token_ptr, feature + j * RUN, tokens, m, k, MASK_K)
                code_sum = plane_dot(
                    code_sum, wa, wb, wc, x, part_of_tile * GROUP_PLANES + j, BITS, HALF, ASM
                )
                x_sum = tl.dot(ones, x, x_sum)
            group = feature // GROUP if GROUP > 0 else 0
            scale, zero = split_pair(tl.load(pair_ptr + group * pair_stride + rows), PAIR_HALF)
            code_sum = tl.fma(-(zero + OFFSET)[:, None], x_sum, code_sum)
            acc = tl.fma(scale[:, None], code_sum, acc)
    return acc


@triton.jit(do_not_specialize=["m", "split_k"])
def decode_mm(
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
    split_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """``y [m, n] = x [m, k]·Ŵᵀ + bias``; grid (row tiles, token blocks, split_k).

    GROUP 0 is the whole row. MASK_K: the last tile reaches beyond k.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    RUNS: tl.constexpr = 3 if BITS == 3 else 1

    row_tile = tl.program_id(0)
    part = tl.program_id(2)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    lanes = tl.arange(0, RUN)

    k_tiles = tl.cdiv(k, PLANES * RUN)
    in_tile = tl.arange(0, TILE_ROWS)[:, None] * RUN + lanes[None, :]
    acc = decode_tile(
        x_ptr + tokens[None, :].to(tl.int64) * k + lanes[:, None],
        words_ptr + row_tile.to(tl.int64) * k_tiles * (RUNS * TILE_ROWS * RUN) + in_tile,
        pair_ptr,
        tokens,
        rows,
        part * k_tiles // split_k,
        (part + 1) * k_tiles // split_k,
        m,
        k,
        tl.num_programs(0) * TILE_ROWS,
        DTYPE,
        BITS,
        GROUP,
        BLOCK_M,
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
        counter_ptr + tl.program_id(1) * tl.num_programs(0) + row_tile,
        tokens,
        rows,
        part,
        split_k,
        m,
        n,
        HAS_BIAS,
    )
