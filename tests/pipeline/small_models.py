"""Random models of every family, a few thousand weights each, in the layout in which transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Name of the configuration class without "Config", its arguments, the layers of one block by stage.
_LLAMA_STAGES = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
FAMILIES: dict[str, tuple[str, dict[str, Any], list[list[str]]]] = {
    "llama": ("Llama", {**_GATED, "tie_word_embeddings": True}, _LLAMA_STAGES),
    "mistral": ("Mistral", {**_GATED, "sliding_window": 8}, _LLAMA_STAGES),
    "qwen2": ("Qwen2", _GATED, _LLAMA_STAGES),
    "qwen3": ("Qwen3", {**_GATED, "head_dim": 32}, _LLAMA_STAGES),
    "gemma": ("Gemma", {**_GATED, "head_dim": 16}, _LLAMA_STAGES),
    "gemma3": (
        "Gemma3Text",
        {
            **_GATED,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _LLAMA_STAGES,
    ),
    "phi": (
        "Phi",
        {**_COMMON, "intermediate_size": 96},
        [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
    ),
    "phi3": (
        "Phi3",
        {**_GATED, "pad_token_id": 0},
        [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    ),
    "opt": (
        "OPT",
        {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
        [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    ),
    "gpt_neox": (
        "GPTNeoX",
        {**_COMMON, "intermediate_size": 96},
        [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    ),
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_GATED, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", {**_GATED, **_EXPERTS, "head_dim": 16}),
}


def write_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Save a random model; return it, in float32."""
    import transformers

    name, settings = (FAMILIES.get(family) or MIXTURES[family])[:2]
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for key, value in model.named_parameters():
            # Norms and biases that do something, weights that make the blocks matter.
            scale = 0.3 if value.dim() < 2 else 0.15
            value.data += scale * torch.randn_like(value) if "norm" in key or value.dim() > 1 else 0.1
    model.save_pretrained(folder)
    return model


def tokens(sequences: int = 6, length: int = 16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (sequences, length), generator=generator)
