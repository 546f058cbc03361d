"""A whole mixture of experts on a GPU: two grouped products on sorted routes, the activation between, the sum."""

from __future__ import annotations

from collections.abc import Callable

import torch

from neuqi_kernels.backend import Prepared
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.moe import MoeBackend
from neuqi_kernels.spec import GemmSpec

# (topk_ids, block size) → sorted ids, owners of the blocks, number of sorted ids: see moe_reference.align_routes.
Align = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
# (hidden [routes, I], pairs [routes, 2·I]): writes the activation of the pairs.
Activate = Callable[[torch.Tensor, torch.Tensor], None]


def run(
    backend: MoeBackend,
    spec: ExpertsSpec,
    x: torch.Tensor,
    first: Prepared,
    second: Prepared,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    align: Align,
    activate: Activate,
) -> torch.Tensor:
    """Return ``y [tokens, H]``; the slow twin is ``experts_reference.experts``, but for a rounding to the dtype of x.

    Nothing waits for the device, so that a CUDA graph can hold it. ``spec.experts`` are those of this rank;
    ``topk_ids`` may count those of all ranks if ``align`` knows which are here.
    """
    tokens, top_k = topk_ids.shape
    routes: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def product(
        x: torch.Tensor, weights: Prepared, spec_of: GemmSpec, scales: torch.Tensor | None, per_token: int
    ) -> torch.Tensor:
        block = backend.block_size(spec_of, spec.experts, tokens, top_k)
        if block not in routes:
            routes[block] = align(topk_ids, block)
        bits, group_size = spec_of.bits, spec_of.group_size
        return backend.moe_gemm(
            x, *weights, None, scales, *routes[block], spec_of.n, per_token, block, bits, group_size
        )

    pairs = product(x, first, spec.first, None, top_k)
    hidden = pairs.new_empty(pairs.shape[0], spec.second.k)
    activate(hidden, pairs)
    # A row of the second product's input is a route: it has one place.
    parts = product(hidden, second, spec.second, topk_weights, 1)
    return parts.view(tokens, top_k, -1).sum(1)
