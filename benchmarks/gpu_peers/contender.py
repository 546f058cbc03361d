"""What a contender is: a kernel bound to copies of one layer's weights."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpu_peers.layer import DTYPE, Case, Layer

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A kernel on copies of the weights of ``layer``, of ``layer_bytes`` each.

    ``layer`` is what the kernel really runs: with integer zero-points where it knows no others. ``tolerance``: the
    largest rel-L2 against float64 with which its result counts as right. ``dtype``: of the activations it is given.
    """

    copies: Sequence[Product]
    layer_bytes: int
    layer: Layer
    tolerance: float
    dtype: torch.dtype = DTYPE

    def error(self, x: Tensor) -> float:
        """rel-L2 of the product with ``x [M, K]`` against float64."""
        return self.layer.error(self.copies[0](x), x)


class Peer(Protocol):
    """A kernel to compare with."""

    name: str

    def refuse(self, case: Case) -> str | None:
        """Return why this peer cannot run the layer here, or None when it can."""

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        """Bring the weights into the peer's layout, in so many copies that they fill ``rotated_bytes``."""


def copy_count(layer_bytes: int, rotated_bytes: int) -> int:
    """Copies that fill ``rotated_bytes``: two at least, so that no call finds its own weights in the cache."""
    return max(2, math.ceil(rotated_bytes / layer_bytes))


def copies_of(
    layer: Layer,
    tensors: Sequence[Tensor],
    product: Callable[..., Tensor],
    rotated_bytes: int,
    tolerance: float,
    dtype: torch.dtype = DTYPE,
) -> Contender:
    """Bind ``product(x, *tensors)`` to copies of the tensors."""
    layer_bytes = sum(tensor.nbytes for tensor in tensors)
    bound: list[Product] = []
    for index in range(copy_count(layer_bytes, rotated_bytes)):
        # clone() keeps the strides: some layouts are column-major.
        copy = [tensor if index == 0 else tensor.clone() for tensor in tensors]
        bound.append(lambda x, copy=copy: product(x, *copy))
    return Contender(bound, layer_bytes, layer, tolerance, dtype)


@functools.cache
def needs(*modules: str) -> str | None:
    """Why the first of the modules that does not import fails, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        # A compiled package fails in ways of its own: a missing library, a symbol, a driver.
        except Exception as error:
            return f"{module} does not import: {type(error).__name__}: {error}"
    return None


def capability() -> tuple[int, int]:
    """Compute capability of the GPU, (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
