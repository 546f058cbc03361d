from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuqi_serve.errors import IntegrityError, UnsupportedModelError
from neuqi_serve.format.source import open_source

INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_source_reads_every_tensor(write_llama: Callable[..., Path], shards: int) -> None:
    folder = write_llama(shards=shards)
    expected = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    source = open_source(folder)
    assert source.architecture == "LlamaForCausalLM"
    assert len(source.shards) == shards
    assert source.tensors.keys() == expected.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_source_takes_tensors_that_the_index_does_not_name(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(shards=2)
    edit_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "model.norm.weight" in open_source(folder).tensors


def test_source_rejects_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedModelError, match="a file"):
        open_source(tmp_path / "file")


def test_source_rejects_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        open_source(tmp_path)


def test_source_rejects_a_model_without_weights(write_llama: Callable[..., Path]) -> None:
    folder = write_llama()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="no weights"):
        open_source(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UnsupportedModelError, match="Convert"):
        open_source(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_source_rejects_a_damaged_configuration(write_llama: Callable[..., Path], text: str) -> None:
    folder = write_llama()
    (folder / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(IntegrityError, match="JSON"):
        open_source(folder)


def test_source_rejects_a_missing_index(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(shards=2)
    (folder / INDEX).unlink()
    with pytest.raises(IntegrityError, match="index is missing"):
        open_source(folder)


def test_source_rejects_a_missing_shard(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model-00002-of-00002\.safetensors with \d+ tensors"):
        open_source(folder)


def test_source_rejects_a_truncated_shard(write_llama: Callable[..., Path]) -> None:
    shard = write_llama(shards=2) / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="truncated"):
        open_source(shard.parent)


def test_source_rejects_an_index_that_names_an_absent_tensor(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(shards=2)
    edit_index(
        folder, lambda index: index["weight_map"].update({"ghost.weight": "model-00001-of-00002.safetensors"})
    )
    with pytest.raises(IntegrityError, match=r"ghost\.weight"):
        open_source(folder)


@pytest.mark.parametrize("weight_map", [{}, None, {"a": 3}, {"a": "../x.safetensors"}, {"a": "weights.bin"}])
def test_source_rejects_an_index_without_a_usable_map(
    write_llama: Callable[..., Path], weight_map: object
) -> None:
    folder = write_llama(shards=2)
    edit_index(folder, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(IntegrityError, match=r"weight_map|names of safetensors"):
        open_source(folder)


def test_source_rejects_a_tensor_in_two_shards(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(shards=2)
    for shard in sorted(folder.glob("*.safetensors")):
        save_file({**load_file(shard), "twice": torch.ones(1)}, shard)
    with pytest.raises(IntegrityError, match="twice in one shard"):
        open_source(folder)


def test_index_decides_which_shard_of_two_holds_a_tensor(write_llama: Callable[..., Path]) -> None:
    folder = write_llama(shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(first), "twice": torch.ones(1)}, first)
    save_file({**load_file(second), "twice": torch.zeros(1)}, second)
    for shard, value in ((first, 1.0), (second, 0.0)):
        edit_index(folder, lambda index, shard=shard: index["weight_map"].update(twice=shard.name))  # type: ignore[misc]
        assert open_source(folder).read("twice").item() == value


def test_source_rejects_an_empty_shard(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match="without any"):
        open_source(tmp_path)
