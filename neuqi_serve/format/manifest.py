"""``neuqi_manifest.json``: what a packed folder must hold (FORMAT.md, section 5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuqi_kernels.layout import packed_words
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.quantization_config import FORMAT_VERSION, check_format_version
from neuqi_serve.format.safetensors_file import DTYPE_CODES, ELEMENT_BYTES, TensorSpec

MANIFEST_NAME = "neuqi_manifest.json"
_HASH_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 (hexadecimal) of a file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """Shard, dtype and shape of a tensor."""

    file: str
    spec: TensorSpec


@dataclass(frozen=True)
class PackedModule:
    """A packed linear layer: its spec, and shape ``[N, K]`` and safetensors dtype of the source weight.

    ``relative_error``: ‖Ŵ − W‖/‖W‖ (Frobenius), if it was measured.
    """

    spec: WeightSpec
    shape: tuple[int, int]
    source_dtype: str
    relative_error: float | None = None

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of ``qweight``, ``scale`` and ``zero``.

        Raises:
            UsageError: the group size does not divide K, or K is no multiple of 32.
        """
        out_features, in_features = self.shape
        parameters = TensorSpec(
            DTYPE_CODES[self.spec.scale_dtype], (out_features, self.spec.groups(in_features))
        )
        words = packed_words(in_features, self.spec.bits)
        return {"qweight": TensorSpec("I32", (out_features, words)), "scale": parameters, "zero": parameters}

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of the three tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def source_bytes(self) -> int:
        """Bytes of the source weight."""
        return TensorSpec(self.source_dtype, self.shape).nbytes


@dataclass(frozen=True)
class Manifest:
    """Files, tensors and modules of a packed folder; ``producer, source, quantization`` only inform."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    modules: Mapping[str, PackedModule]
    producer: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> list[str]:
        """File names of the shards, in order."""
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    def to_json(self) -> str:
        """Serialise; the same manifest gives the same text."""
        body = {
            "format": "neuqi",
            "format_version": FORMAT_VERSION,
            "producer": dict(self.producer),
            "source": dict(self.source),
            "quantization": dict(self.quantization),
            "files": {n: {"bytes": f.nbytes, "sha256": f.sha256} for n, f in sorted(self.files.items())},
            "tensors": {
                name: {"file": t.file, "dtype": t.spec.dtype, "shape": list(t.spec.shape)}
                for name, t in self.tensors.items()
            },
            "modules": {name: _module_to_json(module) for name, module in self.modules.items()},
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check types and values.

        Raises:
            IntegrityError: not JSON, an unknown format version, or a missing or ill-typed entry.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise IntegrityError(
                f"{where}: expected JSON, got something else ({error}). Pack the model again."
            ) from None
        if not isinstance(body, dict) or body.get("format") != "neuqi":
            raise IntegrityError(
                f'{where}: expected an object with "format": "neuqi", got another. Pack the model again.'
            )
        check_format_version(body.get("format_version"), where)
        try:
            return cls(
                files={name: _file(name, entry) for name, entry in body["files"].items()},
                tensors={name: _tensor(entry) for name, entry in body["tensors"].items()},
                modules={name: _module(entry) for name, entry in body["modules"].items()},
                producer=dict(body.get("producer", {})),
                source=dict(body.get("source", {})),
                quantization=dict(body.get("quantization", {})),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{where}: expected the entries of FORMAT.md, section 5, got an incomplete or ill-typed one "
                f"({type(error).__name__}: {error}). Pack the model again."
            ) from None


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in blocks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _module_to_json(module: PackedModule) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "bits": module.spec.bits,
        "group_size": module.spec.group_size,
        "scale_dtype": module.spec.scale_dtype,
        "shape": list(module.shape),
        "source_dtype": module.source_dtype,
    }
    if module.relative_error is not None:
        entry["relative_error"] = module.relative_error
    return entry


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise TypeError(f"{values!r} is no list of sizes")
    return tuple(values)


def _file(name: str, entry: Any) -> FileRecord:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no plain file name")
    (nbytes,) = _integers([entry["bytes"]])
    if not isinstance(entry["sha256"], str):
        raise TypeError(f"sha256 of {name} is no text")
    return FileRecord(nbytes, entry["sha256"])


def _tensor(entry: Any) -> TensorRecord:
    if entry["dtype"] not in ELEMENT_BYTES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    return TensorRecord(str(entry["file"]), TensorSpec(entry["dtype"], _integers(entry["shape"])))


def _module(entry: Any) -> PackedModule:
    out_features, in_features = _integers(entry["shape"])
    if entry["source_dtype"] not in ELEMENT_BYTES:
        raise ValueError(f"unknown dtype {entry['source_dtype']!r}")
    try:
        spec = WeightSpec(entry["bits"], entry["group_size"], entry["scale_dtype"])
    except UsageError as error:
        raise ValueError(str(error)) from None
    error_value = entry.get("relative_error")
    relative_error = None if error_value is None else float(error_value)
    return PackedModule(spec, (out_features, in_features), entry["source_dtype"], relative_error)
