"""Starts the kernels for a mixture of experts."""

from __future__ import annotations

import torch

from neuqi_kernels.gpu.launch import constants
from neuqi_kernels.gpu.moe import moe_decode_mm, moe_prefill_mm
from neuqi_kernels.gpu.plan import Plan, Target


def moe_gemm(
    chosen: Plan,
    target: Target,
    x: torch.Tensor,
    words: torch.Tensor,
    pairs: torch.Tensor,
    bias: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    n: int,
    top_k: int,
    block_size: int,
    bits: int,
    group: int,
) -> torch.Tensor:
    """Return ``y [tokens·top_k, n]`` for ``x [tokens, k]``; ``group`` 0 is the whole row.

    The grid covers as many blocks as there can be; those beyond ``num_tokens_post_padded``, which only the device
    knows, end at once. Rows of y that no block names are left unwritten.
    """
    tokens, k = x.shape
    m = tokens * top_k
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tensors = (
        x,
        words,
        pairs.view(torch.int32),
        x if bias is None else bias,
        y,
        x if topk_weights is None else topk_weights,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
    )
    options = constants(chosen, target, bits, group, k, pairs.dtype, bias is not None)
    options["WEIGHTED"] = topk_weights is not None
    groups, row_tiles = pairs.shape[1], words.shape[1]
    # A block has a route at least, so that a few tokens have few blocks however many experts there are.
    blocks = min(expert_ids.shape[0], m)
    grid = (-(-n // chosen.block_n), blocks * (block_size // chosen.block_m))
    if chosen.kernel == "moe_decode_mm":
        options["BLOCK_SIZE"] = block_size
        moe_decode_mm[grid](*tensors, m, n, k, groups, top_k, **options)
    else:
        moe_prefill_mm[grid](*tensors, m, n, k, groups, row_tiles, top_k, **options)
    return y
