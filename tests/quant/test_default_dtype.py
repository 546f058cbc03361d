import torch

from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.quantize import quantize_packed


def test_quantize_packed_ignores_the_default_dtype_and_gradients() -> None:
    """vLLM sets the model's dtype as torch's default while it loads; parameters require gradients."""
    weight = torch.nn.Parameter(
        torch.randn(17, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    )
    spec = WeightSpec(bits=3, group_size=32)
    expected = quantize_packed(weight, spec)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = quantize_packed(weight, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.qweight, expected.qweight)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
