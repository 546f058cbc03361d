"""Which kernel runs a product, with what tiles: a pure function of the GPU, the layer and the number of tokens.

There is no tuning at run time: no search delays the first calls, and the same call gives the same bits in every
process. Where ``tuning_table`` has an entry measured on such a GPU, it decides. The rules here decide everywhere else;
they come from the machine code (registers, shared memory, instructions per weight) and from the size of the grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from neuqi_kernels.gpu.planar import RUN, RUNS, TILE_ROWS, feature_tiles, row_tiles, tile_features

# Up to this many tokens the codes enter the product as they are; beyond, each weight is de-quantized for it.
DECODE_TOKENS = 32
# Up to this many tokens a product has few blocks of tokens, so that its tiles must leave programs for the whole GPU.
MID_TOKENS = 256
# Beyond this many tokens the weights are written out for torch's dense product. Whether it is the right place to hand
# over is for benchmarks/gpu_kernels.py to show on the GPU at hand.
DENSE_TOKENS = 2048
# The fifth-generation matrix units (sm_100 to sm_119) take no operand from registers. There the tiles of decoding, on
# the older instructions, cost the fewest per weight up to this many tokens; beyond, the dense product has the new ones.
_DENSE_TOKENS_SM100 = 64
# Programs that split K share one counter per tile of the output; so many blocks of tokens have counters.
SPLIT_TOKEN_BLOCKS = 4
# Tokens of a program where a token must get the same bits whatever stands beside it, and of the blocks of experts that
# have few tokens.
INVARIANT_TOKENS = 16
MAX_SPLIT = 16
# Tokens of an expert that fit into the narrowest slab of a block.
FEW_ROUTES = 8
_MOE_BLOCK_SIZES = (32, 64, 128)
_MIN_PART_FEATURES = 512
_PROGRAMS_PER_MULTIPROCESSOR = 4
_WIDE_SHARED_BYTES = 160 * 1024


@dataclass(frozen=True)
class Target:
    """A GPU as the rules see it.

    ``capability``: 90 for sm_90, 0 for AMD's; ``shared_bytes``: most that one program may use; ``inline_asm``:
    whether it takes PTX; ``name``: of the architecture where it is not ``sm_`` and the capability.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    inline_asm: bool = True
    name: str = ""

    @property
    def architecture(self) -> str:
        """The name under which measured plans are kept: ``sm_90``, ``gfx942``."""
        return self.name or f"sm_{self.capability}"

    @property
    def fifth_generation(self) -> bool:
        """Whether its large matrix products go through tensor memory."""
        return 100 <= self.capability < 120


@dataclass(frozen=True)
class Plan:
    """A kernel and its tiles: ``block_m`` tokens by ``block_n`` output features, K in ``split_k`` parts.

    ``decode_mm``, ``mid_mm`` and ``prefill_mm`` are fused products (the last two share their code and differ in their
    tiles); ``dequant`` writes the weights out for torch's dense product.
    """

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
        return Target(80, 4, 1 << 16, inline_asm=False, name="interpreter")
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    return Target(
        capability=properties.major * 10 + properties.minor if is_nvidia else 0,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", 1 << 16),
        inline_asm=is_nvidia,
        name="" if is_nvidia else properties.gcnArchName.split(":")[0],
    )


def plan(
    target: Target, bits: int, group: int, n: int, k: int, m: int, batch_invariant: bool = False
) -> Plan:
    """Choose the kernel and its tiles for ``m`` tokens; ``group`` 0 is the whole row.

    ``batch_invariant``: the plan depends on N and K alone, so that a token gets the same bits from the same machine
    code however many others there are; prompts then run on the tiles of decoding, at less speed.
    """
    if batch_invariant:
        return _decode(target, bits, group, n, k, _decode_tokens(target, bits, group, INVARIANT_TOKENS))
    # Imported here, as the table is made of plans.
    from neuqi_kernels.gpu import tuning_table

    tuned = tuning_table.find(target.architecture, bits, group, n, k, m)
    return tuned if tuned is not None else rule(target, bits, group, n, k, m)


