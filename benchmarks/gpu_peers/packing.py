"""The int32 layouts of 4-bit codes that peers read, made with the canonical packing."""

from __future__ import annotations

from torch import Tensor

from neuqi_kernels import layout

# AWQ puts the even columns of eight into the low half of a word, the odd ones into the high half.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def along_k(codes: Tensor) -> Tensor:
    """GPTQ's order: ``codes [N, K]`` to words ``[K/8, N]``, eight input features each, the first lowest."""
    return layout.pack(codes, 4).t().contiguous()


def along_n(codes: Tensor) -> Tensor:
    """``codes [N, K]`` to words ``[K, N/8]``, eight output features each, the first lowest."""
    return layout.pack(codes.t().contiguous(), 4)


def along_n_awq(codes: Tensor) -> Tensor:
    """AWQ's order: as ``along_n``, with the eight output features of a word in ``AWQ_ORDER``."""
    n, k = codes.shape
    ordered = codes.view(n // 8, 8, k)[:, list(AWQ_ORDER)].reshape(n, k)
    return along_n(ordered)
