"""Which kernel runs a product, with what tiles: a pure function of the GPU, the layer and the number of tokens.

There is no tuning at run time: no search delays the first calls, and the same call gives the same bits in every
process. The rules come from the machine code (registers, shared memory, instructions per weight) and from the size of
the grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from neuqi_kernels.gpu.planar import RUN, RUNS, TILE_ROWS, feature_tiles, row_tiles, tile_features

# Up to this many tokens the codes enter the product as they are; beyond, each weight is de-quantized for it.
DECODE_TOKENS = 32
# Beyond this many tokens the weights are written out for torch's dense product. Whether it is the right place to hand
# over is for benchmarks/gpu_kernels.py to show on the GPU at hand.
DENSE_TOKENS = 2048
# The fifth-generation matrix units (sm_100 to sm_119) take no operand from registers, so that the fused product runs
# on the older instructions there.
_DENSE_TOKENS_SM100 = 256
# Programs that split K share one counter per tile of the output; so many blocks of tokens have counters.
SPLIT_TOKEN_BLOCKS = 4
_MAX_SPLIT = 16
_MIN_PART_FEATURES = 512
_PROGRAMS_PER_MULTIPROCESSOR = 4
_WIDE_SHARED_BYTES = 160 * 1024


@dataclass(frozen=True)
class Target:
    """A GPU as the rules see it.

    ``capability``: 90 for sm_90, 0 for AMD's; ``shared_bytes``: most that one program may use; ``inline_asm``:
    whether it takes PTX.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    inline_asm: bool = True

    @property
    def fifth_generation(self) -> bool:
        """Whether its large matrix products go through tensor memory."""
        return 100 <= self.capability < 120


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
        return Target(capability=80, multiprocessors=4, shared_bytes=1 << 16, inline_asm=False)
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    return Target(
        capability=properties.major * 10 + properties.minor if is_nvidia else 0,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", 1 << 16),
        inline_asm=is_nvidia,
    )


def plan(target: Target, bits: int, group: int, n: int, k: int, m: int) -> Plan:
    """Choose the kernel and its tiles for ``m`` tokens; ``group`` 0 is the whole row.

    Within ``decode_mm`` the parts of K do not depend on m, so a token's result does not depend on how many others
    there are.
    """
    if m <= DECODE_TOKENS:
        split_k = _split(row_tiles(n), feature_tiles(k, bits), bits, target)
        block_m = _decode_tokens(target, bits, m)
        # Two warps: the code stays HMMA on every architecture and Triton version, and small programs fill the GPU.
        return Plan("decode_mm", block_m, TILE_ROWS, 2, _decode_stages(target, bits, group, block_m), split_k)
    if m > (_DENSE_TOKENS_SM100 if target.fifth_generation else DENSE_TOKENS):
        return Plan("dequant")
    block_m, block_n, warps = _prefill_tiles(target, bits, m)
    step_bytes = block_n * RUN * 2 + tile_features(bits) // RUNS[bits] * block_m * 2 + block_n * 16
    stages = max(1, min(3, target.shared_bytes // step_bytes))
    token_blocks = -(-m // block_m)
    split_k = 1
    if token_blocks <= SPLIT_TOKEN_BLOCKS:
        split_k = _split(-(-n // block_n) * token_blocks, feature_tiles(k, bits), bits, target)
    return Plan("prefill_mm", block_m, block_n, warps, stages, split_k)


def _decode_tokens(target: Target, bits: int, m: int) -> int:
    if m <= 8 and target.capability:
        return 8
    # The 3-bit tile of 512 features leaves registers for 16 tokens: more are further blocks. The narrowest matrix
    # product of AMD's GPUs has 16 columns.
    return 16 if m <= 16 or bits == 3 else 32


def _decode_stages(target: Target, bits: int, group: int, block_m: int) -> int:
    if bits == 3:
        # A stage is 20 KiB and more: two leave room for other programs. With the most partial sums, two also make the
        # assembler run out of registers, where three do not.
        crowded = group == 32 or block_m == 16
        return 3 if crowded and target.shared_bytes >= _WIDE_SHARED_BYTES else 2
    return 2 if bits == 2 and block_m == 32 else 3


def _prefill_tiles(target: Target, bits: int, m: int) -> tuple[int, int, int]:
    """Tokens and output features of a program, and its warps."""
    if target.fifth_generation:
        return (32 if bits in (2, 3) else 64), TILE_ROWS, 2
    if m <= 64 or target.shared_bytes < _WIDE_SHARED_BYTES:
        return 64, 2 * TILE_ROWS, 4
    return 128, 2 * TILE_ROWS, 8


def _split(programs: int, tiles: int, bits: int, target: Target) -> int:
    """Parts of K: the smallest power of two that gives every multiprocessor some programs, each with enough to do."""
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * target.multiprocessors
    least = max(2, _MIN_PART_FEATURES // tile_features(bits))
    split_k = 1
    while split_k < _MAX_SPLIT and programs * split_k < wanted and tiles >= 2 * split_k * least:
        split_k *= 2
    return split_k
