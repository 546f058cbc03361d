"""``neuqi serve`` itself: the checks before the start, and a real server from start to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.server.command_line import OwnOptions
from neuqi_serve.server.defaults import Choice
from neuqi_serve.server.endpoints import GRACEFUL_SHUTDOWN_SECONDS
from neuqi_serve.server.launch import check_settings, complete, with_environment
from neuqi_serve.server.served_model import ServedModel

CONFIG = {"hidden_size": 256, "intermediate_size": 512}
BITS, GROUP_SIZE = 3, 64
# As the fixture ``server`` says it.
STREAMS, DRAIN_SECONDS = 32, 120
# Ending the processes once everything is answered, on a machine that others use too.
TEARDOWN_SECONDS = 40
NEUQI = Path(sys.executable).with_name("neuqi")


def _packed(bits: int = 3, group_size: int = 64) -> ServedModel:
    recipe = QuantizationRecipe(WeightSpec(bits, group_size))
    return ServedModel(
        "p", "/p", CONFIG, "packed", method="neuqi", spec=WeightSpec(bits, group_size), recipe=recipe
    )


def _plain(name: str = "m") -> ServedModel:
    return ServedModel(name, f"/models/{name}", CONFIG, "unquantized")


def _foreign() -> ServedModel:
    return ServedModel("f", "/f", CONFIG, "foreign", method="gptq")


@pytest.mark.parametrize(
    "own", [OwnOptions(), OwnOptions(bits=3), OwnOptions(group_size=64, scale_dtype="float16")]
)
def test_a_packed_model_accepts_what_it_is(own: OwnOptions) -> None:
    check_settings(_packed(), own, None)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (OwnOptions(bits=4), "expected --bits 3, as p is packed, got 4"),
        (OwnOptions(group_size=128), "expected --group-size 64"),
        (OwnOptions(scale_dtype="float32"), "expected --scale-dtype float16"),
        (OwnOptions(preset="fast"), "expected no --preset, got fast"),
        (OwnOptions(quantize=False), "which is packed"),
    ],
)
def test_a_packed_model_refuses_what_contradicts_it(own: OwnOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_settings(_packed(), own, None)


def test_importance_needs_a_file_and_an_unquantized_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected an importance file, got .*absent"):
        check_settings(_plain(), OwnOptions(group_size=64, importance=tmp_path / "absent"), None)
    (tmp_path / "h").touch()
    check_settings(_plain(), OwnOptions(group_size=64, importance=tmp_path / "h"), None)
    with pytest.raises(UsageError, match="expected no --importance, as p is packed"):
        check_settings(_packed(), OwnOptions(importance=tmp_path / "h"), None)
    with pytest.raises(UsageError, match="expected no --importance with"):
        check_settings(_plain(), OwnOptions(quantize=False, importance=tmp_path / "h"), None)


def test_widths_of_the_vocabulary_are_checked_against_the_model() -> None:
    recipe = QuantizationRecipe(WeightSpec(3, 64)).with_vocabulary(VocabularyBits(4, 16), tied=False)
    packed = replace(_packed(), recipe=recipe)
    check_settings(packed, OwnOptions(lm_head_bits=4, embedding_bits=16), None)
    with pytest.raises(UsageError, match="expected --lm-head-bits 4, as p is packed, got 8"):
        check_settings(packed, OwnOptions(lm_head_bits=8), None)
    tied = replace(_plain(), config=CONFIG | {"tie_word_embeddings": True})
    check_settings(tied, OwnOptions(lm_head_bits=4), None)
    with pytest.raises(UsageError, match="one width"):
        check_settings(tied, OwnOptions(lm_head_bits=4, embedding_bits=8), None)


def test_a_foreign_model_is_served_as_it_is_and_refuses_bits() -> None:
    check_settings(_foreign(), OwnOptions(), None)
    with pytest.raises(UsageError, match="no --bits with the method 'gptq'"):
        check_settings(_foreign(), OwnOptions(bits=4), None)


def test_bits_contradict_no_quantize_and_another_method() -> None:
    with pytest.raises(UsageError, match="--no-quantize"):
        check_settings(_plain(), OwnOptions(bits=4, quantize=False), None)
    with pytest.raises(UsageError, match="fp8"):
        check_settings(_plain(), OwnOptions(bits=4), "fp8")


def _completed(model: ServedModel, own: OwnOptions, **given: Any) -> Namespace:
    defaults = {"served_model_name": None, "quantization": None, "hf_overrides": {}}
    args = Namespace(**(defaults | given))
    complete(args, model, own, [Choice("max_num_seqs", 16, "a reason")])
    return args


def test_settings_for_an_unquantized_model_travel_in_the_overrides() -> None:
    args = _completed(_plain(), OwnOptions(bits=2))
    assert args.quantization == "neuqi"
    assert args.hf_overrides["quantization_config"]["bits"] == 2
    assert args.hf_overrides["quantization_config"]["online"] is True
    assert (args.model_tag, args.served_model_name, args.max_num_seqs) == ("/models/m", ["m"], 16)


def test_options_go_before_the_environment_and_all_are_one_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_BITS", "2")
    monkeypatch.setenv("NEUQI_GROUP_SIZE", "64")
    args = _completed(
        _plain(),
        OwnOptions(bits=3),
        quantization_config={"preset": "fast"},
        additional_config={"neuqi": {"lm_head_bits": 4}},
    )
    settings = args.hf_overrides["quantization_config"]
    assert {key: settings[key] for key in ("bits", "group_size", "preset", "lm_head_bits")} == {
        "bits": 3,
        "group_size": 64,
        "preset": "fast",
        "lm_head_bits": 4,
    }
    assert args.quantization_config is None
    with pytest.raises(UsageError, match="3 from --bits and 4 from --quantization-config"):
        _completed(_plain(), OwnOptions(bits=3), quantization_config={"bits": 4})
    assert with_environment(OwnOptions(), _plain()).spec() == WeightSpec(2, 64)
    # A packed model has its own.
    assert with_environment(OwnOptions(), _packed()) == OwnOptions()
    with pytest.raises(UsageError, match="as the checkpoint is packed, got 2 from --quantization-config"):
        _completed(_packed(), OwnOptions(), quantization_config={"bits": 2})


@pytest.mark.parametrize(
    ("model", "own", "given"),
    [
        (_packed(), OwnOptions(), {}),
        (_foreign(), OwnOptions(), {}),
        (_plain(), OwnOptions(quantize=False), {}),
        (_plain(), OwnOptions(), {"quantization": "fp8"}),
    ],
)
def test_any_other_model_is_left_to_vllm(model: ServedModel, own: OwnOptions, given: dict[str, Any]) -> None:
    args = _completed(model, own, **given)
    assert args.quantization == given.get("quantization")
    assert args.hf_overrides == {}


def test_the_demo_is_served_under_its_short_name_unless_told_otherwise() -> None:
    assert _completed(_plain("demo"), OwnOptions()).served_model_name == ["demo"]
    assert _completed(_plain("demo"), OwnOptions(), served_model_name=["a"]).served_model_name == ["a"]


# The real server. The last test stops it, so they stay in this order.


def _client(server: Any) -> Any:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def _ask(server: Any, tokens: int, **options: Any) -> Any:
    return _client(server).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "w1 w2 tell me a story about a dog"}],
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        **options,
    )


def test_the_start_says_what_it_chose_and_where_it_listens(server: Any) -> None:
    assert f"quantized while it loads to {BITS} bits, group size {GROUP_SIZE}" in server.output
    assert "--kv-cache-memory-bytes" in server.output
    assert server.output.count("ready:") == 1
    assert f"{server.url}/v1/chat/completions" in server.output


def test_the_engine_shares_the_imports_of_the_api_process(server: Any) -> None:
    assert "started anew" not in server.output


def test_the_models_endpoint_lists_the_served_name(server: Any) -> None:
    assert [model.id for model in _client(server).models.list()] == ["tiny"]


def test_a_completion_counts_its_tokens(server: Any) -> None:
    answer = _ask(server, tokens=9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9


def test_a_stream_brings_the_same_text_piece_by_piece(server: Any) -> None:
    whole = _ask(server, tokens=11).choices[0].message.content
    events = list(_ask(server, tokens=11, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1
    assert events[-1].usage.completion_tokens == 11


def _expected_bytes(config: dict[str, int]) -> dict[str, float]:
    """Weight bytes of a Llama by the definition of the format, without any of our code."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = [
        (q, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, q),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
    ]
    weights = config["num_hidden_layers"] * sum(n * k for n, k in shapes)
    # Head and embedding are one tensor, of a vocabulary that vLLM fills up to a multiple of 64.
    vocabulary = -(-config["vocab_size"] // 64) * 64 * hidden
    groups = (weights + vocabulary) // GROUP_SIZE
    norms = (2 * config["num_hidden_layers"] + 1) * hidden
    return {
        "packed": weights * BITS / 8 + vocabulary,
        "scale_zero": groups * 2 * 2,
        "unquantized": 2 * norms,
        "original": 2 * (weights + vocabulary + norms),
    }


def _samples(server: Any) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_metrics_show_packed_weights_and_no_others(server: Any, model_folder: Path) -> None:
    assert server.wait_for_metric('neuqi_weight_bytes{kind="packed"}')
    samples = _samples(server)
    config = json.loads((model_folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    for kind, size in _expected_bytes(config).items():
        assert samples[f'neuqi_weight_bytes{{kind="{kind}"}}'] == size, kind
    expected = _expected_bytes(config)
    weights = (expected["original"] - expected["unquantized"]) / 2
    bits_per_weight = 8 * (expected["packed"] + expected["scale_zero"]) / weights
    assert samples["neuqi_bits_per_weight"] == pytest.approx(bits_per_weight)
    info = (
        f'bits="{BITS}",group_size="{GROUP_SIZE}",model_name="tiny",scale_dtype="float16",source="on-the-fly"'
    )
    assert samples[f"neuqi_model_info{{{info}}}"] == 1
    layers = [value for name, value in samples.items() if name.startswith("neuqi_kernel_info{")]
    # vLLM fuses q, k, v and gate, up: four linear layers are left of a block's seven; the tied embedding is one more.
    assert sum(layers) == 4 * config["num_hidden_layers"] + 1
    assert samples['neuqi_load_phase_duration_seconds{phase="quantize"}'] > 0
    for process in ("api", "engine"):
        assert samples[f'neuqi_process_resident_bytes{{process="{process}"}}'] > 1 << 26


@pytest.mark.parametrize(
    "name",
    [
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
    ],
)
def test_the_latency_metrics_are_vllms_own(server: Any, name: str) -> None:
    _ask(server, tokens=3)
    assert _samples(server)[f'{name}_count{{engine="0",model_name="tiny"}}'] > 0


def test_a_second_server_on_the_port_ends_with_its_own_code(server: Any, model_folder: Path) -> None:
    done = subprocess.run(
        [str(NEUQI), "serve", str(model_folder), "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 6
    assert done.stderr.startswith(f"error: expected port {server.port}")
    assert done.stdout == ""


def test_quantizing_is_a_span_of_the_trace(server: Any, collector: Any) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not collector.has(b"neuqi.quantize"):
        time.sleep(0.1)
    assert collector.has(b"neuqi.quantize")
    assert collector.has(b"neuqi.layers")
    assert collector.has(b"EngineCore")


def test_sigterm_with_many_streams_in_flight_loses_none(server: Any) -> None:
    children = server.children()
    assert len(children) >= 2
    reasons: list[str | None] = []
    running = threading.Barrier(STREAMS + 1)

    def read() -> None:
        last = None
        for number, event in enumerate(_ask(server, tokens=60, stream=True)):
            if number == 0:
                running.wait(120)
            last = event.choices[0].finish_reason
        reasons.append(last)

    readers = [threading.Thread(target=read) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    running.wait(120)
    os.kill(server.process.pid, signal.SIGTERM)
    code, body = _refusal(f"{server.url}/v1/models")
    assert (code, json.loads(body)["error"]["code"]) == (503, "server_draining")
    assert _get(f"{server.url}/health")[0] == 503
    assert json.loads(_get(f"{server.status_url}/readyz")[1]) == {"ready": False, "reason": "stopping"}
    assert _get(f"{server.status_url}/livez")[0] == 200
    assert "neuqi_bits_per_weight" in _get(f"{server.url}/metrics")[1]
    assert server.process.wait(DRAIN_SECONDS + GRACEFUL_SHUTDOWN_SECONDS + TEARDOWN_SECONDS) == 0
    for reader in readers:
        reader.join(10)
    assert reasons == ["length"] * STREAMS
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _refusal(url: str) -> tuple[int, str]:
    """Ask until the signal has been handled, which is a matter of milliseconds."""
    answer = _get(url)
    for _ in range(100):
        if answer[0] != 200:
            break
        time.sleep(0.02)
        answer = _get(url)
    return answer
