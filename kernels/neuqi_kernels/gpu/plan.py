"""Which kernel runs a product, with what tiles: a pure function of the GPU, the layer and the number of tokens.

There is no tuning at run time, so nothing is slow at first and the same call gives the same bits everywhere. The rules
come from the machine code (registers, shared memory, instructions per weight) and from the size of the grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from neuqi_kernels.gpu.planar import RUNS, TILE_ROWS, feature_tiles, row_tiles, tile_features

# Beyond this many tokens writing the weights out once costs less than a tuned dense product gains.
DENSE_TOKENS = 2048
# Programs that split K share one counter per tile of the output; so many blocks of tokens have counters.
SPLIT_TOKEN_BLOCKS = 4
_MAX_SPLIT = 16
_MIN_PART_FEATURES = 512


@dataclass(frozen=True)
class Target:
    """A GPU as the rules see it. ``capability``: 90 for sm_90, 0 where it says nothing. ``inline_asm``: speaks PTX."""

    capability: int
    multiprocessors: int
    shared_bytes: int
    inline_asm: bool


@dataclass(frozen=True)
class Plan:
    """A kernel and its tiles: ``block_m`` tokens by ``block_n`` output features, K in ``split_k`` parts."""

    kernel: str
    block_m: int = 0
    block_n: int = TILE_ROWS
    warps: int = 4
    stages: int = 1
    split_k: int = 1


@functools.cache
def target_of(device: torch.device) -> Target:
    """Describe the GPU behind ``device``; any other device is Triton's interpreter, taken for a small GPU."""
    if device.type != "cuda":
        return Target(capability=0, multiprocessors=4, shared_bytes=1 << 16, inline_asm=False)
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    return Target(
        capability=properties.major * 10 + properties.minor if is_nvidia else 0,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", 1 << 16),
        inline_asm=is_nvidia,
    )


def plan(target: Target, bits: int, n: int, k: int, m: int) -> Plan:
    """Choose the kernel and its tiles for ``m`` tokens.

    Within ``decode_mm`` the parts of K do not depend on m, so a token's result does not depend on how many others
    there are.
    """
    if m <= _decode_tokens(bits):
        block_m = 8 if m <= 8 else 16 if m <= 16 else 32
        # Two warps: the code stays HMMA on every architecture and Triton version, and small programs fill the GPU.
        split_k = _split(row_tiles(n), feature_tiles(k, bits), bits, target)
        return Plan("decode_mm", block_m, TILE_ROWS, 2, _decode_stages(bits, block_m), split_k)
    if m > DENSE_TOKENS:
        return Plan("dequant")
    return _prefill(target, bits, n, k, m)


def _prefill(target: Target, bits: int, n: int, k: int, m: int) -> Plan:
    block_m, warps = (64, 4) if m <= 64 or target.shared_bytes < 150_000 else (128, 8)
    block_n = 2 * TILE_ROWS
    # One step holds a run of words of block_n rows and the tokens that meet it.
    features = tile_features(bits) // RUNS[bits]
    step_bytes = block_n * 64 + features * block_m * 2 + 4096
    stages = max(1, min(3, target.shared_bytes // step_bytes))
    token_blocks = -(-m // block_m)
    split_k = 1
    if token_blocks <= SPLIT_TOKEN_BLOCKS:
        split_k = _split(-(-n // block_n) * token_blocks, feature_tiles(k, bits), bits, target)
    return Plan("prefill_mm", block_m, block_n, warps, stages, split_k)


def _decode_tokens(bits: int) -> int:
    """Most tokens of ``decode_mm``: the 3-bit tile of 512 features leaves no registers for more than 16."""
    return 16 if bits == 3 else 32


def _decode_stages(bits: int, block_m: int) -> int:
    return 2 if bits == 3 or (bits == 2 and block_m == 32) else 3


def _split(programs: int, tiles: int, bits: int, target: Target) -> int:
    """Parts of K: the smallest power of two that gives every multiprocessor four programs, each with enough to do."""
    least = max(2, _MIN_PART_FEATURES // tile_features(bits))
    split_k = 1
    while (
        split_k < _MAX_SPLIT
        and programs * split_k < 4 * target.multiprocessors
        and tiles >= 2 * split_k * least
    ):
        split_k *= 2
    return split_k
