"""Defaults for serving on CPUs: a pure function of the machine and the model, each value with its reason.

vLLM's own defaults are made for accelerators: 92 % of the memory becomes KV cache and is touched, one core of two is
kept for the API process, the model is compiled at every start. Whatever the user gives wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuqi_serve.errors import DoesNotFitError
from neuqi_serve.server.machine import Machine

MAX_MODEL_LEN = 8192
SEQUENCES_PER_CORE = 8
MAX_SEQUENCES = 128
KV_CACHE_MAX_BYTES = 8 << 30
# Of the memory left beside the weights; the rest is for activations, the API process and the page cache.
KV_CACHE_SHARE = 0.5
# The API and the engine process: interpreter, libraries and code (measured: 0.9 GiB together).
RUNTIME_BYTES = 1 << 30
# Tokens of a block of vLLM's KV cache on CPUs.
BLOCK_TOKENS = 128
SHUTDOWN_TIMEOUT_SECONDS = 30
# Requests inside per request that can run: as many may wait as run, so that waiting at most doubles the latency.
QUEUE_FACTOR = 2
# Where vLLM chooses how many run at once, 256 or 1024 by the accelerator.
ACCELERATOR_QUEUE = 2048
MIN_QUEUE = 8
# Names of ``vllm_plugin.cpu_norms``, which imports torch.
NORM_PROVIDER = "neuqi_cpu"
NORM_OPERATIONS = ("rms_norm", "fused_add_rms_norm")
UNIPROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True)
class Choice:
    """One default: vLLM's ``option`` (its name in the parsed arguments), the ``value`` and the ``reason``."""

    option: str
    value: Any
    reason: str

    def __str__(self) -> str:
        flag = "--" + self.option.replace("_", "-")
        value = json.dumps(self.value) if isinstance(self.value, dict) else self.value
        words = flag if value is True else f"{flag} {value}"
        return f"{words:<42} {self.reason}"


