"""Defaults as a function of cores, memory, model and what the user gave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from neuqi_serve.errors import DoesNotFitError
from neuqi_serve.server.defaults import (
    ACCELERATOR_QUEUE,
    BLOCK_TOKENS,
    KV_CACHE_MAX_BYTES,
    MAX_MODEL_LEN,
    MIN_QUEUE,
    RUNTIME_BYTES,
    SHUTDOWN_TIMEOUT_SECONDS,
    KvShape,
    choose_defaults,
    kv_shape,
    model_max_len,
)
from neuqi_serve.server.machine import Machine

GIB = 1 << 30
# Two layers, three key-value heads of 48: sizes that no other number here repeats.
SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 288,
    "max_position_embeddings": 1000,
}
SMALL_TOKEN_BYTES = 2 * 2 * 3 * 48 * 2
# The shape of an 8B model: 128 KiB of keys and values per token.
LARGE = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


def _machine(cores: int = 2, available: int = 16 * GIB, on_cpu: bool = True) -> Machine:
    return Machine(cores, cores, 24 * GIB, available, on_cpu)


def _chosen(machine: Machine, config: dict[str, Any], weights: int = 0, **given: Any) -> dict[str, Any]:
    return {choice.option: choice.value for choice in choose_defaults(machine, config, weights, given)}


def test_kv_shape_counts_keys_and_values_of_all_layers() -> None:
    assert kv_shape(SMALL) == KvShape(SMALL_TOKEN_BYTES)
    assert kv_shape(SMALL, cache_dtype_bytes=1) == KvShape(SMALL_TOKEN_BYTES // 2)
    assert kv_shape(SMALL | {"head_dim": 64}) == KvShape(2 * 2 * 3 * 64 * 2)


def test_kv_shape_without_key_value_heads_takes_the_attention_heads() -> None:
    config = {"n_layer": 2, "n_head": 6, "n_embd": 288}
    assert kv_shape(config) == KvShape(2 * 2 * 6 * 48 * 2)


@pytest.mark.parametrize("config", [{}, SMALL | {"kv_lora_rank": 512}, SMALL | {"mamba_d_state": 16}])
def test_kv_shape_is_unknown_for_other_caches(config: dict[str, Any]) -> None:
    assert kv_shape(config) is None


def test_kv_bytes_are_whole_blocks_and_a_spare_one() -> None:
    assert KvShape(10).bytes_for(tokens=BLOCK_TOKENS + 1, sequences=3) == (2 * 3 + 1) * BLOCK_TOKENS * 10


def test_a_small_model_gets_the_cache_it_can_use_and_no_more() -> None:
    chosen = _chosen(_machine(cores=2), SMALL)
    assert chosen["max_num_seqs"] == 16
    assert chosen["kv_cache_memory_bytes"] == KvShape(SMALL_TOKEN_BYTES).bytes_for(1000, 16)
    assert "max_model_len" not in chosen


def test_a_huge_context_is_shortened_and_the_cache_bounded() -> None:
    chosen = _chosen(_machine(available=200 * GIB), LARGE)
    assert chosen["max_model_len"] == MAX_MODEL_LEN
    assert chosen["kv_cache_memory_bytes"] == KV_CACHE_MAX_BYTES


def test_the_cache_takes_half_of_what_the_weights_leave() -> None:
    chosen = _chosen(_machine(available=10 * GIB), LARGE, weights=5 * GIB)
    assert chosen["kv_cache_memory_bytes"] == (10 * GIB - 5 * GIB - RUNTIME_BYTES) // 2


def test_a_request_that_does_not_fit_is_an_error_with_figures() -> None:
    with pytest.raises(DoesNotFitError, match=r"8192 tokens, 1\.0 GiB.*--max-model-len"):
        _chosen(_machine(available=7 * GIB), LARGE, weights=5 * GIB)


def test_what_the_user_gave_is_not_chosen_but_counted_with() -> None:
    chosen = _chosen(_machine(), SMALL, max_num_seqs=3, max_model_len=100)
    assert not {"max_num_seqs", "max_model_len"} & set(chosen)
    assert chosen["kv_cache_memory_bytes"] == KvShape(SMALL_TOKEN_BYTES).bytes_for(100, 3)


def test_a_cache_size_given_by_the_user_is_not_questioned() -> None:
    chosen = _chosen(_machine(available=GIB), LARGE, weights=5 * GIB, kv_cache_memory_bytes=1 << 20)
    assert "kv_cache_memory_bytes" not in chosen


def test_an_eight_bit_cache_needs_half() -> None:
    chosen = _chosen(_machine(), SMALL, kv_cache_dtype="fp8")
    assert chosen["kv_cache_memory_bytes"] == KvShape(SMALL_TOKEN_BYTES // 2).bytes_for(1000, 16)


def test_an_unknown_cache_shape_gets_a_bounded_share() -> None:
    assert _chosen(_machine(available=9 * GIB), {})["kv_cache_memory_bytes"] == 4 * GIB


def test_eager_is_chosen_unless_the_user_speaks_of_compilation() -> None:
    assert _chosen(_machine(), SMALL)["enforce_eager"] is True
    assert "enforce_eager" not in _chosen(_machine(), SMALL, optimization_level=2)
    assert "enforce_eager" not in _chosen(_machine(), SMALL, compilation_config={"mode": 3})
    assert "enforce_eager" not in _chosen(_machine(), SMALL, enforce_eager=False)


def test_compiled_norms_are_chosen_in_eager_mode_only() -> None:
    norms = {name: ["neuqi_cpu", "native"] for name in ("rms_norm", "fused_add_rms_norm")}
    assert _chosen(_machine(), SMALL)["ir_op_priority"] == norms
    assert "ir_op_priority" not in _chosen(_machine(), SMALL, enforce_eager=False)
    assert "ir_op_priority" not in _chosen(_machine(), SMALL, compilation_config={"mode": 3})
    assert "ir_op_priority" not in _chosen(_machine(), SMALL, ir_op_priority={})


def test_one_process_runs_the_engine_unless_the_model_is_spread() -> None:
    assert _chosen(_machine(), SMALL)["distributed_executor_backend"].endswith(".UniProcExecutor")
    assert "distributed_executor_backend" not in _chosen(_machine(), SMALL, tensor_parallel_size=2)
    assert "distributed_executor_backend" not in _chosen(_machine(), SMALL, pipeline_parallel_size=2)


def test_an_accelerator_keeps_its_own_defaults_but_for_the_deadline_and_the_queue() -> None:
    chosen = _chosen(_machine(on_cpu=False), LARGE)
    assert chosen == {"shutdown_timeout": SHUTDOWN_TIMEOUT_SECONDS, "max_num_queued_reqs": ACCELERATOR_QUEUE}


def test_as_many_requests_wait_as_run() -> None:
    assert _chosen(_machine(cores=3), SMALL)["max_num_queued_reqs"] == 2 * 24
    assert _chosen(_machine(), SMALL, max_num_seqs=5)["max_num_queued_reqs"] == 10
    assert _chosen(_machine(), SMALL, max_num_seqs=1)["max_num_queued_reqs"] == MIN_QUEUE
    assert _chosen(_machine(on_cpu=False), SMALL, max_num_seqs=70)["max_num_queued_reqs"] == 140
    assert "max_num_queued_reqs" not in _chosen(_machine(), SMALL, max_num_queued_reqs=9)


def test_more_cores_run_more_requests_up_to_a_bound() -> None:
    assert _chosen(_machine(cores=4), SMALL)["max_num_seqs"] == 32
    assert _chosen(_machine(cores=96), SMALL)["max_num_seqs"] == 128


def test_model_max_len_reads_the_known_names() -> None:
    assert model_max_len({"n_positions": 77}) == 77
    assert model_max_len({"max_position_embeddings": None}) is None


def test_every_choice_prints_its_value_and_reason() -> None:
    for choice in choose_defaults(_machine(), LARGE, GIB, {}):
        line = str(choice)
        # What it prints can be given back to change it.
        flag = "--" + choice.option.replace("_", "-")
        value = json.dumps(choice.value) if isinstance(choice.value, dict) else str(choice.value)
        assert line.startswith(flag if choice.value is True else f"{flag} {value}")
        assert line.endswith(choice.reason)
        assert len(choice.reason) > 10
