"""The kernels on a real GPU, where there is one: the interpreter's cases and what only hardware can show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neuqi_kernels.gpu.backend import TRITON
from neuqi_kernels.gpu.plan import target_of

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
BITS = (2, 3, 4, 8)
DEVICE = "cuda"


@pytest.fixture(scope="module")
def cases() -> Any:
    """The module gpu_cases.py, which imports Triton."""
    path = Path(__file__).resolve().with_name("gpu_cases.py")
    spec = importlib.util.spec_from_file_location("gpu_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_cases"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        tensor = allocate(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def run(cases: Any, case: Any) -> torch.Tensor:
    """The product of a case; fails where it is off or a counter is not back at zero."""
    device = torch.device(DEVICE, 0)
    layer = cases.make_layer(case, DEVICE)
    x = cases.make_tokens(case).to(device)
    y, counters = cases.multiply(case, layer, x, target_of(device))
    assert cases.relative_error(y, cases.exact(layer, x)) < cases.TOLERANCE[case.dtype]
    assert not counters.any().item()
    return y


def prepare(layer: Any) -> tuple[torch.Tensor, ...]:
    """The layer in the kernels' layout, on the GPU."""
    tensors = (tensor.to(DEVICE) for tensor in (layer.qweight, layer.scale, layer.zero))
    return TRITON.prepare(*tensors, layer.spec)


@pytest.mark.parametrize("m", [1, 3, 8, 17, 40, 300, 2100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_product_agrees_with_float64(cases: Any, bits: int, group_size: int, dtype: str, m: int) -> None:
    run(cases, cases.Case(bits, group_size, m, 1030, 1152, dtype))


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1030, 14336), (28672, 1024)])
@pytest.mark.parametrize("bits", BITS)
def test_layers_of_real_size(cases: Any, bits: int, n: int, k: int) -> None:
    run(cases, cases.Case(bits, 128, 5, n, k, "bfloat16"))


@pytest.mark.parametrize("bits", BITS)
def test_the_same_bits_every_time_and_for_every_number_of_tokens(cases: Any, bits: int) -> None:
    case = cases.Case(bits, 128, 32, 1030, 4096, "bfloat16")
    y = run(cases, case)
    for _ in range(20):
        assert torch.equal(run(cases, case), y)
    for m in (1, 8, 9, 16, 17):
        assert torch.equal(run(cases, cases.replace(case, m=m)), y[:m])


@pytest.mark.parametrize("m", [4, 64])
def test_a_captured_graph_reads_new_tokens(cases: Any, m: int) -> None:
    case = cases.Case(3, 128, m, 1030, 4096, "bfloat16")
    layer = cases.make_layer(case, DEVICE)
    prepared = prepare(layer)
    bias = layer.bias.to(DEVICE)
    x = cases.make_tokens(case).to(DEVICE)

    def product() -> torch.Tensor:
        return TRITON.gemm(x, *prepared, bias, case.n, case.bits, case.group_size)

    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product()
    for seed in range(3):
        x.copy_(cases.make_tokens(cases.replace(case, seed=seed)))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, product())


def test_the_backend_repacks_on_the_gpu_and_dequantizes_back(cases: Any) -> None:
    case = cases.Case(3, 64, 1, 200, 1088)
    layer = cases.make_layer(case, DEVICE)
    assert TRITON.refuse(layer.spec) is None
    prepared = prepare(layer)
    assert all(tensor.is_cuda for tensor in prepared)
    weight = TRITON.dequantize(*prepared, layer.spec)
    assert torch.allclose(weight.cpu().double(), layer.weight, rtol=1e-6, atol=1e-7)
