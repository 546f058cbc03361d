"""Data-free quantization of a model folder into a packed checkpoint, tensor by tensor."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from neuqi_kernels.reference import dequantize
from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.errors import DoesNotFitError, IntegrityError, UsageError
from neuqi_serve.format.manifest import MANIFEST_NAME, PackedModule
from neuqi_serve.format.safetensors_file import TensorSpec
from neuqi_serve.format.source import CONFIG_NAME, INDEX_NAME, SourceCheckpoint, open_source
from neuqi_serve.format.staging import check_destination
from neuqi_serve.format.writer import (
    DEFAULT_SHARD_BYTES,
    CheckpointWriter,
    is_packed_folder,
    write_checkpoint,
)
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.pipeline.selection import Selection, natural_order, select_modules
from neuqi_serve.pipeline.summary import CheckpointSummary, summarize
from neuqi_serve.quant.quantize import SOLVERS, PackedWeight, quantize_packed

_ERROR_CHUNK_WEIGHTS = 4 << 20
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


@dataclass(frozen=True)
class QuantizationSettings:
    """``solver``: one of ``SOLVERS``. ``device``: where the search runs, e.g. ``cpu`` or ``cuda``.

    ``vocabulary``: widths of output head and embedding, None for the defaults.
    """

    spec: WeightSpec
    solver: str = "fast"
    device: str = "cpu"
    overwrite: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    vocabulary: VocabularyBits | None = None


def quantize_checkpoint(
    source_path: Path,
    destination: Path,
    settings: QuantizationSettings,
    progress_stream: TextIO | None = None,
) -> CheckpointSummary:
    """Pack the linear layers, the output head and the embedding of ``source_path`` into the new folder ``destination``.

    Weights are minimized under plain squared error, no calibration data. Memory is bounded by one weight and its
    packed form, disk by the packed checkpoint. Nothing appears at ``destination`` before all of it is written.
    Which tensors are packed: ``pipeline.selection``.

    Raises:
        UsageError: the destination is taken, the group size fits no layer, an unknown solver or device.
        UnsupportedModelError: no model there, or one that cannot be packed.
        IntegrityError: the source is incomplete or damaged, or holds non-finite weights.
        DoesNotFitError: the disk is too small.
    """
    started = time.monotonic()
    _check_settings(settings)
    _check_apart(source_path, destination)
    check_destination(destination, settings.overwrite, is_packed_folder)
    source = open_source(source_path)
    selection = select_modules(source, settings.spec, settings.vocabulary)
    tensors = plan_tensors(source, selection)
    _check_disk(destination, tensors)
    with write_checkpoint(
        destination, tensors, overwrite=settings.overwrite, shard_bytes=settings.shard_bytes
    ) as writer:
        modules = _write_tensors(source, selection, settings, writer, progress_stream)
        for path in other_files(source_path):
            writer.copy_file(path)
        manifest = writer.finish(
            _config(source, selection),
            selection.recipe,
            modules,
            source={
                "name": source_path.resolve().name,
                "architecture": source.architecture,
                "files": {shard.name: shard.stat().st_size for shard in source.shards},
            },
            quantization={"solver": settings.solver, "importance": "none"},
        )
    return summarize(manifest, selection.unfit, time.monotonic() - started)


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
    if source.config.get("tie_word_embeddings") and not selection.tied:
        return {**source.config, "tie_word_embeddings": False}
    return source.config


def relative_error(weight: Tensor, packed: PackedWeight, spec: WeightSpec) -> float:
    """‖Ŵ − W‖/‖W‖ (Frobenius) of a packed ``weight [N, K]``, some rows at a time; 0 for a weight of zeros."""
    rows = max(1, _ERROR_CHUNK_WEIGHTS // weight.shape[1])
    squared_error = squared_norm = 0.0
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        original = weight[part].float()
        restored = dequantize(
            packed.qweight[part], packed.scale[part], packed.zero[part], spec.bits, spec.group_size
        )
        squared_error += float((restored - original).double().square().sum())
        squared_norm += float(original.double().square().sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _write_tensors(
    source: SourceCheckpoint,
    selection: Selection,
    settings: QuantizationSettings,
    writer: CheckpointWriter,
    progress_stream: TextIO | None,
) -> dict[str, PackedModule]:
    weights = sum(out_features * in_features for out_features, in_features in selection.modules.values())
    progress = Progress(weights, "weights", progress_stream) if progress_stream is not None else None
    modules: dict[str, PackedModule] = {}
    try:
        for name in sorted(source.tensors, key=natural_order):
            module = name.removesuffix(".weight")
            if not name.endswith(".weight") or module not in selection.modules:
                writer.copy(name, source.tensors[name])
                continue
            modules[module] = _write_module(source, selection, settings, writer, module)
            if progress is not None:
                out_features, in_features = selection.modules[module]
                progress.advance(out_features * in_features, module)
    finally:
        if progress is not None:
            progress.close()
    return modules


def _write_module(
    source: SourceCheckpoint,
    selection: Selection,
    settings: QuantizationSettings,
    writer: CheckpointWriter,
    module: str,
) -> PackedModule:
    weight = source.read(f"{module}.weight").to(settings.device)
    damaged = int((~weight.isfinite()).sum())
    if damaged:
        raise IntegrityError(
            f"expected finite weights in {module}.weight of {source.path}, got {damaged} that are not. "
            "Download the model again."
        )
    planned = _packed_module(source, selection, module)
    packed = quantize_packed(weight, planned.spec, solver=settings.solver)
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


def _check_settings(settings: QuantizationSettings) -> None:
    if settings.solver not in SOLVERS:
        raise UsageError(f"expected a solver among {SOLVERS}, got {settings.solver!r}. Try fast.")
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"expected a device of this machine, got {settings.device!r} without a GPU. Use --device cpu."
        )


def _check_apart(source_path: Path, destination: Path) -> None:
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
