"""Device functions that turn fields of 16-bit words into floating-point matrix operands, two at a time.

A field under the exponent bits of a power of two is a float already: ``0x6400 | q`` is the fp16 number ``1024 + q`` and
``0x4300 | q`` the bf16 number ``128 + q``. So a code costs one shift and one three-input logic operation per pair, and
no conversion. The added constant, ``code_offset``, is the same for every code of a layer; it is taken out with the
zero-point, once per group, in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.constexpr_function
def code_offset(bits, half):
    """What every operand carries on top of its code; ``half``: fp16 operands, else bf16."""
    if half:
        return 1024.0
    # A bf16 mantissa has 7 bits: an 8-bit code goes in two nibbles, 128 + low and 2048 + 16·high.
    return 2176.0 if bits == 8 else 128.0


@triton.constexpr_function
def _pair_asm(shift, mask, magic, inverted):
    shifted = f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    # Truth table of (t & mask) | magic, or of (~t & mask) | magic.
    table = "0xae" if inverted else "0xea"
    twice = 0x10001
    return f"{{ .reg .b32 t; {shifted} lop3.b32 $0, t, {mask * twice:#x}, {magic * twice:#x}, {table}; }}"


@triton.constexpr_function
def _signed(magic):
    return magic - 0x10000 if magic >= 0x8000 else magic


@triton.jit
def field(
    words,
    SHIFT: tl.constexpr,
    MASK: tl.constexpr,
    MAGIC: tl.constexpr,
    INVERTED: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
):
    """The field at bit SHIFT of int16 words, or its complement, with the bits MAGIC added, seen as a float."""
    # One return at the end: Triton types a function by all its returns, also those a constant rules out.
    if ASM and HALF:
        operand = tl.inline_asm_elementwise(
            _pair_asm(SHIFT, MASK, MAGIC, INVERTED), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    elif ASM:
        operand = tl.inline_asm_elementwise(
            _pair_asm(SHIFT, MASK, MAGIC, INVERTED), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        bits = (words >> SHIFT) & MASK
        if INVERTED:
            bits = bits ^ MASK
        bits = bits | _signed(MAGIC)
        operand = bits.to(tl.float16 if HALF else tl.bfloat16, bitcast=True)
    return operand


@triton.jit
def plane_dot(acc, wa, wb, wc, x, J: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return ``acc + (codes of plane J + code_offset)·x``.

    The sixteenth plane of 3-bit codes is spread over three words. Its bits are three operands whose constants add
    up to one code_offset c: ``(c + b0) − (c + 2 − 2·b1) + (c + 2 + 4·b2)``; the middle one takes the complement of
    its bit.
    """
    MAGIC: tl.constexpr = 0x6400 if HALF else 0x4300
    if BITS == 3:
        if J < 5:
            acc = tl.dot(field(wa, 3 * J, 7, MAGIC, False, HALF, ASM), x, acc)
        elif J < 10:
            acc = tl.dot(field(wb, 3 * (J - 5), 7, MAGIC, False, HALF, ASM), x, acc)
        elif J < 15:
            acc = tl.dot(field(wc, 3 * (J - 10), 7, MAGIC, False, HALF, ASM), x, acc)
        else:
            acc = tl.dot(field(wa, 15, 1, MAGIC, False, HALF, ASM), x, acc)
            acc = tl.dot(field(wb, 14, 2, MAGIC | 0x8000, True, HALF, ASM), x, acc)
            acc = tl.dot(field(wc, 13, 4, MAGIC | 2, False, HALF, ASM), x, acc)
    elif BITS == 8 and not HALF:
        acc = tl.dot(field(wa, 8 * J, 15, 0x4300, False, HALF, ASM), x, acc)
        acc = tl.dot(field(wa, 8 * J + 4, 15, 0x4500, False, HALF, ASM), x, acc)
    else:
        acc = tl.dot(field(wa, BITS * J, (1 << BITS) - 1, MAGIC, False, HALF, ASM), x, acc)
    return acc


@triton.jit
def split_pair(pair, HALF: tl.constexpr):
    """The two 16-bit floats of int32 words as float32, exactly: scale in the low half, zero-point in the high half."""
    if HALF:
        scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # A bf16 number is the upper half of the same number in float32.
        scale = (pair << 16).to(tl.float32, bitcast=True)
        zero = (pair & -65536).to(tl.float32, bitcast=True)
    return scale, zero


@triton.jit
def plane_value(words, J: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """``code + code_offset`` of the field J of a run as float32; field 15 of 3-bit words is their single bit."""
    MAGIC: tl.constexpr = 0x6400 if HALF else 0x4300
    if BITS == 3 and J == 15:
        value = field(words, 15, 1, MAGIC, False, HALF, ASM).to(tl.float32)
    elif BITS == 8 and not HALF:
        low = field(words, 8 * J, 15, 0x4300, False, HALF, ASM).to(tl.float32)
        value = low + field(words, 8 * J + 4, 15, 0x4500, False, HALF, ASM).to(tl.float32)
    else:
        value = field(words, BITS * J, (1 << BITS) - 1, MAGIC, False, HALF, ASM).to(tl.float32)
    return value


@triton.jit
def load_tokens(token_ptr, feature, tokens, m, k, MASK_K: tl.constexpr):
    """32 consecutive features of every token, zero beyond the last token and beyond k."""
    limit = tl.where(feature < k, m, 0) if MASK_K else m
    return tl.load(token_ptr + feature, mask=(tokens < limit)[None, :], other=0.0)
