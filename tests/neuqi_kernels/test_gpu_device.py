"""The kernels on a real GPU, where there is one: the interpreter's cases and what only hardware can show."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuqi_kernels import moe_reference
from neuqi_kernels.gpu import planar
from neuqi_kernels.gpu.backend import TRITON, pack_words
from neuqi_kernels.gpu.moe_backend import TRITON_MOE
from neuqi_kernels.gpu.plan import target_of

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
BITS = (2, 3, 4, 8)
DEVICE = "cuda"
CASES = Path(__file__).resolve().with_name("gpu_cases.py")
# What runs under compute-sanitizer: every kernel, at sizes that leave tiles half empty.
SANITIZED = f"""
import sys
sys.path.insert(0, {str(CASES.parent)!r})
import gpu_cases as cases, torch
from neuqi_kernels.gpu.plan import target_of
device = torch.device("cuda", 0)
for bits in (2, 3, 4):
    for m, kernel, split_k in ((3, "", 2), (20, "", 1), (40, "", 2), (300, "", 0), (5, "dequant", 0)):
        case = cases.Case(bits, 32, m, 70, 544, kernel=kernel, split_k=split_k)
        layer = cases.make_layer(case, "cuda")
        x = cases.make_tokens(case).to(device)
        y, _ = cases.multiply(case, layer, x, target_of(device))
        assert cases.relative_error(y, cases.exact(layer, x)) < cases.TOLERANCE[case.dtype]
    for block_size in (16, 64):
        case = cases.MoeCase(bits, 32, 9, 70, 544, block_size=block_size, bias=True, weighted=True, absent=2)
        y, expected = cases.moe_multiply(case, "cuda")
        assert cases.relative_error(y, expected) < cases.TOLERANCE[case.dtype]
