"""What runs a layer of experts: one operator on CPUs, two grouped products on GPUs."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from neuqi_kernels import experts, moe
from neuqi_kernels.backend import Prepared
from neuqi_kernels.env import forced_backend
from neuqi_kernels.experts import ExpertsBackend, ExpertsSpec
from neuqi_kernels.moe import MoeBackend
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.errors import UnsupportedModelError
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
        UnsupportedModelError: no kernel of the GPU takes them.
        ValueError: no backend takes them, or the one that ``NEUQI_KERNEL_BACKEND`` names refuses.
    """
    if spec.first.device_type == "cpu":
        return OperatorRun(experts.choose(spec), spec)
    for product in (spec.first, spec.second):
        if moe.choose(product) is moe.REFERENCE and forced_backend() is None:
            triton = moe.find("triton")
            reason = triton if isinstance(triton, str) else triton.refuse(product)
            # The definition waits for the device, which a CUDA graph cannot hold, and takes seconds for a step.
            raise UnsupportedModelError(
                f"expected experts that the GPU's kernels take, they refuse {product.bits} bits in groups of "
                f"{product.group_size}: {reason}. Choose other bits for the experts, or leave them unquantized: "
                '"modules_to_not_convert": ["experts", …].'
            )
    if moe.choose(spec.first) is moe.REFERENCE:
        return OperatorRun(experts.REFERENCE, spec)
    return GroupedRun(moe.choose(spec.first), spec)


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
        first, second = _weights(layer)
        if torch.compiler.is_compiling():
            return torch.ops.neuqi.experts(
                x, *first, *second, None, None, topk_weights, topk_ids, *self._options, self.name
            )
        # Past torch's dispatcher.
        return self._backend.run(x, first, second, None, None, topk_weights, topk_ids, *self._options)


class GroupedRun:
    """Two grouped products on routes that vLLM sorts on the device, with vLLM's activation between."""

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
        from neuqi_kernels.gpu import grouped_experts

        def align(ids: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return compat.align_routes(ids, block, layer.global_num_experts, layer.expert_map)

        def activate(hidden: torch.Tensor, pairs: torch.Tensor) -> None:
            compat.apply_activation(layer, hidden, pairs)

        first, second = _weights(layer)
        return grouped_experts.run(
            self._backend, self._spec, x, first, second, topk_weights, topk_ids, align, activate
        )


def _weights(layer: Any) -> tuple[Prepared, Prepared]:
    """The prepared tensors of both stacks, past a module's attribute search."""
    held = layer._parameters
    return (
        (held["w13_qweight"], held["w13_scale"], held["w13_zero"]),
        (held["w2_qweight"], held["w2_scale"], held["w2_zero"]),
    )