@dataclass(frozen=True)
class KvShape:
    """What the KV cache of one token costs: ``token_bytes`` (keys and values of all layers)."""

    token_bytes: int

    def bytes_for(self, tokens: int, sequences: int) -> int:
        """Bytes for ``sequences`` of ``tokens`` each, in whole blocks, and vLLM's one spare block."""
        blocks = -(-tokens // BLOCK_TOKENS) * sequences + 1
        return blocks * BLOCK_TOKENS * self.token_bytes


def kv_shape(config: Mapping[str, Any], cache_dtype_bytes: int = 2) -> KvShape | None:
    """KV cache shape of a plain transformer; None where layers keep something else (latent attention, state spaces).

    token_bytes = 2 · layers · kv_heads · head_dim · cache_dtype_bytes
    """
    if any(config.get(key) for key in ("kv_lora_rank", "ssm_cfg", "mamba_d_state", "linear_num_value_heads")):
        return None
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_attention_heads") or config.get("n_head")
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    return KvShape(2 * layers * int(kv_heads) * int(head_dim) * cache_dtype_bytes)


def model_max_len(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that the model was made for, if its configuration says so."""
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def choose_defaults(
    machine: Machine, config: Mapping[str, Any], weight_bytes: int, given: Mapping[str, Any]
) -> list[Choice]:
    """Choose vLLM's options for this machine and model; ``given`` holds the options that the user set.

    Raises:
        DoesNotFitError: the KV cache of a single sequence is larger than the memory beside the weights.
    """
    choices = [
        Choice(
            "shutdown_timeout", SHUTDOWN_TIMEOUT_SECONDS, "seconds to finish running requests after SIGTERM"
        ),
        _queue(machine, given),
    ]
    if machine.runs_on_cpu:
        choices += [_sequences(machine), *_memory(machine, config, weight_bytes, given), *_processes(given)]
        choices += _execution(given)
    return [choice for choice in choices if choice.option not in given]


def _queue(machine: Machine, given: Mapping[str, Any]) -> Choice:
    running = given.get("max_num_seqs") or (_sequences(machine).value if machine.runs_on_cpu else None)
    if running is None:
        return Choice("max_num_queued_reqs", ACCELERATOR_QUEUE, "requests inside, 503 above it")
    count = max(MIN_QUEUE, QUEUE_FACTOR * int(running))
    return Choice("max_num_queued_reqs", count, "requests inside, 503 above it: as many wait as run")


def _sequences(machine: Machine) -> Choice:
    count = min(MAX_SEQUENCES, SEQUENCES_PER_CORE * machine.cores)
    return Choice("max_num_seqs", count, f"requests that run at once, {SEQUENCES_PER_CORE} per core")


def _memory(
    machine: Machine, config: Mapping[str, Any], weight_bytes: int, given: Mapping[str, Any]
) -> list[Choice]:
    choices: list[Choice] = []
    sequences = int(given.get("max_num_seqs") or _sequences(machine).value)
    longest = model_max_len(config)
    tokens = given.get("max_model_len")
    budget = int((machine.available_bytes - weight_bytes - RUNTIME_BYTES) * KV_CACHE_SHARE)
    budget = min(max(budget, 0), KV_CACHE_MAX_BYTES)
    shape = kv_shape(config, 1 if "fp8" in str(given.get("kv_cache_dtype", "")) else 2)
    if not isinstance(tokens, int) or tokens <= 0:
        tokens = longest or MAX_MODEL_LEN
        if tokens > MAX_MODEL_LEN and "max_model_len" not in given:
            tokens = MAX_MODEL_LEN
            choices.append(Choice("max_model_len", tokens, f"the model allows {longest}, which costs memory"))
    if shape is None:
        reason = f"{_shown(budget)}, half of what the weights leave"
        return [*choices, Choice("kv_cache_memory_bytes", budget, reason)]
    if "kv_cache_memory_bytes" not in given:
        _check_fits(machine, weight_bytes, shape.bytes_for(tokens, 1), budget, tokens)
    need = shape.bytes_for(tokens, sequences)
    if need <= budget:
        reason = f"{_shown(need)}: room for {sequences} requests of {tokens} tokens"
        return [*choices, Choice("kv_cache_memory_bytes", need, reason)]
    full = budget // shape.bytes_for(tokens, 1)
    reason = f"{_shown(budget)}, half of what the weights leave: {full} full requests of {tokens} tokens"
    return [*choices, Choice("kv_cache_memory_bytes", budget, reason)]


def _check_fits(machine: Machine, weight_bytes: int, need: int, budget: int, tokens: int) -> None:
    if need <= budget:
        return
    raise DoesNotFitError(
        f"expected room for the KV cache of one request of {tokens} tokens, {_shown(need)}; of the "
        f"{_shown(machine.available_bytes)} free, the weights take up to {_shown(weight_bytes)}, the processes "
        f"{_shown(RUNTIME_BYTES)}, and {_shown(budget)} of the rest may be cache. Give a smaller --max-model-len, or "
        "set --kv-cache-memory-bytes yourself."
    )


def _processes(given: Mapping[str, Any]) -> list[Choice]:
    parallel = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes")
    if any(int(given.get(option) or 1) > 1 for option in parallel):
        return []
    reason = "the worker runs inside the engine process"
    return [Choice("distributed_executor_backend", UNIPROCESS_EXECUTOR, reason)]


def _execution(given: Mapping[str, Any]) -> list[Choice]:
    if "compilation_config" in given or "optimization_level" in given or given.get("enforce_eager") is False:
        return []
    eager = Choice("enforce_eager", True, "compiling takes longer than the rest of the start")
    norms = {name: [NORM_PROVIDER, "native"] for name in NORM_OPERATIONS}
    return [
        eager,
        Choice("ir_op_priority", norms, "compiled kernels for norms, a sixth of a step's overhead"),
    ]


def _shown(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