def rule(target: Target, bits: int, group: int, n: int, k: int, m: int) -> Plan:
    """Return the plan where nothing was measured.

    Within ``decode_mm`` the parts of K do not depend on m, so a token's result does not depend on how many others
    there are.
    """
    if m <= (_DENSE_TOKENS_SM100 if target.fifth_generation else DECODE_TOKENS):
        return _decode(target, bits, group, n, k, _decode_tokens(target, bits, group, m))
    if target.fifth_generation or m > DENSE_TOKENS:
        return Plan("dequant")
    chosen = _fused(
        "mid_mm" if m <= MID_TOKENS else "prefill_mm", target, bits, _fused_tokens(target, bits, m)
    )
    token_blocks = -(-m // chosen.block_m)
    if token_blocks > SPLIT_TOKEN_BLOCKS:
        return chosen
    # Programs are larger than in decoding, and so are the partial sums that a further part of K costs.
    programs = -(-n // chosen.block_n) * token_blocks
    split_k = _split(programs, feature_tiles(k, bits), bits, target, _PROGRAMS_PER_MULTIPROCESSOR // 2)
    return replace(chosen, split_k=split_k)


def moe_block_size(
    target: Target, bits: int, routes: int, experts: int, batch_invariant: bool = False
) -> int:
    """Tokens of a block of one expert, for which the routes must be sorted; ``routes``: tokens times top k."""
    expected = -(-routes // experts)
    if batch_invariant or expected <= INVARIANT_TOKENS:
        return INVARIANT_TOKENS
    return _fused_tokens(target, bits, expected)


def moe_plan(target: Target, bits: int, group: int, block_size: int, few: bool) -> Plan:
    """Choose the kernel for blocks of ``block_size`` tokens of one expert. K is never split.

    ``few``: an expert has ``FEW_ROUTES`` tokens on average or fewer.

    Raises:
        ValueError: no kernel has such blocks.
    """
    if block_size == INVARIANT_TOKENS:
        # Three bits leave registers for the narrow slab alone in a program that addresses experts, and with three
        # stages rather than two, where they fit.
        block_m = _decode_tokens(target, bits, group, FEW_ROUTES if few or bits == 3 else block_size)
        stages = _decode_stages(target, bits, group, block_m)
        if bits == 3 and target.shared_bytes >= _WIDE_SHARED_BYTES:
            stages = 3
        return Plan("moe_decode_mm", block_m, TILE_ROWS, _decode_warps(target, bits, block_m), stages)
    if block_size not in _MOE_BLOCK_SIZES:
        raise ValueError(
            f"expected a block size of {(INVARIANT_TOKENS, *_MOE_BLOCK_SIZES)} tokens, got {block_size}. "
            "Ask the backend with block_size before sorting the routes."
        )
    return _fused("moe_prefill_mm", target, bits, block_size)


def stage_bytes(bits: int, block_m: int, block_n: int) -> int:
    """Shared memory that one step of ``mid_mm`` and ``prefill_mm`` in flight takes: words, tokens, scales."""
    features = tile_features(bits) // RUNS[bits]
    return block_n * RUN * 2 + features * block_m * 2 + block_n * 16


def _decode(target: Target, bits: int, group: int, n: int, k: int, block_m: int) -> Plan:
    split_k = _split(row_tiles(n), feature_tiles(k, bits), bits, target, _PROGRAMS_PER_MULTIPROCESSOR)
    warps, stages = _decode_warps(target, bits, block_m), _decode_stages(target, bits, group, block_m)
    return Plan("decode_mm", block_m, TILE_ROWS, warps, stages, split_k)


def _decode_tokens(target: Target, bits: int, group: int, m: int) -> int:
    # Three bits in groups of 32 have the most partial sums, and registers for 8 tokens.
    if target.capability and (m <= 8 or (bits == 3 and group == 32)):
        return 8
    # The 3-bit tile of 512 features leaves registers for 16 tokens: more are further blocks. The narrowest matrix
    # product of AMD's GPUs has 16 columns.
    return 16 if m <= 16 or bits == 3 else 32


def _decode_warps(target: Target, bits: int, block_m: int) -> int:
    """Two: the code stays HMMA on every architecture and Triton version, and small programs fill the GPU."""
    # The most partial sums take more registers than two warps of some architectures have. There, matrix products of
    # four warps are the same instructions; on sm_90 and sm_100 they are others.
    crowded = bits == 3 and block_m == 16
    others = not target.capability or target.capability == 90 or target.fifth_generation
    return 4 if crowded and not others else 2


def _decode_stages(target: Target, bits: int, group: int, block_m: int) -> int:
    if bits == 3:
        # A stage is 20 KiB and more: two leave room for other programs. With the most partial sums, two also make the
        # assembler run out of registers, where three do not.
        crowded = group == 32 or block_m == 16
        return 3 if crowded and target.shared_bytes >= _WIDE_SHARED_BYTES else 2
    return 2 if bits == 2 and block_m == 32 else 3


def _fused_tokens(target: Target, bits: int, m: int) -> int:
    """Tokens of a program that de-quantizes each weight: the more, the less often it does."""
    if target.fifth_generation:
        return 32 if bits in (2, 3) else 64
    # 128 tokens in flight take more shared memory than consumer GPUs have.
    return 64 if m <= 64 or target.shared_bytes < _WIDE_SHARED_BYTES else 128


def _fused(kernel: str, target: Target, bits: int, block_m: int) -> Plan:
    """The rows and warps for ``block_m`` tokens, and as many steps in flight as fit, up to three."""
    if target.fifth_generation:
        # Two warps keep the older matrix instructions, which take weights from registers.
        block_n, warps = TILE_ROWS, 2
    elif not target.capability:
        # AMD's GPUs run out of scalar registers with more rows.
        block_n, warps = TILE_ROWS, 4
    else:
        block_n, warps = 2 * TILE_ROWS, 4 if block_m <= 64 else 8
    stages = max(1, min(3, target.shared_bytes // stage_bytes(bits, block_m, block_n)))
    return Plan(kernel, block_m, block_n, warps, stages)


def _split(programs: int, tiles: int, bits: int, target: Target, per_multiprocessor: int) -> int:
    """Parts of K: the smallest power of two that gives every multiprocessor some programs, each with enough to do."""
    wanted = per_multiprocessor * target.multiprocessors
    least = max(2, _MIN_PART_FEATURES // tile_features(bits))
    split_k = 1
    while split_k < MAX_SPLIT and programs * split_k < wanted and tiles >= 2 * split_k * least:
        split_k *= 2
    return split_k
