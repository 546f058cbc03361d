"""A transformers model whose block linears hold de-quantized weights: what a quantizer does to a model's answers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.config import DEFAULT_SKIP, WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import is_name_of
from neuqi_serve.quant.affine import QuantizedWeight, dequantize
from neuqi_serve.quant.quantize import quantize_weight

# (weight, spec), and importance=… where there is one.
Quantizer = Callable[..., QuantizedWeight]

_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class QuantizedCopy:
    """``model``: the copy. ``layers``: names of the replaced linear layers.

    ``unfit``: name → reason, of block linears left alone because the group size does not divide their rows.
    ``bits_per_weight``: stored bits of the replaced weights, scale and zero-point included, per weight.
    """

    model: Any
    layers: tuple[str, ...]
    unfit: Mapping[str, str]
    bits_per_weight: float


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of the decoder blocks by name, without the routers and without head and embeddings.

    Raises:
        UnsupportedModelError: there is none, or a block holds stacked expert weights, which are no linear layers.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and _IN_A_BLOCK.search(name)
        and not any(is_name_of(skipped, name) for skipped in DEFAULT_SKIP)
    }
    stacked = [
        name for name, value in model.named_parameters() if value.dim() > 2 and _IN_A_BLOCK.search(name)
    ]
    if stacked or not found:
        raise UnsupportedModelError(
            "expected decoder blocks made of linear layers, got "
            + (f"stacked weights such as {stacked[0]}" if stacked else f"none in {type(model).__name__}")
            + ". Use a dense causal language model such as Llama or Qwen."
        )
    return found


# The mode belongs to the calling thread, while solvers work in several: their tensors must be ordinary ones.
@torch.inference_mode(False)
@torch.no_grad()
def quantized_copy(
    model: Any,
    spec: WeightSpec,
    quantize: Quantizer = quantize_weight,
    importance: Mapping[str, Tensor] | None = None,
) -> QuantizedCopy:
    """Copy a model with each block linear's weight replaced by ``(q − zero)·scale``, in the weight's own dtype.

    ``importance``: layer → h ``[K]``, handed to ``quantize`` for the layers that have one. Layers whose rows the group
    size does not divide keep their weights, as in a packed checkpoint. The copy shares every tensor that is not
    replaced with the original, which stays as it was.

    Raises:
        UnsupportedModelError: no linear layers to quantize, or stacked expert weights.
        UsageError: the group size divides the rows of no layer.
    """
    linears, unfit = _fitting(block_linears(model), spec)
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    stored_bits = weights = 0.0
    for name, linear in linears.items():
        weighted = {} if importance is None else {"importance": importance.get(name)}
        values = dequantize(quantize(linear.weight.detach(), spec, **weighted), linear.weight.dtype)
        twin.get_submodule(name).weight = nn.Parameter(values, requires_grad=False)
        stored_bits += spec.bits_per_weight(linear.in_features) * linear.weight.numel()
        weights += linear.weight.numel()
    return QuantizedCopy(twin, tuple(linears), unfit, stored_bits / weights)


def _fitting(
    linears: Mapping[str, nn.Linear], spec: WeightSpec
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    unfit: dict[str, str] = {}
    for name, linear in linears.items():
        try:
            spec.groups(linear.in_features)
        except UsageError as error:
            unfit[name] = str(error)
    if len(unfit) == len(linears):
        raise UsageError(next(iter(unfit.values())))
    return {name: linear for name, linear in linears.items() if name not in unfit}, unfit
