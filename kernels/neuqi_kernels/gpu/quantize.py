"""The quantizer on a GPU: a program takes a few groups into its registers and searches, rounds and packs them there.

The steps are those of csrc/quantize_search.h and csrc/quantize_driver.h, a group in every row of a tile instead of in
every lane; long groups are searched directly, not as histograms. Their twin in torch, which explains them, is
``neuqi_serve/quant/least_squares.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

NEIGHBOURS = tl.constexpr(4)
LEAST_VARIANCE = tl.constexpr(1e-12)
SMALLEST_SPAN = tl.constexpr(1e-30)
LONGEST_STEP = tl.constexpr(4.0)
# Adding and subtracting it rounds a float32 between 0 and 2^22 to the nearest even integer.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def codes_at(x, inverse, zero, TOP: tl.constexpr):
    """Codes ``[G, N]`` of a tile, as float32."""
    steps = x * inverse[:, None] + zero[:, None]
    return (tl.minimum(tl.maximum(steps, 0.0), TOP) + ROUND) - ROUND


@triton.jit
def regress(x, mass, scale, zero, TOP: tl.constexpr, SIZE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Parameters that fit best the codes of one start per group, and what they take off the mean square."""
    codes = codes_at(x, 1.0 / scale, zero, TOP)
    weighted = codes * mass if WEIGHTED else codes
    mean = tl.sum(weighted, 1) / SIZE
    variance = tl.sum(weighted * codes, 1) / SIZE - mean * mean
    product = tl.sum(weighted * x, 1) / SIZE
    fits = (variance > LEAST_VARIANCE) & (product > 0.0)
    slope = product / tl.where(fits, variance, 1.0)
    return tl.where(fits, slope, scale), tl.where(fits, mean, zero), tl.where(fits, slope * product, 0.0)


