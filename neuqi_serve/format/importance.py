"""The importance h ``[K]`` of a linear layer's inputs, from a file: our own sidecar, or llama.cpp's importance matrix.

The sidecar is a safetensors file: one float32 tensor ``[K]`` for each layer, under the layer's name in the checkpoint
(``model.layers.0.mlp.up_proj``), the mean square of each input. Its metadata hold ``"format": "neuqi-importance"``,
``"version": "1"`` and what the writer adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.imatrix import imatrix_name, read_imatrix
from neuqi_serve.format.manifest import hash_file
from neuqi_serve.format.replaced_file import replaced

SIDECAR_FORMAT, SIDECAR_VERSION = "neuqi-importance", "1"
# Layers of a block that read the same input have the same importance. An engine fuses them into one layer, which has
# one input: were they to differ, a model packed ahead of time and one quantized while it loads would differ too.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Importance:
    """The entries of one file; ``key_of`` maps a layer's name in the checkpoint to its key in ``entries``."""

    path: Path
    entries: Mapping[str, Tensor]
    key_of: Callable[[str], str | None]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, which names its content in a manifest or a cache key."""
        return hash_file(self.path).sha256

    def keys_of(self, module: str) -> list[str]:
        """Keys of the entries that count for ``module``: its own, and those of layers with the same input."""
        head, dot, last = module.rpartition(".")
        names = next((group for group in _SAME_INPUT if last in group), (last,))
        keys = [self.key_of(f"{head}{dot}{name}") for name in names]
        return [key for key in keys if key is not None and key in self.entries]

    def of(self, module: str, in_features: int) -> Tensor | None:
        """Return h float32 ``[in_features]`` of the layer ``module``, or None without an entry.

        Raises:
            UsageError: an entry of another length: the file is of another model.
        """
        found = [(key, self.entries[key]) for key in self.keys_of(module)]
        for key, values in found:
            if values.shape != (in_features,):
                raise UsageError(
                    f"{self.path}: expected {in_features} values for the inputs of {module}, got {list(values.shape)} "
                    f"in {key}. The file belongs to another model: give the one of this model."
                )
        if not found:
            return None
        # The mean of equal values is the value itself, in float64, for any number of layers there is.
        return torch.stack([values.double() for _, values in found]).mean(0).float()

    def renamed(self, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> Importance:
        """Return it with the names of a sidecar mapped, e.g. by ``apply_dict`` of vLLM's mapper."""
        if self.key_of is imatrix_name:
            return self
        return Importance(self.path, rename(dict(self.entries)), self.key_of)


@dataclass(frozen=True)
class ResolvedImportance:
    """``values``: layer → h float32 ``[K]``. ``missing``: layers without an entry. ``unused``: entries of no layer."""

    values: Mapping[str, Tensor]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def warnings(self) -> list[str]:
        """Return what the user should know, a line each."""
        lines = []
        if self.missing:
            lines.append(
                f"no importance for {len(self.missing)} layers, e.g. {self.missing[0]}: their inputs weigh alike"
            )
        if self.unused:
            lines.append(
                f"{len(self.unused)} entries belong to no layer that is quantized, e.g. {self.unused[0]}"
            )
        return lines


def resolve(importance: Importance, in_features: Mapping[str, int]) -> ResolvedImportance:
    """Find the importance of every layer; ``in_features``: layer → K.

    Raises:
        UsageError: an entry of another length, or no entry for any layer.
    """
    values: dict[str, Tensor] = {}
    used: set[str] = set()
    for module, length in in_features.items():
        found = importance.of(module, length)
        if found is not None:
            values[module] = found
            used.update(importance.keys_of(module))
    if not values:
        example = min(importance.entries, default="no entry")
        raise UsageError(
            f"{importance.path}: expected importance for layers like {next(iter(in_features), 'none')}, got none for "
            f"any of {len(in_features)}; the file has entries like {example}. Give the file of this model."
        )
    missing = tuple(module for module in in_features if module not in values)
    return ResolvedImportance(values, missing, tuple(sorted(set(importance.entries) - used)))


def read_importance(path: Path) -> Importance:
    """Read a sidecar or an importance matrix of llama.cpp in either layout.

    Raises:
        UsageError: there is no such file, or one of another kind.
        IntegrityError: the file is damaged, or has values that are negative or not finite.
    """
    if not path.is_file():
        received = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"expected an importance file, got {received}: {path}. Check the path.")
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[8:9] == b"{":
        importance = Importance(path, _read_sidecar(path), str)
    else:
        importance = Importance(path, read_imatrix(path), imatrix_name)
    for name, values in importance.entries.items():
        bad = int((~torch.isfinite(values) | (values < 0)).sum())
        if bad:
            raise IntegrityError(
                f"{path}: expected finite values of at least 0 in {name}, got {bad} others. Compute the file again."
            )
    return importance


def write_sidecar(path: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a sidecar: layer → h ``[K]``, stored as float32; ``metadata`` say where it comes from.

    Raises:
        UsageError: the destination is a folder, or its folder does not exist.
    """
    from safetensors.torch import save_file

    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UsageError(f"expected a file name in an existing folder, got {path}. Name another.")
    # Copies: the library refuses tensors that share memory.
    tensors = {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in values.items()}
    described = {**metadata, "format": SIDECAR_FORMAT, "version": SIDECAR_VERSION}
    with replaced(path) as temporary:
        save_file(tensors, temporary, metadata=described)


def _read_sidecar(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (SIDECAR_FORMAT, SIDECAR_VERSION):
                raise UsageError(
                    f"{path}: expected a safetensors file with the metadata format {SIDECAR_FORMAT!r}, version "
                    f"{SIDECAR_VERSION!r}, got {metadata.get('format')!r}, {metadata.get('version')!r}. Write one with "
                    "`neuqi importance`."
                )
            return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise IntegrityError(
            f"{path}: expected a complete safetensors file, got {error}. Write or fetch it again."
        ) from None
