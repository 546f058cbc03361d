"""One configuration of ``gpu_serve.py`` in a process of its own: loads the model in vLLM, measures, writes a JSON file.

    python benchmarks/serve_once.py --model FOLDER --bits 3 --device cuda --batches 1 8 --result FILE

``--bits 16`` is the model as it is. The engine runs in this process, so that its memory is this process's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# vLLM reads these while it is imported. Only our plugin: others register what they replace in vLLM.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "neuqi",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from peak_sampler import PeakSampler, gpu_bytes_in_use

UNQUANTIZED_BITS = 16
# Room for the blocks that are not full.
CACHE_MARGIN = 1.25


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cache-bytes", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return parser.parse_args(arguments)


def start_engine(options: argparse.Namespace) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": options.prompt_tokens + options.new_tokens + 1,
        "max_num_seqs": max(options.batches),
        "enforce_eager": options.eager,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": int(CACHE_MARGIN * options.cache_bytes),
        # The repeats send the same prompts: without this they would not be computed again.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if options.bits != UNQUANTIZED_BITS:
        recipe = {"bits": options.bits, "group_size": options.group_size}
        settings |= {"quantization": "neuqi", "additional_config": {"neuqi": recipe}}
    return LLM(str(options.model), **settings)


def seconds_of(llm: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds until every prompt has its tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    made = {len(output.outputs[0].token_ids) for output in outputs}
    if made != {new_tokens}:
        raise RuntimeError(f"expected {new_tokens} tokens for each prompt, got {sorted(made)}.")
    return seconds


def measure(llm: Any, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second while reading prompts, and while writing answers: what more than the first token takes."""
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(batch)
    size = (batch, options.prompt_tokens)
    prompts = torch.randint(3, vocabulary, size, generator=generator).tolist()
    seconds_of(llm, prompts, options.new_tokens)
    prefill, decode = [], []
    for _ in range(options.repeats):
        first = seconds_of(llm, prompts, 1)
        whole = seconds_of(llm, prompts, options.new_tokens)
        prefill.append(batch * options.prompt_tokens / first)
        # Not negative: on a busy machine the shorter run may be the slower one.
        decode.append(batch * (options.new_tokens - 1) / max(whole - first, 1e-9))
    return {"prefill_rate": statistics.median(prefill), "decode_rate": statistics.median(decode)}


def resident_peak_bytes(llm: Any) -> int:
    return int(llm.collective_rpc("neuqi_load_report")[0]["peak_rss_bytes"])


def run(options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    before = gpu_bytes_in_use() if on_gpu else 0
    with PeakSampler(gpu_bytes_in_use if on_gpu else lambda: 0) as sampler:
        started = time.perf_counter()
        llm = start_engine(options)
        engine_seconds = time.perf_counter() - started
        load_peak = sampler.peak
        report = llm.collective_rpc("neuqi_load_report")[0]
        rates = {batch: measure(llm, batch, options) for batch in options.batches}
    weights = report["weight_bytes"]
    return {
        "engine_seconds": engine_seconds,
        "phases": report["phases"],
        "kernels": report["kernels"],
        "weight_bytes": weights["packed"] + weights["scale_zero"] + weights["unquantized"],
        "load_peak_bytes": load_peak - before if on_gpu else report["peak_rss_bytes"],
        "peak_bytes": sampler.peak - before if on_gpu else resident_peak_bytes(llm),
        "rates": rates,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: expected a CUDA GPU, torch sees none. Give --device cpu to run on the processor."
        )
    options.result.write_text(json.dumps(run(options)))


if __name__ == "__main__":
    main()
