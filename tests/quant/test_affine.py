import pytest
import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, dequantize, max_code, quantize


def params(rows, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, groups, generator=generator) + 0.05
    return AffineParams(scale, torch.randn(rows, groups, generator=generator) * 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantize_picks_the_nearest_level(bits):
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    given = params(5, 3)
    codes = quantize(weight, given, bits)
    levels = torch.arange(max_code(bits) + 1).view(1, 1, -1)
    step, zero = (x.repeat_interleave(32, 1).unsqueeze(-1) for x in (given.scale, given.zero))
    distance = ((levels - zero) * step - weight.unsqueeze(-1)).abs()
    chosen = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distance.amin(-1))
    assert codes.dtype == torch.uint8
    assert codes.shape == (5, 96)


def test_dequantize_inverts_quantize_on_levels():
    given = params(3, 2)
    codes = torch.randint(0, 16, (3, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    weight = dequantize(QuantizedWeight(codes, given.scale, given.zero))
    assert torch.equal(quantize(weight, given, 4), codes)


def test_dequantize_follows_the_sign_convention():
    quantized = QuantizedWeight(
        torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[1.25]])
    )
    assert dequantize(quantized).tolist() == [[-0.625, 0.875]]
    assert dequantize(quantized, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 2), (2, 5)])
def test_quantize_refuses_a_scale_of_another_matrix(shape):
    with pytest.raises(UsageError, match=r"expected a scale \[N, G\]"):
        quantize(torch.zeros(2, 64), params(*shape), 4)
