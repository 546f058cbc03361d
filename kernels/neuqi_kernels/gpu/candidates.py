"""The plans that a kernel can run a product with: what the tuner tries."""

from __future__ import annotations

from collections.abc import Iterator

from neuqi_kernels.gpu.plan import DECODE_TOKENS, MAX_SPLIT, MID_TOKENS, Plan, Target, rule, stage_bytes
from neuqi_kernels.gpu.planar import RUN, RUNS, TILE_ROWS, feature_tiles, tile_features

# Below this many tokens writing the weights out costs more bytes than it could ever save.
_MIN_DENSE_TOKENS = 64
_MAX_STAGES = 4
# A part of K has this many tiles at least: less does not fill the pipeline.
_MIN_PART_TILES = 2


def candidates(target: Target, bits: int, group: int, n: int, k: int, m: int) -> list[Plan]:
    """Return the plans that are legal for ``m`` tokens on the GPU, the rule's first; ``group`` 0 is the whole row."""
    found = [rule(target, bits, group, n, k, m)]
    found += _decode(target, bits, n, k, m) if m <= 2 * DECODE_TOKENS else []
    found += _fused(target, bits, n, k, m) if m > DECODE_TOKENS // 2 else []
    found += [Plan("dequant")] if m >= _MIN_DENSE_TOKENS else []
    return list(dict.fromkeys(found))


def _decode(target: Target, bits: int, n: int, k: int, m: int) -> Iterator[Plan]:
    narrowest = 8 if target.capability else 16
    for block_m in (8, 16, 32):
        # A block wider than the tokens is idle work, unless it is the narrowest.
        if block_m < narrowest or (block_m > narrowest and block_m >= 2 * m) or (bits == 3 and block_m > 16):
            continue
        tile_bytes = RUNS[bits] * TILE_ROWS * RUN * 2 + tile_features(bits) * block_m * 2 + TILE_ROWS * 4
        for warps in (2, 4):
            for stages in range(2, _MAX_STAGES + 1):
                if stages * tile_bytes > target.shared_bytes:
                    continue
                for split_k in _splits(k, bits):
                    yield Plan("decode_mm", block_m, TILE_ROWS, warps, stages, split_k)


def _fused(target: Target, bits: int, n: int, k: int, m: int) -> Iterator[Plan]:
    kernel = "mid_mm" if m <= MID_TOKENS else "prefill_mm"
    for block_m in (32, 64, 128):
        if block_m > 32 and block_m >= 2 * m:
            continue
        for block_n, all_warps in ((TILE_ROWS, (2, 4)), (2 * TILE_ROWS, (4, 8))):
            for warps in all_warps:
                for stages in range(2, _MAX_STAGES + 1):
                    if stages * stage_bytes(bits, block_m, block_n) > target.shared_bytes:
                        continue
                    splits = _splits(k, bits) if m <= MID_TOKENS else [1]
                    yield from (Plan(kernel, block_m, block_n, warps, stages, split) for split in splits)


def _splits(k: int, bits: int) -> list[int]:
    tiles = feature_tiles(k, bits)
    splits = [1]
    while splits[-1] < MAX_SPLIT and tiles >= 2 * splits[-1] * _MIN_PART_TILES:
        splits.append(2 * splits[-1])
    return splits
