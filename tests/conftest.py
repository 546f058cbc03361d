"""Small checkpoints that several test folders need."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB = 64, 96, 48


def llama_tensors(layers: int, tied: bool, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(out_features: int, in_features: int) -> torch.Tensor:
        return (torch.randn(out_features, in_features, generator=generator) * 0.05).to(dtype)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "o_proj"):
            tensors[f"{block}.self_attn.{name}.weight"] = matrix(HIDDEN, HIDDEN)
        for name in ("k_proj", "v_proj"):
            tensors[f"{block}.self_attn.{name}.weight"] = matrix(HIDDEN // 2, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{block}.mlp.{name}.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{block}.mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = torch.ones(HIDDEN, dtype=dtype)
    if not tied:
        tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return tensors


@pytest.fixture
def write_llama(tmp_path: Path) -> Callable[..., Path]:
    """``write_llama(name, layers, tied, dtype, shards, seed, config, tensors) -> folder``: a random tiny Llama.

    ``config`` and ``tensors`` replace entries; a tensor given as None is left out.
    """

    def write(
        name: str = "tiny-llama",
        layers: int = 2,
        tied: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor | None] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        body = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": VOCAB,
            "tie_word_embeddings": tied,
            "dtype": str(dtype).removeprefix("torch."),
            **(config or {}),
        }
        (folder / "config.json").write_text(json.dumps(body))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        content = {**llama_tensors(layers, tied, dtype, seed), **(tensors or {})}
        present = {key: tensor for key, tensor in content.items() if tensor is not None}
        write_shards(folder, present, shards)
        return folder

    return write


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Importance matrices of llama.cpp, written byte by byte from the definition of their two layouts.
_STRING, _ARRAY, _UINT32, _F32, _ALIGNMENT = 8, 9, 4, 0, 32


def write_legacy_imatrix(
    path: Path, entries: Mapping[str, tuple[int, Sequence[float]]], trailer: bool = True
) -> Path:
    """``entries``: name → (calls, mean squares); the file holds the means times the calls."""
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, means) in entries.items():
        encoded = name.encode()
        parts.append(struct.pack("<i", len(encoded)) + encoded)
        parts.append(struct.pack("<ii", calls, len(means)))
        parts.append(struct.pack(f"<{len(means)}f", *(mean * calls for mean in means)))
    if trailer:
        parts.append(struct.pack("<ii", 7, 4) + b"text")
    path.write_bytes(b"".join(parts))
    return path


def write_gguf_imatrix(
    path: Path,
    entries: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    kind: str = "imatrix",
    version: int = 3,
) -> Path:
    """``entries``: name → (sums of squares, counts); several counts mean as many experts."""
    tensors: list[tuple[str, tuple[int, ...], Sequence[float]]] = []
    for name, (sums, counts) in entries.items():
        tensors.append((f"{name}.in_sum2", (len(sums) // len(counts), len(counts)), sums))
        tensors.append((f"{name}.counts", (1, len(counts)), counts))
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 4)
    head += _string("general.type") + struct.pack("<I", _STRING) + _string(kind)
    head += _string("imatrix.datasets") + struct.pack("<IIQ", _ARRAY, _STRING, 1) + _string("calibration.txt")
    head += _string("imatrix.chunk_count") + struct.pack("<II", _UINT32, 45)
    head += _string("imatrix.chunk_size") + struct.pack("<II", _UINT32, 512)
    data = b""
    for name, shape, values in tensors:
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", _F32, len(data))
        data += _aligned(struct.pack(f"<{len(values)}f", *values))
    path.write_bytes(_aligned(head) + data)
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % _ALIGNMENT)


@pytest.fixture
def write_legacy() -> Callable[..., Path]:
    """``write_legacy_imatrix``."""
    return write_legacy_imatrix


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """``write_gguf_imatrix``."""
    return write_gguf_imatrix
