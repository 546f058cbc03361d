"""Random Llama models on disk, in every format that the speed benchmarks compare: the weights mean nothing, their
bytes and shapes are those of a real model.

One layer is drawn and written for all of them: speed does not depend on the values.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.format.manifest import PackedModule
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.safetensors_file import TensorSpec
from neuqi_serve.format.writer import write_checkpoint
from neuqi_serve.quant.quantize import PackedWeight

STANDARD_DEVIATION = 0.02
GPTQ_BITS, GPTQ_GROUP = 4, 128


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes as in its ``config.json``; ``head_dim`` is hidden size over heads."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 2048

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """``[N, K]`` of the linear layers of a block, by the end of their name."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }

    def modules(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and ``[N, K]`` of every matrix, the vocabulary's included."""
        yield "model.embed_tokens", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name, shape in self.linears().items():
                yield f"model.layers.{layer}.{name}", shape
        yield "lm_head", (self.vocab, self.hidden)


LLAMA_1B = Shape(layers=22, hidden=2048, ffn=5632, heads=32, kv_heads=4, vocab=32000)
# As many layers, and weights that cost nothing: what is left is the engine's own time.
LLAMA_NARROW = Shape(layers=22, hidden=256, ffn=704, heads=4, kv_heads=2, vocab=1024)
LLAMA_TINY = Shape(layers=2, hidden=256, ffn=768, heads=4, kv_heads=2, vocab=512)


def norms(shape: Shape) -> dict[str, torch.Tensor]:
    ones = {"model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)}
    for layer in range(shape.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            ones[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    return ones


def matrices(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """One random tensor per kind of matrix, shared by all layers."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, torch.Tensor] = {}
    found = {}
    for name, size in shape.modules():
        kind = name.rpartition(".")[2]
        if kind not in drawn:
            values = torch.empty(size, dtype=torch.float32).normal_(
                std=STANDARD_DEVIATION, generator=generator
            )
            drawn[kind] = values.to(dtype)
        found[name] = drawn[kind]
    return found


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """A tokenizer that knows one word per token, for servers that insist on one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, shape.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_bf16(shape: Shape, folder: Path) -> Path:
    folder.mkdir()
    weights = {f"{name}.weight": tensor.clone() for name, tensor in matrices(shape).items()}
    save_file(weights | norms(shape), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config()))
    write_tokenizer(shape, folder)
    return folder


def write_packed(shape: Shape, folder: Path, spec: WeightSpec, head_bits: int, embedding_bits: int) -> Path:
    """A packed checkpoint of random codes."""
    vocabulary = VocabularyBits(head_bits, embedding_bits)
    recipe = QuantizationRecipe(spec).with_vocabulary(vocabulary, tied=False)
    modules, plan = {}, {}
    for name, size in shape.modules():
        if recipe.keeps(name):
            plan[f"{name}.weight"] = TensorSpec("BF16", size)
            continue
        modules[name] = PackedModule(recipe.spec_of(name), size, "BF16")
        plan |= {f"{name}.{part}": one for part, one in modules[name].tensors.items()}
    ones = norms(shape)
    plan |= {name: TensorSpec("BF16", tuple(tensor.shape)) for name, tensor in ones.items()}
    generator = torch.Generator().manual_seed(0)
    with write_checkpoint(folder, plan) as writer:
        for name, size in shape.modules():
            if name in modules:
                writer.write_module(name, random_codes(modules[name], generator))
            else:
                writer.write(f"{name}.weight", torch.full(size, STANDARD_DEVIATION, dtype=torch.bfloat16))
        for name, tensor in ones.items():
            writer.write(name, tensor)
        writer.finish(shape.config(), recipe, modules, source={"name": "random"}, quantization={})
    write_tokenizer(shape, folder)
    return folder


def random_codes(module: PackedModule, generator: torch.Generator) -> PackedWeight:
    tensors, bits = module.tensors, module.spec.bits
    size = tensors["qweight"].shape
    words = torch.randint(-(1 << 31), 1 << 31, size, generator=generator, dtype=torch.int64)
    groups = tensors["scale"].shape
    step = 6 * STANDARD_DEVIATION / (1 << bits)
    scale = torch.full(groups, step, dtype=torch.float16)
    zero = torch.full(groups, ((1 << bits) - 1) / 2, dtype=torch.float16)
    return PackedWeight(words.to(torch.int32), scale, zero)


def write_gptq(shape: Shape, folder: Path) -> Path:
    """A symmetric 4-bit GPTQ checkpoint of random codes, head and embedding in bf16: what vLLM's own CPU path takes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = norms(shape)
    for name, (n, k) in shape.modules():
        if ".layers." not in name:
            tensors[f"{name}.weight"] = torch.full((n, k), STANDARD_DEVIATION, dtype=torch.bfloat16)
            continue
        size = (k * GPTQ_BITS // 32, n)
        words = torch.randint(-(1 << 31), 1 << 31, size, generator=generator, dtype=torch.int64)
        tensors[f"{name}.qweight"] = words.to(torch.int32)
        groups = k // GPTQ_GROUP
        tensors[f"{name}.scales"] = torch.full((groups, n), 6 * STANDARD_DEVIATION / 16, dtype=torch.bfloat16)
        tensors[f"{name}.qzeros"] = torch.full((groups, n * GPTQ_BITS // 32), 0x77777777, dtype=torch.int32)
        tensors[f"{name}.g_idx"] = torch.arange(k, dtype=torch.int32) // GPTQ_GROUP
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": GPTQ_BITS, "group_size": GPTQ_GROUP}
    quantization |= {"desc_act": False, "sym": True, "lm_head": False}
    (folder / "config.json").write_text(json.dumps(shape.config() | {"quantization_config": quantization}))
    write_tokenizer(shape, folder)
    return folder


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(shape: Shape, path: Path) -> Path:
    """The model in float16 as a GGUF file, from which llama.cpp quantizes."""
    import gguf
    import numpy as np

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    special = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    tokens = (special + [f"w{i}".encode() for i in range(shape.vocab)])[: shape.vocab]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(shape.vocab)])
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * shape.vocab)][: shape.vocab])
    weights = {name: tensor.numpy() for name, tensor in matrices(shape, torch.float16).items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens"])
    writer.add_tensor("output.weight", weights["lm_head"])
    ones = np.ones(shape.hidden, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape.layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, short in _GGUF_NAMES.items():
            writer.add_tensor(f"blk.{layer}.{short}.weight", weights[f"model.layers.{layer}.{name}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(path)


def quantize_gguf(source: Path, path: Path, kind: str, threads: int) -> Path:
    """Quantize with llama.cpp itself; ``kind``: the name of one of its file types, e.g. ``Q4_0``.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    from llama_cpp import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    partial = path.with_suffix(".partial")
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(parameters)
    )
    if failed:
        raise RuntimeError(f"expected llama.cpp to quantize {source.name} to {kind}, got error {failed}.")
    return partial.rename(path)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def weight_bytes(path: Path) -> int:
    """Bytes of a model's weight files."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.glob("*.safetensors"))
    )
