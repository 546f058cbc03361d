"""The definition of the product of a mixture of experts, in float32, and of the layout in which its tokens come.

Every token goes to ``top_k`` of E experts. A *route* is a token at one of its experts, number ``token·top_k + place``.
vLLM sorts the routes by expert and fills each expert's up to whole blocks of ``block_size``:

* ``sorted_token_ids [≥ num_tokens_post_padded]`` int32: routes; those that only fill up are ``≥ tokens·top_k``;
* ``expert_ids [blocks]`` int32: the expert of each block; −1 where it lives on another rank;
* ``num_tokens_post_padded [1]`` int32: how much of the two counts, on the device, as only the router knows.
"""

from __future__ import annotations

import torch

from neuqi_kernels import reference


def align_routes(
    topk_ids: torch.Tensor, experts: int, block_size: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``sorted_token_ids, expert_ids, num_tokens_post_padded`` for ``topk_ids [tokens, top_k]``.

    The plain twin of vLLM's ``moe_align_block_size``, for tests and for machines without vLLM. ``expert_map [experts]``
    turns global experts into this rank's, −1 into nobody's here.
    """
    flat = topk_ids.flatten().to(torch.int64)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    blocks = (counts + block_size - 1) // block_size
    expert_ids = torch.repeat_interleave(torch.arange(experts, device=flat.device), blocks)
    # Where an expert's routes begin, in the sorted order and in the filled-up one.
    starts = torch.cumsum(counts, 0) - counts
    padded_starts = (torch.cumsum(blocks, 0) - blocks) * block_size
    expert = flat[order]
    place = padded_starts[expert] + torch.arange(flat.numel(), device=flat.device) - starts[expert]
    padded = int(blocks.sum()) * block_size
    sorted_ids = torch.full((padded,), flat.numel(), dtype=torch.int32, device=flat.device)
    sorted_ids[place] = order.to(torch.int32)
    if expert_map is not None:
        expert_ids = expert_map.to(expert_ids.device, torch.int64)[expert_ids]
    total = torch.tensor([padded], dtype=torch.int32, device=flat.device)
    return sorted_ids, expert_ids.to(torch.int32), total


def moe_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    top_k: int,
    block_size: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Return ``y [tokens·top_k, N]`` in the dtype of ``x [tokens, K]``: ``w·(x·Ŵₑᵀ + biasₑ)`` for every route.

    ``qweight [E, N, K·bits/32]``, ``scale, zero [E, N, G]`` canonical, ``bias [E, N]``. ``topk_weights [tokens·top_k]``
    are the router's weights w; without them w is 1. Routes of an expert on another rank give zeros, as do those that
    no block names.
    """
    routes, n = x.shape[0] * top_k, qweight.shape[1]
    y = torch.zeros(routes, n, dtype=torch.float32, device=x.device)
    blocks = int(num_tokens_post_padded) // block_size
    owners = expert_ids[:blocks].repeat_interleave(block_size)
    ids = sorted_token_ids[: blocks * block_size].to(torch.int64)
    for expert in sorted(set(owners.tolist())):
        mine = ids[(owners == expert) & (ids < routes)]
        if expert < 0 or not mine.numel():
            continue
        weight = reference.dequantize(qweight[expert], scale[expert], zero[expert], bits, group_size)
        part = x[mine // top_k].to(torch.float32) @ weight.t()
        if bias is not None:
            part = part + bias[expert].to(torch.float32)
        if topk_weights is not None:
            part = part * topk_weights.flatten()[mine].to(torch.float32).unsqueeze(-1)
        y[mine] = part
    return y.to(x.dtype)
