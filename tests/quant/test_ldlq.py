import pytest
import torch
from torch import Tensor

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, dequantize, quantize
from neuqi_serve.quant.hessian import damped, feedback_factor, proxy_loss
from neuqi_serve.quant.ldlq import round_ldlq, round_unblocked
from neuqi_serve.quant.quantize import quantize_weight


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    seen = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ mixing * sizes
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 0.05
    return weight, damped(seen.T @ seen / len(seen))


def initial(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, preset: str = "balanced"
) -> QuantizedWeight:
    return quantize_weight(weight.float(), WeightSpec(bits, group_size), hessian.diagonal().float(), preset)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "block_size"), [(2, 32, 17), (3, 64, 128), (4, -1, 32), (2, -1, 1)]
)
def test_blocked_rounding_gives_the_codes_of_the_definition(bits, group_size, block_size, act_order):
    weight, hessian = layer(17, 192)
    start = initial(weight, hessian, bits, group_size)
    expected = round_unblocked(weight, start.scale, start.zero, hessian, bits, act_order)
    got = round_ldlq(weight, start.scale, start.zero, hessian, bits, group_size, act_order, block_size)
    assert got.dtype == torch.uint8
    assert torch.equal(got, expected)


def total_loss(weight: Tensor, codes: Tensor, start: QuantizedWeight, hessian: Tensor) -> float:
    values = dequantize(QuantizedWeight(codes, start.scale, start.zero), torch.float64)
    return float(proxy_loss(values - weight, hessian).sum())


def test_float32_rounding_is_as_good_as_float64():
    weight, hessian = layer(33, 256)
    start = initial(weight, hessian, 3, 64)
    wide, narrow = (
        round_ldlq(one, start.scale, start.zero, hessian, 3, 64) for one in (weight, weight.float())
    )
    # A few codes at ties fall elsewhere; in the mean that changes nothing.
    expected = total_loss(weight, wide, start, hessian)
    assert total_loss(weight, narrow, start, hessian) == pytest.approx(expected, rel=0.01)


def test_loss_is_the_sum_of_the_rounding_errors_weighted_by_the_pivots():
    weight, hessian = layer(5, 96)
    start = initial(weight, hessian, 2, 32)
    codes = round_ldlq(weight, start.scale, start.zero, hessian, 2, 32)
    error = weight - dequantize(QuantizedWeight(codes, start.scale, start.zero), torch.float64)
    factor = feedback_factor(hessian)
    roundings = error[:, factor.order] @ factor.upper
    torch.testing.assert_close((roundings.square() * factor.pivots).sum(1), proxy_loss(error, hessian))
    # Where no code is cut off at an end, a rounding error is at most half a step.
    steps = start.scale.double().repeat_interleave(32, 1)[:, factor.order]
    inner = ((codes > 0) & (codes < 3))[:, factor.order]
    assert (roundings.abs() <= 0.5 * steps * (1 + 1e-9))[inner].all()


@pytest.mark.parametrize("preset", ["balanced", "minmax"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_lowers_the_loss_of_any_initialisation(bits, preset):
    weight, hessian = layer(64, 128)
    start = initial(weight, hessian, bits, 64, preset)
    codes = round_ldlq(weight, start.scale, start.zero, hessian, bits, 64)
    plain = total_loss(weight, start.codes, start, hessian)
    assert total_loss(weight, codes, start, hessian) < 0.9 * plain


def test_a_diagonal_hessian_leaves_plain_rounding():
    weight, _ = layer(9, 64)
    start = initial(weight, torch.eye(64), 3, 32)
    plain = quantize(weight.float(), AffineParams(start.scale, start.zero), 3)
    assert torch.equal(round_ldlq(weight.float(), start.scale, start.zero, torch.eye(64), 3, 32), plain)


def test_rows_do_not_depend_on_one_another():
    weight, hessian = layer(20, 64)
    start = initial(weight, hessian, 2, 32)
    whole = round_ldlq(weight, start.scale, start.zero, hessian, 2, 32)
    part = round_ldlq(weight[7:11], start.scale[7:11], start.zero[7:11], hessian, 2, 32)
    assert torch.equal(whole[7:11], part)


def test_shapes_that_do_not_fit_are_refused():
    weight, hessian = layer(4, 64)
    start = initial(weight, hessian, 2, 32)
    with pytest.raises(UsageError, match="Hessian"):
        round_ldlq(weight, start.scale, start.zero, hessian[:32, :32], 2, 32)
    with pytest.raises(UsageError, match="scale and zero"):
        round_ldlq(weight, start.scale, start.zero, hessian, 2, 64)
    with pytest.raises(UsageError, match="block"):
        round_ldlq(weight, start.scale, start.zero, hessian, 2, 32, block_size=0)
