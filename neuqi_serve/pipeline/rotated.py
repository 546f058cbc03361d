"""A checkpoint whose hidden states live in another basis, turned by random Hadamard matrices folded into its weights.

Two rotations cost nothing at inference. *The hidden states'*: with RMSNorm, whose weights are folded into the layers
behind it, a block sees nothing of an orthogonal Q between its residual stream and its layers; layers that read it
become ``W·diag(norm)·Q``, layers that write it ``Qᵀ W``, the embedding ``E·Q``, the head ``W·diag(norm)·Q``. *The
values'*: attention is linear in its values, so those of each head may be turned by R if the output projection turns
them back. A head tied to the embedding becomes one of its own, since the final norm goes into the head alone.

Reference: arXiv:2404.00456 (QuaRot), arXiv:2405.16406 (SpinQuant: R1, R2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.format.safetensors_file import StoredTensor
from neuqi_serve.format.source import SourceCheckpoint
from neuqi_serve.pipeline.selection import is_tied
from neuqi_serve.quant.rotation import random_rotation

# Blocks of RMSNorm, attention, RMSNorm, gated MLP, with nothing between a layer and the residual stream.
_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
)
_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_BLOCK = re.compile(r"(model\.layers\.\d+)\.(.+)")
_NORM_OF = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    "self_attn.qkv_proj": "input_layernorm",
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"), "post_attention_layernorm"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class RotatedCheckpoint(SourceCheckpoint):
    """``hidden`` ``[D, D]`` and ``values`` ``[d, d]`` (of a head) orthogonal, float64. Weights come out as float32."""

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    def unchanged(self, name: str) -> bool:
        """Norms of queries and keys, for one, keep their bytes."""
        return self._turned(name) is None

    def read(self, name: str) -> Tensor:
        """Read one tensor as it is in the new basis."""
        turned = self._turned(name)
        return super().read(name) if turned is None else turned().float()

    def _original(self, name: str) -> Tensor:
        return super().read(name).double()

    def _norm(self, name: str) -> Tensor:
        """The weight of a norm as a factor."""
        weight = self._original(name)
        return weight + 1 if self.architecture.startswith("Gemma") else weight

    def _turned(self, name: str) -> Callable[[], Tensor] | None:
        """What computes a tensor in the new basis, None for one that is the same."""
        if name == _EMBEDDING:
            return lambda: self._original(name) @ self.hidden
        if name == _HEAD:
            stored = _EMBEDDING if self.tensors[_HEAD] is self.tensors[_EMBEDDING] else _HEAD
            return lambda: (self._original(stored) * self._norm(_FINAL_NORM)) @ self.hidden
        match = _BLOCK.fullmatch(name)
        if name == _FINAL_NORM or (match and match[2] in _norm_names()):
            neutral = 0.0 if self.architecture.startswith("Gemma") else 1.0
            return lambda: torch.full_like(self._original(name), neutral)
        if match is None:
            return None
        module, _, part = match[2].rpartition(".")
        return self._in_block(match[1], module, part)

    def _in_block(self, block: str, module: str, part: str) -> Callable[[], Tensor] | None:
        name, norm = f"{block}.{module}.{part}", _NORM_OF.get(module)
        last = module.rpartition(".")[2]
        if part == "weight" and norm is not None:
            return lambda: self._values_out(
                last, (self._original(name) * self._norm(f"{block}.{norm}.weight")) @ self.hidden
            )
        if part == "weight" and module in _WRITERS:
            return lambda: self.hidden.T @ self._values_in(last, self._original(name))
        if part == "bias" and module in _WRITERS:
            return lambda: self._original(name) @ self.hidden
        if part == "bias" and last in ("v_proj", "qkv_proj"):
            return lambda: self._values_out(last, self._original(name).unsqueeze(1)).squeeze(1)
        return None

    def _values_out(self, module: str, weight: Tensor) -> Tensor:
        """Turn the values of each head, which are rows of ``v_proj``, or the last rows of a fused projection."""
        if module not in ("v_proj", "qkv_proj"):
            return weight
        size = len(self.values)
        rows = len(weight)
        if module == "qkv_proj":
            rows = int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"]) * size
        kept, turned = weight[: len(weight) - rows], weight[len(weight) - rows :]
        heads = self.values.T @ turned.reshape(rows // size, size, -1)
        return torch.cat([kept, heads.reshape(rows, -1)])

    def _values_in(self, module: str, weight: Tensor) -> Tensor:
        if module != "o_proj":
            return weight
        heads = weight.reshape(len(weight), -1, len(self.values)) @ self.values
        return heads.reshape(weight.shape)


def rotated_source(source: SourceCheckpoint, seed: int = 0) -> SourceCheckpoint:
    """The same model in a basis that ``seed`` decides, computed as its tensors are read; nothing is read now.

    Raises:
        UnsupportedModelError: an architecture whose blocks cannot be rotated for nothing, or unexpected tensors.
    """
    if source.architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"expected one of the architectures {', '.join(_ARCHITECTURES)} to rotate, got "
            f"{source.architecture or 'none'}: a LayerNorm, or a norm between a layer and the hidden states, lets no "
            "rotation through. Leave --rotate out."
        )
    missing = [name for name in (_EMBEDDING, _FINAL_NORM) if name not in source.tensors]
    if missing:
        raise UnsupportedModelError(
            f"expected a tensor {missing[0]} to rotate, got {source.path} without. Leave --rotate out."
        )
    config: Mapping[str, Any] = source.config
    hidden = source.tensors[_EMBEDDING].spec.shape[1]
    head = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    tensors: dict[str, StoredTensor] = dict(source.tensors)
    if is_tied(source):
        config = {**config, "tie_word_embeddings": False}
        tensors[_HEAD] = tensors[_EMBEDDING]
    return RotatedCheckpoint(
        source.path,
        config,
        tensors,
        source.shards,
        hidden=random_rotation(hidden, seed),
        values=random_rotation(head, seed + 1),
    )


def _norm_names() -> set[str]:
    return {f"{norm}.weight" for norm in _NORM_OF.values()}
