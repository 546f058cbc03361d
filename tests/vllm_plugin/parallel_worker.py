"""Runs engines of several processes and writes what each answers and holds: ``parallel_worker.py CASES OUT``.

``CASES``: a JSON list of objects with ``name``, ``model``, ``options`` of ``vllm.LLM`` and, for folders damaged on
purpose, ``unchecked``. Worker processes are forked from this one, which has imported vLLM and computes nothing
before the last case: a spawned worker would import everything once more.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = [[1, 17, 254, 33, 9], [1, 300, 5]]
NEW_TOKENS = 4


def settings() -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # One core for each of two ranks.
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def held_weights(self: Any) -> dict[str, list[str]]:
    """Every packed layer of a rank: its rows, de-quantized, as hexadecimal bytes."""
    held = {}
    for name, module in self.get_model().named_modules():
        if hasattr(module, "neuqi_record"):
            weight = module.quant_method.dequantize_weight(module).float().contiguous()
            held[name] = [row.numpy().tobytes().hex() for row in weight]
    return held


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from neuqi_serve.vllm_plugin.config import NeuqiConfig

    if case.get("unchecked"):
        NeuqiConfig.maybe_update_config = lambda *_, **__: None
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
    )
    common = {"max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True, "skip_tokenizer_init": True}
    common |= {"kv_cache_memory_bytes": 16 << 20, "disable_log_stats": True, "dtype": "float32"}
    started = time.monotonic()
    try:
        llm = LLM(case["model"], **(common | case["options"]))
    except Exception as error:
        kind = type(error).__name__
        return {"error": kind, "message": str(error), "seconds": time.monotonic() - started}
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    answers = [
        (list(o.outputs[0].token_ids), [next(iter(s.values())).logprob for s in o.outputs[0].logprobs])
        for o in outputs
    ]
    result = {
        "answers": answers,
        "reports": llm.collective_rpc("neuqi_load_report"),
        "weights": llm.collective_rpc("held_weights"),
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main(cases: str, out: str) -> None:
    os.environ.update(settings())
    import vllm.v1.executor.multiproc_executor as executor
    from vllm.v1.worker.worker_base import WorkerBase

    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    WorkerBase.held_weights = held_weights
    results = {case["name"]: run(case) for case in json.loads(Path(cases).read_text())}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
