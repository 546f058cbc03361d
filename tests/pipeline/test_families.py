from __future__ import annotations

from typing import Any

import pytest

from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.pipeline.families import SUPPORTED_ARCHITECTURES, family_of


@pytest.mark.parametrize(
    ("architecture", "tensor", "block"),
    [
        ("LlamaForCausalLM", "model.layers.12.self_attn.q_proj.weight", 12),
        ("Qwen3ForCausalLM", "model.layers.0.mlp.down_proj.weight", 0),
        ("MixtralForCausalLM", "model.layers.2.block_sparse_moe.experts.7.w1.weight", 2),
        ("Phi3ForCausalLM", "model.layers.3.self_attn.qkv_proj.weight", 3),
        ("OPTForCausalLM", "model.decoder.layers.7.fc1.weight", 7),
        ("OPTForCausalLM", "decoder.layers.7.fc1.weight", 7),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.1.attention.query_key_value.weight", 1),
        ("LlamaForCausalLM", "model.embed_tokens.weight", None),
        ("LlamaForCausalLM", "vision.model.layers.1.fc.weight", None),
        ("OPTForCausalLM", "model.decoder.project_in.weight", None),
    ],
)
def test_family_knows_its_blocks(architecture: str, tensor: str, block: int | None) -> None:
    assert family_of(architecture, {}).block_number(tensor) == block


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_every_supported_architecture_has_layers_to_check(architecture: str) -> None:
    family = family_of(architecture, {})
    assert family.reads
    assert family.writes


@pytest.mark.parametrize(
    ("architecture", "config", "part"),
    [
        ("GPT2LMHeadModel", {}, "LlamaForCausalLM.*got GPT2LMHeadModel"),
        ("", {}, "without architectures"),
        ("DeepseekV3ForCausalLM", {"n_routed_experts": 8}, "Qwen3MoeForCausalLM.*Mixtral.*8 experts"),
        ("LlamaForCausalLM", {"n_routed_experts": 4}, "4 experts"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ("LlamaForCausalLM", {"quantization_config": "odd"}, "'odd'"),
    ],
)
def test_other_models_are_refused(architecture: str, config: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=part):
        family_of(architecture, config)
