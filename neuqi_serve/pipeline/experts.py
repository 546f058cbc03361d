"""Mixtures of experts in transformers: the weights of all experts of a layer in two stacked parameters.

``gate_up_proj`` ``[E, 2·I, D]`` and ``down_proj`` ``[E, D, I]``, where a checkpoint has three matrices for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.errors import UnsupportedModelError

# (gate, up, down) in a checkpoint.
_SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class StackedExperts:
    """``module``: of transformers. ``names``: for each expert, gate, up and down in the checkpoint."""

    module: Any
    names: tuple[tuple[str, str, str], ...]

    def load(self, read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Put the experts' weights into the module."""
        width = self.module.down_proj.shape[-1]
        both = torch.empty(self.module.gate_up_proj.shape, dtype=dtype, device=device)
        down = torch.empty(self.module.down_proj.shape, dtype=dtype, device=device)
        for number, (gate, up, out) in enumerate(self.names):
            both[number, :width] = read(f"{gate}.weight").to(device, dtype)
            both[number, width:] = read(f"{up}.weight").to(device, dtype)
            down[number] = read(f"{out}.weight").to(device, dtype)
        self.module.gate_up_proj = nn.Parameter(both, requires_grad=False)
        self.module.down_proj = nn.Parameter(down, requires_grad=False)

    def slices(self, expert: int) -> dict[str, Tensor]:
        """Views of an expert's weights by their names in the checkpoint."""
        gate, up, down = self.names[expert]
        width = self.module.down_proj.shape[-1]
        both = self.module.gate_up_proj[expert]
        return {gate: both[:width], up: both[width:], down: self.module.down_proj[expert]}

    def inputs(self, expert: int, hidden: Tensor, chosen: Tensor) -> Tensor:
        """The rows of ``hidden`` ``[T, D]`` that the router sends to an expert; ``chosen`` ``[T, k]``."""
        return hidden[(chosen == expert).any(-1)]

    def middle(self, expert: int, rows: Tensor) -> Tensor:
        """What an expert's last layer reads for these rows ``[t, D]``: ``[t, I]``."""
        gate, up = nn.functional.linear(rows, self.module.gate_up_proj[expert]).chunk(2, -1)
        return self.module.act_fn(gate) * up


def stacked_experts(block: nn.Module, prefix: str, has: Callable[[str], bool]) -> list[StackedExperts]:
    """Find them in a block whose module name is ``prefix``; ``has``: whether the checkpoint has a tensor.

    Raises:
        UnsupportedModelError: stacked weights of a kind that is not known here, or without their tensors.
    """
    found = []
    for path, module in block.named_modules():
        stacked = [name for name, value in module.named_parameters(recurse=False) if value.dim() == 3]
        if not stacked:
            continue
        # Experts with biases, or with gate and up interleaved, have other parameters.
        if sorted(name for name, _ in module.named_parameters(recurse=False)) != [
            "down_proj",
            "gate_up_proj",
        ]:
            raise UnsupportedModelError(
                f"expected experts with gate_up_proj and down_proj in {prefix}.{path}, got {stacked}. "
                "Quantize this model without calibration."
            )
        found.append(StackedExperts(module, _names(f"{prefix}.{path}", module.down_proj.shape[0], has)))
    return found


def _names(prefix: str, count: int, has: Callable[[str], bool]) -> tuple[tuple[str, str, str], ...]:
    for parent in (prefix, re.sub(r"\.mlp\.", ".block_sparse_moe.", prefix)):
        for gate, up, down in _SPELLINGS:
            if has(f"{parent}.0.{gate}.weight"):
                return tuple(
                    (f"{parent}.{i}.{gate}", f"{parent}.{i}.{up}", f"{parent}.{i}.{down}")
                    for i in range(count)
                )
    raise UnsupportedModelError(
        f"expected tensors like {prefix}.0.gate_proj.weight in the checkpoint, got none. "
        "Convert the checkpoint to the Hugging Face layout, an expert a tensor."
    )