@triton.jit
def refine(
    x,
    mass,
    scale,
    zero,
    gain,
    passes,
    overshoot,
    TOP: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """``passes`` regressions, each overshot; the best of them and of what came in."""
    best_scale, best_zero, best_gain = scale, zero, gain
    for _ in range(passes):
        fitted_scale, fitted_zero, fitted_gain = regress(x, mass, scale, zero, TOP, SIZE, WEIGHTED)
        better = fitted_gain > best_gain
        best_scale = tl.where(better, fitted_scale, best_scale)
        best_zero = tl.where(better, fitted_zero, best_zero)
        best_gain = tl.where(better, fitted_gain, best_gain)
        scale = tl.maximum(scale + overshoot * (fitted_scale - scale), 0.5 * fitted_scale)
        zero = zero + overshoot * (fitted_zero - zero)
    return best_scale, best_zero, best_gain


@triton.jit
def centring_step(x, mass, scale, zero, TOP: tl.constexpr):
    """A Newton step towards the zero-point that balances what the codes cut off at either end."""
    steps = x * (1.0 / scale)[:, None] + zero[:, None]
    above = steps > TOP + 0.5
    outside = tl.where((steps < -0.5) | above, mass, 0.0)
    pull = tl.sum(outside * tl.where(above, steps - TOP, steps), 1)
    move = pull / tl.maximum(tl.sum(outside, 1), 1e-6)
    return tl.minimum(tl.maximum(move, -LONGEST_STEP), LONGEST_STEP)


@triton.jit
def take(pool, slot, width: tl.constexpr):
    """Column ``slot [G]`` of ``pool [G, width]``."""
    columns = tl.arange(0, width)
    return tl.sum(tl.where(columns[None, :] == slot[:, None], pool, 0.0), 1)


@triton.jit
def put(pool, slot, value, where, width: tl.constexpr):
    """``pool`` with ``value [G]`` in column ``slot [G]`` of the groups ``where [G]``."""
    columns = tl.arange(0, width)
    return tl.where((columns[None, :] == slot[:, None]) & where[:, None], value[:, None], pool)


@triton.jit
def scan(
    x,
    mass,
    low,
    high,
    spread,
    TOP: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HALVINGS: tl.constexpr,
    PHASES: tl.constexpr,
    CENTRING: tl.constexpr,
    REFINEMENTS: tl.constexpr,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERSHOOT: tl.constexpr,
    NARROWEST: tl.constexpr,
):
    """The grid of starts; returns the best ``KEPT`` points in pools ``[G, WIDTH]``, their gains −2 in other columns."""
    span = high - low
    factor = tl.minimum(tl.maximum(NARROWEST * spread / tl.maximum(span, SMALLEST_SPAN), 0.01), 0.9)
    for _ in tl.static_range(HALVINGS):
        factor = tl.sqrt(factor)
    scale, centre = tl.maximum(span, SMALLEST_SPAN) / TOP, 0.5 * (low + high)
    columns = tl.arange(0, WIDTH)[None, :]
    flat = tl.zeros_like(scale)[:, None] + tl.zeros([1, WIDTH], tl.float32)
    scales, zeros = flat + 1.0, flat
    # An unused column is never the worst, so that nothing goes there.
    gains = tl.where(columns < KEPT, flat - 1.0, float("inf"))
    for _ in range((1 << HALVINGS) + 1):
        zero = 0.5 * TOP - centre / scale
        for _ in tl.static_range(CENTRING):
            zero -= centring_step(x, mass, scale, zero, TOP)
        centre = (0.5 * TOP - zero) * scale
        for first in range(0, PHASES, NEIGHBOURS):
            best_scale, best_zero, best_gain = scale, zero, tl.zeros_like(scale) - 1.0
            for neighbour in range(NEIGHBOURS):
                shift = ((first + neighbour + 0.5) / PHASES - 0.5) * WINDOW
                start = zero + shift
                found_scale, found_zero, found_gain = refine(
                    x, mass, scale, start, start * 0.0 - 1.0, REFINEMENTS, OVERSHOOT, TOP, SIZE, WEIGHTED
                )
                better = found_gain > best_gain
                best_scale = tl.where(better, found_scale, best_scale)
                best_zero = tl.where(better, found_zero, best_zero)
                best_gain = tl.where(better, found_gain, best_gain)
            slot = tl.argmin(gains, 1)
            better = best_gain > tl.min(gains, 1)
            scales = put(scales, slot, best_scale, better, WIDTH)
            zeros = put(zeros, slot, best_zero, better, WIDTH)
            gains = put(gains, slot, best_gain, better, WIDTH)
        scale = scale * factor
    return scales, zeros, tl.where(columns < KEPT, gains, -2.0)


@triton.jit
def stage(
    x,
    mass,
    scales,
    zeros,
    gains,
    TOP: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    PASSES: tl.constexpr,
    OVERSHOOT: tl.constexpr,
):
    """Refine the best ``KEPT`` of the points in pools ``[G, FROM]``; returns pools ``[G, WIDTH]``."""
    flat = tl.zeros_like(tl.min(gains, 1))[:, None] + tl.zeros([1, WIDTH], tl.float32)
    new_scales, new_zeros, new_gains = flat + 1.0, flat, flat - 2.0
    always = tl.min(gains, 1) < float("inf")
    for index in range(KEPT):
        slot = tl.argmax(gains, 1)
        scale, zero, gain = refine(
            x,
            mass,
            take(scales, slot, FROM),
            take(zeros, slot, FROM),
            tl.max(gains, 1),
            PASSES,
            OVERSHOOT,
            TOP,
            SIZE,
            WEIGHTED,
        )
        gains = put(gains, slot, gain * 0.0 - 2.0, always, FROM)
        place = slot * 0 + index
        new_scales = put(new_scales, place, scale, always, WIDTH)
        new_zeros = put(new_zeros, place, zero, always, WIDTH)
        new_gains = put(new_gains, place, gain, always, WIDTH)
    return new_scales, new_zeros, new_gains


@triton.jit
def stored(value, low, high, DTYPE: tl.constexpr):
    """``value`` within limits, rounded to its storage dtype, as float32."""
    return tl.minimum(tl.maximum(value, low), high).to(DTYPE).to(tl.float32)


@triton.jit
def stored_loss(w, mass, scale, zero, TOP: tl.constexpr):
    """Sum of squared errors of the weights as they are, under stored parameters."""
    error = (codes_at(w, 1.0 / scale, zero, TOP) - zero[:, None]) * scale[:, None] - w
    return tl.sum(error * error * mass, 1)


@triton.jit
def constant(value, tiny, largest, DTYPE: tl.constexpr):
    """Stored parameters of a group in which all weights have one value."""
    scale = stored(tl.where(value == 0.0, 1.0, tl.abs(value)), tiny, largest, DTYPE)
    code = tl.where(value > 0.0, 1.0, 0.0)
    return scale, stored(code - tl.div_rn(value, scale), -largest, largest, DTYPE) + 0.0


@triton.jit
def store_packed(
    qweight_ptr, codes, group, is_group, SIZE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr
):
    """Write codes ``[ROWS, N]`` in the canonical layout: code k of a row at its bits ``[k·b, (k + 1)·b)``."""
    blocks: tl.constexpr = codes.shape[1] // 32
    words: tl.constexpr = SIZE * BITS // 32
    lanes = tl.reshape(codes.to(tl.uint32), [ROWS, blocks, 32])
    block = tl.arange(0, blocks)
    position = (tl.arange(0, 32) * BITS)[None, None, :]
    for word in tl.static_range(BITS):
        start = position - 32 * word
        # A code that began in the word before gives its upper bits.
        left = tl.where((start >= 0) & (start < 32), lanes << tl.maximum(start, 0).to(tl.uint32), 0)
        right = tl.where((start < 0) & (start > -BITS), lanes >> tl.maximum(-start, 0).to(tl.uint32), 0)
        packed = tl.sum(left | right, 2).to(tl.int32, bitcast=True)
        column = block * BITS + word
        place = group[:, None].to(tl.int64) * words + column[None, :]
        tl.store(qweight_ptr + place, packed, mask=is_group[:, None] & (column < words)[None, :])


@triton.jit
def quantize_groups(
    weight_ptr,
    mass_ptr,
    qweight_ptr,
    scale_ptr,
    zero_ptr,
    unusable_ptr,
    groups,
    groups_per_row,
    stride,
    tiny,
    largest,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HALVINGS: tl.constexpr,
    PHASES: tl.constexpr,
    CENTRING: tl.constexpr,
    REFINEMENTS: tl.constexpr,
    KEPT_1: tl.constexpr,
    KEPT_2: tl.constexpr,
    KEPT_3: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    WIDTH_3: tl.constexpr,
    PASSES_1: tl.constexpr,
    PASSES_2: tl.constexpr,
    PASSES_3: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERSHOOT: tl.constexpr,
    NARROWEST: tl.constexpr,
):
    """``ROWS`` groups of ``SIZE`` weights, in registers from the first load to the packed codes."""
    TOP: tl.constexpr = (1 << BITS) - 1
    DTYPE: tl.constexpr = scale_ptr.dtype.element_ty
    # Where a tile is wider than its groups, the weights beyond have no mass.
    MASSED: tl.constexpr = WEIGHTED or SIZE < BLOCK
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_group = group < groups
    row, part = group // groups_per_row, group % groups_per_row
    column = tl.arange(0, BLOCK)
    is_weight = is_group[:, None] & (column < SIZE)[None, :]
    place = row.to(tl.int64)[:, None] * stride + part[:, None] * SIZE + column[None, :]
    w = tl.load(weight_ptr + place, mask=is_weight, other=0.0).to(tl.float32)
    mass = tl.where(is_weight, 1.0, 0.0)
    if WEIGHTED:
        mass = tl.load(mass_ptr + part[:, None] * SIZE + column[None, :], mask=is_weight, other=0.0)
    # Also true where it is not a number.
    bad = tl.sum(tl.where(tl.abs(w) <= 1e18, 0, 1), 1)
    tl.store(unusable_ptr + group * 0, bad * 0 + 1, mask=is_group & (bad > 0))

    low = tl.min(tl.where(is_weight, w, float("inf")), 1)
    high = tl.max(tl.where(is_weight, w, float("-inf")), 1)
    low, high = tl.where(is_group, low, 0.0), tl.where(is_group, high, 0.0)
    middle = 0.5 * (low + high)
    span = tl.maximum(high - low, SMALLEST_SPAN)
    x = tl.where(is_weight, (w - middle[:, None]) * (1.0 / span)[:, None], 0.0)
    mean = tl.sum(x * mass, 1) / SIZE
    x = tl.where(is_weight, x - mean[:, None], 0.0)
    spread = tl.sqrt(tl.sum(x * x * mass, 1) / SIZE)
    lowest = tl.min(tl.where(is_weight, x, float("inf")), 1)
    highest = tl.max(tl.where(is_weight, x, float("-inf")), 1)
    lowest, highest = tl.where(is_group, lowest, 0.0), tl.where(is_group, highest, 0.0)
    scales, zeros, gains = scan(
        x,
        mass,
        lowest,
        highest,
        spread,
        TOP,
        SIZE,
        MASSED,
        HALVINGS,
        PHASES,
        CENTRING,
        REFINEMENTS,
        KEPT_1,
        WIDTH_1,
        WINDOW,
        OVERSHOOT,
        NARROWEST,
    )
    scales, zeros, gains = stage(
        x, mass, scales, zeros, gains, TOP, SIZE, MASSED, WIDTH_1, WIDTH_1, KEPT_1, PASSES_1, OVERSHOOT
    )
    scales, zeros, gains = stage(
        x, mass, scales, zeros, gains, TOP, SIZE, MASSED, WIDTH_1, WIDTH_2, KEPT_2, PASSES_2, OVERSHOOT
    )
    scales, zeros, gains = stage(
        x, mass, scales, zeros, gains, TOP, SIZE, MASSED, WIDTH_2, WIDTH_3, KEPT_3, PASSES_3, OVERSHOOT
    )

    # Read again rather than kept in registers all the time.
    w = tl.load(weight_ptr + place, mask=is_weight, other=0.0).to(tl.float32)
    centre = mean * span + middle
    scale = stored((high - low) / TOP, tiny, largest, DTYPE)
    zero = stored(tl.div_rn(-low, scale), -largest, largest, DTYPE) + 0.0
    least = stored_loss(w, mass, scale, zero, TOP)
    for index in range(KEPT_3 + 1):
        slot = tl.argmax(gains, 1)
        other_scale = stored(take(scales, slot, WIDTH_3) * span, tiny, largest, DTYPE)
        codes = codes_at(x, span / other_scale, take(zeros, slot, WIDTH_3), TOP)
        other_zero = tl.sum(codes * mass, 1) / SIZE - centre / other_scale
        other_zero = stored(other_zero, -largest, largest, DTYPE) + 0.0
        gains = put(gains, slot, span * 0.0 - 2.0, is_group, WIDTH_3)
        if index == KEPT_3:
            other_scale, other_zero = constant(centre, tiny, largest, DTYPE)
        loss = stored_loss(w, mass, other_scale, other_zero, TOP)
        better = loss < least
        scale, zero = tl.where(better, other_scale, scale), tl.where(better, other_zero, zero)
        least = tl.where(better, loss, least)
    alike_scale, alike_zero = constant(low, tiny, largest, DTYPE)
    scale, zero = tl.where(low == high, alike_scale, scale), tl.where(low == high, alike_zero, zero)

    steps = tl.div_rn(w, scale[:, None] + tl.zeros_like(w)) + zero[:, None]
    codes = (tl.minimum(tl.maximum(steps, 0.0), TOP) + ROUND) - ROUND
    store_packed(qweight_ptr, codes, group, is_group, SIZE, BITS, ROWS)
    tl.store(scale_ptr + group, scale.to(DTYPE), mask=is_group)
    tl.store(zero_ptr + group, zero.to(DTYPE), mask=is_group)
