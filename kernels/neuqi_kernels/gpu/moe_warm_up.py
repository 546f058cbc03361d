"""Compiles the kernels of a layer of experts before a CUDA graph is captured or a request waits."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from neuqi_kernels.env import batch_invariant
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.gpu.plan import FEW_ROUTES, Plan, Target, moe_block_size, moe_plan, target_of
from neuqi_kernels.spec import GemmSpec

# Tokens up to which plans are looked for: more change nothing, as blocks have their largest size long before.
MOST_TOKENS = 1 << 15

# Kinds of layers that are compiled already in this process.
_seen: set[Hashable] = set()

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def planned(spec: ExpertsSpec, top_k: int, target: Target) -> dict[tuple[Plan, Plan], int]:
    """Return the pairs of plans that a layer can run, each with the smallest power of two of tokens that runs it."""
    found: dict[tuple[Plan, Plan], int] = {}
    tokens = 1
    while tokens <= MOST_TOKENS:
        plans = (
            _plan(spec.first, spec.experts, tokens, top_k, target),
            _plan(spec.second, spec.experts, tokens, top_k, target),
        )
        found.setdefault(plans, tokens)
        tokens *= 2
    return found


def _plan(spec: GemmSpec, experts: int, tokens: int, top_k: int, target: Target) -> Plan:
    routes = tokens * top_k
    block = moe_block_size(target, spec.bits, routes, experts, batch_invariant())
    few = batch_invariant() or routes <= FEW_ROUTES * experts
    return moe_plan(target, spec.bits, 0 if spec.groups == 1 else spec.group, block, few)


def warm_up_experts(run: Run, spec: ExpertsSpec, top_k: int, device: torch.device) -> None:
    """Run the layer, ``run(x, topk_weights, topk_ids)``, once for every kernel that it can run.

    Layers of the same kind cost nothing. All tokens go to the first experts: which ones is no matter of the compiler.
    """
    signature = (spec, top_k, device, batch_invariant())
    if signature in _seen:
        return
    for tokens in planned(spec, top_k, target_of(device)).values():
        x = torch.zeros(tokens, spec.first.k, dtype=spec.first.dtype, device=device)
        ids = torch.arange(top_k, dtype=torch.int32, device=device).repeat(tokens, 1)
        run(x, torch.ones(tokens, top_k, device=device), ids)
    _seen.add(signature)
