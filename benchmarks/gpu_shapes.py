"""What ``gpu_kernels.py`` measures, the most important first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpu_peers.layer import Case

# Output by input features. The fused products (q, k, v; gate and up) are one layer, as vLLM runs them.
SHAPES: dict[tuple[int, int], str] = {
    (28672, 4096): "Llama-3.1-8B gate_up",
    (4096, 14336): "Llama-3.1-8B down",
    (6144, 4096): "Llama-3.1-8B qkv, Qwen3-8B qkv",
    (4096, 4096): "Llama-3.1-8B o, Qwen3-8B o",
    (8192, 8192): "Llama-70B o, the shape of published tables",
    (57344, 8192): "Llama-70B gate_up",
    (51200, 5120): "Qwen3-32B gate_up",
    (8192, 28672): "Llama-70B down",
    (5120, 25600): "Qwen3-32B down",
    (19456, 2560): "Qwen3-4B gate_up",
    (2560, 9728): "Qwen3-4B down",
    (34816, 5120): "Qwen3-14B gate_up",
    (5120, 17408): "Qwen3-14B down",
    (24576, 4096): "Qwen3-8B gate_up",
    (4096, 12288): "Qwen3-8B down",
    (10240, 8192): "Llama-70B qkv",
    (10240, 5120): "Qwen3-32B qkv",
    (5120, 8192): "Qwen3-32B o",
    (7168, 5120): "Qwen3-14B qkv",
    (5120, 5120): "Qwen3-14B o",
    (6144, 2560): "Qwen3-4B qkv",
    (2560, 4096): "Qwen3-4B o",
    (14336, 8192): "Llama-70B gate_up, quarter",
    (8192, 7168): "Llama-70B down, quarter",
    (2560, 8192): "Llama-70B qkv, quarter",
    (8192, 2048): "Llama-70B o, quarter",
    (7168, 8192): "Llama-70B gate_up, eighth",
    (8192, 3584): "Llama-70B down, eighth",
    (1280, 8192): "Llama-70B qkv, eighth",
    (8192, 1024): "Llama-70B o, eighth",
    (128256, 4096): "Llama-3.1-8B lm_head",
}
# So many shapes come before the other group sizes do.
FIRST_SHAPES = 5
# Decoding one request, a small and a large batch, a prompt; then what lies between.
TOKENS = (1, 16, 64, 512, 256, 4, 2048, 8, 32, 128, 2, 8192)


def blocks(
    shapes: Sequence[tuple[int, int]], bits: Sequence[int], group_sizes: Sequence[int]
) -> Iterable[Case]:
    """The layers in the order in which they are measured: the first group size is the important one.

    The first shapes at the first group size, then at the others, then the other shapes. A group size that does not
    divide a row is left out.
    """
    parts = [(shapes[:FIRST_SHAPES], group_sizes[:1]), (shapes[:FIRST_SHAPES], group_sizes[1:])]
    parts += [(shapes[FIRST_SHAPES:], group_sizes[:1]), (shapes[FIRST_SHAPES:], group_sizes[1:])]
    for part, groups in parts:
        for group_size in groups:
            for n, k in part:
                for width in bits:
                    if group_size == -1 or k % group_size == 0:
                        yield Case(n, k, width, group_size)


def parse_shape(text: str) -> tuple[int, int]:
    """``"4096x14336"`` as N and K.

    Raises:
        ValueError: the text is no two numbers with an x between.
    """
    try:
        n, k = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"expected a shape N x K as 4096x14336, got {text!r}. Write two numbers.") from None
    return n, k
