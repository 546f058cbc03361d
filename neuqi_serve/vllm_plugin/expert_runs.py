"""What runs a layer of experts: one operator on CPUs, two grouped products on GPUs."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from neuqi_kernels import experts, moe
from neuqi_kernels.backend import Prepared
from neuqi_kernels.experts import ExpertsBackend, ExpertsSpec
from neuqi_kernels.moe import MoeBackend
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.vllm_plugin import compat


class ExpertRun(Protocol):
    """Repacks the stacks of a layer, and runs it."""

    name: str

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return three tensors in the kernel's layout, from the canonical ones."""

    def warm_up(self, layer: Any) -> None:
        """Compile what the layer can run; its parameters are in place."""

    def __call__(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return this rank's share of ``y [tokens, H]``; ``topk_ids`` count the experts of all ranks."""


def choose_run(spec: ExpertsSpec) -> ExpertRun:
    """Return what runs such experts on their device.

    Raises:
        ValueError: no backend takes them, or the one that ``NEUQI_KERNEL_BACKEND`` names refuses.
    """
    if spec.first.device_type == "cuda":
        backends = {moe.choose(spec.first), moe.choose(spec.second)}
        if len(backends) == 1 and moe.REFERENCE not in backends:
            return GroupedRun(backends.pop(), spec)
    return OperatorRun(experts.choose(spec), spec)


class OperatorRun:
    """``neuqi::experts``: the whole layer in one call, which torch.compile sees as one operator."""

    def __init__(self, backend: ExpertsBackend, spec: ExpertsSpec) -> None:
        self.name, self._backend = backend.name, backend
        self.prepare = backend.prepare
        first, second = spec.first, spec.second
        self._options = (
            second.k,
            first.bits,
            first.group_size,
            second.bits,
            second.group_size,
            spec.activation,
        )

    def warm_up(self, layer: Any) -> None:
        """Nothing is compiled when it runs."""

    def __call__(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return this rank's share of ``y [tokens, H]``."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.to(torch.int64)]
        held = layer._parameters
        first, second = (
            (held[f"{name}_qweight"], held[f"{name}_scale"], held[f"{name}_zero"]) for name in ("w13", "w2")
        )
        if torch.compiler.is_compiling():
            return torch.ops.neuqi.experts(
                x, *first, *second, None, None, topk_weights, topk_ids, *self._options, self.name
            )
        # Past torch's dispatcher.
        return self._backend.run(x, first, second, None, None, topk_weights, topk_ids, *self._options)


class GroupedRun:
    """``neuqi::moe_gemm`` twice, on routes that vLLM sorts on the device, with vLLM's activation between.

    Nothing waits for the device, so that a CUDA graph can hold it.
    """

    def __init__(self, backend: MoeBackend, spec: ExpertsSpec) -> None:
        self.name, self._backend, self._spec = backend.name, backend, spec
        self.prepare = backend.prepare

    def warm_up(self, layer: Any) -> None:
        """Run the layer once for every kernel that it can run."""
        from neuqi_kernels.gpu.moe_warm_up import warm_up_experts

        def run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
            self(layer, x, topk_weights, topk_ids)

        warm_up_experts(run, self._spec, layer.top_k, layer.w2_qweight.device)

    def __call__(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return this rank's share of ``y [tokens, H]``."""
        spec, (tokens, top_k) = self._spec, topk_ids.shape
        pairs = self._product(layer, "w13", x, None, topk_ids, top_k, spec.first)
        hidden = pairs.new_empty(pairs.shape[0], spec.second.k)
        compat.apply_activation(layer, hidden, pairs)
        parts = self._product(layer, "w2", hidden, topk_weights, topk_ids, 1, spec.second)
        return parts.view(tokens, top_k, -1).sum(1)

    def _product(
        self,
        layer: Any,
        name: str,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
        top_k: int,
        spec: GemmSpec,
    ) -> torch.Tensor:
        held = layer._parameters
        block = self._backend.block_size(spec, self._spec.experts, topk_ids.shape[0], topk_ids.shape[1])
        routes = compat.align_routes(topk_ids, block, layer.global_num_experts, layer.expert_map)
        return self._backend.moe_gemm(
            x,
            held[f"{name}_qweight"],
            held[f"{name}_scale"],
            held[f"{name}_zero"],
            None,
            topk_weights,
            *routes,
            spec.n,
            top_k,
            block,
            spec.bits,
            spec.group_size,
        )
