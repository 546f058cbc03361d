"""Quantization of a model folder into a packed checkpoint, tensor by tensor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from neuqi_kernels.reference import dequantize
from neuqi_serve import load_status
from neuqi_serve.config import DEFAULT_PRESET, EMBEDDING, LM_HEAD, PRESETS, VocabularyBits, WeightSpec
from neuqi_serve.errors import DoesNotFitError, IntegrityError, UsageError
from neuqi_serve.format.importance import Importance, read_importance, resolve
from neuqi_serve.format.manifest import MANIFEST_NAME, Manifest, PackedModule
from neuqi_serve.format.quantization_config import is_name_of
from neuqi_serve.format.safetensors_file import TensorSpec, prefetch_tensor, torch_dtype
from neuqi_serve.format.source import CONFIG_NAME, INDEX_NAME, SourceCheckpoint, open_source
from neuqi_serve.format.staging import check_destination
from neuqi_serve.format.writer import (
    DEFAULT_SHARD_BYTES,
    CheckpointWriter,
    is_packed_folder,
    write_checkpoint,
)
from neuqi_serve.pipeline.families import ties_vocabulary
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.pipeline.selection import Selection, natural_order, select_modules
from neuqi_serve.pipeline.summary import CheckpointSummary, summarize
from neuqi_serve.quant.quantize import PackedWeight, quantize_packed

# The float32 copies of this many weights stay in a cache of the processor.
_ERROR_CHUNK_WEIGHTS = 1 << 19
# Weights in other containers, and what is written anew.
_NOT_COPIED_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".index.json",
)
_NOT_COPIED_NAMES = (CONFIG_NAME, INDEX_NAME, MANIFEST_NAME)
# Module, weight [N, K] on the device of the settings, spec → what is stored.
Pack = Callable[[str, Tensor, WeightSpec], PackedWeight]


@dataclass(frozen=True)
class QuantizationSettings:
    """``preset``: one of ``PRESETS``. ``device``: where the search runs, e.g. ``cpu`` or ``cuda``.

    ``importance``: a file of ``format.importance``; None weighs all inputs alike. ``vocabulary``: widths of output head
    and embedding, None for the defaults. ``exceptions``: linear layers with another spec, by full name. ``budget``: the
    option that they come from, for the manifest.
    """

    spec: WeightSpec
    preset: str = DEFAULT_PRESET
    device: str = "cpu"
    overwrite: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    importance: Path | None = None
    vocabulary: VocabularyBits | None = None
    exceptions: Mapping[str, WeightSpec] = field(default_factory=dict)
    budget: str | None = None


def quantize_checkpoint(
    source_path: Path,
    destination: Path,
    settings: QuantizationSettings,
    progress_stream: TextIO | None = None,
) -> CheckpointSummary:
    """Pack the linear layers, the output head and the embedding of ``source_path`` into the new folder ``destination``.

    The squared error of the weights is minimized, weighted by ``settings.importance`` if given. Memory is bounded by
    one weight and its packed form, disk by the packed checkpoint. Nothing appears at ``destination`` before all of it
    is written. Which tensors are packed: ``pipeline.selection``.

    Raises:
        UsageError: the destination is taken, the group size fits no layer, an unknown preset or device, an importance
            file of another model.
        UnsupportedModelError: no model there, or one that cannot be packed.
        IntegrityError: the source is incomplete or damaged, or holds non-finite weights.
        DoesNotFitError: the disk is too small.
    """
    started = time.monotonic()
    check_settings(settings)
    check_apart(source_path, destination)
    check_destination(destination, settings.overwrite, is_packed_folder)
    source = open_source(source_path)
    selection = select_modules(source, settings.spec, settings.vocabulary, settings.exceptions)
    importance = None if settings.importance is None else read_importance(settings.importance)
    weights = _importance_values(importance, selection, progress_stream)
    made = {"preset": settings.preset, "importance": describe_importance(importance)}

    def pack(module: str, weight: Tensor, spec: WeightSpec) -> PackedWeight:
        return quantize_packed(weight, spec, weights.get(module), preset=settings.preset)

    manifest = write_packed(source, selection, destination, settings, pack, made, progress_stream)
    return summarize(manifest, selection.unfit, time.monotonic() - started)


def write_packed(
    source: SourceCheckpoint,
    selection: Selection,
    destination: Path,
    settings: QuantizationSettings,
    pack: Pack,
    quantization: Mapping[str, Any],
    progress_stream: TextIO | None,
) -> Manifest:
    """Write the packed folder: ``pack`` makes the packed form of each module selected, all else is copied.

    ``quantization``: what the manifest says about how. Errors as :func:`quantize_checkpoint`.
    """
    tensors = plan_tensors(source, selection)
    _check_disk(destination, tensors)
    with write_checkpoint(
        destination, tensors, overwrite=settings.overwrite, shard_bytes=settings.shard_bytes
    ) as writer:
        modules = _write_tensors(source, selection, settings, pack, writer, progress_stream)
        for path in other_files(source.path):
            writer.copy_file(path)
        return writer.finish(
            _config(source, selection),
            selection.recipe,
            modules,
            source={
                "name": source.path.resolve().name,
                "architecture": source.architecture,
                "files": {shard.name: shard.stat().st_size for shard in source.shards},
            },
            quantization={**quantization, **({} if settings.budget is None else {"budget": settings.budget})},
        )


def describe_importance(importance: Importance | None) -> str:
    """Return what a manifest says about the importance: ``none``, or the file's name and SHA-256."""
    return "none" if importance is None else f"{importance.path.name} sha256:{importance.sha256}"


