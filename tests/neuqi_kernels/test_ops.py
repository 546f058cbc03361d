"""The operator against float64, through every backend that runs on this machine, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from neuqi_kernels import dispatch, layout, ops, reference
from neuqi_kernels.spec import GemmSpec

ops.register()

# The products are exact in float32 and summed over K ≤ 192 terms: rounding of the sum (2^-24 a step, growing like
# the root of K) and of the result (half a unit in the last place of the activation type) is all there is.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
CPU_BACKENDS = [name for name in dispatch.backend_names() if name != "triton"]


def layer(n: int, k: int, bits: int, group_size: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    groups = 1 if group_size == -1 else k // group_size
    scale = (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).half()
    zero = (torch.rand(n, groups, generator=generator) * (1 << bits) - 0.5).half()
    return codes, layout.pack(codes, bits), scale, zero


def exact(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    n, k = codes.shape
    grouped = codes.double().view(n, scale.shape[1], -1)
    weight = (grouped - zero.double().unsqueeze(-1)) * scale.double().unsqueeze(-1)
    return x.double() @ weight.view(n, k).t()


def run(
    name: str, x: torch.Tensor, tensors: tuple[torch.Tensor, ...], bits: int, group_size: int, bias: object
):
    _, qweight, scale, zero = tensors
    n, k = scale.shape[0], x.shape[-1]
    spec = GemmSpec(n, k, bits, group_size, "cpu", x.dtype, scale.dtype)
    backend = dispatch.find(name)
    if isinstance(backend, str):
        pytest.skip(f"{name} is {backend}")
    reason = backend.refuse(spec)
    if reason is not None:
        pytest.skip(f"{name} refuses: {reason}")
    prepared = backend.prepare(qweight, scale, zero, spec)
    return torch.ops.neuqi.gemm(x, *prepared, bias, n, bits, group_size, name)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("bits", layout.SUPPORTED_BITS)
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemm_is_within_rounding_of_float64(
    name: str, bits: int, group_size: int, dtype: torch.dtype
) -> None:
    n, k = 37, 192
    tensors = layer(n, k, bits, group_size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    y = run(name, x, tensors, bits, group_size, bias)
    assert y.dtype == dtype
    expected = exact(x, tensors[0], tensors[2], tensors[3]) + bias.double()
    bound = TOLERANCE[dtype] * expected.abs().amax()
    assert (y.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_gemm_keeps_leading_dimensions_and_takes_none(name: str) -> None:
    tensors = layer(17, 64, 3, 32)
    for shape in [(64,), (2, 5, 64), (0, 64)]:
        y = run(name, torch.randn(shape), tensors, 3, 32, None)
        assert y.shape == (*shape[:-1], 17)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_gemm_carries_nan_only_to_its_own_token(name: str) -> None:
    tensors = layer(17, 64, 4, 64)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = run(name, x, tensors, 4, 64, None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_gemm_works_under_torch_compile() -> None:
    _, qweight, scale, zero = layer(17, 64, 3, 32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.ops.neuqi.gemm(x, qweight, scale, zero, None, 17, 3, 32, "cpu_blocks")

    x = torch.randn(2, 64)
    expected = 2 * reference.gemm(x, qweight, scale, zero, None, 3, 32)
    torch.testing.assert_close(doubled(x), expected, atol=1e-5, rtol=1e-5)


def test_operator_definition_passes_torchs_own_checks() -> None:
    _, qweight, scale, zero = layer(17, 64, 3, 32)
    arguments = (torch.randn(2, 64), qweight, scale, zero, None, 17, 3, 32, "reference")
    torch.library.opcheck(
        torch.ops.neuqi.gemm.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_register_twice_changes_nothing() -> None:
    before = torch.ops.neuqi.gemm.default
    ops.register()
    assert torch.ops.neuqi.gemm.default is before


def test_unknown_backend_is_refused() -> None:
    _, qweight, scale, zero = layer(17, 64, 3, 32)
    with pytest.raises(ValueError, match="expected a backend of"):
        torch.ops.neuqi.gemm(torch.randn(2, 64), qweight, scale, zero, None, 17, 3, 32, "abacus")


def test_dequantize_refuses_scales_of_another_group_size() -> None:
    _, qweight, scale, zero = layer(17, 64, 3, 32)
    with pytest.raises(ValueError, match="group size 64"):
        reference.dequantize(qweight, scale, zero, 3, 64)


def test_dequantize_rounds_to_the_asked_type_last() -> None:
    codes, qweight, scale, zero = layer(17, 64, 3, 32)
    wide = reference.dequantize(qweight, scale, zero, 3, 32)
    assert torch.equal(
        reference.dequantize(qweight, scale, zero, 3, 32, torch.bfloat16), wide.to(torch.bfloat16)
    )
    first = (float(codes[4, 33]) - float(zero[4, 1])) * float(scale[4, 1])
    assert wide[4, 33].item() == pytest.approx(first, rel=1e-6)
