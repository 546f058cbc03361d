from __future__ import annotations

from typing import Any

import pytest
import torch

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.quantized_vocabulary import quantized_vocabulary
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.quantize import quantize_weight

SPEC = WeightSpec(4, 32)


def test_head_and_embedding_are_replaced_and_the_original_stays(tiny_llama: Any) -> None:
    tiny_llama.lm_head.weight = torch.nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    copy = quantized_vocabulary(tiny_llama, SPEC, None)
    head = tiny_llama.get_output_embeddings().weight
    expected = dequantize(quantize_weight(head.detach(), SPEC), head.dtype)
    assert torch.equal(copy.get_output_embeddings().weight, expected)
    assert copy.get_input_embeddings().weight is tiny_llama.get_input_embeddings().weight
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_tied_weights_stay_one_tensor(tiny_llama: Any) -> None:
    copy = quantized_vocabulary(tiny_llama, SPEC, SPEC)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    assert not torch.equal(copy.lm_head.weight, tiny_llama.lm_head.weight)
    with pytest.raises(UsageError, match="one spec"):
        quantized_vocabulary(tiny_llama, SPEC, None)
