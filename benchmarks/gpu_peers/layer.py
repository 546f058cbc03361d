"""The layer that all contenders multiply with, and what it should give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuqi_kernels.spec import GemmSpec

SAMPLED_ROWS = 97
# Activations and results: what the models of today compute in.
DTYPE = torch.bfloat16
DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    """A layer of N by K, its format and the number of tokens."""

    n: int
    k: int
    bits: int
    group_size: int
    tokens: int = 0

    @property
    def spec(self) -> GemmSpec:
        return GemmSpec(self.n, self.k, self.bits, self.group_size, "cuda", DTYPE)

    def record(self, contender: str) -> dict[str, str | int | float | bool]:
        fields = {"n": self.n, "k": self.k, "bits": self.bits, "group_size": self.group_size}
        return {"contender": contender, **fields, "tokens": self.tokens}

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else self.group_size
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        return f"{self.n}x{self.k}, {self.bits} bits, group {group}{tokens}"


@dataclass(frozen=True)
class Layer:
    """``codes [N, K]`` uint8 and ``scale, zero [N, G]`` float16 of a layer of ``bits`` bits."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @staticmethod
    def random(case: Case, device: str | None = None) -> Layer:
        """Random codes, and real zero-points all over the range of the codes."""
        device = device or DEVICE
        generator = torch.Generator(device).manual_seed(0)
        size = (case.n, case.spec.groups)
        codes = torch.randint(
            0, 1 << case.bits, (case.n, case.k), dtype=torch.uint8, generator=generator, device=device
        )
        scale = torch.rand(size, generator=generator, device=device) * 0.02 + 0.01
        zero = torch.rand(size, generator=generator, device=device) * (1 << case.bits)
        return Layer(codes, scale.half(), zero.half(), case.bits)

    @property
    def group(self) -> int:
        """Input features per group."""
        return self.codes.shape[1] // self.scale.shape[1]

    def with_integer_zeros(self) -> Layer:
        """The layer that a kernel for integer zero-points can run instead: each rounded to a code."""
        return replace(self, zero=self.zero.round().clamp(0, (1 << self.bits) - 1))

    def weight(self, rows: Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        """``(q − zero)·scale`` of some output features, computed in ``dtype``."""
        codes = self.codes[rows].to(dtype)
        grouped = codes.view(len(codes), -1, self.group) - self.zero[rows].to(dtype).unsqueeze(-1)
        return (grouped * self.scale[rows].to(dtype).unsqueeze(-1)).view(codes.shape)

    def error(self, y: Tensor, x: Tensor) -> float:
        """rel-L2 of a sample of output features of ``y [M, N]``, the product of ``x [M, K]``, against float64."""
        rows = torch.randperm(len(self.codes), generator=torch.Generator().manual_seed(1))[:SAMPLED_ROWS]
        rows = rows.to(self.codes.device)
        expected = x.double() @ self.weight(rows).t()
        return float((y[:, rows].double() - expected).norm() / expected.norm())
