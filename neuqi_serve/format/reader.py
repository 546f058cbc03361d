"""Reading a packed checkpoint: validated headers first, tensors when they are asked for (FORMAT.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.manifest import MANIFEST_NAME, Manifest, PackedModule, hash_file
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.safetensors_file import StoredTensor, TensorSpec, read_header, read_tensor
from neuqi_serve.format.source import CONFIG_NAME, INDEX_NAME, read_json_object
from neuqi_serve.quant.quantize import PackedWeight

_AGAIN = "Pack or copy the checkpoint again."


@dataclass(frozen=True)
class PackedCheckpoint:
    """``config``: the parsed ``config.json``. ``recipe``: its ``quantization_config``. ``manifest``: what is there."""

    path: Path
    config: Mapping[str, Any]
    recipe: QuantizationRecipe
    manifest: Manifest

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Where every tensor lies, from the headers of the shards, which must agree with the manifest.

        Raises:
            IntegrityError: a missing, extra, truncated or resized shard, or a tensor that is not as listed.
        """
        present = {file.name for file in self.path.glob("*.safetensors")}
        for name in self.manifest.shards:
            if name not in present:
                raise IntegrityError(f"expected the shard {name} in {self.path}, got no such file. {_AGAIN}")
        for name in sorted(present - set(self.manifest.shards)):
            raise IntegrityError(
                f"expected only the shards {self.manifest.shards} in {self.path}, got also {name}, which a loader "
                "would read. Remove it, or pack the model again."
            )
        stored: dict[str, StoredTensor] = {}
        for name in self.manifest.shards:
            _check_size(self.path / name, self.manifest.files[name].nbytes)
            found = read_header(self.path / name)
            _check_tensors(self.path / name, found, self.manifest)
            stored.update(found)
        unplaced = sorted(set(self.manifest.tensors) - set(stored))
        if unplaced:
            raise IntegrityError(
                f"expected {unplaced[0]} in {self.manifest.tensors[unplaced[0]].file}, got no such shard in the "
                f"manifest of {self.path}. {_AGAIN}"
            )
        return stored

    def expected_tensors(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor that the manifest lists."""
        return {name: record.spec for name, record in self.manifest.tensors.items()}

    def validate(self) -> None:
        """Check headers, sizes, shapes and the recipe; no tensor data is read, whatever the size of the model.

        Raises:
            IntegrityError: a rule of FORMAT.md, section 6, 1 to 9.
        """
        _ = self.stored
        self._check_index()
        for name, module in self.manifest.modules.items():
            self._check_module(name, module)
        self._check_unpacked()

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Check everything: ``validate``, the checksum of every file, and that all scales and zeros are finite.

        ``progress`` is called with the bytes just checked.

        Raises:
            IntegrityError: a rule of FORMAT.md, section 6.
        """
        self.validate()
        for name, record in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise IntegrityError(f"expected the file {name} in {self.path}, got no such file. {_AGAIN}")
            _check_size(path, record.nbytes)
            found = hash_file(path)
            if found.sha256 != record.sha256:
                raise IntegrityError(
                    f"{path}: expected SHA-256 {record.sha256}, got {found.sha256}: the file was changed. {_AGAIN}"
                )
            if progress is not None:
                progress(record.nbytes)
        for name in self.manifest.modules:
            self._read_parameter(f"{name}.scale")
            self._read_parameter(f"{name}.zero")

    def read(self, name: str) -> Tensor:
        """Read one tensor as it is stored.

        Raises:
            IntegrityError: there is no tensor of this name, or the folder is not as its manifest says.
        """
        if name not in self.stored:
            raise IntegrityError(f"expected the tensor {name} in {self.path}, got none. Check the name.")
        return read_tensor(self.stored[name])

    def read_module(self, name: str) -> PackedWeight:
        """Read a packed module: ``qweight`` int32 ``[N, K·b/32]``, ``scale`` and ``zero`` ``[N, G]``.

        Raises:
            IntegrityError: no packed module of this name, a wrong shape or dtype, or a non-finite scale or zero.
        """
        if name not in self.manifest.modules:
            raise IntegrityError(f"expected a packed module {name} in {self.path}, got none. Check the name.")
        self._check_module(name, self.manifest.modules[name])
        scale, zero = self._read_parameter(f"{name}.scale"), self._read_parameter(f"{name}.zero")
        return PackedWeight(qweight=self.read(f"{name}.qweight"), scale=scale, zero=zero)

    def _read_parameter(self, name: str) -> Tensor:
        values = self.read(name)
        damaged = int((~values.isfinite()).sum())
        if damaged:
            raise IntegrityError(
                f"{self.path}: expected finite values in {name}, got {damaged} that are not. {_AGAIN}"
            )
        return values

    def _check_index(self) -> None:
        path = self.path / INDEX_NAME
        if len(self.manifest.shards) < 2 and not path.exists():
            return
        weight_map = read_json_object(path).get("weight_map")
        expected = {name: record.file for name, record in self.manifest.tensors.items()}
        if weight_map != expected:
            raise IntegrityError(
                f"{path}: expected every tensor in the shard that {MANIFEST_NAME} names, got another map. {_AGAIN}"
            )

    def _check_module(self, name: str, module: PackedModule) -> None:
        if self.recipe.keeps(name):
            raise IntegrityError(
                f"{self.path}: expected {name} unquantized, as modules_to_not_convert says, got it packed. {_AGAIN}"
            )
        if module.spec != self.recipe.spec_of(name):
            raise IntegrityError(
                f"{self.path}: expected {name} as config.json says ({self.recipe.spec_of(name)}), got {module.spec} "
                f"in {MANIFEST_NAME}. {_AGAIN}"
            )
        try:
            tensors = module.tensors
        except UsageError as error:
            raise IntegrityError(f"{self.path}: {name} {list(module.shape)}: {error}") from None
        for part, spec in tensors.items():
            record = self.manifest.tensors.get(f"{name}.{part}")
            if record is None or record.spec != spec:
                received = "none" if record is None else str(record.spec)
                raise IntegrityError(f"{self.path}: expected {name}.{part} {spec}, got {received}. {_AGAIN}")
        if f"{name}.weight" in self.manifest.tensors:
            raise IntegrityError(
                f"{self.path}: expected {name} packed only, got also {name}.weight. {_AGAIN}"
            )

    def _check_unpacked(self) -> None:
        for name, record in self.manifest.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "qweight" and module not in self.manifest.modules:
                raise IntegrityError(
                    f"{self.path}: expected {module} as a module of {MANIFEST_NAME}, got only its tensors. {_AGAIN}"
                )
            if part == "weight" and len(record.spec.shape) == 2 and not self.recipe.keeps(module):
                raise IntegrityError(
                    f"{self.path}: expected {module} packed or named in modules_to_not_convert, got neither. {_AGAIN}"
                )


def open_checkpoint(path: Path) -> PackedCheckpoint:
    """Open a packed folder: ``config.json`` and manifest are parsed, the shards are not looked at yet.

    Raises:
        UnsupportedModelError: there is no folder or no model in it, or the model is not a packed one.
        IntegrityError: a missing manifest, another or unknown format version, or a value outside the format.
    """
    if not path.is_dir():
        received = "a file" if path.exists() else "no such folder"
        raise UnsupportedModelError(
            f"expected a packed checkpoint folder, got {received}: {path}. Check the path."
        )
    config = read_json_object(path / CONFIG_NAME, missing=UnsupportedModelError)
    quantization = config.get("quantization_config")
    if quantization is None:
        raise UnsupportedModelError(
            f"expected a packed checkpoint, got a model without quantization_config: {path}. "
            f"Pack it with `neuqi quantize {path} -o OUT`."
        )
    where = f"{path / CONFIG_NAME}, quantization_config"
    if not isinstance(quantization, dict):
        raise IntegrityError(f"{where}: expected an object, got {quantization!r}. {_AGAIN}")
    recipe = QuantizationRecipe.from_dict(quantization, where)
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        raise IntegrityError(f"expected {MANIFEST_NAME} in {path}, got no such file. {_AGAIN}")
    manifest = Manifest.from_json(manifest_path.read_bytes(), str(manifest_path))
    return PackedCheckpoint(path, config, recipe, manifest)


def _check_size(path: Path, nbytes: int) -> None:
    size = path.stat().st_size
    if size != nbytes:
        kind = "truncated" if size < nbytes else "too long"
        raise IntegrityError(f"{path}: expected {nbytes} bytes, got {size}: {kind}. {_AGAIN}")


def _check_tensors(path: Path, found: Mapping[str, StoredTensor], manifest: Manifest) -> None:
    listed = {name: record.spec for name, record in manifest.tensors.items() if record.file == path.name}
    for name in sorted(listed.keys() | found.keys()):
        expected = str(listed[name]) if name in listed else "no such tensor"
        received = str(found[name].spec) if name in found else "no such tensor"
        if expected != received:
            raise IntegrityError(
                f"{path}: expected {name} {expected} ({MANIFEST_NAME}), got {received}. {_AGAIN}"
            )
