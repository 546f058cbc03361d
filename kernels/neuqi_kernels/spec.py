"""What a backend must know of a layer to take it or to refuse it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmSpec:
    """One packed layer: ``n`` output and ``k`` input features, ``bits``, ``group_size`` (−1: the whole row).

    ``device_type``: ``"cpu"`` or ``"cuda"``. ``dtype``: of the activations. ``scale_dtype``: of scale and zero-point
    in the canonical layout.
    """

    n: int
    k: int
    bits: int
    group_size: int
    device_type: str
    dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float16

    @property
    def group(self) -> int:
        """Input features per group, as a positive number."""
        return self.k if self.group_size == -1 else self.group_size

    @property
    def groups(self) -> int:
        """Number of groups G in a row."""
        return self.k // self.group
