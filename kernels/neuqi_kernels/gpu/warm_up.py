"""Compiles, before a CUDA graph is captured or a request waits, every kernel that a layer can run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from neuqi_kernels.backend import Prepared
from neuqi_kernels.env import batch_invariant
from neuqi_kernels.gpu import tuning_table
from neuqi_kernels.gpu.plan import Plan, plan, target_of
from neuqi_kernels.gpu.planar import tile_features
from neuqi_kernels.spec import GemmSpec

# What is compiled already in this process, and the kinds of layers that were looked at.
_compiled: set[Hashable] = set()
_seen: set[Hashable] = set()


def planned(spec: GemmSpec, device: torch.device) -> dict[Plan, int]:
    """Return the compiled forms that a layer can run, each with the smallest number of tokens that it is used for.

    The plan changes between the token buckets of the tuning table and nowhere else; how many parts K has is no matter
    of the compiler.
    """
    target, group = target_of(device), 0 if spec.groups == 1 else spec.group
    bounds = tuning_table.TOKEN_BUCKETS
    tokens = sorted({1, *bounds, *(bound + 1 for bound in bounds)})
    found: dict[Plan, int] = {}
    for m in tokens:
        chosen = plan(target, spec.bits, group, spec.n, spec.k, m, batch_invariant())
        found.setdefault(replace(chosen, split_k=1), m)
    return found


def warm_up(gemm: Callable[..., torch.Tensor], prepared: Prepared, spec: GemmSpec, has_bias: bool) -> None:
    """Run the layer once for every kernel that it can run and that this process has not compiled yet.

    ``gemm`` is the backend's, ``prepared`` its tensors for a layer of ``spec``. Layers of the same kind cost nothing.
    """
    device = prepared[0].device
    signature = (spec, has_bias, device, batch_invariant())
    if signature in _seen:
        return
    # What Triton compiles for beside the plan: dtypes, constants, and whether sizes are multiples of 16.
    shape = (spec.k % tile_features(spec.bits) == 0, spec.n % 16 == 0)
    kind = (spec.bits, spec.group_size, spec.dtype, spec.scale_dtype, has_bias, device, shape)
    bias = torch.zeros(spec.n, dtype=spec.dtype, device=device) if has_bias else None
    for chosen, tokens in planned(spec, device).items():
        if (kind, chosen) in _compiled:
            continue
        x = torch.zeros(tokens, spec.k, dtype=spec.dtype, device=device)
        gemm(x, *prepared, bias, spec.n, spec.bits, spec.group_size)
        _compiled.add((kind, chosen))
    _seen.add(signature)
