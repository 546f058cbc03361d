"""What a kernel backend is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from neuqi_kernels import reference
from neuqi_kernels.spec import GemmSpec

Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Backend(Protocol):
    """A kernel: says whether it takes a layer, brings the weights into its own layout, and multiplies."""

    name: str

    def refuse(self, spec: GemmSpec) -> str | None:
        """Return why this backend cannot run the layer, or None when it can."""

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return three tensors in the backend's layout, made from the canonical ones (which they may alias)."""

    def gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``x·Ŵᵀ + bias`` as ``[..., n]`` in the dtype of ``x [..., K]``, from prepared tensors."""

    def embedding(
        self,
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the rows ``ids [...]`` (int64, below ``n``) of prepared ``Ŵ`` as ``[..., k]`` in ``dtype``."""

    def dequantize(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> torch.Tensor:
        """Return ``Ŵ [N, K]`` in float32, from prepared tensors."""


@runtime_checkable
class CompilesWhenRun(Protocol):
    """A backend whose kernels are compiled at their first call, which must not happen while a graph is captured."""

    def warm_up(self, prepared: Prepared, spec: GemmSpec, has_bias: bool) -> None:
        """Compile what ``gemm`` can run for the layer, for any number of tokens; once per kind of layer."""


class ReferenceBackend:
    """The definition itself, on any device: correct, and as slow as building the whole matrix each time is."""

    name = "reference"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Take everything."""
        return None

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Keep the canonical layout."""
        return qweight, scale, zero

    def gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``reference.gemm``."""
        return reference.gemm(x, qweight, scale, zero, bias, bits, group_size)

    def embedding(
        self,
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return ``reference.embedding``."""
        return reference.embedding(ids, qweight, scale, zero, bits, group_size, dtype)

    def dequantize(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> torch.Tensor:
        """Return ``reference.dequantize``."""
        return reference.dequantize(qweight, scale, zero, spec.bits, spec.group_size)


REFERENCE = ReferenceBackend()
