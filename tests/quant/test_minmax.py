import pytest
import torch

from neuqi_serve.quant.minmax import minmax, minmax_integer, minmax_plus
from neuqi_serve.quant.storage import Tile, codes_of, stored_loss

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def tile(shift=0.0, dim=0):
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) + shift
    return Tile(weight if dim == 0 else weight.t().contiguous(), None, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, -1])
def test_minmax_reaches_both_ends_of_the_range(dtype, dim):
    groups, bits = tile(dim=dim), 3
    params = minmax(groups, bits, dtype)
    codes = codes_of(groups, params, bits)
    assert (codes.amin(dim) == 0).all()
    assert (codes.amax(dim) == 7).all()
    assert torch.equal(params.scale.to(dtype).float(), params.scale)
    assert torch.equal(params.zero.to(dtype).float(), params.zero)
    worst = ((codes - params.zero) * params.scale - groups.weight).abs().amax(dim, keepdim=True)
    # Half a step, and what the rounding of scale and zero-point shifts the far end of eight levels by.
    assert (worst <= params.scale * (0.5 + 24 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_minmax_integer_has_a_zero_point_among_the_codes(shift):
    params = minmax_integer(tile(shift), 4, torch.float16)
    assert torch.equal(params.zero, params.zero.round())
    assert ((params.zero >= 0) & (params.zero <= 15)).all()


def test_minmax_plus_is_better_for_uniform_weights_at_two_bits():
    weight = torch.rand(4096, 3, generator=torch.Generator().manual_seed(1))
    groups = Tile(weight, None, 0)
    plus = stored_loss(groups, minmax_plus(groups, 2, torch.float32), 2)
    plain = stored_loss(groups, minmax(groups, 2, torch.float32), 2)
    # Cells of a quarter against a third of the range: (3/4)² of the squared error, when the sample is large.
    torch.testing.assert_close(plus / plain, torch.full_like(plus, 9 / 16), rtol=0.05, atol=0)
