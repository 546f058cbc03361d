import pytest
import torch
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant import refit as module
from neuqi_serve.quant.affine import QuantizedWeight, dequantize
from neuqi_serve.quant.hessian import damped, proxy_loss
from neuqi_serve.quant.ldlq import round_ldlq
from neuqi_serve.quant.quantize import quantize_weight
from neuqi_serve.quant.refit import refit


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    seen = torch.randn(3 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator) * 0.05, damped(seen.T @ seen / len(seen))


def rounded(weight: Tensor, hessian: Tensor, spec: WeightSpec) -> QuantizedWeight:
    start = quantize_weight(weight, spec, hessian.diagonal().float())
    codes = round_ldlq(weight, start.scale, start.zero, hessian, spec.bits, spec.group_size)
    return QuantizedWeight(codes, start.scale, start.zero)


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    return proxy_loss(dequantize(quantized, torch.float64) - weight.double(), hessian)


def refitted(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    params = refit(weight, quantized, hessian)
    return QuantizedWeight(quantized.codes, params.scale, params.zero)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, -1)])
def test_refit_never_raises_the_loss_of_a_row_and_lowers_the_sum(bits, group_size, scale_dtype):
    weight, hessian = layer(33, 128)
    before = rounded(weight, hessian, WeightSpec(bits, group_size, scale_dtype))
    after = refitted(weight, before, hessian)
    assert after.scale.dtype == after.zero.dtype == before.scale.dtype
    losses = loss(weight, before, hessian), loss(weight, after, hessian)
    assert (losses[1] <= losses[0]).all()
    assert losses[1].sum() < losses[0].sum()


def test_refit_in_float32_solves_the_least_squares_problem():
    weight, hessian = layer(3, 96)
    before = rounded(weight, hessian, WeightSpec(3, 32, "float32"))
    after = loss(weight, refitted(weight, before, hessian), hessian)
    root = torch.linalg.cholesky(hessian)
    for row in range(3):
        basis = torch.zeros(96, 6, dtype=torch.float64)
        for group in range(3):
            part = slice(32 * group, 32 * group + 32)
            basis[part, group], basis[part, 3 + group] = before.codes[row, part].double(), 1.0
        best = torch.linalg.lstsq(root.T @ basis, root.T @ weight[row].double().unsqueeze(1)).solution
        least = float((root.T @ (basis @ best - weight[row].double().unsqueeze(1))).square().sum())
        assert float(after[row]) == pytest.approx(least, rel=1e-4)


def test_rows_in_parts_give_the_same(monkeypatch):
    weight, hessian = layer(20, 64)
    before = rounded(weight, hessian, WeightSpec(2, 32))
    whole = refit(weight, before, hessian)
    monkeypatch.setattr(module, "CHUNK_VALUES", 64 * 3)
    parts = refit(weight, before, hessian)
    torch.testing.assert_close(parts.scale, whole.scale)
    torch.testing.assert_close(parts.zero, whole.zero)


@pytest.mark.parametrize("value", [0.0, 0.02, -7.0])
def test_groups_of_one_value_stay_what_they_are(value):
    weight, hessian = layer(4, 64)
    weight[:, :32] = value
    before = rounded(weight, hessian, WeightSpec(2, 32))
    after = refitted(weight, before, hessian)
    assert after.scale.isfinite().all()
    assert after.zero.isfinite().all()
    assert (loss(weight, after, hessian) <= loss(weight, before, hessian)).all()
