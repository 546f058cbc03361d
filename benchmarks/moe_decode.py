"""A whole mixture of experts in vLLM on a CPU, unquantized and on the fly: ``python benchmarks/moe_decode.py``.

A random Qwen3-MoE with the layers of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, of which a token takes 8), four of
its 48, is written to a temporary folder and served at every width in a process of its own. ``decode_rate`` and
``prefill_rate``: tokens a second. ``load_seconds``: until the engine is there. ``peak_bytes``: the most anonymous
memory of the process, half a gigabyte of it imports and cache, against what the weights take in the end
(``weight_bytes``). ``--model`` names a folder for the model, which is written where there is none and stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Record, report
from safetensors.torch import save_file

SAMPLE_SECONDS = 0.02
# Random numbers that all weights are cut from.
POOL_ELEMENTS = 1 << 24
STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE."""

    layers: int = 4
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 32000

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.intermediate,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def matrices(self, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
        block, heads, kv = f"model.layers.{layer}", self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, rows, columns in (
            ("q_proj", heads, self.hidden),
            ("k_proj", kv, self.hidden),
            ("v_proj", kv, self.hidden),
            ("o_proj", self.hidden, heads),
        ):
            yield f"{block}.self_attn.{name}", (rows, columns)
        yield f"{block}.mlp.gate", (self.experts, self.hidden)
        for expert in range(self.experts):
            for name in ("gate_proj", "up_proj"):
                yield f"{block}.mlp.experts.{expert}.{name}", (self.intermediate, self.hidden)
            yield f"{block}.mlp.experts.{expert}.down_proj", (self.hidden, self.intermediate)


QUICK = Shape(layers=1, hidden=128, intermediate=64, experts=4, top_k=2, heads=2, kv_heads=1, vocabulary=512)


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Write the model, a layer in each file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL_ELEMENTS, generator=generator).mul_(STD).bfloat16()
    weight_map: dict[str, str] = {}

    def matrix(shape: tuple[int, int]) -> torch.Tensor:
        count = shape[0] * shape[1]
        if count > POOL_ELEMENTS // 2:
            return pool.repeat(-(-count // POOL_ELEMENTS))[:count].view(shape).clone()
        start = int(torch.randint(0, POOL_ELEMENTS - count, (1,), generator=generator))
        return pool[start : start + count].view(shape).clone()

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    vocabulary = (shape.vocabulary, shape.hidden)
    outer = {f"{name}.weight": matrix(vocabulary) for name in ("model.embed_tokens", "lm_head")}
    write("model-00000.safetensors", outer | {"model.norm.weight": ones})
    for layer in range(shape.layers):
        tensors = {f"{name}.weight": matrix(size) for name, size in shape.matrices(layer)}
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = ones.clone()
        for name in ("q_norm", "k_norm"):
            tensors[f"{block}.self_attn.{name}.weight"] = torch.ones(shape.head_dim, dtype=torch.bfloat16)
        write(f"model-{layer + 1:05d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that is no file's, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * next((int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")), 0)


def serve(model: Path, bits: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What ``serve_once.py`` measures, and the most anonymous memory of its process."""
    result = folder / "result.json"
    fixed = ["--device", "cpu", "--eager", "--cache-bytes", str(64 << 20)]
    sizes = ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    command = [sys.executable, str(Path(__file__).with_name("serve_once.py")), "--model", str(model)]
    command += [
        *("--bits", str(bits), "--group-size", str(options.group_size), "--result", str(result)),
        *("--batches", *map(str, options.batches), "--repeats", str(options.repeats), *fixed, *sizes),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append(anonymous_bytes(process.pid))

    watcher = threading.Thread(target=sample)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"error: expected {' '.join(command)} to succeed, it left with {code}.")
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured | {"anonymous_peak": max(samples)}


def records_of(shape: Shape, results: dict[int, dict[str, Any]], group_size: int) -> list[Record]:
    """Records of every width against 16 bits."""
    records = []
    for bits, result in results.items():
        sizes = {"layers": shape.layers, "hidden": shape.hidden, "experts": shape.experts}
        case = {**sizes, "bits": bits, "group_size": group_size if bits < 16 else 0}
        for batch, rates in result["rates"].items():
            for metric, rate in rates.items():
                base = results[16]["rates"][batch][metric]
                fields = {**case, "batch": int(batch)}
                records.append(Record(fields, metric, rate, "tokens/s", "16 bits", rate / base))
        weights, peak = result["weight_bytes"], result["anonymous_peak"]
        records.append(Record(case, "load_seconds", result["engine_seconds"], "s"))
        records.append(Record(case, "weight_bytes", weights / 1e9, "GB"))
        records.append(Record(case, "peak_bytes", peak / 1e9, "GB", "weight_bytes", peak / weights))
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one batch, one repeat")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else Shape()
    if options.quick:
        options.batches, options.repeats, options.group_size, options.new_tokens = [1], 1, 32, 8
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "model"
        if not model.exists():
            write_checkpoint(model, shape)
        results = {bits: serve(model, bits, options, Path(folder)) for bits in (16, *options.bits)}
    report("moe_decode", records_of(shape, results, options.group_size), options.out)


if __name__ == "__main__":
    main()
