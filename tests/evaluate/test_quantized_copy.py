from functools import partial

import pytest
import torch
from torch import nn

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.evaluate.quantized_copy import block_linears, quantized_copy
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.quantize import quantize_weight

BLOCK_LINEARS = {
    f"model.layers.{block}.{name}"
    for block in (0, 1)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip
minmax = partial(quantize_weight, preset="minmax")


def test_block_linears_are_those_of_the_blocks(tiny_llama):
    assert set(block_linears(tiny_llama)) == BLOCK_LINEARS


def test_routers_are_no_block_linears():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(32, 4), "up": nn.Linear(32, 32)})])
    assert set(block_linears(model)) == {"layers.0.up"}


def test_copy_changes_the_block_linears_and_nothing_else(tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    found = quantized_copy(tiny_llama, WeightSpec(2, 32), minmax)
    assert set(found.layers) == BLOCK_LINEARS
    assert not found.unfit
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, before[name]) != (name.removesuffix(".weight") in BLOCK_LINEARS), name


def test_original_is_left_as_it_was(tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        expected = tiny_llama(input_ids=tokens).logits
        found = quantized_copy(tiny_llama, WeightSpec(2, 32), minmax)
        assert not torch.equal(found.model(input_ids=tokens).logits, expected)
        assert torch.equal(tiny_llama(input_ids=tokens).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_copied_weights_are_the_dequantized_ones(tiny_llama):
    spec = WeightSpec(3, 32)
    model = tiny_llama.to(torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach()
    found = quantized_copy(model, spec).model.get_submodule(name).weight
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, dequantize(quantize_weight(weight, spec), torch.bfloat16))


def test_bits_per_weight_count_scale_and_zero_point(tiny_llama):
    assert quantized_copy(tiny_llama, WeightSpec(2, 32), minmax).bits_per_weight == 3.0
    # A whole row has one scale and zero-point, 32 bits: down_proj has rows of 96 weights, all others of 64.
    found = quantized_copy(tiny_llama, WeightSpec(4, -1), minmax).bits_per_weight
    long, short = 2 * 64 * 96, 2 * 64 * (64 + 32 + 32 + 64 + 96 + 96)
    assert found == pytest.approx(4 + (long * 32 / 96 + short * 32 / 64) / (long + short))


def test_layers_that_the_group_size_does_not_divide_keep_their_weights(tiny_llama):
    found = quantized_copy(tiny_llama, WeightSpec(2, 64), minmax)
    unfit = {f"model.layers.{block}.mlp.down_proj" for block in (0, 1)}
    assert set(found.unfit) == unfit
    assert set(found.layers) == BLOCK_LINEARS - unfit
    for name in unfit:
        weight = tiny_llama.get_submodule(name).weight
        assert torch.equal(found.model.get_submodule(name).weight, weight)


def test_group_size_that_divides_no_layer_is_refused(tiny_llama):
    with pytest.raises(UsageError, match="does not divide"):
        quantized_copy(tiny_llama, WeightSpec(2, 128), minmax)


def test_model_without_block_linears_is_refused():
    with pytest.raises(UnsupportedModelError, match="none in Linear"):
        quantized_copy(nn.Linear(32, 32), WeightSpec(2, 32))


def test_stacked_experts_are_refused():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(32, 32), nn.ParameterDict({"experts": torch.zeros(2, 32, 32)})])
    with pytest.raises(UnsupportedModelError, match=r"stacked weights such as layers\.1\.experts"):
        block_linears(model)


def test_copy_can_be_made_in_inference_mode_with_several_threads(tiny_llama):
    torch.set_num_threads(2)
    with torch.inference_mode():
        found = quantized_copy(tiny_llama, WeightSpec(2, 32), minmax)
    assert not any(value.is_inference() for value in found.model.parameters())