def _importance_values(
    importance: Importance | None, selection: Selection, stream: TextIO | None
) -> Mapping[str, Tensor]:
    if importance is None:
        return {}
    # Output head and embedding are not weighed, as they are not on the fly: 8 bits leave nothing to gain.
    inputs = {
        name: columns
        for name, (_, columns) in selection.modules.items()
        if not any(is_name_of(vocabulary, name) for vocabulary in (LM_HEAD, EMBEDDING))
    }
    found = resolve(importance, inputs)
    for line in found.warnings() if stream is not None else ():
        print(f"warning: {importance.path.name}: {line}", file=stream, flush=True)
    return found.values


def plan_tensors(source: SourceCheckpoint, selection: Selection) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of the packed checkpoint, blocks in order."""
    planned: dict[str, TensorSpec] = {}
    for name in sorted(source.tensors, key=natural_order):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in selection.modules:
            packed = _packed_module(source, selection, module)
            planned.update({f"{module}.{part}": spec for part, spec in packed.tensors.items()})
        else:
            planned[name] = source.tensors[name].spec
    return planned


def other_files(source_path: Path) -> list[Path]:
    """Files that go along unchanged: tokenizer, generation configuration, chat template, licence, model card."""
    return [
        path
        for path in sorted(source_path.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_COPIED_NAMES
        and not path.name.endswith(_NOT_COPIED_SUFFIXES)
    ]


def _config(source: SourceCheckpoint, selection: Selection) -> Mapping[str, Any]:
    """The model's configuration; a head of its own beside a configuration that calls it tied is declared untied.

    vLLM looks for the unpacked head to find that out.
    """
    if ties_vocabulary(source.config) and not selection.tied:
        return {**source.config, "tie_word_embeddings": False}
    return source.config


def relative_error(weight: Tensor, packed: PackedWeight, spec: WeightSpec) -> float:
    """‖Ŵ − W‖/‖W‖ (Frobenius) of a packed ``weight [N, K]``, some rows at a time; 0 for a weight of zeros."""
    rows = max(1, _ERROR_CHUNK_WEIGHTS // weight.shape[1])
    squared_error = squared_norm = 0.0
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        original = weight[part].float()
        error = dequantize(
            packed.qweight[part], packed.scale[part], packed.zero[part], spec.bits, spec.group_size
        ).sub_(original)
        squared_error += float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
        squared_norm += float(torch.linalg.vector_norm(original, dtype=torch.float64)) ** 2
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _write_tensors(
    source: SourceCheckpoint,
    selection: Selection,
    settings: QuantizationSettings,
    pack: Pack,
    writer: CheckpointWriter,
    progress_stream: TextIO | None,
) -> dict[str, PackedModule]:
    sizes = {module: source.tensors[f"{module}.weight"].spec.nbytes for module in selection.modules}
    progress = None
    if progress_stream is not None:
        progress = Progress(sum(sizes.values()), "B", progress_stream, steps=len(sizes))
    modules: dict[str, PackedModule] = {}
    done = 0
    try:
        names = sorted(source.tensors, key=natural_order)
        for name, following in zip(names, [*names[1:], None], strict=True):
            if following is not None:
                # The disk reads the next tensor while this one is quantized.
                prefetch_tensor(source.tensors[following])
            module = name.removesuffix(".weight")
            if not name.endswith(".weight") or module not in selection.modules:
                if source.unchanged(name):
                    writer.copy(name, source.tensors[name])
                else:
                    writer.write(name, source.read(name).to(torch_dtype(source.tensors[name].spec.dtype)))
                continue
            modules[module] = _write_module(source, selection, settings, pack, writer, module)
            if progress is not None:
                progress.advance(sizes[module], module)
            done += sizes[module]
            load_status.progress("cache", len(modules), len(sizes), done, sum(sizes.values()))
    finally:
        if progress is not None:
            progress.close()
    return modules


def _write_module(
    source: SourceCheckpoint,
    selection: Selection,
    settings: QuantizationSettings,
    pack: Pack,
    writer: CheckpointWriter,
    module: str,
) -> PackedModule:
    weight = source.read(f"{module}.weight").to(settings.device)
    # Both extremes are NaN if any weight is: one fast pass in place of a mask.
    if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight)):
        damaged = int((~weight.isfinite()).sum())
        raise IntegrityError(
            f"expected finite weights in {module}.weight of {source.path}, got {damaged} that are not. "
            "Download the model again."
        )
    planned = _packed_module(source, selection, module)
    packed = pack(module, weight, planned.spec)
    largest = torch.finfo(packed.scale.dtype).max
    if not packed.scale.abs().max() < largest:
        raise UsageError(
            f"expected the scales of {module} within the range of {planned.spec.scale_dtype}, got one of at least "
            f"{largest:.5g}. Choose another --scale-dtype (float32)."
        )
    writer.write_module(module, packed)
    error = relative_error(weight, packed, planned.spec)
    # Six digits are more than anyone reads, and keep the last bits of a sum out of the manifest.
    return PackedModule(planned.spec, planned.shape, planned.source_dtype, float(f"{error:.6g}"))


def _packed_module(source: SourceCheckpoint, selection: Selection, module: str) -> PackedModule:
    spec = selection.recipe.spec_of(module)
    return PackedModule(spec, selection.modules[module], source.tensors[f"{module}.weight"].spec.dtype)


def check_settings(settings: QuantizationSettings) -> None:
    """Refuse an unknown preset, and a device that is not there."""
    if settings.preset not in PRESETS:
        raise UsageError(f"expected a preset among {PRESETS}, got {settings.preset!r}. Try {DEFAULT_PRESET}.")
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"expected a device of this machine, got {settings.device!r} without a GPU. Use --device cpu."
        )


def check_apart(source_path: Path, destination: Path) -> None:
    """Refuse to write into the model or a folder that holds it."""
    source, target = source_path.resolve(), destination.resolve()
    if source == target or target in source.parents:
        raise UsageError(
            f"expected a destination apart from the model, got {destination} for the model {source_path}. "
            "Name another folder."
        )


def _check_disk(destination: Path, tensors: Mapping[str, TensorSpec]) -> None:
    needed = sum(spec.nbytes for spec in tensors.values())
    existing = next(path for path in destination.resolve().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DoesNotFitError(
            f"expected {needed / 2**30:.2f} GiB of free disk space for {destination}, got {free / 2**30:.2f} GiB. "
            "Free some, or name a folder on another disk."
        )
