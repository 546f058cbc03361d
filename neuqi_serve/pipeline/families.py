"""The model families that can be packed: where their decoder blocks and linear layers are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuqi_serve.errors import UnsupportedModelError

_LLAMA_READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_LLAMA_WRITES = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """``blocks``: prefix of a block's tensors, up to the block number (a regular expression).

    ``reads``: last name components of linear layers that read the hidden state (K is ``hidden_size``);
    ``writes``: of those that write it (N is ``hidden_size``). ``packs_vocabulary``: vLLM's class of the model can run
    a packed output head and a packed embedding. ``ties_vocabulary``: head and embedding are one tensor unless the
    configuration says otherwise. ``experts``: blocks may hold a mixture of experts, ``….experts.3.gate_proj``.
    """

    blocks: str = r"model\.layers"
    reads: tuple[str, ...] = _LLAMA_READS
    writes: tuple[str, ...] = _LLAMA_WRITES
    packs_vocabulary: bool = True
    ties_vocabulary: bool = False
    experts: bool = False

    def block_number(self, name: str) -> int | None:
        """Return the number of the decoder block that a tensor belongs to, None outside the blocks."""
        match = re.match(rf"{self.blocks}\.(\d+)\.", name)
        return int(match.group(1)) if match else None


_LLAMA = Family()
_FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": Family(packs_vocabulary=False, ties_vocabulary=True),
    "Gemma2ForCausalLM": Family(packs_vocabulary=False, ties_vocabulary=True),
    "Gemma3ForCausalLM": Family(ties_vocabulary=True),
    "Phi3ForCausalLM": Family(reads=("qkv_proj", "gate_up_proj")),
    "PhiForCausalLM": Family(
        reads=("q_proj", "k_proj", "v_proj", "fc1"), writes=("dense", "fc2"), packs_vocabulary=False
    ),
    "OPTForCausalLM": Family(
        blocks=r"(?:model\.)?decoder\.layers",
        reads=("q_proj", "k_proj", "v_proj", "fc1"),
        writes=("out_proj", "fc2"),
        packs_vocabulary=False,
        ties_vocabulary=True,
    ),
    "Qwen2MoeForCausalLM": Family(experts=True),
    "Qwen3MoeForCausalLM": Family(experts=True),
    "MixtralForCausalLM": Family(
        reads=("q_proj", "k_proj", "v_proj", "w1", "w3"),
        writes=("o_proj", "w2"),
        packs_vocabulary=False,
        experts=True,
    ),
    "GPTNeoXForCausalLM": Family(
        blocks=r"gpt_neox\.layers",
        reads=("query_key_value", "dense_h_to_4h"),
        writes=("dense", "dense_4h_to_h"),
        packs_vocabulary=False,
    ),
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def ties_vocabulary(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` means that output head and embedding are one tensor.

    Published configurations leave out what is the default of their class.
    """
    told = config.get("tie_word_embeddings")
    if told is not None:
        return bool(told)
    names = config.get("architectures")
    family = _FAMILIES.get(str(names[0])) if isinstance(names, list) and names else None
    return family is not None and family.ties_vocabulary


def expert_count(config: Mapping[str, Any]) -> int | None:
    """Number of experts of a mixture's layer, None for a dense model."""
    return next((int(config[key]) for key in _EXPERT_COUNTS if config.get(key)), None)


def family_of(architecture: str, config: Mapping[str, Any]) -> Family:
    """Return the family of an architecture such as ``LlamaForCausalLM``.

    Raises:
        UnsupportedModelError: a mixture of experts of another architecture, an already quantized model, or an
            architecture not in the table.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"expected an unquantized model, got one quantized with {method!r}. Start from the original weights."
        )
    family = _FAMILIES.get(architecture)
    experts = expert_count(config)
    if experts is not None and not (family is not None and family.experts):
        mixtures = ", ".join(name for name, known in _FAMILIES.items() if known.experts)
        raise UnsupportedModelError(
            f"expected a dense model, or a mixture of experts of one of the architectures {mixtures}; got "
            f"{architecture or 'a model'} with {experts} experts. Choose a model of one of these."
        )
    if family is None:
        raise UnsupportedModelError(
            f"expected one of the architectures {', '.join(SUPPORTED_ARCHITECTURES)}; got "
            f"{architecture or 'a config.json without architectures'}. Choose a model of one of these."
        )
    return family
