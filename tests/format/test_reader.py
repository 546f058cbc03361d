"""Every rule of FORMAT.md, section 6, by its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_kernels import layout
from neuqi_serve.errors import IntegrityError, UnsupportedModelError
from neuqi_serve.format.manifest import hash_file
from neuqi_serve.format.reader import open_checkpoint

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Edit = Callable[[dict[str, Any]], object]


def edit_json(path: Path, edit: Edit) -> None:
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))


def edit_config(folder: Path, edit: Edit) -> None:
    edit_json(folder / "config.json", lambda body: edit(body["quantization_config"]))


def edit_manifest(folder: Path, edit: Edit) -> None:
    edit_json(folder / "neuqi_manifest.json", edit)


def edit_tensors(folder: Path, edit: Edit, listed: bool = True) -> None:
    """Rewrite the shard; with ``listed`` the manifest agrees with it, as if a writer had meant it."""
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)
    record = hash_file(shard)
    codes = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

    def relist(body: dict[str, Any]) -> None:
        body["files"]["model.safetensors"] = {"bytes": record.nbytes, "sha256": record.sha256}
        if listed:
            body["tensors"] = {
                name: {"file": "model.safetensors", "dtype": codes[t.dtype], "shape": list(t.shape)}
                for name, t in tensors.items()
            }

    edit_manifest(folder, relist)


def reject(folder: Path, part: str) -> None:
    with pytest.raises(IntegrityError, match=part):
        open_checkpoint(folder).validate()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 150])
def test_checkpoint_reads_back(packed_folder: Callable[..., Path], shard_bytes: int) -> None:
    checkpoint = open_checkpoint(packed_folder(shard_bytes))
    checkpoint.validate()
    checkpoint.verify()
    module = checkpoint.read_module(UP)
    codes = torch.arange(5 * 64).reshape(5, 64) * 7 % 8
    assert torch.equal(layout.unpack(module.qweight, 3).int(), codes.int())
    assert torch.equal(module.scale, torch.full((5, 2), 0.25, dtype=torch.float16))
    assert torch.equal(module.zero, torch.full((5, 2), 1.5, dtype=torch.float16))
    kept = checkpoint.read("model.embed_tokens.weight")
    assert torch.equal(kept, torch.arange(15.0).reshape(3, 5).bfloat16())


def test_expected_tensors_are_those_of_the_shards(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    expected = open_checkpoint(folder).expected_tensors()
    loaded = load_file(folder / "model.safetensors")
    assert {name: spec.shape for name, spec in expected.items()} == {
        n: tuple(t.shape) for n, t in loaded.items()
    }


def test_validation_reads_no_tensor_data(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    open_checkpoint(folder).validate()


def test_edited_chat_template_loads_but_does_not_verify(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_json(folder / "config.json", lambda body: body.update(eos_token_id=3))
    open_checkpoint(folder).validate()
    with pytest.raises(IntegrityError, match=r"config\.json: expected \d+ bytes"):
        open_checkpoint(folder).verify()


def test_path_without_a_packed_model_is_rejected(packed_folder: Callable[..., Path], tmp_path: Path) -> None:
    for path, part in ((tmp_path / "nowhere", "no such folder"), (tmp_path, r"config\.json")):
        with pytest.raises(UnsupportedModelError, match=part):
            open_checkpoint(path)
    folder = packed_folder()
    with pytest.raises(UnsupportedModelError, match="a file"):
        open_checkpoint(folder / "config.json")
    edit_json(folder / "config.json", lambda body: body.pop("quantization_config"))
    with pytest.raises(UnsupportedModelError, match="neuqi quantize"):
        open_checkpoint(folder)


def test_rule_1_missing_or_broken_metadata(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_json(folder / "config.json", lambda body: body.update(quantization_config="neuqi"))
    reject(folder, "expected an object")
    (folder / "config.json").write_text("{")
    reject(folder, "expected JSON")


def test_rule_1_missing_manifest(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    (folder / "neuqi_manifest.json").unlink()
    reject(folder, r"expected neuqi_manifest\.json")


def test_rule_2_other_method_or_version(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_manifest(folder, lambda body: body.update(format_version=2))
    reject(folder, "format_version 1, got 2")
    edit_config(folder, lambda body: body.update(format_version=0))
    reject(folder, "format_version 1, got 0")
    edit_config(folder, lambda body: body.update(quant_method="gptq"))
    with pytest.raises(UnsupportedModelError, match="quant_method"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("bits", 5), ("group_size", 100), ("scale_dtype", "int8"), ("sym", True)]
)
def test_rule_3_value_or_key_outside_the_format(
    packed_folder: Callable[..., Path], key: str, value: object
) -> None:
    folder = packed_folder()
    edit_config(folder, lambda body: body.update({key: value}))
    reject(folder, key.replace("_", "."))


def test_rule_4_missing_shard(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder(shard_bytes=150)
    next(folder.glob("*-00002-*")).unlink()
    reject(folder, r"expected the shard model-00002.* no such file")


def test_rule_4_extra_shard(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    save_file({"x": torch.ones(1)}, folder / "adapter.safetensors")
    reject(folder, r"got also adapter\.safetensors")


def test_rule_5_truncated_shard(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    reject(folder, "truncated")
    edit_manifest(folder, lambda body: body["files"]["model.safetensors"].update(bytes=shard.stat().st_size))
    reject(folder, "as its header declares")


def test_rule_5_extended_shard(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")
    reject(folder, "too long")


def test_rule_6_tensor_missing_in_the_shard(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.zero"), listed=False)
    reject(folder, f"{UP}.zero F16.* got no such tensor")


def test_rule_6_tensor_missing_in_the_manifest(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_manifest(folder, lambda body: body["tensors"].pop(f"{UP}.zero"))
    reject(folder, f"{UP}.zero no such tensor.* got F16")


def test_rule_6_tensor_in_a_shard_that_is_not_listed(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_manifest(folder, lambda body: body["tensors"].update(x={"file": "y", "dtype": "F32", "shape": [1]}))
    reject(folder, "expected x in y")


@pytest.mark.parametrize("change", [lambda t: t[:-1].contiguous(), lambda t: t.float()])
def test_rule_6_other_shape_or_dtype(
    packed_folder: Callable[..., Path], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = packed_folder()
    edit_tensors(
        folder, lambda tensors: tensors.update({f"{UP}.scale": change(tensors[f"{UP}.scale"])}), listed=False
    )
    reject(folder, f"expected {UP}.scale F16")


def test_rule_7_index_that_contradicts_the_manifest(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder(shard_bytes=150)
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda body: body["weight_map"].update({f"{UP}.scale": "elsewhere.safetensors"}))
    reject(folder, "another map")
    index.unlink()
    reject(folder, r"model\.safetensors\.index\.json")


def test_rule_8_incomplete_module(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.zero"))
    reject(folder, f"expected {UP}.zero .* got none")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("qweight", torch.zeros(5, 4, dtype=torch.int32)),
        ("scale", torch.ones(5, 1, dtype=torch.float16)),
        ("zero", torch.ones(5, 2, dtype=torch.bfloat16)),
    ],
)
def test_rule_8_wrong_shape_or_dtype(
    packed_folder: Callable[..., Path], part: str, value: torch.Tensor
) -> None:
    folder = packed_folder()
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.{part}": value}))
    reject(folder, rf"expected {UP}\.{part} .* got")
    with pytest.raises(IntegrityError, match=part):
        open_checkpoint(folder).read_module(UP)


@pytest.mark.parametrize(("in_features", "part"), [(48, "multiple of 32"), (96, "does not divide")])
def test_rule_8_rows_that_do_not_fit(packed_folder: Callable[..., Path], in_features: int, part: str) -> None:
    folder = packed_folder()
    edit_config(folder, lambda body: body.update(group_size=64))
    edit_manifest(folder, lambda body: body["modules"][UP].update(group_size=64, shape=[5, in_features]))
    reject(folder, part)


def test_rule_8_spec_that_contradicts_the_configuration(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_config(folder, lambda body: body["modules"][DOWN].update(bits=2))
    reject(folder, f"expected {DOWN} as config.json says")


def test_rule_8_packed_module_that_must_not_be(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_config(folder, lambda body: body["modules_to_not_convert"].append("up_proj"))
    reject(folder, f"expected {UP} unquantized")


def test_rule_8_packed_module_that_also_has_a_weight(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight": torch.ones(5, 64)}))
    reject(folder, rf"got also {UP}\.weight")


def test_rule_9_codes_of_no_module(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_manifest(folder, lambda body: body["modules"].pop(UP))
    reject(folder, f"expected {UP} as a module")


def test_rule_9_matrix_that_nothing_names(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.fc.weight": torch.ones(2, 2)}))
    reject(folder, r"model\.layers\.1\.fc packed or named")


def test_rule_10_checksum(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    shard = folder / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match="SHA-256"):
        open_checkpoint(folder).verify()


def test_rule_10_missing_file(packed_folder: Callable[..., Path]) -> None:
    folder = packed_folder()
    edit_manifest(folder, lambda body: body["files"].update({"tokenizer.json": {"bytes": 1, "sha256": "a"}}))
    with pytest.raises(IntegrityError, match=r"expected the file tokenizer\.json"):
        open_checkpoint(folder).verify()


@pytest.mark.parametrize("part", ["scale", "zero"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rule_11_scale_or_zero_that_is_not_finite(
    packed_folder: Callable[..., Path], part: str, value: float
) -> None:
    folder = packed_folder()
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.{part}"][-1].fill_(value))
    open_checkpoint(folder).validate()
    with pytest.raises(IntegrityError, match=f"finite values in {UP}.{part}, got 2"):
        open_checkpoint(folder).verify()
    with pytest.raises(IntegrityError, match="finite"):
        open_checkpoint(folder).read_module(UP)


def test_unknown_names_are_rejected(packed_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(packed_folder())
    with pytest.raises(IntegrityError, match="the tensor ghost"):
        checkpoint.read("ghost")
    with pytest.raises(IntegrityError, match="packed module ghost"):
        checkpoint.read_module("ghost")


def test_verification_reports_every_byte(packed_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(packed_folder())
    counted: list[int] = []
    checkpoint.verify(counted.append)
    assert sum(counted) == sum(record.nbytes for record in checkpoint.manifest.files.values())
