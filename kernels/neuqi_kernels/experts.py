"""Backends for a whole mixture of experts in one call, and the choice between them.

On GPUs a layer is two launches of ``moe``'s product; on CPUs, where starting threads costs as much as a small product,
it is one parallel region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from neuqi_kernels import experts_reference
from neuqi_kernels.backend import Prepared
from neuqi_kernels.backend_table import BackendTable
from neuqi_kernels.env import forced_backend
from neuqi_kernels.spec import GemmSpec


@dataclass(frozen=True)
class ExpertsSpec:
    """``experts`` experts: ``first`` N = 2·I, K = H, ``second`` N = H, K = I, and vLLM's name of the activation."""

    experts: int
    first: GemmSpec
    second: GemmSpec
    activation: str


class ExpertsBackend(Protocol):
    """A kernel for all experts of a layer."""

    name: str

    def refuse(self, spec: ExpertsSpec) -> str | None:
        """Return why this backend cannot run such experts, or None when it can."""

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return three tensors in the backend's layout, from canonical ``[E, N, …]``, which they may alias."""

    def run(
        self,
        x: torch.Tensor,
        first: Prepared,
        second: Prepared,
        first_bias: torch.Tensor | None,
        second_bias: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        intermediate: int,
        first_bits: int,
        first_group_size: int,
        second_bits: int,
        second_group_size: int,
        activation: str,
    ) -> torch.Tensor:
        """Return ``y [tokens, H]``, see ``experts_reference.experts``, from prepared tensors."""


class ReferenceExperts:
    """The definition itself, on any device."""

    name = "reference"

    def refuse(self, spec: ExpertsSpec) -> str | None:
        """Take every activation that is defined."""
        if spec.activation in experts_reference.ACTIVATIONS:
            return None
        return f"takes the activations {tuple(experts_reference.ACTIVATIONS)}, not {spec.activation!r}"

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Keep the canonical layout."""
        return qweight, scale, zero

    def run(
        self,
        x: torch.Tensor,
        first: Prepared,
        second: Prepared,
        first_bias: torch.Tensor | None,
        second_bias: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        intermediate: int,
        first_bits: int,
        first_group_size: int,
        second_bits: int,
        second_group_size: int,
        activation: str,
    ) -> torch.Tensor:
        """Return ``experts_reference.experts``."""
        return experts_reference.experts(
            x,
            first,
            second,
            first_bias,
            second_bias,
            topk_weights,
            topk_ids,
            first_bits,
            first_group_size,
            second_bits,
            second_group_size,
            activation,
        )


REFERENCE = ReferenceExperts()


_TABLE: BackendTable[ExpertsBackend] = BackendTable(
    (("cpu_native", "neuqi_kernels.cpu.experts", "NATIVE_EXPERTS"),),
    REFERENCE,
    "a backend for a layer of experts",
)


def find(name: str) -> ExpertsBackend | str:
    """Return the backend called ``name``, or the reason why its module does not import.

    Raises:
        ValueError: no backend has this name.
    """
    return _TABLE.find(name)


def choose(spec: ExpertsSpec) -> ExpertsBackend:
    """Return the first backend that takes such experts, or the one that ``NEUQI_KERNEL_BACKEND`` names.

    A forced backend of linear layers that has no form for experts leaves these to the reference.

    Raises:
        ValueError: the named backend refuses such experts, or none takes them.
    """
    wanted = forced_backend()
    names = _TABLE.names
    if wanted is not None:
        names = (wanted if wanted in names else REFERENCE.name,)
    reasons = []
    for name in names:
        backend = find(name)
        reason = backend if isinstance(backend, str) else backend.refuse(spec)
        if not isinstance(backend, str) and reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"expected a backend for experts of {spec}, all refuse: {'; '.join(reasons)}. Serve this model without "
        "--quantization neuqi" + (", or unset NEUQI_KERNEL_BACKEND." if wanted else ".")
    )
