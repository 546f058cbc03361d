"""Which linear layers of a block read the same input, in the order in which they run, and the Hessians of these inputs.

Nothing here knows a model family: one pass through the block shows it. Layers that were handed the same tensor form a
stage; an engine fuses such layers, so they must be quantized alike. The experts of a layer form two stages, before and
after their activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuqi_serve.pipeline.block_model import BlockCall
from neuqi_serve.pipeline.experts import StackedExperts
from neuqi_serve.quant.hessian import HessianSum

# Bytes of Hessians held at a time for the experts of a layer.
EXPERT_HESSIAN_BYTES = 4 << 30


@dataclass(frozen=True)
class LinearStage:
    """Linear layers of one input: names in the checkpoint → modules."""

    layers: Mapping[str, nn.Linear]


@dataclass(frozen=True)
class ExpertStage:
    """The layers of some experts on one side of their activation; ``after``: the ones behind it."""

    experts: StackedExperts
    numbers: tuple[int, ...]
    after: bool


Stage = LinearStage | ExpertStage


class _Stop(Exception):
    """Raised by a hook: what follows in the block is not needed."""


def find_stages(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    experts: Sequence[StackedExperts],
    call: BlockCall,
    hidden: Tensor,
) -> list[Stage]:
    """Run a block once and return its stages in the order of execution.

    ``linears``: the layers that count, by their names in the checkpoint. A layer that does not run is in no stage.
    """
    seen: list[tuple[Any, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        # The tensors are kept, so that no two of them can have one address.
        seen.append((module, args[0]))

    modules = [*linears.values(), *(one.module for one in experts)]
    with _hooks(dict.fromkeys(modules, note)):
        call.run(block, hidden)
    names = {id(module): name for name, module in linears.items()}
    stacked = {id(one.module): one for one in experts}
    stages: list[Stage] = []
    groups: list[tuple[Tensor, dict[str, nn.Linear]]] = []
    for module, value in seen:
        mixture = stacked.get(id(module))
        if mixture is not None:
            stages += _expert_stages(mixture)
            continue
        layers = next((layers for first, layers in groups if _same(first, value)), None)
        if layers is None:
            layers = {}
            groups.append((value, layers))
            stages.append(LinearStage(layers))
        layers[names[id(module)]] = module
    return stages


def inputs_of(stage: Stage, block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[Any, ...]:
    """Arguments with which the first module of a stage is called; the rest of the block does not run."""
    module = stage.experts.module if isinstance(stage, ExpertStage) else next(iter(stage.layers.values()))
    caught: list[tuple[Any, ...]] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args)
        raise _Stop

    with _hooks({module: stop}):
        try:
            call.run(block, hidden)
        except _Stop:
            return caught[0]
    raise AssertionError("a stage is made of modules that run")


def expert_hessians(stage: ExpertStage, calls: Iterator[tuple[Any, ...]]) -> dict[int, Tensor]:
    """The Hessian of each expert's input, float64 ``[K, K]``, given what the module was called with.

    An expert that saw few tokens says little about its inputs. So T tokens of its own count beside K tokens' worth of a
    prior, where K is the length of a row: before the activation the prior is the mean over all tokens, wherever the
    router sent them; behind it, where the dimensions of two experts have nothing in common, it is the identity at the
    scale of the expert's own diagonal, or of all experts' where it saw none.
    """
    module = stage.experts.module
    size = module.down_proj.shape[-1] if stage.after else module.gate_up_proj.shape[-1]
    device = module.down_proj.device
    own = {number: HessianSum(size, device) for number in stage.numbers}
    everyone = HessianSum(size, device)
    for args in calls:
        hidden, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
        if not stage.after:
            everyone.add(hidden)
        for number, total in own.items():
            rows = stage.experts.inputs(number, hidden, chosen)
            if len(rows):
                total.add(stage.experts.middle(number, rows) if stage.after else rows)
    return {number: _blended(total, own, everyone, stage.after) for number, total in own.items()}


def _blended(total: HessianSum, own: Mapping[int, HessianSum], everyone: HessianSum, after: bool) -> Tensor:
    size = len(total.total)
    if not after:
        prior = everyone.mean()
    else:
        seen = [total] if total.tokens else list(own.values())
        scale = sum(float(one.total.diagonal().sum()) for one in seen) / max(
            1, sum(one.tokens for one in seen)
        )
        prior = torch.eye(size, dtype=torch.float64, device=total.total.device) * (scale / size)
    return (total.total + size * prior) / (total.tokens + size)


def _expert_stages(experts: StackedExperts) -> list[Stage]:
    stages: list[Stage] = []
    for after, size in (
        (False, experts.module.gate_up_proj.shape[-1]),
        (True, experts.module.down_proj.shape[-1]),
    ):
        at_once = max(1, EXPERT_HESSIAN_BYTES // (8 * size * size))
        numbers = range(len(experts.names))
        stages += [
            ExpertStage(experts, tuple(numbers[start : start + at_once]), after)
            for start in range(0, len(numbers), at_once)
        ]
    return stages


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[[nn.Module, tuple[Any, ...]], None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
