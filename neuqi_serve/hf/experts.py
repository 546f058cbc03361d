"""The experts of a layer as packed matrices: transformers holds them in two stacked tensors, checkpoints one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.config import WeightSpec
from neuqi_serve.hf.layers import PackedLinear

STACKED = ("gate_up_proj", "down_proj")
# Model type → names of gate, up and down in a checkpoint.
_NAMES = {"mixtral": ("w1", "w3", "w2")}
_DEFAULT_NAMES = ("gate_proj", "up_proj", "down_proj")


def matrix_names(model: Any) -> tuple[str, str, str]:
    """Return what checkpoints of this model call the gate, up and down matrices of an expert."""
    return _NAMES.get(str(model.config.model_type), _DEFAULT_NAMES)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as ``gate_up_proj [E, 2·I, H]`` and ``down_proj [E, H, I]``, without biases."""
    stacked = [getattr(module, name, None) for name in STACKED]
    if not all(isinstance(one, nn.Parameter) and one.ndim == 3 for one in stacked):
        return False
    gate_up, down = stacked
    assert gate_up is not None
    assert down is not None
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    concatenated = bool(getattr(module, "is_concatenated", True)) and hasattr(module, "act_fn")
    return plain and concatenated and gate_up.shape[1] == 2 * down.shape[2]


def matrices(module: Any, names: tuple[str, str, str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name within the module (``3.gate_proj``) and shape ``[N, K]`` of every matrix of every expert."""
    experts, hidden, inner = module.down_proj.shape
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    for expert in range(experts):
        for name, shape in zip(names, shapes, strict=True):
            yield f"{expert}.{name}", shape


class PackedExperts(nn.Module):
    """Experts ``0 … E − 1``, each three packed matrices under the names of the checkpoint.

    ``forward(x [T, H], index [T, k], weights [T, k])`` as transformers calls it; an index of E or more is no expert.
    """

    def __init__(self, old: Any, names: tuple[str, str, str], specs: Mapping[str, WeightSpec]) -> None:
        super().__init__()
        self.num_experts = int(old.down_proj.shape[0])
        self.names, self.act_fn = names, old.act_fn
        for expert in range(self.num_experts):
            self.add_module(str(expert), nn.Module())
        for name, (rows, columns) in matrices(old, names):
            self.set_submodule(name, PackedLinear(rows, columns, specs[name], None), strict=False)

    def expect_weight(self, old: Any, dtype: torch.dtype) -> None:
        """Take the two stacked tensors under their names until ``quantize`` has replaced them."""
        for name in STACKED:
            empty = torch.empty(getattr(old, name).shape, dtype=dtype, device=getattr(old, name).device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def expects_weight(self) -> bool:
        """Whether a stacked tensor was expected and has not come yet."""
        return any(name in self._parameters for name in STACKED)

    def quantize(
        self, name: str, stacked: Tensor, importance: Callable[[str, int], Tensor | None], preset: str
    ) -> list[str]:
        """Pack what lies in ``gate_up_proj`` or ``down_proj``; return the names of the matrices.

        ``importance``: name of a matrix and K → h ``[K]`` or None.
        """
        self._parameters.pop(name, None)
        gate, up, down = self.names
        parts = (gate, up) if name == STACKED[0] else (down,)
        packed = []
        for expert in range(self.num_experts):
            for part, weight in zip(parts, stacked[expert].chunk(len(parts)), strict=True):
                matrix = f"{expert}.{part}"
                self._matrix(expert, part).quantize(weight, importance(matrix, weight.shape[1]), preset)
                packed.append(matrix)
        return packed

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts that each token was sent to."""
        result = torch.zeros_like(hidden_states)
        gate, up, down = self.names
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token]
            inner = self.act_fn(self._matrix(expert, gate)(x)) * self._matrix(expert, up)(x)
            y = self._matrix(expert, down)(inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    def _matrix(self, expert: int, name: str) -> PackedLinear:
        matrix = getattr(self._modules[str(expert)], name)
        assert isinstance(matrix, PackedLinear)
        return matrix
