"""Backends for the products of a mixture of experts, and the choice between them."""

from __future__ import annotations

from typing import Protocol

import torch

from neuqi_kernels import moe_reference
from neuqi_kernels.backend import Prepared
from neuqi_kernels.backend_table import BackendTable
from neuqi_kernels.env import forced_backend
from neuqi_kernels.spec import GemmSpec


class MoeBackend(Protocol):
    """A kernel for the products of all experts of a layer; the specification is that of one expert."""

    name: str

    def refuse(self, spec: GemmSpec) -> str | None:
        """Return why this backend cannot run such experts, or None when it can."""

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return three tensors in the backend's layout, from canonical ``[E, N, …]``, which they may alias."""

    def block_size(self, spec: GemmSpec, experts: int, tokens: int, top_k: int) -> int:
        """Return the block size for which the routes of ``tokens`` tokens must be sorted."""

    def moe_gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        sorted_token_ids: torch.Tensor,
        expert_ids: torch.Tensor,
        num_tokens_post_padded: torch.Tensor,
        n: int,
        top_k: int,
        block_size: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``y [tokens·top_k, n]``, see ``moe_reference.moe_gemm``, from prepared tensors."""


class ReferenceMoe:
    """The definition itself, on any device."""

    name = "reference"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Take everything."""
        return None

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Keep the canonical layout."""
        return qweight, scale, zero

    def block_size(self, spec: GemmSpec, experts: int, tokens: int, top_k: int) -> int:
        """Any size will do."""
        return 16

    def moe_gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        sorted_token_ids: torch.Tensor,
        expert_ids: torch.Tensor,
        num_tokens_post_padded: torch.Tensor,
        n: int,
        top_k: int,
        block_size: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``moe_reference.moe_gemm``."""
        return moe_reference.moe_gemm(
            x,
            qweight,
            scale,
            zero,
            bias,
            topk_weights,
            sorted_token_ids,
            expert_ids,
            num_tokens_post_padded,
            top_k,
            block_size,
            bits,
            group_size,
        )


REFERENCE = ReferenceMoe()


_TABLE: BackendTable[MoeBackend] = BackendTable(
    (("triton", "neuqi_kernels.gpu.moe_backend", "TRITON_MOE"),), REFERENCE, "a backend for experts"
)


def find(name: str) -> MoeBackend | str:
    """Return the backend called ``name``, or the reason why its module does not import.

    Raises:
        ValueError: no backend has this name.
    """
    return _TABLE.find(name)


def choose(spec: GemmSpec) -> MoeBackend:
    """Return the first backend that takes such experts, or the one that ``NEUQI_KERNEL_BACKEND`` names.

    Raises:
        ValueError: the named backend does not exist for experts or refuses them.
    """
    wanted = forced_backend()
    for name in (wanted,) if wanted else _TABLE.names:
        backend = find(name)
        reason = backend if isinstance(backend, str) else backend.refuse(spec)
        if not isinstance(backend, str) and reason is None:
            return backend
        if wanted:
            raise ValueError(
                f"expected the backend {wanted!r} to run experts of {spec}, it refuses: {reason}. "
                "Unset NEUQI_KERNEL_BACKEND to let the first suitable one run."
            )
    raise AssertionError("the reference backend takes every layer")
