"""Our own options, what is read before vLLM's parser, and where the settings travel."""

from __future__ import annotations

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.server.command_line import OwnOptions, merged_overrides, read_early
from neuqi_serve.server.listen_address import ListenAddress


def test_defaults_are_four_bits_in_groups_of_128_on_loopback() -> None:
    early = read_early(["demo"])
    assert early.model == "demo"
    assert early.own.spec() == WeightSpec(4, 128, "float16")
    assert early.address == ListenAddress("127.0.0.1", 8000)


def test_flags_of_vllm_are_passed_over() -> None:
    early = read_early(["m", "--max-model-len", "512", "--bits", "3", "--enforce-eager", "--port=81"])
    assert (early.model, early.own.bits, early.address.port) == ("m", 3, 81)


def test_underscores_are_read_as_dashes() -> None:
    assert read_early(["m", "--group_size", "-1"]).own.group_size == -1
    assert read_early(["m", "--group_size=64"]).own.group_size == 64


def test_a_model_after_other_flags_is_left_to_vllms_parser() -> None:
    assert read_early(["--max-model-len", "512", "demo", "--bits", "2"]).model is None


@pytest.mark.parametrize("option", ["--tokenizer", "--lora-modules", "--speculative_config"])
def test_options_that_may_need_the_hub_are_noticed(option: str) -> None:
    assert read_early(["m"]).hub_free
    assert not read_early(["m", option, "x"]).hub_free


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "5"], "bits must be one of"),
        (["--group-size", "100"], "group size must be"),
        (["--lm-head-bits", "3"], "lm_head bits must be one of"),
    ],
)
def test_values_outside_the_set_are_refused_early(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_early(["m", *words])


def test_a_word_for_bits_ends_with_the_usage_code() -> None:
    with pytest.raises(SystemExit) as request:
        read_early(["m", "--bits", "three"])
    assert request.value.code == 2


def test_settings_are_merged_into_the_users_overrides() -> None:
    merged = merged_overrides({"rope_theta": 5.0}, OwnOptions(bits=3, group_size=64))
    assert merged["rope_theta"] == 5.0
    assert merged["quantization_config"] == {
        "quant_method": "neuqi",
        "bits": 3,
        "group_size": 64,
        "scale_dtype": "float16",
        "preset": "balanced",
        "online": True,
    }


def test_the_preset_travels_with_the_settings() -> None:
    early = read_early(["m", "--preset", "fast"])
    assert merged_overrides({}, early.own)["quantization_config"]["preset"] == "fast"
    given = {"quantization_config": {"preset": "fast"}}
    assert merged_overrides(given, OwnOptions())["quantization_config"]["preset"] == "fast"
    with pytest.raises(UsageError, match="expected one preset, got reference from --preset and fast"):
        merged_overrides(given, OwnOptions(preset="reference"))


def test_an_unknown_preset_ends_with_the_usage_code() -> None:
    with pytest.raises(SystemExit) as request:
        read_early(["m", "--preset", "best"])
    assert request.value.code == 2


def test_widths_of_the_vocabulary_travel_only_when_given() -> None:
    merged = merged_overrides({}, OwnOptions(lm_head_bits=4))["quantization_config"]
    assert merged["lm_head_bits"] == 4
    assert "embedding_bits" not in merged
    with pytest.raises(UsageError, match="got 8 from --embedding-bits and 16"):
        merged_overrides({"quantization_config": {"embedding_bits": 16}}, OwnOptions(embedding_bits=8))


def test_overrides_of_the_user_win_over_defaults() -> None:
    merged = merged_overrides(
        {"quantization_config": {"bits": 2, "modules_to_not_convert": ["a"]}}, OwnOptions()
    )
    assert merged["quantization_config"]["bits"] == 2
    assert merged["quantization_config"]["modules_to_not_convert"] == ["a"]
    assert merged["quantization_config"]["online"] is True


def test_overrides_are_not_changed_in_place() -> None:
    given = {"quantization_config": {"bits": 2}}
    merged_overrides(given, OwnOptions())
    assert given == {"quantization_config": {"bits": 2}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "expected one bits, got 4 from --bits and 3"),
        ({"quant_method": "fp8"}, 'expected quant_method "neuqi"'),
        ([1], "expected an object"),
    ],
)
def test_contradicting_overrides_are_refused(settings: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged_overrides({"quantization_config": settings}, OwnOptions(bits=4))
