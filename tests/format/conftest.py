"""A packed checkpoint made without the quantizer: codes, scales and zero-points are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuqi_kernels import layout
from neuqi_serve.config import WeightSpec
from neuqi_serve.format.manifest import PackedModule
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.format.safetensors_file import TensorSpec
from neuqi_serve.format.writer import write_checkpoint
from neuqi_serve.quant.quantize import PackedWeight

DEFAULT = WeightSpec(3, 32)
MODULES = {
    "model.layers.0.mlp.up_proj": (WeightSpec(3, 32), (5, 64)),
    "model.layers.0.mlp.down_proj": (WeightSpec(4, -1), (3, 96)),
}
KEPT = {"model.embed_tokens.weight": torch.arange(15, dtype=torch.float32).reshape(3, 5).to(torch.bfloat16)}


def packed_weight(spec: WeightSpec, shape: tuple[int, int]) -> PackedWeight:
    out_features, in_features = shape
    groups = spec.groups(in_features)
    codes = torch.arange(out_features * in_features).reshape(shape) * 7 % 2**spec.bits
    scale = torch.full((out_features, groups), 0.25, dtype=getattr(torch, spec.scale_dtype))
    zero = torch.full_like(scale, 1.5)
    return PackedWeight(layout.pack(codes.to(torch.uint8), spec.bits), scale, zero)


@pytest.fixture
def packed_folder(tmp_path: Path) -> Callable[..., Path]:
    """``packed_folder(shard_bytes) -> folder``: two packed modules and an embedding."""

    def write(shard_bytes: int = 1 << 30) -> Path:
        modules = {name: PackedModule(spec, shape, "BF16", 0.125) for name, (spec, shape) in MODULES.items()}
        tensors = {name: TensorSpec("BF16", tuple(tensor.shape)) for name, tensor in KEPT.items()}
        for name, module in modules.items():
            tensors.update({f"{name}.{part}": spec for part, spec in module.tensors.items()})
        recipe = QuantizationRecipe(
            DEFAULT, {"model.layers.0.mlp.down_proj": WeightSpec(4, -1)}, ("embed_tokens",)
        )
        folder = tmp_path / "packed"
        with write_checkpoint(folder, tensors, shard_bytes=shard_bytes) as writer:
            for name, (spec, shape) in MODULES.items():
                writer.write_module(name, packed_weight(spec, shape))
            for name, tensor in KEPT.items():
                writer.write(name, tensor)
            writer.finish(
                {"architectures": ["LlamaForCausalLM"]}, recipe, modules, {"name": "x"}, {"solver": "given"}
            )
        return folder

    return write
