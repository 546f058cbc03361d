"""Writes a trained network as a model folder that transformers and vLLM load."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from neuqi_serve.demo.network import Network
from neuqi_serve.demo.tokens import BOS, BOS_ID, CHAT_TEMPLATE, END, END_ID, PAD, PAD_ID


def write_model(folder: Path, network: Network, tokenizer: Tokenizer) -> None:
    """Write the six files of the model into ``folder``; each is written under a temporary name and renamed.

    The weights are stored in bfloat16. A README.md that is already there is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        draft = Path(scratch)
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(draft / "tokenizer.json"), pretty=False)
        (draft / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        for name, content in _documents(network).items():
            (draft / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in sorted(draft.iterdir()):
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)


def _documents(network: Network) -> dict[str, dict[str, object]]:
    shape = network.shape
    ids: dict[str, object] = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        **ids,
    }
    tokenizer_config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_positions,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    # transformers decodes greedily for do_sample, vLLM for the temperature: without it vLLM samples at 1.
    generation: dict[str, object] = {"do_sample": False, "temperature": 0.0, "max_new_tokens": 128, **ids}
    return {
        "config.json": config, "tokenizer_config.json": tokenizer_config, "generation_config.json":
        generation,
    }  # fmt: skip
