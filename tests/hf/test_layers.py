from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from neuqi_kernels import reference
from neuqi_serve.config import WeightSpec
from neuqi_serve.hf.layers import PackedEmbedding, PackedLinear, TiedHead
from neuqi_serve.quant.quantize import quantize_packed

# The CPU kernel's fixed point: 21 bits relative to the largest of 128 neighbours, summed over K = 96.
TOLERANCE = 1e-4


def linear(spec: WeightSpec, bias: bool = True, shift: float = 0.0) -> tuple[PackedLinear, torch.Tensor]:
    torch.manual_seed(3)
    weight = torch.randn(17, 96) + shift
    layer = PackedLinear(17, 96, spec, nn.Parameter(torch.randn(17)) if bias else None)
    layer.quantize(weight, None, "fast")
    return layer, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_a_packed_layer_multiplies_as_the_definition_does(bits: int, group_size: int) -> None:
    spec = WeightSpec(bits, group_size)
    layer, weight = linear(spec)
    packed = quantize_packed(weight, spec, None, "fast")
    x = torch.randn(2, 5, 96)
    expected = reference.gemm(x, packed.qweight, packed.scale, packed.zero, layer.bias, bits, group_size)
    torch.testing.assert_close(layer(x), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_codes_come_back_from_the_kernels_layout(bits: int, shift: float) -> None:
    """With a shift the zero-points are far outside the range of the codes."""
    layer, weight = linear(WeightSpec(bits, 32), shift=shift)
    expected = quantize_packed(weight, WeightSpec(bits, 32), None, "fast")
    layer(torch.randn(3, 96))
    state = layer.state_dict()
    assert torch.equal(state["qweight"], expected.qweight)
    assert torch.equal(state["scale"], expected.scale)
    assert set(state) == {"qweight", "scale", "zero", "bias"}


def test_codes_that_could_not_be_found_again_are_kept() -> None:
    layer, _ = linear(WeightSpec(4, 32))
    layer.scale[0, 0] = 0.0
    layer(torch.randn(3, 96))
    assert "qweight" in dict(layer.named_buffers())


def test_weights_are_held_once_after_the_first_call() -> None:
    layer, _ = linear(WeightSpec(4, 32))
    layer(torch.randn(3, 96))
    if layer._prepared is not None and layer._prepared[0] is layer._buffers.get("qweight"):
        pytest.skip("this backend multiplies with the canonical layout")
    assert "qweight" not in dict(layer.named_buffers())


def test_casts_are_about_activations_only() -> None:
    layer, _ = linear(WeightSpec(4, 32, "float32"))
    x = torch.randn(3, 96)
    expected = layer(x)
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.to(torch.float32)
    torch.testing.assert_close(layer(x), expected, atol=0.02, rtol=0.02)


def test_a_copy_and_a_loaded_state_answer_alike() -> None:
    layer, _ = linear(WeightSpec(3, 32))
    x = torch.randn(3, 96)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    other = PackedLinear(17, 96, WeightSpec(3, 32), nn.Parameter(torch.zeros(17)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


def test_a_tied_head_multiplies_with_the_embedding() -> None:
    torch.manual_seed(0)
    embedding = PackedEmbedding(40, 64, WeightSpec(8, 64), torch.float32)
    embedding.quantize(torch.randn(40, 64), None, "fast")
    head = TiedHead(embedding, None)
    assert list(head.parameters()) == list(head.buffers()) == []
    weight = embedding.dequantized(torch.float32)
    x = torch.randn(2, 64)
    torch.testing.assert_close(head(x), x @ weight.t(), atol=TOLERANCE, rtol=TOLERANCE)
    ids = torch.tensor([[3, 39], [0, 7]])
    torch.testing.assert_close(embedding(ids), weight[ids])
    embedding.embed_scale = 8.0
    torch.testing.assert_close(embedding(ids), weight[ids] * 8)


def test_an_embedding_answers_in_the_models_dtype() -> None:
    embedding = PackedEmbedding(40, 64, WeightSpec(8, 64), torch.float32)
    embedding.quantize(torch.randn(40, 64), None, "fast")
    embedding(torch.tensor([1]))
    assert embedding.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
