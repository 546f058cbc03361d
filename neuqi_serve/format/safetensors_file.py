"""The safetensors container: every byte of a file is accounted for before it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neuqi_serve.errors import IntegrityError

ELEMENT_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
TORCH_NAMES = {
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "F32": "float32",
    "I32": "int32",
    "U32": "uint32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "U16": "uint16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPE_CODES = {name: code for code, name in TORCH_NAMES.items()}
FLOAT_CODES = ("F64", "F32", "F16", "BF16")

# The limit of the reference implementation: a header beyond it is damage, not a model.
_MAX_HEADER_BYTES = 100_000_000
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (safetensors name, e.g. ``"BF16"``) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` counts bytes from the start of the file ``path``."""

    path: Path
    spec: TensorSpec
    offset: int


def order_in_shard(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names by decreasing element size, then by name: every tensor is aligned to its elements."""
    return sorted(specs, key=lambda name: (-ELEMENT_BYTES[specs[name].dtype], name))


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file with these tensors, and each tensor's offset in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, begins = 0, {}
    for name in order_in_shard(specs):
        spec = specs[name]
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begins[name] = begin
        begin += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: len(prefix) + begin for name, begin in begins.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors' places from the header, which must account for every byte of the file.

    Raises:
        IntegrityError: a missing, truncated or malformed file.
    """
    if not path.is_file():
        raise IntegrityError(
            f"expected the shard {path}, got no such file. Download or pack the model again."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise IntegrityError(
                f"{path}: expected a safetensors header within the file, got {length} header bytes in a file "
                f"of {size} bytes: truncated, or no safetensors file. Download or pack the model again."
            )
        header = _parse_header(path, file.read(length))
    end, tensors = 0, {}
    for name, begin, stop, spec in sorted(_entries(path, header), key=lambda entry: entry[1:3]):
        if begin != end or stop - begin != spec.nbytes:
            raise IntegrityError(
                f"{path}: expected {name} {spec} at the bytes {end} to {end + spec.nbytes}, got {begin} "
                f"to {stop}: the header is damaged. Download or pack the model again."
            )
        tensors[name] = StoredTensor(path, spec, 8 + length + begin)
        end = stop
    if size != 8 + length + end:
        raise IntegrityError(
            f"{path}: expected {8 + length + end} bytes as its header declares, got {size}: "
            f"{'truncated' if size < 8 + length + end else 'trailing bytes'}. Download or pack it again."
        )
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise IntegrityError(
            f"{path}: expected a JSON header, got something else ({error}). Download or pack it again."
        ) from None
    if not isinstance(header, dict):
        raise IntegrityError(
            f"{path}: expected a JSON object as header, got {type(header).__name__}. Download it again."
        )
    header.pop("__metadata__", None)
    return header


def _entries(path: Path, header: Mapping[str, Any]) -> Iterator[tuple[str, int, int, TensorSpec]]:
    for name, entry in header.items():
        try:
            dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            valid = all(type(n) is int and n >= 0 for n in (*shape, begin, stop)) and dtype in ELEMENT_BYTES
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise IntegrityError(
                f"{path}: expected dtype, shape and data_offsets of the tensor {name}, got {entry!r}. "
                "Download or pack the model again."
            )
        yield name, begin, stop, TensorSpec(dtype, tuple(shape))


def torch_dtype(code: str) -> torch.dtype:
    """Dtype of torch for a safetensors name such as ``"BF16"``."""
    dtype = getattr(torch, TORCH_NAMES[code])
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read one tensor into memory of its own; nothing else of the file stays in memory.

    Raises:
        IntegrityError: the file ends before the tensor does.
    """
    buffer = torch.empty(stored.spec.nbytes, dtype=torch.uint8)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        view, done = buffer.numpy().data, 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise _ended(stored)
            done += count
    return buffer.view(getattr(torch, TORCH_NAMES[stored.spec.dtype])).reshape(stored.spec.shape)


def prefetch_tensor(stored: StoredTensor) -> None:
    """Ask the system to read a tensor's bytes ahead, while the caller does something else; does not wait."""
    if not hasattr(os, "posix_fadvise"):
        return
    with stored.path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), stored.offset, stored.spec.nbytes, os.POSIX_FADV_WILLNEED)


def copy_tensor(stored: StoredTensor, destination: BinaryIO) -> None:
    """Copy a tensor's bytes to the destination's position, some MiB at a time.

    Raises:
        IntegrityError: the file ends before the tensor does.
    """
    left = stored.spec.nbytes
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        while left:
            block = file.read(min(left, _COPY_BYTES))
            if not block:
                raise _ended(stored)
            destination.write(block)
            left -= len(block)


def _ended(stored: StoredTensor) -> IntegrityError:
    return IntegrityError(
        f"{stored.path}: expected {stored.spec.nbytes} bytes at {stored.offset}, got fewer: the file "
        "shrank while it was read. Download or pack the model again."
    )
