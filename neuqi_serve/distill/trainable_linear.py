"""A packed linear layer whose scales, zero-points and bias are trained; its codes stay as they are.

No weight in floating point outlives a call: forward and backward make it anew from the codes, some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from neuqi_kernels import layout
from neuqi_serve.config import WeightSpec
from neuqi_serve.distill.stored_rounding import round_to_stored
from neuqi_serve.quant.quantize import PackedWeight

# Weights that are de-quantized at a time: 64 MiB in float32.
CHUNK_WEIGHTS = 1 << 24


class AffineProduct(torch.autograd.Function):
    """``y = x·Ŵᵀ`` with ``ŵ = (q − z)·s``, and the exact gradients of x, s and z.

    With ``dW = dyᵀx``: ``ds = Σ_g dW∘(q − z)`` and ``dz = −s·Σ_g dW``, sums over each group. Saved for the backward
    pass are x and the packed tensors; ``chunk`` weights are de-quantized at a time.

    Reference: arXiv:2505.17595 §3.4 and App. D.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bits: int, chunk: int
    ) -> Tensor:
        """``x`` ``[..., K]``, ``qweight`` int32 ``[N, K·b/32]``, ``scale``, ``zero`` float32 ``[N, G]``."""
        ctx.save_for_backward(x, qweight, scale, zero)
        ctx.bits, ctx.chunk = bits, chunk
        parts = [
            linear(x, _weight(qweight[rows], scale[rows], zero[rows], bits).flatten(1).to(x.dtype))
            for rows in _row_chunks(scale, x.shape[-1], chunk)
        ]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Gradients of x, scale and zero."""
        x, qweight, scale, zero = ctx.saved_tensors
        wants_x, _, wants_scale, wants_zero, *_ = ctx.needs_input_grad
        outer = gradients[0].reshape(-1, len(scale))
        inner = x.reshape(-1, x.shape[-1])
        dx = torch.zeros_like(inner) if wants_x else None
        dscale, dzero = torch.empty_like(scale), torch.empty_like(zero)
        for rows in _row_chunks(scale, x.shape[-1], ctx.chunk):
            part = outer[:, rows]
            steps = _centred(qweight[rows], zero[rows], ctx.bits)
            if dx is not None:
                weight = steps * scale[rows].unsqueeze(-1)
                dx.addmm_(part, weight.flatten(1).to(part.dtype))
            if wants_scale or wants_zero:
                dweight = (part.T @ inner).float().view_as(steps)
                dscale[rows] = (dweight * steps).sum(-1)
                dzero[rows] = dweight.sum(-1).mul_(-scale[rows])
        return (
            None if dx is None else dx.view_as(x),
            None,
            dscale if wants_scale else None,
            dzero if wants_zero else None,
            None,
            None,
        )


def _row_chunks(scale: Tensor, columns: int, chunk: int) -> list[slice]:
    rows = max(1, chunk // columns)
    return [slice(start, min(start + rows, len(scale))) for start in range(0, len(scale), rows)]


def _centred(qweight: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``q − z`` as float32 ``[N, G, g]``."""
    codes = layout.unpack(qweight, bits).view(*zero.shape, -1)
    return codes.float() - zero.unsqueeze(-1)


def _weight(qweight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return _centred(qweight, zero, bits).mul_(scale.unsqueeze(-1))


class TrainableLinear(nn.Module):
    """``y = x·Ŵᵀ + bias`` with frozen codes.

    Parameters, float32: ``factor`` ``[N, G]``, by which the packed scales are multiplied, so that a learning rate means
    a relative change; ``zero`` ``[N, G]`` in code units; ``bias`` ``[N]``, if there is one. Each is used as it will be
    stored: ``stored`` gives the values to write.

    ``packed``: the tensors to start from. ``dtype``: of the product. ``bias_dtype``: in which the bias is stored.
    """

    qweight: Tensor
    start: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: PackedWeight,
        spec: WeightSpec,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        bias_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec, self.dtype, self.bias_dtype = spec, dtype, bias_dtype
        self.storage = packed.scale.dtype
        self.out_features = len(packed.scale)
        self.in_features = packed.qweight.shape[1] * 32 // spec.bits
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("start", packed.scale.float())
        self.factor = nn.Parameter(torch.ones_like(self.start))
        self.zero = nn.Parameter(packed.zero.float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Scales and zero-points float32 ``[N, G]``, with the values that their storage type has."""
        smallest = torch.finfo(self.storage).tiny
        scale = round_to_stored((self.start * self.factor).clamp(min=smallest), self.storage)
        return scale, round_to_stored(self.zero, self.storage)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product ``[..., N]`` for ``x`` ``[..., K]``."""
        scale, zero = self.scale_and_zero()
        y: Tensor = AffineProduct.apply(  # type: ignore[no-untyped-call]
            x.to(self.dtype), self.qweight, scale, zero, self.spec.bits, CHUNK_WEIGHTS
        )
        return y if self.bias is None else y + round_to_stored(self.bias, self.bias_dtype, self.dtype)

    @torch.no_grad()
    def stored(self) -> PackedWeight:
        """The packed weight as it is now: the codes it began with, scales and zero-points in their storage type."""
        scale, zero = self.scale_and_zero()
        return PackedWeight(self.qweight, scale.to(self.storage), zero.to(self.storage))

    def extra_repr(self) -> str:
        """Return what a printed model shows of the layer."""
        return f"{self.in_features}, {self.out_features}, bits={self.spec.bits}, group_size={self.spec.group_size}"
