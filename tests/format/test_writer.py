from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.safetensors_file import TensorSpec, read_header
from neuqi_serve.format.writer import plan_shards, write_checkpoint

ONE = {"a.bias": TensorSpec("F32", (3,))}
RECIPE = QuantizationRecipe(WeightSpec(4))


def test_plan_fills_shards_in_order_and_gives_a_large_tensor_its_own() -> None:
    sizes = {"a": 4, "b": 6, "c": 30, "d": 5, "e": 5}
    specs = {name: TensorSpec("U8", (size,)) for name, size in sizes.items()}
    assert [list(shard) for shard in plan_shards(specs, 10)] == [["a", "b"], ["c"], ["d", "e"]]


def test_one_shard_has_the_plain_name_and_no_index(packed_folder: Callable[..., Path]) -> None:
    names = {path.name for path in packed_folder().iterdir()}
    assert names == {"config.json", "model.safetensors", "neuqi_manifest.json"}


def test_shards_and_index_are_those_that_hugging_face_loaders_expect(
    packed_folder: Callable[..., Path],
) -> None:
    folder = packed_folder(shard_bytes=150)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    loaded = {file: load_file(folder / file) for file in files}
    assert {name: file for file, part in loaded.items() for name in part} == index["weight_map"]
    total = sum(tensor.nbytes for part in loaded.values() for tensor in part.values())
    assert index["metadata"]["total_size"] == total
    open_checkpoint(folder).verify()


def test_configuration_keeps_the_source_and_gains_the_recipe(packed_folder: Callable[..., Path]) -> None:
    config = json.loads((packed_folder() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "neuqi"


def test_same_content_gives_the_same_bytes(packed_folder: Callable[..., Path], tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in packed_folder().iterdir()}
    (tmp_path / "packed").rename(tmp_path / "other")
    assert {path.name: path.read_bytes() for path in packed_folder().iterdir()} == first


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(6.0)[3:],
        torch.arange(6.0).view(1, 1, 6)[..., 4:5],
        torch.tensor(1.0),
    ],
)
def test_view_is_written_in_order(tmp_path: Path, tensor: torch.Tensor) -> None:
    with write_checkpoint(tmp_path / "out", {"a.bias": TensorSpec("F32", tuple(tensor.shape))}) as writer:
        writer.write("a.bias", tensor)
        writer.finish({}, RECIPE, {}, {}, {})
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a.bias"], tensor)


def test_view_of_size_one_with_another_stride_is_written(tmp_path: Path) -> None:
    tensor = torch.tensor([[[3.0, 4.0]]]).unbind(-1)[1]
    assert tensor.stride(-1) != 1
    with write_checkpoint(tmp_path / "out", {"a.bias": TensorSpec("F32", (1, 1))}) as writer:
        writer.write("a.bias", tensor)
        writer.finish({}, RECIPE, {}, {}, {})
    assert load_file(tmp_path / "out" / "model.safetensors")["a.bias"].item() == 4.0


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.float16), torch.zeros(4), torch.zeros(3, 1)])
def test_tensor_other_than_planned_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="planned as"), write_checkpoint(tmp_path / "out", ONE) as writer:
        writer.write("a.bias", tensor)
    assert not list(tmp_path.iterdir())


def test_copied_tensor_other_than_planned_is_refused(tmp_path: Path) -> None:
    save_file({"a.bias": torch.zeros(4)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["a.bias"]
    with pytest.raises(ValueError, match="planned as"), write_checkpoint(tmp_path / "out", ONE) as writer:
        writer.copy("a.bias", stored)


def test_planned_tensor_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not written"), write_checkpoint(tmp_path / "out", ONE) as writer:
        writer.finish({}, RECIPE, {}, {}, {})
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_packed_checkpoints_only(
    packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed_folder()
    with write_checkpoint(folder, ONE, overwrite=True) as writer:
        writer.write("a.bias", torch.ones(3))
        writer.finish({}, RECIPE, {}, {}, {})
    assert list(open_checkpoint(folder).expected_tensors()) == ["a.bias"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with (
        pytest.raises(UsageError, match="will not be removed"),
        write_checkpoint(tmp_path / "other", ONE, overwrite=True),
    ):
        pass
