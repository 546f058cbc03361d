"""The two methods of a mixture of experts: experts that arrive packed, and experts that are packed as they arrive."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import Parameter

from neuqi_serve.errors import IntegrityError
from neuqi_serve.quant.quantize import quantize_packed
from neuqi_serve.vllm_plugin.expert_method import DONE, PARTS, STACK_OF, NeuqiExpertsMethod


class NeuqiPackedExpertsMethod(NeuqiExpertsMethod):
    """A packed checkpoint: ``….experts.3.up_proj.qweight``, ``.scale``, ``.zero`` in the canonical layout."""

    source = "packed"

    def _register(self, layer: Any) -> None:
        for name, stack in self.stacks.items():
            for part, (shape, dtype) in stack.shapes(self.experts).items():
                # Not-a-number until loaded, so that a part that never arrives cannot pass for data.
                data = torch.empty(shape, dtype=dtype)
                if part != "qweight":
                    data.fill_(float("nan"))
                parameter = Parameter(data, requires_grad=False)
                parameter.weight_loader = self._loader(layer, part)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{part}", parameter)

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
        self._rows(param.data, shard, expert).copy_(mine)
        self.arrived.setdefault(part, set()).add((expert, shard))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything arrived, then repack for the kernel.

        Raises:
            IntegrityError: a tensor is missing, or a scale or zero-point is not finite.
        """
        if getattr(layer, DONE, False):
            return
        self._check_arrived(PARTS)
        tensors = {
            f"{name}_{part}": getattr(layer, f"{name}_{part}").data for name in self.stacks for part in PARTS
        }
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise IntegrityError(
                    f"expected finite values in {name} of the experts {self.layer.prefix!r}, got others. The "
                    "checkpoint is damaged or incomplete: run `neuqi inspect --verify` on it, or write it again."
                )
        self._install(layer, tensors)


class NeuqiOnlineExpertsMethod(NeuqiExpertsMethod):
    """An unquantized checkpoint: each matrix of each expert is quantized as it arrives and released.

    Of a layer's unquantized weights one matrix exists at a time, whatever the number of experts.
    """

    source = "on-the-fly"
    uses_meta_device = True

    def _register(self, layer: Any) -> None:
        self.packed: dict[str, torch.Tensor] = {}
        for name, stack in self.stacks.items():
            shape = (self.experts, stack.n, stack.k)
            weight = Parameter(torch.empty(shape, device="meta", dtype=self.dtype), requires_grad=False)
            weight.weight_loader = self._loader(layer, "weight")  # type: ignore[attr-defined]
            layer.register_parameter(f"{name}_weight", weight)

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
        if getattr(layer, DONE, False):
            # A reload: vLLM first counts what arrives on the meta device, and comes again with all of it.
            self._rows(param.data, shard, expert).copy_(mine)
            return
        self.config.progress.begin()
        stack = self.stacks[STACK_OF[shard]]
        started = time.perf_counter()
        importance = self._importance(shard, global_expert)
        packed = quantize_packed(
            mine.to(self.device), stack.spec, importance, preset=self.config.recipe.preset
        )
        for piece, (shape, dtype) in stack.shapes(self.experts).items():
            name = f"{STACK_OF[shard]}_{piece}"
            if name not in self.packed:
                self.packed[name] = torch.empty(shape, dtype=dtype, device=self.device)
            self._rows(self.packed[name], shard, expert).copy_(getattr(packed, piece))
        stack.record.quantize_seconds += time.perf_counter() - started
        arrived = self.arrived.setdefault(part, set())
        arrived.add((expert, shard))
        if len(arrived) == self.experts * len(STACK_OF):
            tensors, self.packed = self.packed, {}
            self._install(layer, tensors)

    def _importance(self, shard: str, global_expert: int) -> torch.Tensor | None:
        k = self.stacks[STACK_OF[shard]].k
        whole = k * self.tp_size if shard == "w2" else k
        found = self.config.importance_for(self.layer.name(shard, global_expert), whole)
        return found if found is None or k == whole else found.narrow(0, self.tp_rank * k, k)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every expert arrived, with the last of which the layer became ready.

        Raises:
            IntegrityError: a matrix never arrived.
        """
        if not getattr(layer, DONE, False):
            self._check_arrived(("weight",))
        # Not before, as the loader still offers the experts of other ranks.
        for name in self.stacks:
            if hasattr(layer, f"{name}_weight"):
                delattr(layer, f"{name}_weight")
