"""One of several ranks that run a model with vLLM, each in a process of its own; started by test_experts.py.

Arguments: a JSON list of cases ``{"model": …, "options": {…}}``, prompts as a JSON list, new tokens, a file for the
answers: per case the tokens and log-probabilities, and the weight bytes of every rank.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def answers(case: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    import torch.distributed
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        case["model"],
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=True,
        distributed_executor_backend="external_launcher",
        **case["options"],
    )
    sampling = SamplingParams(
        max_tokens=new_tokens, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    logprobs = [
        [
            step[token].logprob
            for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
        ]
        for o in outputs
    ]
    report = llm.collective_rpc("neuqi_load_report")[0]
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"tokens": tokens, "logprobs": logprobs, "weight_bytes": [r["weight_bytes"] for r in reports]}


def main() -> None:
    cases, prompts, new_tokens, out = sys.argv[1:]
    results = [answers(case, json.loads(prompts), int(new_tokens)) for case in json.loads(cases)]
    Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
