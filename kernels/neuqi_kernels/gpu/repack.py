"""``repack``: the canonical bit stream of a layer, or of all experts of one, into planar words, in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "stream_words"])
def repack(
    stream_ptr,
    words_ptr,
    n,
    stream_words,
    BITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Write one tile ``int16 [runs, TILE_ROWS, RUN]``; grid (row tiles, K tiles, experts).

    ``stream [experts, n, stream_words]`` int32 in the canonical layout. A plane is 32 consecutive codes, which begin at
    a whole int32 word for every number of bits. Rows beyond n and codes beyond the stream become zeros. The slow twin
    is ``planar.to_planar``.
    """
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    MASK: tl.constexpr = (1 << BITS) - 1

    row_tile = tl.program_id(0)
    tile = tl.program_id(1)
    expert = tl.program_id(2)
    in_tile = tl.arange(0, TILE_ROWS)
    rows = row_tile * TILE_ROWS + in_tile
    lanes = tl.arange(0, RUN)
    shifts = ((lanes * BITS) % 32)[None, :]
    row_ptr = stream_ptr + (expert.to(tl.int64) * n + rows)[:, None] * stream_words
    is_row = (rows < n)[:, None]

    wa = tl.zeros((TILE_ROWS, RUN), tl.int32)
    wb = wa
    wc = wa
    for j in tl.static_range(PLANES):
        word = ((tile * PLANES + j) * BITS + (lanes * BITS) // 32)[None, :]
        low = tl.load(row_ptr + word, mask=is_row & (word < stream_words), other=0)
        codes = (low.to(tl.uint32, bitcast=True) >> shifts.to(tl.uint32)).to(tl.int32, bitcast=True)
        if BITS == 3:
            # Two codes of 32 reach into the next word of their plane.
            straddles = shifts > 32 - BITS
            high = tl.load(row_ptr + word + 1, mask=is_row & straddles & (word < stream_words), other=0)
            codes = codes | tl.where(straddles, high << ((32 - shifts) % 32), 0)
        codes = codes & MASK
        if BITS == 3 and j == 15:
            wa = wa | ((codes & 1) << 15)
            wb = wb | ((codes >> 1 & 1) << 15)
            wc = wc | ((codes >> 2) << 15)
        elif BITS == 3 and j >= 10:
            wc = wc | (codes << 3 * (j - 10))
        elif BITS == 3 and j >= 5:
            wb = wb | (codes << 3 * (j - 5))
        else:
            wa = wa | (codes << BITS * j)

    tile_index = (expert.to(tl.int64) * tl.num_programs(0) + row_tile) * tl.num_programs(1) + tile
    out_ptr = words_ptr + tile_index * (RUNS * TILE_ROWS * RUN) + in_tile[:, None] * RUN + lanes[None, :]
    # The conversion keeps the low 16 bits, whatever the sign.
    tl.store(out_ptr, wa.to(tl.int16))
    if BITS == 3:
        tl.store(out_ptr + TILE_ROWS * RUN, wb.to(tl.int16))
        tl.store(out_ptr + 2 * TILE_ROWS * RUN, wc.to(tl.int16))
