import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuqi_kernels import layout
from neuqi_kernels.reference import dequantize
from neuqi_serve.config import WeightSpec
from neuqi_serve.distill.trainable_linear import AffineProduct, TrainableLinear
from neuqi_serve.quant.quantize import PackedWeight, quantize_packed

# Sums of at most a few hundred float32 products of order one, in another order.
TOLERANCE = 2e-5


def problem(rows, groups, size, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, groups * size), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randn(rows, groups, generator=generator) + (1 << bits) / 2
    x = torch.randn(3, 5, groups * size, generator=generator)
    return codes, scale, zero, x


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 7, 17]), st.sampled_from([1, 3]), st.integers(1, 600)
)
def test_gradients_are_those_of_the_product_written_out(bits, rows, groups, chunk):
    codes, scale, zero, x = problem(rows, groups, 32, bits)
    packed = layout.pack(codes, bits)
    twins = [[one.clone().requires_grad_() for one in (x, scale, zero)] for _ in range(2)]
    ours = AffineProduct.apply(twins[0][0], packed, *twins[0][1:], bits, chunk)
    steps = codes.view(rows, groups, 32) - twins[1][2].unsqueeze(-1)
    theirs = twins[1][0] @ (steps * twins[1][1].unsqueeze(-1)).view(rows, -1).T
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    for one, other in zip(*twins, strict=True):
        size = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad, other.grad, atol=TOLERANCE * size, rtol=TOLERANCE)


def test_the_backward_pass_keeps_no_weight_in_floating_point():
    codes, scale, zero, x = problem(64, 4, 64, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        AffineProduct.apply(
            x.requires_grad_(), layout.pack(codes, 2), scale.requires_grad_(), zero, 2, 1 << 24
        )
    floats = [one for one in kept if one.is_floating_point()]
    assert max(one.numel() for one in floats) < codes.numel() / 4


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_a_layer_computes_with_the_values_that_it_stores(storage):
    weight = torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec(3, 32, storage)
    packed = quantize_packed(weight, spec)
    layer = TrainableLinear(packed, spec, torch.float32)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    first = layer.stored()
    assert all(
        torch.equal(getattr(first, part), getattr(packed, part)) for part in ("qweight", "scale", "zero")
    )
    with torch.no_grad():
        layer.factor.mul_(1.0123)
        layer.zero.add_(0.0321)
    stored = layer.stored()
    assert stored.scale.dtype == packed.scale.dtype
    assert not torch.equal(stored.scale, packed.scale)
    weight = dequantize(stored.qweight, stored.scale, stored.zero, 3, 32)
    torch.testing.assert_close(layer(x), x @ weight.T, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_scale_stays_above_zero():
    spec = WeightSpec(2, 32)
    packed = PackedWeight(
        torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 1, dtype=torch.float16), torch.ones(1, 1).half()
    )
    layer = TrainableLinear(packed, spec, torch.float32)
    with torch.no_grad():
        layer.factor.fill_(-1.0)
    assert float(layer.stored().scale) > 0
