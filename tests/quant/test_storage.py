import pytest
import torch

from neuqi_serve.quant.affine import AffineParams, quantize
from neuqi_serve.quant.minmax import minmax
from neuqi_serve.quant.objective import weighted_loss
from neuqi_serve.quant.storage import (
    Tile,
    choose,
    codes_of,
    constant_params,
    normalized_importance,
    refit_zero,
    stored_loss,
    stored_scale,
    stored_zero,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def columns(size=20, count=7, weighted=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, count, generator=generator)
    mass = normalized_importance(torch.rand(size, count, generator=generator), 0) if weighted else None
    return Tile(weight, mass, 0)


def transposed(tile):
    mass = None if tile.importance is None else tile.importance.t().contiguous()
    return Tile(tile.weight.t().contiguous(), mass, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scale_is_normal_and_finite(dtype):
    limits = torch.finfo(dtype)
    scale = stored_scale(torch.tensor([0.0, limits.tiny / 3, 0.1, 3e38]), dtype)
    assert torch.equal(scale, scale.to(dtype).float())
    assert (scale >= limits.tiny).all()
    assert torch.isfinite(scale.to(dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_zero_is_finite_and_has_no_negative_zero(dtype):
    zero = stored_zero(torch.tensor([-3e38, -0.0, 1.0 / 3, 3e38]), dtype)
    assert torch.isfinite(zero.to(dtype)).all()
    assert torch.equal(zero, zero.to(dtype).float())
    assert not torch.signbit(zero[1])


def test_normalized_importance_has_mean_one_and_replaces_nothing_by_ones():
    mass = normalized_importance(torch.tensor([[1e-30, 3e-30], [0.0, 0.0], [2.0, 0.0]]), -1)
    torch.testing.assert_close(mass, torch.tensor([[0.5, 1.5], [1.0, 1.0], [2.0, 0.0]]))


@pytest.mark.parametrize("weighted", [False, True])
def test_stored_loss_agrees_with_the_definition_in_both_layouts(weighted):
    tile = columns(weighted=weighted)
    params = minmax(tile, 3, torch.float16)
    loss = stored_loss(tile, params, 3)
    mass = None if tile.importance is None else tile.importance.t()
    slow = weighted_loss(tile.weight.t(), mass, params.scale.squeeze(0), params.zero.squeeze(0), 3) / 20
    torch.testing.assert_close(loss.squeeze(0).double(), slow, rtol=1e-5, atol=0)
    other = stored_loss(transposed(tile), AffineParams(params.scale.t(), params.zero.t()), 3)
    torch.testing.assert_close(other, loss.t(), rtol=1e-5, atol=0)


def test_codes_are_those_of_the_definition():
    tile = columns()
    params = minmax(tile, 4, torch.float16)
    expected = quantize(tile.weight.t(), AffineParams(params.scale.t(), params.zero.t()), 4)
    assert torch.equal(codes_of(tile, params, 4).t().to(torch.uint8), expected)


def test_refit_zero_is_optimal_for_its_codes_and_scale():
    tile, bits = columns(), 2
    start = AffineParams(torch.full((1, 7), 0.7), torch.full((1, 7), 1.4))
    fitted = refit_zero(tile, tile.mean(tile.weight), start, bits, torch.float32)
    codes = codes_of(tile, AffineParams(fitted.scale, start.zero), bits)

    def loss(zero):
        return tile.mean(((codes - zero) * fitted.scale - tile.weight).square())

    for step in (-0.1, -0.01, 0.01, 0.1):
        assert (loss(fitted.zero) < loss(fitted.zero + step)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_params_represent_a_value_in_its_own_dtype_exactly(dtype):
    value = torch.tensor([[3.0, -3.0, 0.0, 0.02, -0.02, 1e-3]]).to(dtype).float()
    params = constant_params(value, dtype)
    codes = codes_of(Tile(value, None, 0), params, 2)
    assert torch.equal((codes - params.zero) * params.scale, value)
    assert params.scale[0, :3].tolist() == [3.0, 3.0, 1.0]
    assert params.zero[0, :3].tolist() == [0.0, 1.0, 0.0]
    assert codes[0].tolist() == [1, 0, 0, 1, 0, 1]


def test_choose_takes_the_least_loss_in_each_group():
    tile = columns(count=3)
    good, bad = minmax(tile, 4, torch.float32), AffineParams(torch.full((1, 3), 9.0), torch.zeros(1, 3))
    mixed = AffineParams(torch.where(torch.tensor([True, False, True]), good.scale, bad.scale), good.zero)
    for candidates in ([bad, good, mixed], [mixed, bad, good]):
        chosen = choose(tile, candidates, 4)
        assert torch.equal(chosen.scale, good.scale)
        assert torch.equal(chosen.zero, good.zero)


def test_choose_keeps_the_first_of_equal_candidates():
    tile = Tile(torch.zeros(4, 2), None, 0)
    first = AffineParams(torch.full((1, 2), 0.5), torch.zeros(1, 2))
    second = AffineParams(torch.full((1, 2), 0.25), torch.zeros(1, 2))
    assert torch.equal(choose(tile, [first, second], 2).scale, first.scale)
