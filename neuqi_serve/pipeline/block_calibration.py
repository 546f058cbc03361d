"""One decoder block, quantized stage by stage under the Hessians of what its layers read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuqi_kernels import layout
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import NeuqiError, UsageError
from neuqi_serve.pipeline.block_model import BlockCall
from neuqi_serve.pipeline.experts import StackedExperts
from neuqi_serve.pipeline.layer_inputs import (
    ExpertStage,
    LinearStage,
    Stage,
    expert_hessians,
    find_stages,
    inputs_of,
)
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.calibrated import LayerHessian, RoundingRecipe, quantize_calibrated
from neuqi_serve.quant.hessian import HessianSum
from neuqi_serve.quant.quantize import PackedWeight


@dataclass
class States:
    """Hidden states ``[B, T, D]`` of each batch in front of a block: of the model quantized so far, and, where the
    recipe asks for them, of the original model. They lie in the memory of the CPU.
    """

    quantized: list[Tensor]
    original: list[Tensor] | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Both under names, for a file."""
        named = {f"quantized.{i}": state for i, state in enumerate(self.quantized)}
        return named | {f"original.{i}": state for i, state in enumerate(self.original or ())}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> States:
        """What :meth:`to_tensors` gave."""
        parts: dict[str, list[Tensor]] = {}
        for kind in ("quantized", "original"):
            count = sum(name.startswith(f"{kind}.") for name in tensors)
            parts[kind] = [tensors[f"{kind}.{i}"] for i in range(count)]
        return cls(parts["quantized"], parts["original"] or None)


class BlockCalibration:
    """A block with its weights, to be quantized.

    ``linears`` and ``experts``: the layers that may be quantized, by their names in the checkpoint; ``spec_of`` says
    how, or None to leave one. ``calls``: for each batch, how transformers calls the block. ``correction``: share from 0
    to 1 of the difference between the original and the quantized model's inputs that a layer makes up for.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        experts: Sequence[StackedExperts],
        calls: Sequence[BlockCall],
        spec_of: Callable[[str], WeightSpec | None],
        recipe: RoundingRecipe,
        correction: float = 0.0,
    ) -> None:
        self._block, self._experts, self._calls = block, experts, calls
        self._linears = {name: layer for name, layer in linears.items() if spec_of(name) is not None}
        self._spec_of, self._recipe, self._correction = spec_of, recipe, correction
        self._device = next(block.parameters()).device
        self.packed: dict[str, PackedWeight] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, states: States) -> States:
        """Quantize every layer; return the states behind the block. ``packed`` then holds name → packed weight."""
        stages = find_stages(
            self._block, self._linears, self._experts, self._calls[0], states.quantized[0].to(self._device)
        )
        original = copy.deepcopy(self._block) if states.original is not None else None
        for stage in stages:
            if isinstance(stage, ExpertStage):
                self._quantize_experts(stage, states)
            else:
                self._quantize_linears(stage, states, original)
        following = self._forward(self._block, states.quantized)
        if original is None or states.original is None:
            return States(following)
        return States(following, self._forward(original, states.original))

    def _forward(self, block: nn.Module, states: Sequence[Tensor]) -> list[Tensor]:
        return [
            call.run(block, state.to(self._device)).cpu()
            for call, state in zip(self._calls, states, strict=True)
        ]

    def _inputs(
        self, stage: Stage, block: nn.Module, states: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, ...]]:
        for call, state in zip(self._calls, states, strict=True):
            yield inputs_of(stage, block, call, state.to(self._device))

    def _quantize_linears(self, stage: LinearStage, states: States, original: nn.Module | None) -> None:
        first = next(iter(stage.layers.values()))
        total = HessianSum(first.in_features, self._device)
        missed = torch.zeros_like(total.total)
        others: Iterator[tuple[Tensor, ...]] | None = None
        if original is not None and states.original is not None and self._correction > 0:
            others = self._inputs(self._twin(stage, original), original, states.original)
        for args in self._inputs(stage, self._block, states.quantized):
            total.add(args[0])
            if others is not None:
                missed += _product(next(others)[0] - args[0], args[0])
        hessian = self._prepared(stage.layers, total.mean())
        change = None
        if others is not None:
            # W x should come out of the inputs x̂: W + W·D·H⁻¹ does that best, with D the mean of (x − x̂) x̂ᵀ.
            right = missed / max(1, total.tokens)
            change = torch.linalg.solve(hessian.matrix, right.T).T * self._correction
        for name, layer in stage.layers.items():
            layer.weight.data.copy_(self._quantized(name, layer.weight, hessian, change))

    def _twin(self, stage: LinearStage, original: nn.Module) -> LinearStage:
        """The stage in a copy of the block."""
        paths = {id(module): path for path, module in self._block.named_modules()}
        layers = {name: original.get_submodule(paths[id(layer)]) for name, layer in stage.layers.items()}
        return LinearStage({name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)})

    def _quantize_experts(self, stage: ExpertStage, states: States) -> None:
        hessians = expert_hessians(stage, self._inputs(stage, self._block, states.quantized))
        for number, matrix in hessians.items():
            names = stage.experts.names[number]
            chosen = names[2:] if stage.after else names[:2]
            weights = stage.experts.slices(number)
            hessian = self._prepared(chosen, matrix)
            for name in chosen:
                if self._spec_of(name) is not None:
                    weights[name].copy_(self._quantized(name, weights[name], hessian, None))

    def _prepared(self, names: Mapping[str, object] | Sequence[str], matrix: Tensor) -> LayerHessian:
        try:
            return LayerHessian(matrix, self._recipe.damping)
        except UsageError as error:
            raise UsageError(f"inputs of {next(iter(names))}: {error}") from None

    def _quantized(self, name: str, weight: Tensor, hessian: LayerHessian, change: Tensor | None) -> Tensor:
        """Keep the packed form of a weight; return its new values."""
        spec = self._spec_of(name)
        assert spec is not None
        target = weight.detach().float()
        if change is not None:
            target = target + (target.double() @ change).float()
        try:
            found = quantize_calibrated(target, spec, hessian, self._recipe)
        except NeuqiError as error:
            raise type(error)(f"{name}: {error}") from error
        self.packed[name] = PackedWeight(layout.pack(found.codes, spec.bits), found.scale, found.zero)
        return dequantize(found, weight.dtype)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """``firstᵀ second`` over all tokens, float64 ``[K, K]``."""
    left, right = (one.reshape(-1, one.shape[-1]).float() for one in (first, second))
    return (left.T @ right).double()
