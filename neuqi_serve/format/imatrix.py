"""Importance matrices of llama.cpp: Σx² per input channel of every matrix multiplication, in two layouts.

GGUF layout (``general.type`` is ``imatrix``): for every weight ``W`` the tensors ``W.in_sum2`` (sums of squared inputs)
and ``W.counts`` (how many were summed). Older files (``.dat``), little-endian: the number of entries; for each the
length of its name, the name, the number of calls, the number of values, and the values (mean square × calls, float32);
then, optionally, a trailer that does not matter here. All integers are int32.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from neuqi_serve.errors import IntegrityError, UsageError

GGUF_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES = 1 << 20
_LONGEST_NAME = 4096
# Last components of Hugging Face names, and what llama.cpp calls the same layer of block N: blk.N.<this>.weight.
_BLOCK_LAYERS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "query_key_value": "attn_qkv",
    "o_proj": "attn_output",
    "out_proj": "attn_output",
    "dense": "attn_output",
    "gate_proj": "ffn_gate",
    "gate_up_proj": "ffn_up",
    "up_proj": "ffn_up",
    "fc1": "ffn_up",
    "dense_h_to_4h": "ffn_up",
    "down_proj": "ffn_down",
    "fc2": "ffn_down",
    "dense_4h_to_h": "ffn_down",
}
_OTHER_LAYERS = {"lm_head": "output", "embed_out": "output"}


def imatrix_name(module: str) -> str | None:
    """Return llama.cpp's name, without ``.weight``, of the linear layer that Hugging Face calls ``module``.

    Only the block number and the last component count, so that the names of an engine, which may have another prefix,
    work as well. None for a layer that llama.cpp has no name for.
    """
    last = module.rpartition(".")[2]
    block = re.search(r"(?:^|\.)(\d+)\.", module)
    if block is None:
        return _OTHER_LAYERS.get(last)
    layer = _BLOCK_LAYERS.get(last)
    return None if layer is None else f"blk.{block.group(1)}.{layer}"


def read_imatrix(path: Path) -> dict[str, Tensor]:
    """Read either layout: llama.cpp's name without ``.weight`` → mean squared input, float32 ``[K]``.

    Entries without a single call, and those of experts, are left out.

    Raises:
        IntegrityError: the file is truncated or no importance matrix.
        UsageError: a GGUF file without the package ``gguf`` installed, or one that holds something else.
    """
    with path.open("rb") as file:
        is_gguf = file.read(4) == GGUF_MAGIC
    entries = _read_gguf(path) if is_gguf else _read_legacy(path.read_bytes(), path)
    return {
        name.removesuffix(".weight"): mean
        for name, mean in entries.items()
        if "_exps" not in name and mean is not None
    }


def _read_gguf(path: Path) -> dict[str, Tensor | None]:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError(
            f"expected the package gguf to read {path}, it is not installed. Install it (pip install gguf), or give an "
            "importance matrix in the older .dat layout, or one written by `neuqi importance`."
        ) from None
    try:
        reader = GGUFReader(path)
        kind = reader.fields.get("general.type")
        found = str(kind.contents()) if kind is not None else "none"
        tensors = {tensor.name: tensor.data.reshape(-1).copy() for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"an unreadable GGUF file ({type(error).__name__}: {error})") from None
    if found != "imatrix":
        raise UsageError(
            f'{path}: expected an importance matrix (general.type "imatrix"), got general.type {found!r}. Give the '
            "file that llama-imatrix wrote, not a model."
        )
    entries: dict[str, Tensor | None] = {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = tensors.get(weight + _COUNTS)
        if counts is None:
            raise _damaged(path, f"{name} without {weight + _COUNTS}")
        # Several counts: one matrix for each expert.
        if len(counts) == 1:
            count = float(counts[0])
            entries[weight] = torch.from_numpy(sums).float() / count if count > 0 else None
    return entries


def _read_legacy(content: bytes, path: Path) -> dict[str, Tensor | None]:
    position = 0

    def take(nbytes: int) -> bytes:
        nonlocal position
        if nbytes < 0 or position + nbytes > len(content):
            raise _damaged(path, f"{len(content)} bytes, which end within an entry")
        part = content[position : position + nbytes]
        position += nbytes
        return part

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    count = integer()
    if not 1 <= count <= _MOST_ENTRIES:
        raise _damaged(path, f"{count} entries, or another kind of file")
    entries: dict[str, Tensor | None] = {}
    for _ in range(count):
        name = _legacy_name(take, integer(), path)
        calls, values = integer(), integer()
        if values < 1 or 4 * values > len(content):
            raise _damaged(path, f"{values} values of {name}")
        sums = torch.frombuffer(bytearray(take(4 * values)), dtype=torch.float32)
        entries[name] = sums / calls if calls > 0 else None
    return entries


def _legacy_name(take: Callable[[int], bytes], length: int, path: Path) -> str:
    if not 1 <= length <= _LONGEST_NAME:
        raise _damaged(path, f"a name of {length} bytes")
    try:
        return take(length).decode()
    except UnicodeDecodeError:
        raise _damaged(path, "a name that is no text") from None


def _damaged(path: Path, received: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: expected an importance matrix of llama.cpp, got {received}. Fetch or compute it again."
    )
