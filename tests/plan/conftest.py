from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", GROUPED),
    "MistralForCausalLM": ("mistral", GROUPED),
    "Qwen2ForCausalLM": ("qwen2", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("qwen3", {**GROUPED, "tie_word_embeddings": True}),
    "GemmaForCausalLM": ("gemma", GROUPED),
    "Gemma2ForCausalLM": ("gemma2", GROUPED),
    "Gemma3ForCausalLM": ("gemma3_text", GROUPED),
    "PhiForCausalLM": ("phi", COMMON),
    "Phi3ForCausalLM": ("phi3", {**GROUPED, "head_dim": 16}),
    "OPTForCausalLM": ("opt", {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "GPTNeoXForCausalLM": ("gpt_neox", COMMON),
    "MixtralForCausalLM": ("mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}


@pytest.fixture(params=list(FAMILIES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    """The configuration of a small model of this architecture."""

    def make(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
        model_type, sizes = FAMILIES[architecture]
        return {"architectures": [architecture], "model_type": model_type, **sizes, **changes}

    return make


@pytest.fixture
def write_config(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Write only that configuration and return its path."""

    def write(architecture: str = "LlamaForCausalLM", **changes: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config(architecture, **changes)))
        return path

    return write
