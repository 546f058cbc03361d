"""Rounding to the type in which a value is stored, straight through: what is trained is what will be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stored: torch.dtype, result: torch.dtype) -> Tensor:
        ctx.dtype = value.dtype
        limits = torch.finfo(stored)
        return value.detach().clamp(-limits.max, limits.max).to(stored).to(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].to(ctx.dtype), None, None


def round_to_stored(value: Tensor, stored: torch.dtype, result: torch.dtype = torch.float32) -> Tensor:
    """``value`` rounded to ``stored`` and given as ``result``; its gradient passes as if nothing were rounded."""
    return _Round.apply(value, stored, result)  # type: ignore[no-untyped-call]


class StoredRounding(nn.Module):
    """:func:`round_to_stored` as a parametrization (``torch.nn.utils.parametrize``) of a parameter in float32."""

    def __init__(self, stored: torch.dtype, result: torch.dtype) -> None:
        super().__init__()
        self.stored, self.result = stored, result

    def forward(self, value: Tensor) -> Tensor:
        """Return the rounded value."""
        return round_to_stored(value, self.stored, self.result)
