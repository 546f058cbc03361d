"""The canonical bit layout of packed codes, on disk and between backends; this module is its single owner.

Each output row is a dense little-endian stream of b-bit codes in K order: code k occupies the bits
``[k·b, (k+1)·b)`` of the row, and bit i of the stream is bit ``i mod 32`` of the int32 word ``⌊i/32⌋``. K is a multiple
of 32, so that a row is whole words for every b. Packing runs along K only: rows may be sliced and concatenated freely,
and K may be cut at multiples of 32.
"""

from __future__ import annotations

import torch

SUPPORTED_BITS = (2, 3, 4, 8)
BLOCK = 32


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words in a row of ``in_features`` codes of ``bits`` bits.

    Raises:
        ValueError: unsupported bits, or a row that is no multiple of 32 codes.
    """
    _check(in_features, bits)
    return in_features * bits // 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``codes [N, K]`` (uint8, below 2^bits) into ``qweight [N, K·bits/32]`` (int32), on the same device.

    Raises:
        ValueError: another dtype or shape, unsupported bits, or a code that does not fit.
    """
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(
            f"expected codes as uint8 [N, K], got {codes.dtype} {list(codes.shape)}. Convert them first."
        )
    rows, in_features = codes.shape
    words = packed_words(in_features, bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(
            f"expected codes below {1 << bits} for {bits} bits, got {int(codes.max())}. Clamp them first."
        )
    if bits == 3:
        # Eight 3-bit codes fill three bytes, so a group of eight never straddles its neighbours.
        lanes = codes.view(rows, in_features // 8, 8).to(torch.int32)
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=codes.device)
        triple = (lanes << shifts).sum(-1, dtype=torch.int32)
        spread = torch.stack((triple & 255, (triple >> 8) & 255, triple >> 16), dim=-1)
        stream = spread.to(torch.uint8).view(rows, -1)
    else:
        fields = 8 // bits
        lanes = codes.view(rows, -1, fields)
        stream = lanes[:, :, 0].clone()
        for field in range(1, fields):
            stream |= lanes[:, :, field] << (field * bits)
    # torch is little-endian on every platform it runs on here, so four stream bytes are one word.
    return stream.contiguous().view(torch.int32).view(rows, words)


def unpack(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack ``qweight [N, K·bits/32]`` (int32) into ``codes [N, K]`` (uint8): the inverse of ``pack``.

    Raises:
        ValueError: another dtype or shape, unsupported bits, or words that are no whole blocks of 32 codes.
    """
    if qweight.dtype != torch.int32 or qweight.ndim != 2:
        raise ValueError(
            f"expected qweight as int32 [N, K*bits/32], got {qweight.dtype} {list(qweight.shape)}. Pack codes first."
        )
    rows, words = qweight.shape
    if bits not in SUPPORTED_BITS or words % bits:
        raise ValueError(
            f"expected bits in {SUPPORTED_BITS} and a whole number of {bits}-word blocks in a row, got {bits} bits and "
            f"{words} words. Were these weights packed with other bits?"
        )
    in_features = words * 32 // bits
    stream = qweight.contiguous().view(torch.uint8).view(rows, words * 4)
    if bits == 8:
        return stream.clone()
    if bits == 3:
        spread = stream.view(rows, -1, 3).to(torch.int32)
        triple = spread[:, :, 0] | spread[:, :, 1] << 8 | spread[:, :, 2] << 16
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=qweight.device)
        return ((triple.unsqueeze(-1) >> shifts) & 7).to(torch.uint8).view(rows, in_features)
    mask = (1 << bits) - 1
    fields = [(stream >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).view(rows, in_features)


def _check(in_features: int, bits: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"expected bits in {SUPPORTED_BITS}, got {bits}. Choose one of these.")
    if in_features % BLOCK:
        raise ValueError(
            f"expected rows of a multiple of {BLOCK} codes, got {in_features}. Leave this layer unquantized."
        )
