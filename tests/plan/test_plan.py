from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.plan.device import DEVICES, Device, find_device
from neuqi_serve.plan.plan import make_plan
from neuqi_serve.plan.report import does_not_fit, to_json, to_text


def device(memory_bytes: int) -> Device:
    return Device("card", memory_bytes, 1e12, "given", False)


ROOMY = device(8 << 30)


def test_keys_and_values_of_the_whole_request_in_whole_blocks(write_config: Callable[..., Path]) -> None:
    plan = make_plan(str(write_config()), ROOMY, context=200, concurrency=3)
    assert plan.cache_token_bytes == 2 * 2 * 2 * 32 * 2  # keys and values, layers, heads, head size, bytes
    assert plan.cache_bytes == (3 * 2 + 1) * 128 * plan.cache_token_bytes
    halved = make_plan(str(write_config()), ROOMY, context=200, concurrency=3, cache_dtype_bytes=1)
    assert halved.cache_bytes * 2 == plan.cache_bytes


def test_options_go_from_most_bits_to_fewest_and_the_first_that_fits_is_chosen(
    write_config: Callable[..., Path],
) -> None:
    plan = make_plan(str(write_config()), ROOMY)
    stored = [option.weights.bits_per_weight for option in plan.options]
    assert stored == sorted(stored, reverse=True)
    assert plan.chosen is plan.options[0]
    needed = [option.needed for option in plan.options]
    tight = make_plan(str(write_config()), device(needed[3]))
    assert tight.chosen is not None
    assert tight.chosen.spec == plan.options[3].spec
    assert [option.fits for option in tight.options[:4]] == [False, False, False, True]


def test_requests_are_what_the_free_memory_holds(write_config: Callable[..., Path]) -> None:
    plan = make_plan(str(write_config()), ROOMY, context=256, specs=[WeightSpec(4, 32)])
    option = plan.options[0]
    as_many = make_plan(str(write_config()), ROOMY, 256, option.requests, specs=[WeightSpec(4, 32)])
    # The logits of more requests take workspace, so allow for that much.
    spare = as_many.workspace - plan.workspace
    assert as_many.options[0].needed - spare <= ROOMY.memory_bytes
    more = make_plan(str(write_config()), ROOMY, 256, option.requests + 1, specs=[WeightSpec(4, 32)])
    assert not more.options[0].fits


def test_speed_is_bandwidth_over_what_a_step_reads(write_config: Callable[..., Path]) -> None:
    plan = make_plan(str(write_config()), ROOMY, context=256, specs=[WeightSpec(4, 32)])
    option = plan.options[0]
    read = option.weights.read_per_token + 128 * plan.cache_token_bytes
    assert option.tokens_per_second == pytest.approx(1e12 / read)


def test_nothing_fits_and_the_message_says_what_would(write_config: Callable[..., Path]) -> None:
    plan = make_plan(str(write_config()), device(1 << 20))
    assert plan.chosen is None
    message = does_not_fit(plan)
    assert message.startswith("expected ")
    assert "--tensor-parallel 2" in message
    assert "Run it" not in to_text(plan)
    assert to_json(plan)["fits"] is False


def test_text_is_at_most_80_columns_apart_from_names_and_the_command(
    write_config: Callable[..., Path],
) -> None:
    path = str(write_config())
    lines = to_text(make_plan(path, ROOMY)).splitlines()
    assert [line for line in lines if len(line) > 80 and path not in line] == []


def test_json_components_add_up(write_config: Callable[..., Path]) -> None:
    body = json.loads(json.dumps(to_json(make_plan(str(write_config()), ROOMY))))
    for option in body["options"]:
        assert sum(option["weight_bytes_by_component"].values()) == option["weight_bytes"]
    assert body["command"][:2] == ["neuqi", "serve"]


def test_the_command_is_one_that_serve_understands(write_config: Callable[..., Path]) -> None:
    from neuqi_serve.server.command_line import read_early

    plan = make_plan(str(write_config()), ROOMY, cache_dtype_bytes=1)
    assert plan.chosen is not None
    words = plan.command(plan.chosen)
    assert words[:2] == ["neuqi", "serve"]
    early = read_early(words[2:])
    assert early.model == plan.model
    assert early.own.spec() == plan.chosen.spec
    assert {"max-model-len", "max-num-seqs", "kv-cache-memory-bytes", "kv-cache-dtype"} <= early.options


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": []}, UnsupportedModelError, "architectures"),
        ({"model_type": "no-such"}, UnsupportedModelError, "model_type"),
        ({"model_type": "mistral"}, IntegrityError, "MistralForCausalLM"),
        ({"num_attention_heads": "four"}, IntegrityError, "cannot build"),
        ({"dtype": "int3"}, IntegrityError, "dtype"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "gptq"),
    ],
)
def test_a_bad_configuration_is_named(
    changes: dict[str, Any], error: type[Exception], message: str, write_config: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=message):
        make_plan(str(write_config(**changes)), ROOMY)


def test_a_context_beyond_the_models_is_refused(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="at most 256 tokens"):
        make_plan(str(write_config()), ROOMY, context=257)


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="rtx-4090"):
        find_device("rtx-9999")


@pytest.mark.parametrize("name", [name for name in DEVICES if name != "cpu"])
def test_every_known_device_has_memory_and_bandwidth(name: str) -> None:
    found = find_device(name)
    assert 8 << 30 <= found.memory_bytes <= 1 << 40
    assert 1e11 < found.bandwidth < 1e13


def test_what_is_given_replaces_what_is_known() -> None:
    found = find_device("l4", memory_bytes=5, bandwidth_gb_s=100)
    assert (found.memory_bytes, found.bandwidth, found.bandwidth_source) == (5, 1e11, "given")


def test_the_processor_is_measured() -> None:
    found = find_device("cpu")
    assert found.is_cpu
    assert found.bandwidth_source == "measured"
    assert 1e8 < found.bandwidth < 1e13
