"""Writing a packed checkpoint: shard plan first, then tensor by tensor, memory bounded by one tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuqi_serve._version import VERSION
from neuqi_serve.format.manifest import (
    MANIFEST_NAME,
    Manifest,
    PackedModule,
    TensorRecord,
    hash_file,
)
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.safetensors_file import (
    DTYPE_CODES,
    StoredTensor,
    TensorSpec,
    copy_tensor,
    encode_header,
)
from neuqi_serve.format.source import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from neuqi_serve.format.staging import staged_folder
from neuqi_serve.quant.quantize import PackedWeight

DEFAULT_SHARD_BYTES = 4 << 30


class CheckpointWriter:
    """Fills a folder with the tensors planned; made by ``write_checkpoint``.

    ``tensors``: dtype and shape of everything that will be written, in the order in which the shards are filled.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorSpec], shard_bytes: int) -> None:
        self._folder = folder
        self._placed: dict[str, StoredTensor] = {}
        self._written: set[str] = set()
        shards = plan_shards(tensors, shard_bytes)
        for number, shard in enumerate(shards, 1):
            path = folder / _shard_name(number, len(shards))
            prefix, offsets = encode_header(shard)
            with path.open("wb") as file:
                file.write(prefix)
                file.truncate(len(prefix) + sum(spec.nbytes for spec in shard.values()))
            self._placed.update({name: StoredTensor(path, shard[name], offsets[name]) for name in offsets})
        self._order = list(tensors)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: its dtype or shape is not the planned one.
        """
        place = self._placed[name]
        received = TensorSpec(DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        if received != place.spec:
            raise ValueError(f"{name}: planned as {place.spec}, got {received}. Plan what is written.")
        dense = tensor.detach().cpu().contiguous()
        # Dimensions of size one may have any stride; a view as bytes needs a stride of one.
        content = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        with place.path.open("r+b") as file:
            file.seek(place.offset)
            file.write(content.numpy().data)
        self._written.add(name)

    def write_module(self, name: str, packed: PackedWeight) -> None:
        """Write ``qweight``, ``scale`` and ``zero`` of a module.

        Raises:
            ValueError: a dtype or shape is not the planned one.
        """
        self.write(f"{name}.qweight", packed.qweight)
        self.write(f"{name}.scale", packed.scale)
        self.write(f"{name}.zero", packed.zero)

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Copy a tensor's bytes from another safetensors file.

        Raises:
            ValueError: its dtype or shape is not the planned one.
            IntegrityError: that file is shorter than it was.
        """
        place = self._placed[name]
        if stored.spec != place.spec:
            raise ValueError(f"{name}: planned as {place.spec}, got {stored.spec}. Plan what is written.")
        with place.path.open("r+b") as file:
            file.seek(place.offset)
            copy_tensor(stored, file)
        self._written.add(name)

    def copy_file(self, path: Path) -> None:
        """Copy a file that holds no tensors, under its own name."""
        shutil.copyfile(path, self._folder / path.name)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file that holds no tensors."""
        (self._folder / name).write_bytes(content)

    def finish(
        self,
        config: Mapping[str, Any],
        recipe: QuantizationRecipe,
        modules: Mapping[str, PackedModule],
        source: Mapping[str, Any],
        quantization: Mapping[str, Any],
    ) -> Manifest:
        """Write ``config.json``, the index and, last, the manifest.

        Raises:
            ValueError: a planned tensor was not written.
        """
        missing = [name for name in self._order if name not in self._written]
        if missing:
            raise ValueError(
                f"{len(missing)} planned tensors were not written, e.g. {missing[0]}. Write them."
            )
        self._write_json(CONFIG_NAME, {**config, "quantization_config": recipe.to_dict()})
        if len({place.path for place in self._placed.values()}) > 1:
            self._write_index()
        manifest = Manifest(
            files={path.name: hash_file(path) for path in sorted(self._folder.iterdir())},
            tensors={
                name: TensorRecord(self._placed[name].path.name, self._placed[name].spec)
                for name in self._order
            },
            modules=modules,
            producer={"name": "neuqi-serve", "version": VERSION},
            source=source,
            quantization=quantization,
        )
        (self._folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _write_index(self) -> None:
        total = sum(place.spec.nbytes for place in self._placed.values())
        weight_map = {name: self._placed[name].path.name for name in sorted(self._placed)}
        self._write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self._folder / name).write_text(text, encoding="utf-8")


@contextmanager
def write_checkpoint(
    destination: Path,
    tensors: Mapping[str, TensorSpec],
    *,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Iterator[CheckpointWriter]:
    """Yield a writer whose folder gets the name ``destination`` when the block ends without an error.

    Call ``finish`` last. After an exception nothing is left of it, and what was at ``destination`` is untouched.

    Raises:
        UsageError: the destination is taken, or another process is writing it.
    """
    with staged_folder(destination, overwrite, is_packed_folder) as folder:
        yield CheckpointWriter(folder, tensors, shard_bytes)


def is_packed_folder(path: Path) -> bool:
    """Whether a folder looks like a packed checkpoint of ours, complete or not."""
    return (path / MANIFEST_NAME).is_file()


def plan_shards(tensors: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Fill shards in the given order, each up to ``shard_bytes``; a larger tensor has a shard of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in tensors.items():
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
