"""An unquantized Hugging Face checkpoint folder, read lazily, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neuqi_serve.errors import IntegrityError, UnsupportedModelError
from neuqi_serve.format.fused_experts import unfuse_experts
from neuqi_serve.format.safetensors_file import StoredTensor, read_header, read_tensor

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5")


@dataclass(frozen=True)
class SourceCheckpoint:
    """``config``: the parsed ``config.json``. ``tensors``: where each tensor lies, experts one by one.

    ``shards``: all the files.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``, e.g. ``LlamaForCausalLM``; empty if there is none."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            IntegrityError: the file changed since it was opened.
        """
        return read_tensor(self.tensors[name])

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.tensors

    def unchanged(self, name: str) -> bool:
        """Whether :meth:`read` gives the bytes of the file: a checkpoint that changes weights on the way says no."""
        return name in self.tensors


def open_source(path: Path) -> SourceCheckpoint:
    """Open a folder with ``config.json`` and one or several safetensors shards; no tensor data is read.

    Raises:
        UnsupportedModelError: there is no folder, no model in it, or one without safetensors.
        IntegrityError: a missing, truncated or damaged shard, an index that does not fit the shards.
    """
    if not path.is_dir():
        received = "a file" if path.exists() else "no such folder"
        raise UnsupportedModelError(
            f"expected a model folder with {CONFIG_NAME} and safetensors, got {received}: {path}. "
            "Give the path of a downloaded model."
        )
    config = read_json_object(path / CONFIG_NAME, missing=UnsupportedModelError)
    if (path / INDEX_NAME).exists():
        weight_map = _weight_map(path)
        shards = tuple(path / name for name in sorted(set(weight_map.values())))
    else:
        weight_map, shards = {}, (_single_file(path),)
    tensors = _collect(path, weight_map, shards)
    if not tensors:
        raise IntegrityError(f"expected tensors in {path}, got shards without any. Download the model again.")
    hidden_size = config.get("hidden_size")
    tensors = unfuse_experts(tensors, hidden_size if isinstance(hidden_size, int) else None)
    return SourceCheckpoint(path, config, tensors, shards)


def read_json_object(
    path: Path, missing: type[UnsupportedModelError] | type[IntegrityError] = IntegrityError
) -> dict[str, Any]:
    """Read a file that holds one JSON object; ``missing`` is the error for an absent file.

    Raises:
        UnsupportedModelError: the file is absent and ``missing`` says so.
        IntegrityError: the file is absent or holds something else.
    """
    if not path.is_file():
        raise missing(
            f"expected a model with {path.name}, got a folder without it: {path.parent}. Check the path."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{path}: expected JSON, got something else ({error}). Download or pack it again."
        ) from None
    if not isinstance(content, dict):
        raise IntegrityError(
            f"{path}: expected a JSON object, got {type(content).__name__}. Download or pack it again."
        )
    return content


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError(
            f'{path / INDEX_NAME}: expected a non-empty "weight_map", got {weight_map!r:.80}. Download it again.'
        )
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise IntegrityError(
                f"{path / INDEX_NAME}: expected names of safetensors files in the same folder, got {file!r}. "
                "Download the model again."
            )
    return weight_map


def _single_file(path: Path) -> Path:
    if (path / SINGLE_NAME).is_file():
        return path / SINGLE_NAME
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if found:
        raise IntegrityError(
            f"expected {SINGLE_NAME} or {INDEX_NAME} in {path}, got only {found[:3]}. "
            "The index is missing: download the model again."
        )
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))
    if others:
        raise UnsupportedModelError(
            f"expected weights in safetensors files in {path}, got {others[:3]}. "
            "Convert them, e.g. with transformers' save_pretrained."
        )
    raise UnsupportedModelError(
        f"expected {SINGLE_NAME} or {INDEX_NAME} in {path}, got no weights. Give the path of a downloaded model."
    )


def _collect(path: Path, weight_map: Mapping[str, str], shards: tuple[Path, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not shard.is_file():
            count = sum(1 for file in weight_map.values() if file == shard.name)
            raise IntegrityError(
                f"expected the shard {shard.name} with {count} tensors in {path}, got no such file. "
                "Download it again."
            )
        for name, stored in read_header(shard).items():
            if weight_map.get(name, shard.name) != shard.name:
                continue
            if name in tensors:
                raise IntegrityError(
                    f"expected {name} in one shard of {path}, got it in {tensors[name].path.name} and "
                    f"{shard.name}. Download the model again."
                )
            tensors[name] = stored
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise IntegrityError(
            f"expected {absent[0]} in {weight_map[absent[0]]} as {INDEX_NAME} says, got a shard without it "
            f"({len(absent)} tensors absent). Download the model again."
        )
    return tensors
