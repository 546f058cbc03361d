"""The methods of output head and token embedding: packed rows that are multiplied, or gathered and de-quantized."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from neuqi_serve.config import EMBEDDING, LM_HEAD
from neuqi_serve.vllm_plugin.linear import NeuqiLinearMethod, NeuqiOnlineLinearMethod, NeuqiPackedLinearMethod


class TiedHeadMethod(QuantizeMethodBase):
    """An output head without weights of its own: it multiplies with those of the embedding, stored once."""

    def __init__(self, embed_tokens: Any) -> None:
        self._embed_tokens = embed_tokens

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Create nothing."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x [..., K] · Ŵᵀ + bias`` as ``[..., N]``, Ŵ being the embedding."""
        weights = self._embed_tokens
        y = weights.quant_method.apply(weights, x, bias)
        assert isinstance(y, torch.Tensor)
        return y


def tie(layer: Any, embed_tokens: Any) -> Any:
    """Let the head ``layer`` use the weights of ``embed_tokens``, whatever method holds them."""
    for name in ("weight", "qweight", "scale", "zero"):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.quant_method = TiedHeadMethod(embed_tokens)
    return layer


class _Vocabulary(NeuqiLinearMethod):
    """What packed and on-the-fly weights share: one row per token, sharded along the vocabulary, padding rows zero."""

    def role(self, layer: Any) -> str:
        """Return ``lm_head`` or ``embed_tokens``."""
        return LM_HEAD if isinstance(layer, ParallelLMHead) else EMBEDDING

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows ``input_ [...]`` (int64, this rank's numbering) as ``[..., K]`` in the model's dtype."""
        y = torch.ops.neuqi.embedding(
            input_,
            layer.qweight,
            layer.scale,
            layer.zero,
            self.n,
            self.k,
            self.spec.bits,
            self.spec.group_size,
            self.dtype,
            self.backend,
        )
        assert isinstance(y, torch.Tensor)
        return y

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the embedding's weights instead of packing them a second time."""
        self.config.progress.forget(self.record.original_bytes)
        return tie(layer, embed_tokens)


class NeuqiPackedVocabularyMethod(_Vocabulary, NeuqiPackedLinearMethod):
    """Head or embedding of a packed checkpoint."""


class NeuqiOnlineVocabularyMethod(_Vocabulary, NeuqiOnlineLinearMethod):
    """Head or embedding that is packed as it arrives."""


class UnquantizedHeadMethod(UnquantizedEmbeddingMethod):
    """A head in the checkpoint's own precision; tied, it follows the embedding, which may be packed."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the embedding's weights, in whatever form they are."""
        if isinstance(embed_tokens.quant_method, _Vocabulary):
            return tie(layer, embed_tokens)
        return super().tie_weights(layer, embed_tokens)
