"""The definition of a whole mixture of experts, in float32: two products, an activation between, a weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from neuqi_kernels import reference

# Of an expert that are de-quantized at once: an expert can be as large as the layers of a model.
_ROWS = 1024
# Of vLLM's activation "swigluoai": where gate and up are cut off, and the steepness of the gate.
_LIMIT, _STEEPNESS = 7.0, 1.702


def _swigluoai(pairs: torch.Tensor) -> torch.Tensor:
    gate, up = pairs[..., ::2].clamp(max=_LIMIT), pairs[..., 1::2].clamp(-_LIMIT, _LIMIT)
    return gate * torch.sigmoid(_STEEPNESS * gate) * (up + 1)


def _gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def gated(pairs: torch.Tensor) -> torch.Tensor:
        gate, up = pairs.chunk(2, dim=-1)
        return function(gate) * up

    return gated


# By vLLM's names, [..., 2·I] → [..., I]: gates are the first half, in "swigluoai" the even elements.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": _gated(functional.silu),
    "gelu": _gated(functional.gelu),
    "gelu_tanh": _gated(lambda gate: functional.gelu(gate, approximate="tanh")),
    "swigluoai": _swigluoai,
}

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def experts(
    x: torch.Tensor,
    first: Weights,
    second: Weights,
    first_bias: torch.Tensor | None,
    second_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    first_bits: int,
    first_group_size: int,
    second_bits: int,
    second_group_size: int,
    activation: str,
) -> torch.Tensor:
    """Return ``y [tokens, H]`` in the dtype of ``x [tokens, H]``: the sum of a token's experts, each with its weight.

    An expert is ``activation(x·Ŵ₁ᵀ + b₁)·Ŵ₂ᵀ + b₂``, the activation rounded to the dtype of ``x``. ``first``: canonical
    qweight, scale, zero ``[E, 2·I, …]``; ``second``: ``[E, H, …]``; biases ``[E, 2·I]`` and ``[E, H]``.
    ``topk_weights, topk_ids [tokens, top_k]``; a negative id counts nothing. Only chosen experts are looked at.
    """
    tokens, top_k = topk_ids.shape
    parts = torch.zeros(tokens, top_k, second[0].shape[1], dtype=torch.float32, device=x.device)
    for expert in sorted(set(topk_ids.flatten().tolist())):
        if expert < 0:
            continue
        token, place = (topk_ids == expert).nonzero(as_tuple=True)
        pairs = _product(x[token], first, first_bias, expert, first_bits, first_group_size)
        hidden = ACTIVATIONS[activation](pairs).to(x.dtype)
        parts[token, place] = _product(hidden, second, second_bias, expert, second_bits, second_group_size)
    weighted = parts * topk_weights.to(torch.float32).unsqueeze(-1)
    return weighted.masked_fill(topk_ids.unsqueeze(-1) < 0, 0.0).sum(1).to(x.dtype)


def _product(
    x: torch.Tensor, weights: Weights, bias: torch.Tensor | None, expert: int, bits: int, group_size: int
) -> torch.Tensor:
    parts = []
    for start in range(0, weights[0].shape[1], _ROWS):
        qweight, scale, zero = (tensor[expert, start : start + _ROWS] for tensor in weights)
        weight = reference.dequantize(qweight, scale, zero, bits, group_size)
        parts.append(x.to(torch.float32) @ weight.t())
    y = torch.cat(parts, dim=-1)
    return y if bias is None else y + bias[expert].to(torch.float32)