print("all right")
"""


@pytest.fixture(scope="module")
def cases() -> Any:
    """The module gpu_cases.py, which imports Triton."""
    spec = importlib.util.spec_from_file_location("gpu_cases", CASES)
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


def replayed(x: torch.Tensor, product: Any, inputs: list[torch.Tensor]) -> None:
    """Capture ``product``, which reads ``x``, and hold its replays against it for every input."""
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product()
    for tokens in inputs:
        x.copy_(tokens)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, product())


@pytest.mark.parametrize("m", [1, 3, 8, 17, 40, 100, 300, 2100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_product_agrees_with_float64(cases: Any, bits: int, group_size: int, dtype: str, m: int) -> None:
    run(cases, cases.Case(bits, group_size, m, 1030, 1152, dtype))


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1030, 14336), (28672, 1024)])
@pytest.mark.parametrize("bits", BITS)
def test_layers_of_real_size(cases: Any, bits: int, n: int, k: int) -> None:
    run(cases, cases.Case(bits, 128, 5, n, k, "bfloat16"))


@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize("bits", BITS)
def test_a_single_hot_feature_gives_its_column_of_weights(cases: Any, bits: int, m: int) -> None:
    case = cases.Case(bits, 32, m, 130, 1088, bias=False)
    layer = cases.make_layer(case, DEVICE)
    prepared = prepare(layer)
    for start in range(0, case.k, m):
        hot = torch.arange(start, min(start + m, case.k))
        x = torch.zeros(m, case.k, dtype=torch.float16)
        x[torch.arange(len(hot)), hot] = 1
        y = TRITON.gemm(x.to(DEVICE), *prepared, None, case.n, bits, 32)[: len(hot)]
        weight = layer.weight[:, hot].t()
        # One product: what is rounded is the weight, or the bits of a 3-bit code and its zero-point one by one. A wrong
        # code would be off by a whole scale.
        bound = layer.scale[:, hot // 32].t().double() * 2.0 ** (bits - 10) + weight.abs() * 2.0**-10
        assert ((y.cpu().double() - weight).abs() <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_same_bits_every_time_and_for_every_number_of_tokens(cases: Any, bits: int) -> None:
    case = cases.Case(bits, 128, 32, 1030, 4096, "bfloat16")
    y = run(cases, case)
    for _ in range(20):
        assert torch.equal(run(cases, case), y)
    for m in (1, 8, 9, 16, 17):
        assert torch.equal(run(cases, replace(case, m=m)), y[:m])


@pytest.mark.parametrize("bits", BITS)
def test_batch_invariant_plans_give_a_token_its_bits_in_every_batch(cases: Any, bits: int) -> None:
    case = cases.Case(bits, 128, 700, 1030, 4096, "bfloat16", invariant=True)
    y = run(cases, case)
    for m in (1, 16, 33, 64):
        few = run(cases, replace(case, m=m))
        # Up to 64 tokens the same ones come first, whatever their number.
        assert torch.equal(few, run(cases, replace(case, m=64))[:m])
    layer = cases.make_layer(case, DEVICE)
    x = cases.make_tokens(case).to(DEVICE)
    one, _ = cases.multiply(replace(case, m=1), layer, x[699:], target_of(torch.device(DEVICE, 0)))
    assert torch.equal(one, y[699:])


@pytest.mark.parametrize("m", [4, 64, 300])
@pytest.mark.parametrize("bits", [3, 4])
def test_slices_of_rows_are_slices_of_the_product_and_slices_of_k_add_up(
    cases: Any, bits: int, m: int
) -> None:
    case = cases.Case(bits, 64, m, 512, 2048, "bfloat16", bias=False)
    layer = cases.make_layer(case, DEVICE)
    x = cases.make_tokens(case).to(DEVICE)
    whole = run(cases, case)

    def part(rows: slice, features: slice) -> torch.Tensor:
        words = slice(features.start * bits // 32, features.stop * bits // 32)
        groups = slice(features.start // 64, features.stop // 64)
        tensors = (
            layer.qweight[rows, words].contiguous(),
            layer.scale[rows, groups],
            layer.zero[rows, groups],
        )
        spec = replace(layer.spec, n=rows.stop - rows.start, k=features.stop - features.start)
        prepared = TRITON.prepare(*(tensor.to(DEVICE) for tensor in tensors), spec)
        return TRITON.gemm(x[:, features].contiguous(), *prepared, None, spec.n, bits, 64)

    columns = [part(slice(start, start + 128), slice(0, 2048)) for start in range(0, 512, 128)]
    expected = cases.exact(layer, x)
    assert cases.relative_error(torch.cat(columns, dim=1), expected) < cases.TOLERANCE["bfloat16"]
    # The parts of K depend on the number of rows, so that the sums may differ in the last bit and no further.
    assert cases.relative_error(torch.cat(columns, dim=1), whole.cpu().double()) < 2.0**-8
    rows = [part(slice(0, 512), slice(start, start + 1024)).double() for start in (0, 1024)]
    assert cases.relative_error(rows[0] + rows[1], expected) < cases.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("m", [4, 64, 300, 2100])
def test_a_captured_graph_reads_new_tokens(cases: Any, m: int) -> None:
    case = cases.Case(3, 128, m, 1030, 4096, "bfloat16")
    layer = cases.make_layer(case, DEVICE)
    prepared = prepare(layer)
    bias = layer.bias.to(DEVICE)
    x = cases.make_tokens(case).to(DEVICE)
    replayed(
        x,
        lambda: TRITON.gemm(x, *prepared, bias, case.n, case.bits, case.group_size),
        [cases.make_tokens(replace(case, seed=seed)).to(DEVICE) for seed in range(3)],
    )


def test_after_warming_up_a_graph_is_captured_without_compiling(cases: Any) -> None:
    case = cases.Case(4, 64, 24, 192, 576)
    layer = cases.make_layer(case, DEVICE)
    prepared = prepare(layer)
    TRITON.warm_up(prepared, layer.spec, False)
    x = cases.make_tokens(case).to(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = TRITON.gemm(x, *prepared, None, case.n, case.bits, case.group_size)
    graph.replay()
    assert cases.relative_error(y, cases.exact(replace(layer, bias=None), x)) < cases.TOLERANCE[case.dtype]


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("bits", BITS)
def test_repacking_on_the_gpu_equals_its_slow_twin_and_makes_no_copy(bits: int, experts: int) -> None:
    shape = (experts, 1030) if experts else (1030,)
    qweight = torch.randint(-(2**31), 2**31, (*shape, 1088 * bits // 32), dtype=torch.int64).to(torch.int32)
    on_gpu = qweight.to(DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    words = pack_words(on_gpu, bits)
    assert torch.cuda.max_memory_allocated() - before <= words.nbytes + 512
    assert torch.equal(words.cpu(), planar.to_planar(qweight, bits))


def test_the_backend_repacks_on_the_gpu_and_dequantizes_back(cases: Any) -> None:
    case = cases.Case(3, 64, 1, 200, 1088)
    layer = cases.make_layer(case, DEVICE)
    assert TRITON.refuse(layer.spec) is None
    prepared = prepare(layer)
    assert all(tensor.is_cuda for tensor in prepared)
    weight = TRITON.dequantize(*prepared, layer.spec)
    assert torch.allclose(weight.cpu().double(), layer.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_experts_agree_with_float64(
    cases: Any, bits: int, group_size: int, dtype: str, block_size: int
) -> None:
    case = cases.MoeCase(
        bits, group_size, 150, 330, 1152, dtype, 12, 3, block_size, bias=True, weighted=True, absent=5
    )
    y, expected = cases.moe_multiply(case, DEVICE)
    assert cases.relative_error(y, expected) < cases.TOLERANCE[dtype]


def test_a_captured_graph_of_experts_follows_the_router(cases: Any) -> None:
    case = cases.MoeCase(4, 128, 20, 256, 512, experts=8, top_k=2)
    layers = cases.moe_experts(case)
    stacked = [
        torch.stack([getattr(layer, name) for layer in layers]).to(DEVICE)
        for name in ("qweight", "scale", "zero")
    ]
    prepared = TRITON_MOE.prepare(*stacked, layers[0].spec)
    x = cases.make_tokens(cases.Case(4, 128, 20, 256, 512)).to(DEVICE)
    blocks = case.tokens * case.top_k
    routes = torch.zeros(blocks * 16, dtype=torch.int32, device=DEVICE)
    owners = torch.zeros(blocks, dtype=torch.int32, device=DEVICE)
    total = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def product() -> torch.Tensor:
        return TRITON_MOE.moe_gemm(
            x, *prepared, None, None, routes, owners, total, 256, case.top_k, 16, 4, 128
        )

    def route(seed: int) -> None:
        ids = cases.moe_routes(replace(case, seed=seed))[0]
        for buffer, found in zip(
            (routes, owners, total), moe_reference.align_routes(ids, 8, 16), strict=True
        ):
            buffer[: len(found)] = found.to(DEVICE)

    route(0)
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product()
    for seed in (1, 2, 3):
        route(seed)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, product())


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed (CUDA toolkit)"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.timeout(1200)
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    script = tmp_path / "cases.py"
    script.write_text(SANITIZED)
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)],
        # torch's own allocator would hide an access beyond a tensor.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "all right" in done.stdout
