"""What the methods of a mixture of experts share: the stacks, the slice of a rank, the kernel.

vLLM stacks a layer's experts: ``w13`` has the rows of gate and up of each, ``w2`` is down. A checkpoint has each matrix
of each expert by itself, and so has the packed one. Ranks share a layer's experts (expert parallelism), or each has a
slice of every expert: rows of gate and up, whole groups of the inputs of down (tensor parallelism).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from neuqi_kernels import ops
from neuqi_kernels.backend import Prepared
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError
from neuqi_serve.vllm_plugin import compat
from neuqi_serve.vllm_plugin.expert_layer import ExpertLayer, check_layer
from neuqi_serve.vllm_plugin.expert_runs import ExpertRun, choose_run
from neuqi_serve.vllm_plugin.report import LayerRecord

if TYPE_CHECKING:
    from neuqi_serve.vllm_plugin.config import NeuqiConfig

ops.register()

DONE = "_already_called_process_weights_after_loading"
PARTS = ("qweight", "scale", "zero")
# The matrices of an expert by vLLM's names of them, and the stack that each belongs to.
STACK_OF = {"w1": "w13", "w3": "w13", "w2": "w2"}


@dataclass
class _Stack:
    """One of the two stacks: its spec, ``[N, K]`` of this rank's slice of an expert, and the record for the metrics."""

    spec: WeightSpec
    n: int
    k: int
    record: LayerRecord

    def shapes(self, experts: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the canonical tensors of all experts."""
        groups = (experts, self.n, self.spec.groups(self.k)), compat.torch_dtype(self.spec.scale_dtype)
        words = (experts, self.n, self.k * self.spec.bits // 32), torch.int32
        return dict(zip(PARTS, (words, groups, groups), strict=True))


class NeuqiExpertsMethod(FusedMoEMethodBase):
    """What both methods share: the slice of a rank, the check that every matrix arrived, and the kernel."""

    source = ""

    def __init__(self, config: NeuqiConfig, layer: Any, experts: ExpertLayer) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        self.layer = experts
        self.run: ExpertRun | None = None
        # Matrices of this rank's experts by the part of them that arrived.
        self.arrived: dict[str, set[tuple[int, str]]] = {}

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: no modular kernel of vLLM's runs these experts."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters that vLLM's loaders look for.

        Raises:
            UnsupportedModelError: biases, padding or an activation that the kernels do not have.
            UsageError: the group size does not divide this rank's slice.
        """
        hidden, intermediate = hidden_size, intermediate_size_per_partition
        check_layer(layer, self.layer, hidden, intermediate)
        self.experts, self.intermediate, self.dtype = num_experts, intermediate, params_dtype
        self.tp_size, self.tp_rank = int(layer.moe_config.tp_size), int(layer.moe_config.tp_rank)
        self.device = torch.get_default_device()
        self.stacks = {
            "w13": self._stack(self.layer.first, 2 * intermediate, hidden),
            "w2": self._stack(self.layer.second, hidden, intermediate),
        }
        self._register(layer)
        self.config.progress.expect(self._original_bytes())

    def _stack(self, spec: WeightSpec, n: int, k: int) -> _Stack:
        original = self.experts * n * k * self.dtype.itemsize
        record = LayerRecord(self.source, spec, original, time.perf_counter(), role="experts")
        return _Stack(spec, n, k, record)

    def _register(self, layer: Any) -> None:
        raise NotImplementedError

    def _original_bytes(self) -> int:
        return sum(stack.record.original_bytes for stack in self.stacks.values())

    def _loader(self, layer: Any, part: str) -> Callable[..., bool | None]:
        """Return what vLLM calls with each matrix of each expert, or with a part of its packed form."""

        def weight_loader(
            param: torch.Tensor,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            expert = compat.local_expert(layer, expert_id)
            if expert >= 0:
                mine = self._slice(loaded_weight, shard_id, part, weight_name)
                self._take(layer, param, mine, part, shard_id, expert, expert_id)
            return expert >= 0 if return_success else None

        weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]
        return weight_loader

    def _slice(self, loaded: torch.Tensor, shard: str, part: str, name: str) -> torch.Tensor:
        """Cut this rank's rows of gate or up, or its inputs of down, out of a matrix or a part of its packed form.

        Raises:
            IntegrityError: the tensor has another shape than the configuration says.
        """
        stack = self.stacks[STACK_OF[shard]]
        spec, whole = stack.spec, self.intermediate * self.tp_size

        def width(k: int) -> int:
            if part == "weight":
                return k
            return k * spec.bits // 32 if part == "qweight" else spec.groups(k)

        if shard == "w2":
            expected, dim, size = (stack.n, width(whole)), 1, width(stack.k)
        else:
            expected, dim, size = (whole, width(stack.k)), 0, self.intermediate
        if loaded.shape != expected:
            raise IntegrityError(
                f"expected {part} {list(expected)} for {name} ({shard}), got {list(loaded.shape)}. The checkpoint and "
                "its config.json do not belong together: fetch or pack the model again."
            )
        if size == expected[dim]:
            # All of it; a scale of a whole row belongs to every slice of the row.
            return loaded
        return loaded.narrow(dim, self.tp_rank * size, size)

    def _take(
        self,
        layer: Any,
        param: torch.Tensor,
        mine: torch.Tensor,
        part: str,
        shard: str,
        expert: int,
        global_expert: int,
    ) -> None:
        raise NotImplementedError

    def _rows(self, tensor: torch.Tensor, shard: str, expert: int) -> torch.Tensor:
        """The rows of a stacked tensor that a matrix of an expert fills."""
        if shard == "w2":
            return tensor[expert]
        return tensor[expert].narrow(0, self.intermediate if shard == "w3" else 0, self.intermediate)

    def _check_arrived(self, parts: tuple[str, ...]) -> None:
        self.config.unused_names.warn()
        expected = {(expert, shard) for expert in range(self.experts) for shard in STACK_OF}
        for part in parts:
            missing = sorted(expected - self.arrived.get(part, set()))
            if not missing:
                continue
            expert, shard = missing[0]
            raise IntegrityError(
                f"expected {len(expected)} part(s) of {part!r} for the experts {self.layer.prefix!r}, "
                f"{len(missing)} did not come, the first is {shard} of this rank's expert {expert}. The checkpoint is "
                "incomplete: fetch or write it again."
            )

    def _install(self, layer: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Repack for the chosen kernel and register plain parameters, whose addresses reload and graphs keep."""
        started = time.perf_counter()
        specs = [
            GemmSpec(
                n=stack.n,
                k=stack.k,
                bits=stack.spec.bits,
                group_size=stack.spec.group_size,
                device_type=tensors[f"{name}_qweight"].device.type,
                dtype=self.dtype,
                scale_dtype=tensors[f"{name}_scale"].dtype,
            )
            for name, stack in self.stacks.items()
        ]
        experts = ExpertsSpec(self.experts, specs[0], specs[1], compat.activation_name(layer))
        run = choose_run(experts)
        kept: list[Prepared] = []
        checks = self.config.sanity.wants_experts(run, experts)
        for (name, stack), spec in zip(self.stacks.items(), specs, strict=True):
            canonical = [tensors.pop(f"{name}_{part}") for part in PARTS]
            if checks:
                qweight, scale, zero = (tensor[-1:].clone() for tensor in canonical)
                kept.append((qweight, scale, zero))
            stack.record.packed_bytes = canonical[0].nbytes
            stack.record.scale_zero_bytes = canonical[1].nbytes + canonical[2].nbytes
            prepared = run.prepare(canonical[0], canonical[1], canonical[2], spec)
            for part in PARTS:
                if hasattr(layer, f"{name}_{part}"):
                    delattr(layer, f"{name}_{part}")
            for part, tensor in zip(PARTS, prepared, strict=True):
                layer.register_parameter(f"{name}_{part}", Parameter(tensor, requires_grad=False))
            stack.record.backend = run.name
        self.run = run
        setattr(layer, DONE, True)
        run.warm_up(layer)
        if checks:
            self.config.sanity.check_experts(repr(self.layer.prefix), run, layer, experts, *kept)
        now = time.perf_counter()
        first, second = (stack.record for stack in self.stacks.values())
        first.repack_seconds += now - started
        first.finished_at = second.finished_at = now
        layer.neuqi_record = (first, second)
        self.arrived = {}
        self.config.progress.finish(self._original_bytes())

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this rank's share of ``[tokens, H]``: the weighted sum over the experts of each token."""
        assert self.run is not None
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        return self.run(layer, x, topk_weights, topk_ids)
