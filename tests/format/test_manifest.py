from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.format.manifest import FileRecord, Manifest, PackedModule, TensorRecord, hash_file
from neuqi_serve.format.safetensors_file import TensorSpec

MANIFEST = Manifest(
    files={"model.safetensors": FileRecord(3, "ab"), "config.json": FileRecord(2, "cd")},
    tensors={"a.weight": TensorRecord("model.safetensors", TensorSpec("BF16", (2, 3)))},
    modules={"a": PackedModule(WeightSpec(3, 64, "float32"), (2, 128), "BF16", 0.25)},
    producer={"name": "x"},
    source={"name": "y"},
    quantization={"solver": "z"},
)


def test_manifest_survives_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_manifest_ignores_unknown_keys() -> None:
    body = {**json.loads(MANIFEST.to_json()), "later": 1}
    assert Manifest.from_json(json.dumps(body)) == MANIFEST


@pytest.mark.parametrize(
    ("bits", "group_size", "scale_dtype", "words", "groups", "code"),
    [(2, 32, "float16", 8, 4, "F16"), (3, -1, "float32", 12, 1, "F32"), (8, 128, "bfloat16", 32, 1, "BF16")],
)
def test_module_tensors_have_the_shapes_of_the_format(
    bits: int, group_size: int, scale_dtype: str, words: int, groups: int, code: str
) -> None:
    module = PackedModule(WeightSpec(bits, group_size, scale_dtype), (5, 128), "F32")
    parameters = TensorSpec(code, (5, groups))
    assert module.tensors == {
        "qweight": TensorSpec("I32", (5, words)),
        "scale": parameters,
        "zero": parameters,
    }
    assert module.packed_bytes == 5 * words * 4 + 2 * parameters.nbytes
    assert module.source_bytes == 5 * 128 * 4


def test_module_tensors_reject_rows_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="does not divide"):
        _ = PackedModule(WeightSpec(4, 128), (5, 160), "F32").tensors


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    body = json.loads(MANIFEST.to_json())
    edit(body)
    return json.dumps(body)


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda body: body.update(format="other"), "format"),
        (lambda body: body.update(format_version=2), "format_version 1, got 2"),
        (lambda body: body.pop("format_version"), "got None"),
        (lambda body: body.pop("files"), "files"),
        (lambda body: body.update(tensors=[]), "AttributeError"),
        (lambda body: body["files"]["config.json"].update(bytes=-1), "sizes"),
        (lambda body: body["files"]["config.json"].update(sha256=3), "sha256"),
        (lambda body: body["files"].update({"../x": {"bytes": 1, "sha256": "a"}}), "plain file name"),
        (lambda body: body["tensors"]["a.weight"].update(dtype="F7"), "dtype"),
        (lambda body: body["tensors"]["a.weight"].update(shape=[1.5]), "sizes"),
        (lambda body: body["modules"]["a"].update(bits=5), "bits"),
        (lambda body: body["modules"]["a"].update(group_size=100), "group size"),
        (lambda body: body["modules"]["a"].update(scale_dtype="int8"), "scale dtype"),
        (lambda body: body["modules"]["a"].update(shape=[1]), "ValueError"),
        (lambda body: body["modules"]["a"].update(source_dtype="F7"), "dtype"),
        (lambda body: body["modules"]["a"].update(relative_error="much"), "ValueError"),
        (lambda body: body["modules"].update(a=None), "TypeError"),
    ],
)
def test_manifest_rejects(edit: Callable[[dict[str, Any]], object], part: str) -> None:
    with pytest.raises(IntegrityError, match=part):
        Manifest.from_json(edited(edit), "the manifest")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_manifest_rejects_what_is_no_json_object(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="the manifest: expected"):
        Manifest.from_json(content, "the manifest")


def test_hash_covers_more_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuqi_serve.format.manifest._HASH_BLOCK_BYTES", 7)
    (tmp_path / "file").write_bytes(b"x" * 17)
    assert hash_file(tmp_path / "file") == FileRecord(17, hashlib.sha256(b"x" * 17).hexdigest())
