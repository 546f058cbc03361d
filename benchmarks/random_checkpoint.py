"""A Llama checkpoint with random weights, made on the spot: the speed of a model does not depend on what it says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

DTYPE = torch.bfloat16
STD = 0.02
SHARD_BYTES = 2 << 30
# Random numbers that all weights are cut from, at offsets that differ: making each by itself takes minutes.
POOL_ELEMENTS = 1 << 24
# What has to be left on the disk beside the checkpoint.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int

    def config(self) -> dict[str, object]:
        """The content of its ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, block by block."""
        named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for index in range(self.layers):
            block = f"model.layers.{index}"
            named |= {
                f"{block}.self_attn.q_proj.weight": (queries, self.hidden),
                f"{block}.self_attn.k_proj.weight": (keys, self.hidden),
                f"{block}.self_attn.v_proj.weight": (keys, self.hidden),
                f"{block}.self_attn.o_proj.weight": (self.hidden, queries),
                f"{block}.mlp.gate_proj.weight": (self.ffn, self.hidden),
                f"{block}.mlp.up_proj.weight": (self.ffn, self.hidden),
                f"{block}.mlp.down_proj.weight": (self.hidden, self.ffn),
                f"{block}.input_layernorm.weight": (self.hidden,),
                f"{block}.post_attention_layernorm.weight": (self.hidden,),
            }
        return named | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(math.prod, self.tensors().values())) * DTYPE.itemsize

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE.itemsize * tokens


SHAPES = {
    # The sizes of Llama-3.1-8B.
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, 131072),
    "tiny": Shape(128, 384, 2, 2, 1, 64, 320, 1024),
}


def require_space(shape: Shape, folder: Path) -> None:
    """Stop where the disk of ``folder`` has no room for the checkpoint."""
    free = shutil.disk_usage(folder).free
    if free < shape.bytes + SPARE_BYTES:
        raise SystemExit(
            f"error: expected {(shape.bytes + SPARE_BYTES) / 1e9:.1f} GB free in {folder} for the checkpoint, "
            f"there are {free / 1e9:.1f}. Name a folder on another disk with --folder."
        )


def write_checkpoint(shape: Shape, folder: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write ``config.json`` and the shards of random weights into ``folder``, which must be empty, and return it."""
    require_space(shape, folder)
    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(STD).to(DTYPE)
    shards = list(shards_of(shape, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: random_tensor(pool, size, len(weight_map) + i)
            for i, (name, size) in enumerate(names.items())
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": shape.bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return folder


def shards_of(shape: Shape, shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in groups of at most ``shard_bytes``, or of a single larger one."""
    shard: dict[str, tuple[int, ...]] = {}
    filled = 0
    for name, size in shape.tensors().items():
        size_bytes = math.prod(size) * DTYPE.itemsize
        if shard and filled + size_bytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = size
        filled += size_bytes
    yield shard


def random_tensor(pool: torch.Tensor, size: tuple[int, ...], number: int) -> torch.Tensor:
    """A norm of ones, or random weights from the pool, from a place of its own on."""
    if len(size) == 1:
        return torch.ones(size, dtype=DTYPE)
    count = math.prod(size)
    start = number * 1_000_003 % len(pool)
    repeats = -(-(start + count) // len(pool))
    return pool.repeat(repeats)[start : start + count].clone().view(size)
