from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.errors import IntegrityError
from neuqi_serve.format.safetensors_file import (
    DTYPE_CODES,
    TensorSpec,
    copy_tensor,
    encode_header,
    read_header,
    read_tensor,
)

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.arange(3, dtype=torch.float16),
    "words": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "bf16": torch.arange(17, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_reader_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = read_tensor(stored[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_header_is_read_by_the_reference_reader_and_aligns_every_tensor(tmp_path: Path) -> None:
    specs = {
        name: TensorSpec(DTYPE_CODES[str(tensor.dtype)[6:]], tuple(tensor.shape))
        for name, tensor in TENSORS.items()
    }
    prefix, offsets = encode_header(specs)
    content = bytearray(prefix) + bytearray(sum(spec.nbytes for spec in specs.values()))
    for name, tensor in TENSORS.items():
        assert offsets[name] % max(1, tensor.element_size()) == 0
        content[offsets[name] : offsets[name] + tensor.nbytes] = bytes(
            tensor.reshape(-1).view(torch.uint8).tolist()
        )
    (tmp_path / "x.safetensors").write_bytes(content)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_copy_moves_the_bytes_of_one_tensor(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    destination = io.BytesIO()
    copy_tensor(read_header(tmp_path / "x.safetensors")["words"], destination)
    assert destination.getvalue() == TENSORS["words"].numpy().tobytes()


ONE = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "truncated"),
        (b"\x10\0\0", "truncated"),
        (raw(b"{}")[:-1], "truncated"),
        (b"\xff" * 16, "truncated"),
        (raw(b"{nope"), "JSON"),
        (raw(b"[]"), "JSON object"),
        (raw(json.dumps({"a": ONE}).encode(), b"x"), "truncated"),
        (raw(json.dumps({"a": ONE}).encode(), b"xyz"), "trailing"),
        (raw(json.dumps({"a": {**ONE, "dtype": "F7"}}).encode(), b"xy"), "dtype, shape"),
        (raw(json.dumps({"a": {**ONE, "shape": [-2]}}).encode(), b"xy"), "dtype, shape"),
        (raw(json.dumps({"a": {**ONE, "shape": 2}}).encode(), b"xy"), "dtype, shape"),
        (raw(json.dumps({"a": {"dtype": "U8"}}).encode(), b"xy"), "dtype, shape"),
        (raw(json.dumps({"a": 3}).encode(), b"xy"), "dtype, shape"),
        (raw(json.dumps({"a": {**ONE, "shape": [3]}}).encode(), b"xy"), "damaged"),
        (raw(json.dumps({"a": {**ONE, "data_offsets": [1, 3]}}).encode(), b"xyz"), "damaged"),
        (raw(json.dumps({"a": ONE, "b": ONE}).encode(), b"xy"), "damaged"),
    ],
)
def test_header_rejects_damage(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=part):
        read_header(tmp_path / "x.safetensors")


def test_header_rejects_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no such file"):
        read_header(tmp_path / "x.safetensors")


def test_tensor_of_a_file_that_shrank_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    stored = max(read_header(path).values(), key=lambda tensor: tensor.offset)
    path.write_bytes(path.read_bytes()[: stored.offset])
    with pytest.raises(IntegrityError, match="shrank"):
        read_tensor(stored)
    with pytest.raises(IntegrityError, match="shrank"):
        copy_tensor(stored, io.BytesIO())
