"""Quantize a Llama block by block under the Hessians of its inputs, with any initialisation; in memory.

The plain form of the calibrated pipeline, for models that fit: stages of layers with one input are calibrated on the
block as it is by then, and the quantized block makes the inputs of the next one. Scales are as stored throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.affine import QuantizedWeight, dequantize
from neuqi_serve.quant.hessian import HessianSum, damped
from neuqi_serve.quant.ldlq import round_ldlq
from neuqi_serve.quant.refit import refit
from neuqi_serve.quant.rotation import random_rotation
from quality_peers.initialisations import INITIALISATIONS

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """``initialisation``: a name of ``INITIALISATIONS``. ``ldlq``: rounding with feedback; ``refit``: of scales and
    zero-points afterwards; ``rounds``: how often the two alternate; ``rotate``: the basis of the hidden states first.
    """

    initialisation: str = "neuqi"
    ldlq: bool = False
    refit: bool = False
    rounds: int = 1
    rotate: bool = False


class _Stop(Exception):
    pass


@torch.no_grad()
def quantize_blocks(
    model: Any, windows: Tensor, spec: WeightSpec, recipe: Recipe
) -> tuple[Any, dict[str, QuantizedWeight]]:
    """A copy of a transformers Llama with de-quantized weights, and what is stored of each layer that fits the spec.

    ``windows`` int64 ``[S, T]``: the calibration text.
    """
    twin = copy.deepcopy(model)
    if recipe.rotate:
        rotate(twin)
    batches = windows.split(BATCH)
    hidden, call = _inputs_of_blocks(twin, batches)
    found: dict[str, QuantizedWeight] = {}
    for number, block in enumerate(twin.model.layers):
        for stage in STAGES:
            layers = {name: block.get_submodule(name) for name in stage}
            first = next(iter(layers.values()))
            if not _fits(first.in_features, spec):
                continue
            hessian = damped(_hessian(block, first, hidden, call))
            for name, layer in layers.items():
                stored = _quantized(layer.weight.detach().float(), spec, hessian, recipe)
                layer.weight = nn.Parameter(dequantize(stored), requires_grad=False)
                found[f"model.layers.{number}.{name}"] = stored
        hidden = [_run(block, one, call) for one in hidden]
    return twin, found


def _fits(columns: int, spec: WeightSpec) -> bool:
    return columns % 32 == 0 and (spec.group_size == -1 or columns % spec.group_size == 0)


def _quantized(weight: Tensor, spec: WeightSpec, hessian: Tensor, recipe: Recipe) -> QuantizedWeight:
    found = INITIALISATIONS[recipe.initialisation](weight, spec, hessian.diagonal().float())
    for _ in range(recipe.rounds if recipe.ldlq else 0):
        codes = round_ldlq(weight, found.scale, found.zero, hessian, spec.bits, spec.group_size)
        found = QuantizedWeight(codes, found.scale, found.zero)
        if recipe.refit:
            params = refit(weight, found, hessian)
            found = QuantizedWeight(codes, params.scale, params.zero)
    return found


def _inputs_of_blocks(model: Any, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    hidden: list[Tensor] = []
    call: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        # All batches but the last have one shape, and masks and positions broadcast over the rows.
        call.update({name: value for name, value in kwargs.items() if name != "past_key_values"})
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            with _stopped():
                model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()
    return hidden, call


def _run(block: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    result = block(hidden, **call)
    return result[0] if isinstance(result, tuple) else result


def _hessian(block: nn.Module, layer: nn.Linear, hidden: Sequence[Tensor], call: dict[str, Any]) -> Tensor:
    total = HessianSum(layer.in_features)

    def add(_: nn.Module, args: tuple[Any, ...]) -> None:
        total.add(args[0])
        raise _Stop

    handle = layer.register_forward_pre_hook(add)
    try:
        for one in hidden:
            with _stopped():
                _run(block, one, call)
    finally:
        handle.remove()
    return total.total / total.tokens


@contextmanager
def _stopped() -> Iterator[None]:
    with suppress(_Stop):
        yield


@torch.no_grad()
def rotate(model: Any, seed: int = 0) -> None:
    """Turn the hidden states of a Llama, and the values of its heads, by random Hadamard matrices, in place.

    Norms are folded into the layers behind them, so that the model computes the same. Reference: arXiv:2404.00456.
    """
    config = model.config
    turn = random_rotation(config.hidden_size, seed)
    heads = random_rotation(config.head_dim, seed + 1)

    def replace(layer: Any, weight: Tensor) -> None:
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)

    head = model.lm_head.weight.double() * model.model.norm.weight.double()
    replace(model.model.embed_tokens, model.model.embed_tokens.weight.double() @ turn)
    replace(model.lm_head, head @ turn)
    model.model.norm.weight.fill_(1.0)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, layers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for layer in layers:
                replace(layer, (layer.weight.double() * norm.weight.double()) @ turn)
            norm.weight.fill_(1.0)
        values = attention.v_proj.weight.double().view(-1, config.head_dim, config.hidden_size)
        replace(attention.v_proj, (heads.T @ values).reshape(attention.v_proj.weight.shape))
        outward = attention.o_proj.weight.double()
        turned = (outward.view(len(outward), -1, config.head_dim) @ heads).view_as(outward)
        replace(attention.o_proj, turn.T @ turned)
        replace(mlp.down_proj, turn.T @ mlp.down_proj.weight.double())
