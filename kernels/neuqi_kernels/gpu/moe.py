"""``moe_decode_mm`` and ``moe_prefill_mm``: blocks of tokens, each times the weights of the expert they were sent to.

The tiles are those of the dense kernels. The tokens come in vLLM's layout: ``sorted_ids`` lists routes (token·top_k +
the place of the expert among its top k) so that each block belongs to one expert, ``expert_ids`` names it, and blocks
are filled up with routes ≥ m. K is not split: the experts of a batch give programs enough.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from neuqi_kernels.gpu.decode import decode_tile
from neuqi_kernels.gpu.finish import store_routed
from neuqi_kernels.gpu.prefill import prefill_tile


@triton.jit
def store_nothing(y_ptr, routes, rows, m, n, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write zeros: the expert of these routes lives on another rank, which adds its part later."""
    out = routes[None, :].to(tl.int64) * n + rows[:, None]
    zeros = tl.zeros((ROWS, BLOCK_M), y_ptr.dtype.element_ty)
    tl.store(y_ptr + out, zeros, mask=(routes < m)[None, :] & (rows < n)[:, None])


@triton.jit(do_not_specialize=["m", "groups", "top_k"])
def moe_decode_mm(
    x_ptr,
    words_ptr,
    pair_ptr,
    bias_ptr,
    y_ptr,
    route_weight_ptr,
    sorted_ids_ptr,
    expert_ids_ptr,
    padded_routes_ptr,
    m,
    n,
    k,
    groups,
    top_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """``y [m, n]``, a row for every route, from ``x [m / top_k, k]``; grid (row tiles, slabs of BLOCK_M in blocks).

    The routes were sorted in blocks of BLOCK_SIZE: a program takes a slab of one, so that an expert with few tokens
    costs no more than these.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    RUNS: tl.constexpr = 3 if BITS == 3 else 1

    first = tl.program_id(1) * BLOCK_M
    if first >= tl.load(padded_routes_ptr):
        return
    # What fills a block up comes last in it.
    if tl.load(sorted_ids_ptr + first) >= m:
        return
    row_tile = tl.program_id(0)
    row_tiles = tl.num_programs(0)
    in_rows = tl.arange(0, TILE_ROWS)
    rows = row_tile * TILE_ROWS + in_rows
    routes = tl.load(sorted_ids_ptr + first + tl.arange(0, BLOCK_M))
    expert = tl.load(expert_ids_ptr + first // BLOCK_SIZE).to(tl.int64)
    if expert < 0:
        store_nothing(y_ptr, routes, rows, m, n, TILE_ROWS, BLOCK_M)
        return
    lanes = tl.arange(0, RUN)
    k_tiles = tl.cdiv(k, PLANES * RUN)
    first_word = (expert * row_tiles + row_tile) * k_tiles * (RUNS * TILE_ROWS * RUN)
    acc = decode_tile(
        x_ptr + (routes // top_k)[None, :].to(tl.int64) * k + lanes[:, None],
        words_ptr + first_word + in_rows[:, None] * RUN + lanes[None, :],
        pair_ptr + expert * groups * row_tiles * TILE_ROWS,
        routes,
        rows,
        0,
        k_tiles,
        m,
        k,
        row_tiles * TILE_ROWS,
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
    store_routed(acc, y_ptr, bias_ptr + expert * n, route_weight_ptr, routes, rows, m, n, HAS_BIAS, WEIGHTED)


@triton.jit(do_not_specialize=["m", "groups", "row_tiles", "top_k"])
def moe_prefill_mm(
    x_ptr,
    words_ptr,
    pair_ptr,
    bias_ptr,
    y_ptr,
    route_weight_ptr,
    sorted_ids_ptr,
    expert_ids_ptr,
    padded_routes_ptr,
    m,
    n,
    k,
    groups,
    row_tiles,
    top_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
    PAIR_HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """``y [m, n]``, a row for every route, from ``x [m / top_k, k]``; grid (row blocks, blocks)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS

    block = tl.program_id(1)
    if block * BLOCK_M >= tl.load(padded_routes_ptr):
        return
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    routes = tl.load(sorted_ids_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    expert = tl.load(expert_ids_ptr + block).to(tl.int64)
    if expert < 0:
        store_nothing(y_ptr, routes, rows, m, n, BLOCK_N, BLOCK_M)
        return
    lanes = tl.arange(0, RUN)
    row_tile = tl.minimum(rows // TILE_ROWS, row_tiles - 1)
    steps = tl.cdiv(k, PLANES * RUN) * RUNS
    first_word = ((expert * row_tiles + row_tile) * steps * TILE_ROWS + rows % TILE_ROWS) * RUN
    acc = prefill_tile(
        x_ptr + (routes // top_k)[None, :].to(tl.int64) * k + lanes[:, None],
        words_ptr + first_word[:, None] + lanes[None, :],
        pair_ptr + (expert * groups * row_tiles + row_tile) * TILE_ROWS + rows % TILE_ROWS,
        routes,
        0,
        steps,
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
    store_routed(acc, y_ptr, bias_ptr + expert * n, route_weight_ptr, routes, rows, m, n, HAS_BIAS, WEIGHTED)
