"""The weight layout of the GPU kernels: planar 16-bit words in tiles, and one 32-bit word per scale and zero-point.

A tile is 64 output rows by ``PLANES[bits]·32`` input features. Of each row it holds runs of 32 int16 words; the
field ``j`` of the 32 words of a run is the plane ``j``: 32 consecutive codes. So one ``[64, 32]`` block of words,
loaded once, gives one matrix operand per field by the same shift and mask in every element: no shuffle, no second
load.

* 2, 4, 8 bits: one run, plane ``j`` at bit ``bits·j``.
* 3 bits: three runs. Each holds five planes at the bits 0, 3, 6, 9, 12, and in bit 15 one bit of the sixteenth plane
  (run ``i`` its bit ``i``): 16 planes in 3 words, so exactly 3 bits per weight.

Shape of the words: ``int16 [row tiles, K tiles, runs, 64, 32]``, contiguous, so that what a program reads at a time
is one piece of memory. Rows and input features are filled up to whole tiles with zeros.
"""

from __future__ import annotations

import torch

from neuqi_kernels.layout import pack, unpack

TILE_ROWS = 64
RUN = 32
PLANES = {2: 8, 3: 16, 4: 4, 8: 2}
RUNS = {2: 1, 3: 3, 4: 1, 8: 1}
# Codes taken apart at a time while repacking: the int32 temporaries stay near 100 MB.
_CHUNK_CODES = 1 << 24


def tile_features(bits: int) -> int:
    """Input features of a tile."""
    return PLANES[bits] * RUN


def row_tiles(n: int) -> int:
    """Tiles that ``n`` output features take."""
    return -(-n // TILE_ROWS)


def feature_tiles(k: int, bits: int) -> int:
    """Tiles that ``k`` input features take."""
    return -(-k // tile_features(bits))


def to_planar(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Repack canonical ``qweight [(E,) N, K·bits/32]`` into planar words, on its device, a block of rows at a time.

    The slow twin of the kernel ``repack``; it runs wherever torch does.
    """
    if qweight.ndim == 3:
        return torch.stack([to_planar(expert, bits) for expert in qweight])
    n, words = qweight.shape
    k = words * 32 // bits
    tiles, features = feature_tiles(k, bits), tile_features(bits)
    planar = torch.zeros(
        row_tiles(n), tiles, RUNS[bits], TILE_ROWS, RUN, dtype=torch.int16, device=qweight.device
    )
    step = max(1, _CHUNK_CODES // (tiles * features * TILE_ROWS)) * TILE_ROWS
    for start in range(0, n, step):
        codes = unpack(qweight[start : start + step], bits)
        filled = codes.new_zeros(row_tiles(codes.shape[0]) * TILE_ROWS, tiles * features)
        filled[: codes.shape[0], :k] = codes
        planes = filled.view(-1, TILE_ROWS, tiles, PLANES[bits], RUN).to(torch.int32).permute(3, 0, 2, 1, 4)
        first = start // TILE_ROWS
        for run, word in enumerate(_words(planes, bits)):
            # The conversion keeps the low 16 bits, whatever the sign.
            planar[first : first + word.shape[0], :, run] = word.to(torch.int16)
    return planar


def from_planar(planar: torch.Tensor, n: int, k: int, bits: int) -> torch.Tensor:
    """Return the canonical ``qweight [n, k·bits/32]``: the inverse of ``to_planar``."""
    rows, features = planar.shape[0] * TILE_ROWS, planar.shape[1] * tile_features(bits)
    mask = (1 << bits) - 1
    words = planar.to(torch.int32) & 0xFFFF
    if bits == 3:
        planes = [(words[:, :, j // 5] >> 3 * (j % 5)) & mask for j in range(15)]
        top = words >> 15
        planes.append(top[:, :, 0] | top[:, :, 1] << 1 | top[:, :, 2] << 2)
    else:
        planes = [(words[:, :, 0] >> bits * j) & mask for j in range(PLANES[bits])]
    # [planes, row tiles, K tiles, 64, 32] to [row tiles, 64, K tiles, planes, 32].
    codes = torch.stack(planes).to(torch.uint8).permute(1, 3, 2, 0, 4).reshape(rows, features)
    return pack(codes[:n, :k].contiguous(), bits)


def rows_from_planar(planar: torch.Tensor, rows: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """Return the canonical ``qweight [R, k·bits/32]`` of the ``rows [R]`` (int64)."""
    count = rows.shape[0]
    chosen = planar[rows // TILE_ROWS, :, :, rows % TILE_ROWS]
    filled = chosen.new_zeros(row_tiles(count) * TILE_ROWS, *chosen.shape[1:])
    filled[:count] = chosen
    tiles = filled.view(-1, TILE_ROWS, *chosen.shape[1:]).permute(0, 2, 3, 1, 4)
    return from_planar(tiles, count, k, bits)


def fuse_scale_zero(
    scale: torch.Tensor, zero: torch.Tensor, bits: int, group: int, groups: int
) -> torch.Tensor:
    """Return scale and zero-point side by side as ``[(E,) groups, N filled up, 2]`` in their own 16-bit dtype.

    The pair is one 32-bit word to the kernels. ``scale, zero [(E,) N, G]``; groups and rows that only fill up tiles get
    scale and zero-point 0, and so add nothing.
    """
    *experts, n, stored = scale.shape
    padded = -(-groups * group // tile_features(bits)) * tile_features(bits) // group if groups > 1 else 1
    fused = scale.new_zeros(*experts, padded, row_tiles(n) * TILE_ROWS, 2)
    fused[..., :stored, :n, 0] = scale.transpose(-2, -1)
    fused[..., :stored, :n, 1] = zero.transpose(-2, -1)
    return fused


def split_scale_zero(fused: torch.Tensor, n: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``scale, zero [n, groups]``: the inverse of ``fuse_scale_zero``."""
    pair = fused[:groups, :n].permute(2, 1, 0)
    return pair[0].contiguous(), pair[1].contiguous()


def _words(planes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """``planes [P, …]`` int32 to the words of each run."""
    if bits != 3:
        return [sum_fields(planes, bits)]
    return [
        sum_fields(planes[5 * run : 5 * run + 5], 3) | ((planes[15] >> run & 1) << 15) for run in range(3)
    ]


def sum_fields(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """Put plane ``j`` at bit ``bits·j`` of int32 words."""
    words = planes[0].clone()
    for j in range(1, planes.shape[0]):
        words |= planes[j] << bits * j
    return words
