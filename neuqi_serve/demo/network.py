"""A lean trainable twin of transformers' ``LlamaForCausalLM``.

The parameter names are those of the Hugging Face layout, so ``state_dict()`` is what ``model.safetensors``
holds. The twin exists because it is about twice as fast on a CPU as the library's class: it keeps no cache,
computes logits only where there is a loss, and shares the rotary table between the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of the demo network; both sides of every matrix are multiples of 128, so real kernels apply."""

    vocab_size: int = 1536
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    max_positions: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def rotary_table(shape: NetworkShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 of shape (max_positions, head_dim), in Llama's half-split layout."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(shape.max_positions, dtype=torch.float32)[:, None] / shape.rope_theta**exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x of shape (batch, heads, length, head_dim); the dtype of x is kept."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, length, hidden) to the same shape."""
        batch, length, _ = x.shape
        dim = self.shape.head_dim
        q = rotate(self.q_proj(x).view(batch, length, -1, dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, length, -1, dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        repeats = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return result


class FeedForward(nn.Module):
    """The gated SiLU feed-forward block."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, hidden) to the same shape."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, length, hidden) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and final norm; the part that Hugging Face calls ``model``."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)


class Network(nn.Module):
    """The whole language model; the output matrix is the embedding matrix (tied)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: NetworkShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        cos, sin = rotary_table(shape)
        self.register_buffer("cos", cos.to(torch.bfloat16), persistent=False)
        self.register_buffer("sin", sin.to(torch.bfloat16), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = 0.02 if "embed" in name else 0.6 * weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale /= (2 * shape.layers) ** 0.5
                nn.init.normal_(weight, std=scale, generator=generator)

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits after some of the positions of ``tokens`` (int64, (batch, length)).

        ``rows`` (int64, (count,)) are the positions in the flattened tokens; the result is float32 of shape
        (count, vocab). Raises ValueError when the rows of tokens are longer than the shape allows.
        """
        length = tokens.shape[1]
        if length > self.shape.max_positions:
            raise ValueError(f"expected at most {self.shape.max_positions} tokens in a row, got {length}")
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        kept = x.reshape(-1, x.shape[-1])[rows]
        return F.linear(self.model.norm(kept), self.model.embed_tokens.weight).float()
