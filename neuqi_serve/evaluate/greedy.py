"""Greedy decoding of many short prompts at once; a finished reply leaves its batch and frees its share of the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuqi_serve.errors import UsageError

SHRINK_AT = 0.75
"""A batch is packed together once this share of its rows, or less, still runs."""


def greedy_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end_id: int,
    batch_size: int = 256,
) -> list[list[int]]:
    """Greedy continuations of prompts, in the order of the prompts, without the end token.

    ``model``: a transformers causal language model; ``prompts``: token ids; ``limits``: most new tokens of each reply.
    Prompts of similar limit and length share a batch, padded on the left.

    Raises:
        UsageError: an empty prompt, a limit below 1, or a number of limits that is not that of the prompts.
    """
    if len(prompts) != len(limits) or not all(prompts) or min(limits, default=1) < 1:
        raise UsageError(
            f"expected prompts of at least one token, each with a limit of at least 1, got {len(prompts)} prompts "
            f"and {len(limits)} limits (least: {min(limits, default=1)}). Give one positive limit a prompt."
        )
    order = sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i])))
    replies: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        _decode(
            model,
            [prompts[i] for i in chosen],
            [limits[i] for i in chosen],
            end_id,
            [replies[i] for i in chosen],
        )
    return replies


@torch.inference_mode()
def _decode(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], end_id: int, replies: list[list[int]]
) -> None:
    """Decode one batch; ``replies`` (empty lists) are filled in place."""
    tokens, mask = _pad_left(prompts, model.device)
    cache = None
    # Row r of the batch belongs to prompt rows[r]; a row that is done runs on until the batch is packed.
    rows = list(range(len(prompts)))
    running = set(rows)
    while running:
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -tokens.shape[1] :]
        output = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            if row not in running:
                continue
            if token != end_id:
                replies[row].append(token)
            if token == end_id or len(replies[row]) == limits[row]:
                running.remove(row)
        if len(running) <= SHRINK_AT * len(rows):
            kept = [place for place, row in enumerate(rows) if row in running]
            index = torch.tensor(kept, dtype=torch.int64, device=tokens.device)
            rows = [rows[place] for place in kept]
            tokens, mask = tokens[index], mask[index]
            cache.batch_select_indices(index)
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=-1)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[B, L]``; what is padding has id 0 and mask 0."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    return tokens, mask
