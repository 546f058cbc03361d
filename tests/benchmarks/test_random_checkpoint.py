from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def checkpoint(load, monkeypatch):
    module = load("random_checkpoint")
    monkeypatch.setattr(module, "POOL_ELEMENTS", 10_007)
    return module


def test_the_sizes_are_those_of_llama_8b(checkpoint):
    shape = checkpoint.SHAPES["8b"]
    assert sum(map(math.prod, shape.tensors().values())) == 8_030_261_248
    assert shape.cache_bytes(1) == 131072


def test_the_shards_hold_every_tensor_once(checkpoint, tmp_path):
    shape = checkpoint.SHAPES["tiny"]
    checkpoint.write_checkpoint(shape, tmp_path, shard_bytes=300_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 310_000 for file in files)
    found = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    assert {name: tuple(tensor.shape) for name, (_, tensor) in found.items()} == shape.tensors()
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert (
        index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values()) == shape.bytes
    )
    weights = [tensor for _, tensor in found.values() if tensor.ndim == 2]
    assert all(abs(float(weight.float().std()) / checkpoint.STD - 1) < 0.05 for weight in weights)
    assert not torch.equal(weights[1][:64, :64], weights[2][:64, :64])


def test_transformers_reads_it(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint.write_checkpoint(checkpoint.SHAPES["tiny"], tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert sum(parameter.nbytes for parameter in model.parameters()) == checkpoint.SHAPES["tiny"].bytes
    assert torch.isfinite(model(torch.tensor([[5, 9, 300]])).logits).all()


def test_a_full_disk_is_named_before_anything_is_written(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 << 30))
    with pytest.raises(SystemExit, match=r"expected 17\.1 GB free in .*, there are 3\.2\. Name a folder"):
        checkpoint.write_checkpoint(checkpoint.SHAPES["8b"], tmp_path)
    assert not list(tmp_path.iterdir())
