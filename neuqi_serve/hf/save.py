"""``save_pretrained`` of a packed model: the folder that ``neuqi quantize`` writes, manifest included."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuqi_serve._version import VERSION
from neuqi_serve.errors import UsageError
from neuqi_serve.format.manifest import MANIFEST_NAME, Manifest, PackedModule, TensorRecord, hash_file
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.safetensors_file import DTYPE_CODES, read_header
from neuqi_serve.format.source import CONFIG_NAME, INDEX_NAME, read_json_object


def save_packed(model: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Write a packed folder that ``from_pretrained`` and vLLM load; other files there, e.g. a tokenizer, stay.

    transformers writes configuration and tensors into a temporary folder; what is complete then moves into place, the
    manifest last. ``options``: those of ``PreTrainedModel.save_pretrained`` but ``push_to_hub``.

    Raises:
        UsageError: the folder holds an unquantized model, or is a file; ``push_to_hub``.
    """
    if options.get("push_to_hub"):
        raise UsageError(
            "expected a local folder, got push_to_hub: the manifest is written last. Save the model, then upload the "
            "folder."
        )
    destination = Path(save_directory).resolve()
    _check_destination(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that renames stay on one file system.
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        type(model).save_pretrained(model, folder, **options)
        write_manifest(folder, model)
        open_checkpoint(folder).validate()
        _move(folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, model: Any) -> None:
    """Write the manifest of a folder whose shards hold packed modules, and complete the recipe in its configuration."""
    tensors: dict[str, TensorRecord] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {
            name: TensorRecord(shard.name, stored.spec) for name, stored in read_header(shard).items()
        }
    recipe = _with_kept_names(model.config.quantization_config.recipe, tensors)
    config = {**read_json_object(folder / CONFIG_NAME), "quantization_config": recipe.to_dict()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    source_dtype = DTYPE_CODES[str(model.dtype).removeprefix("torch.")]
    modules: dict[str, PackedModule] = {}
    for name, record in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            spec = recipe.spec_of(module)
            rows, words = record.spec.shape
            modules[module] = PackedModule(spec, (rows, words * 32 // spec.bits), source_dtype)
    manifest = Manifest(
        files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
        tensors=tensors,
        modules=modules,
        producer={"name": "neuqi-serve", "version": VERSION, "writer": "transformers"},
        source={"name": Path(model.config.name_or_path).name, "architecture": type(model).__name__},
        quantization={"preset": recipe.preset},
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _with_kept_names(recipe: QuantizationRecipe, tensors: Mapping[str, TensorRecord]) -> QuantizationRecipe:
    """Name what stays as the checkpoint does: transformers calls some modules otherwise, e.g. GPT-NeoX's head."""
    kept = [
        name.removesuffix(".weight")
        for name, record in tensors.items()
        if name.endswith(".weight")
        and len(record.spec.shape) == 2
        and not recipe.keeps(name[: -len(".weight")])
    ]
    return replace(recipe, modules_to_not_convert=(*recipe.modules_to_not_convert, *kept))


def _check_destination(destination: Path) -> None:
    if destination.is_file():
        raise UsageError(f"expected a folder to write to, {destination} is a file. Name another.")
    if any(destination.glob("*.safetensors")) and not (destination / MANIFEST_NAME).is_file():
        raise UsageError(
            f"expected a new folder or a packed checkpoint, {destination} holds unquantized weights, which would be "
            "lost. Name another folder."
        )


def _move(folder: Path, destination: Path) -> None:
    if not destination.exists():
        folder.chmod(0o755)
        folder.rename(destination)
        return
    # Without a manifest the folder counts as incomplete until everything is there.
    (destination / MANIFEST_NAME).unlink(missing_ok=True)
    for stale in [*destination.glob("*.safetensors"), destination / INDEX_NAME]:
        stale.unlink(missing_ok=True)
    files = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_NAME)
    for path in files:
        os.replace(path, destination / path.name)
