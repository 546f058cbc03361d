"""Whether a model fits, with how many requests of what length, and what runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuqi_serve.config import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, VocabularyBits, WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.source import CONFIG_NAME, SourceCheckpoint, open_source, read_json_object
from neuqi_serve.pipeline.selection import is_tied
from neuqi_serve.plan.device import Device
from neuqi_serve.plan.outline import outline
from neuqi_serve.plan.weights import Weights, weights_of
from neuqi_serve.server.defaults import MAX_MODEL_LEN, RUNTIME_BYTES, KvShape, kv_shape, model_max_len
from neuqi_serve.server.served_model import find_config, local_folder

# What CUDA, the libraries, captured graphs and fragmentation take on a GPU. An estimate.
GPU_RUNTIME_BYTES = 3 << 29
# Tokens of one step, by vLLM's default.
STEP_TOKENS = 2048
# Weights at these widths are what a plan compares; 8 bits are for head and embedding.
_COMPARED_BITS = tuple(bits for bits in SUPPORTED_BITS if bits < 8)


@dataclass(frozen=True)
class Request:
    """What the plan is asked for: ``context`` tokens per request, ``concurrency`` requests, ``ranks`` devices.

    ``cache_dtype_bytes``: of an element of the KV cache: 2, or 1 for fp8.
    """

    context: int
    concurrency: int = 1
    ranks: int = 1
    cache_dtype_bytes: int = 2


@dataclass(frozen=True)
class Option:
    """One way to store the weights, and what comes of it on one device.

    ``needed``: all bytes of the request. ``free_for_cache``: bytes of the device beside weights and workspace;
    ``requests``: how many of the full context they hold. ``load_peak``: host memory at most while the model is packed.
    ``tokens_per_second``: one request, if a step took only as long as reading what it needs; None if unknown.
    """

    spec: WeightSpec
    weights: Weights
    needed: int
    free_for_cache: int
    requests: int
    load_peak: int
    tokens_per_second: float | None
    fits: bool


@dataclass(frozen=True)
class Plan:
    """``options``: from the most bits to the fewest. ``cache_bytes``: KV cache of the whole request, on one device."""

    model: str
    source: SourceCheckpoint
    device: Device
    request: Request
    cache_bytes: int
    cache_token_bytes: int
    workspace: int
    tied: bool
    options: tuple[Option, ...]

    @property
    def chosen(self) -> Option | None:
        """The option of most bits that fits."""
        return next((option for option in self.options if option.fits), None)

    def command(self, option: Option) -> list[str]:
        """The command line that serves this option."""
        words = ["neuqi", "serve", self.model, "--bits", str(option.spec.bits)]
        words += ["--group-size", str(option.spec.group_size)]
        words += [
            "--max-model-len",
            str(self.request.context),
            "--max-num-seqs",
            str(self.request.concurrency),
        ]
        words += ["--kv-cache-memory-bytes", str(self.cache_bytes)]
        if self.request.cache_dtype_bytes == 1:
            words += ["--kv-cache-dtype", "fp8"]
        if self.request.ranks > 1:
            words += ["--tensor-parallel-size", str(self.request.ranks)]
        return words


def read_model(name: str) -> SourceCheckpoint:
    """Return the checkpoint that ``name`` means: a folder, its ``config.json`` alone, or a name on the hub.

    Where the weights are there, their headers say what they are; otherwise the configuration does.

    Raises:
        UnsupportedModelError: no such model, one that cannot be packed, or one that is packed already.
        IntegrityError: a damaged configuration or checkpoint.
    """
    folder = local_folder(name)
    if folder is None:
        return outline(find_config(name), Path(name) / CONFIG_NAME)
    if folder.is_file():
        return outline(_language_model(read_json_object(folder), folder), folder)
    if any(folder.glob("*.safetensors")):
        return open_source(folder)
    path = folder / CONFIG_NAME
    return outline(_language_model(read_json_object(path, missing=UnsupportedModelError), path), path)


def make_plan(
    model: str,
    device: Device,
    context: int | None = None,
    concurrency: int = 1,
    ranks: int = 1,
    specs: Sequence[WeightSpec] | None = None,
    vocabulary: VocabularyBits | None = None,
    cache_dtype_bytes: int = 2,
) -> Plan:
    """Compute what ``model`` needs on ``device`` for ``concurrency`` requests of ``context`` tokens.

    ``specs``: the ways to store the weights; None compares 4, 3 and 2 bits with every group size that fits the model.

    Raises:
        UnsupportedModelError, IntegrityError: as ``read_model``; also a model whose KV cache has another shape.
        UsageError: a context beyond the model's, a number of ranks or a group size that does not fit it.
    """
    source = read_model(model)
    shape = kv_shape(source.config, cache_dtype_bytes)
    if shape is None:
        raise UnsupportedModelError(
            f"expected a model with keys and values per head and layer, got {source.architecture}, which caches "
            "something else. Its memory cannot be planned."
        )
    request = Request(_context(source, context), concurrency, ranks, cache_dtype_bytes)
    per_rank = _shared_out(source, shape, ranks)
    cache_bytes = per_rank.bytes_for(request.context, concurrency)
    workspace = _workspace(source, device, request)
    options = [
        _option(source, spec, vocabulary, device, request, per_rank, workspace)
        for spec in _ordered(_fitting_specs(source, specs))
    ]
    return Plan(
        model,
        source,
        device,
        request,
        cache_bytes,
        per_rank.token_bytes,
        workspace,
        is_tied(source),
        tuple(options),
    )


def _option(
    source: SourceCheckpoint,
    spec: WeightSpec,
    vocabulary: VocabularyBits | None,
    device: Device,
    request: Request,
    cache: KvShape,
    workspace: int,
) -> Option:
    weights = weights_of(source, spec, vocabulary, request.ranks)
    needed = weights.total + workspace + cache.bytes_for(request.context, request.concurrency)
    free = device.memory_bytes - weights.total - workspace
    requests = max(
        0, (free - cache.bytes_for(0, 0)) // (cache.bytes_for(request.context, 1) - cache.bytes_for(0, 0))
    )
    read = weights.read_per_token + request.context // 2 * cache.token_bytes
    return Option(
        spec=spec,
        weights=weights,
        needed=needed,
        free_for_cache=max(0, free),
        requests=requests,
        load_peak=weights.total + 2 * weights.largest_layer + RUNTIME_BYTES,
        tokens_per_second=device.bandwidth / read if device.bandwidth else None,
        fits=needed <= device.memory_bytes,
    )


def _ordered(specs: Sequence[WeightSpec]) -> list[WeightSpec]:
    """Most stored bits first; a long row stands for all rows."""
    return sorted(specs, key=lambda spec: -spec.bits_per_weight(1 << 14))


def _fitting_specs(source: SourceCheckpoint, asked: Sequence[WeightSpec] | None) -> list[WeightSpec]:
    """Of the specs asked for, or of all, those whose groups divide every layer.

    Raises:
        UsageError: there are none.
    """
    specs, last = [], None
    for spec in asked or [
        WeightSpec(bits, size) for bits in _COMPARED_BITS for size in SUPPORTED_GROUP_SIZES
    ]:
        try:
            weights_of(source, spec)
        except UsageError as error:
            last = error
            continue
        specs.append(spec)
    if not specs and last is not None:
        raise last
    return specs


def _context(source: SourceCheckpoint, context: int | None) -> int:
    longest = model_max_len(source.config)
    if context is None:
        return min(longest or MAX_MODEL_LEN, MAX_MODEL_LEN)
    if longest is not None and context > longest:
        raise UsageError(
            f"expected a context of at most {longest} tokens, which the model was made for, got {context}. "
            "Give a smaller --context."
        )
    return context


def _shared_out(source: SourceCheckpoint, shape: KvShape, ranks: int) -> KvShape:
    """KV cache of a token on one rank: a rank has at least one key-value head."""
    config = source.config
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)
    return KvShape(shape.token_bytes // heads * max(1, heads // ranks))


def _workspace(source: SourceCheckpoint, device: Device, request: Request) -> int:
    """Bytes beside weights and cache, an estimate: the processes, the activations of a step, the logits."""
    config = source.config
    width = 4 * int(config["hidden_size"]) + 2 * int(config.get("intermediate_size") or config["hidden_size"])
    activations = STEP_TOKENS * width * 2
    logits = request.concurrency * int(config["vocab_size"]) * 4 * 2
    return (RUNTIME_BYTES if device.is_cpu else GPU_RUNTIME_BYTES) + activations + logits


def _language_model(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    if not config.get("architectures"):
        raise UnsupportedModelError(
            f'{path}: expected "architectures" with one name, got {json.dumps(config.get("architectures"))}. '
            "Give the config.json of a language model."
        )
    return config
