"""The end of both products: bias, rounding, and the deterministic sum over the parts of K."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def store_rows(y_ptr, bias_ptr, acc, out, is_out, rows, n, HAS_BIAS: tl.constexpr):
    """Add the bias in float32 and write ``acc`` rounded once."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def store_routed(
    acc,
    y_ptr,
    bias_ptr,
    route_weight_ptr,
    routes,
    rows,
    m,
    n,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Write the columns of ``acc [rows, routes]`` to the rows that ``routes`` names of ``y [m, n]``.

    A column is a token at one of its experts; after the bias it is multiplied with the weight that the router gave it.
    Columns that only fill up a block name no row below m.
    """
    is_route = routes < m
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    if WEIGHTED:
        acc *= tl.load(route_weight_ptr + routes, mask=is_route, other=0.0).to(tl.float32)[None, :]
    out = routes[None, :].to(tl.int64) * n + rows[:, None]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=is_route[None, :] & (rows < n)[:, None])


@triton.jit
def finish(
    acc, y_ptr, bias_ptr, partial_ptr, counter_ptr, tokens, rows, part, split_k, m, n, HAS_BIAS: tl.constexpr
):
    """Write the tile ``acc [rows, tokens]`` of ``y [m, n]``, or its part of it.

    With split_k > 1 every program writes its float32 part, and the one that arrives last adds the parts in the order of
    their index: one launch, the same bits every time, no atomic operation on data. It sets its counter back to zero for
    the next launch, so that a captured graph can be replayed.
    """
    is_out = (tokens < m)[None, :] & (rows < n)[:, None]
    out = tokens[None, :].to(tl.int64) * n + rows[:, None]
    if split_k == 1:
        store_rows(y_ptr, bias_ptr, acc, out, is_out, rows, n, HAS_BIAS)
    else:
        part_elements = m.to(tl.int64) * n
        tl.store(partial_ptr + part * part_elements + out, acc, mask=is_out)
        # Every thread's part is written before the one atomic that publishes it.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == split_k - 1:
            total = tl.zeros(acc.shape, tl.float32)
            for index in range(split_k):
                total += tl.load(
                    partial_ptr + index * part_elements + out, mask=is_out, other=0.0, cache_modifier=".cg"
                )
            store_rows(y_ptr, bias_ptr, total, out, is_out, rows, n, HAS_BIAS)
            tl.store(counter_ptr, 0)
