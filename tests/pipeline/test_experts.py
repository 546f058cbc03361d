"""Packing a mixture of experts: both layouts of a checkpoint, what is missing, how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neuqi_serve.cli.main import main
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

SETTINGS = QuantizationSettings(WeightSpec(3, 32))
HIDDEN, INTERMEDIATE, EXPERTS = 64, 32, 4
CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS}
Tensors = dict[str, torch.Tensor | None]


def without_mlp() -> Tensors:
    """The dense layers of the tiny Llama, taken away."""
    kinds = ("gate_proj", "up_proj", "down_proj")
    return {f"model.layers.{i}.mlp.{kind}.weight": None for i in range(2) for kind in kinds}


def experts(
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), where: str = "mlp"
) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    gate, up, down = names
    tensors: Tensors = without_mlp()
    for layer in range(2):
        block = f"model.layers.{layer}.{where}"
        for expert in range(EXPERTS):
            for name, shape in (
                (gate, (INTERMEDIATE, HIDDEN)),
                (up, (INTERMEDIATE, HIDDEN)),
                (down, (HIDDEN, 32)),
            ):
                weight = torch.randn(shape, generator=generator).mul(0.05).bfloat16()
                tensors[f"{block}.experts.{expert}.{name}.weight"] = weight
        tensors[f"{block}.gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()
    return tensors


def fused(tensors: Tensors, transposed: bool = False) -> Tensors:
    """The same experts as transformers holds them in memory."""
    together = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"

        def stacked(kind: str, block: str = block) -> torch.Tensor:
            parts = [tensors[f"{block}.{expert}.{kind}.weight"] for expert in range(EXPERTS)]
            return torch.stack([part for part in parts if part is not None])

        gate_up = torch.cat((stacked("gate_proj"), stacked("up_proj")), dim=1)
        for name, tensor in (("gate_up_proj", gate_up), ("down_proj", stacked("down_proj"))):
            together[f"{block}.{name}"] = tensor.mT.contiguous() if transposed else tensor
    return together


def test_both_layouts_give_the_same_packed_experts(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    apart = write_llama("apart", config=CONFIG, tensors=experts())
    together = write_llama("together", config=CONFIG, tensors=fused(experts()))
    summary = quantize_checkpoint(apart, tmp_path / "a", SETTINGS)
    quantize_checkpoint(together, tmp_path / "b", SETTINGS)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.layers.1.mlp.experts.3.up_proj.qweight"].shape == (INTERMEDIATE, HIDDEN * 3 // 32)
    # The router chooses by small differences: it stays as it is.
    assert first["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert {g.kind: g.layers for g in summary.groups if "experts" in g.kind} == {
        "experts.gate_proj": 2 * EXPERTS,
        "experts.up_proj": 2 * EXPERTS,
        "experts.down_proj": 2 * EXPERTS,
    }


def test_mixtral_has_names_of_its_own(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
    }
    folder = write_llama("mixtral", config=config, tensors=experts(("w1", "w3", "w2"), "block_sparse_moe"))
    quantize_checkpoint(folder, tmp_path / "out", SETTINGS)
    packed = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.0.w2.scale" in packed
    assert "model.layers.1.block_sparse_moe.gate.weight" in packed
    # vLLM's class of the model takes no packed embedding.
    assert "model.embed_tokens.weight" in packed


def test_a_missing_expert_is_found(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    lacking = experts() | {"model.layers.1.mlp.experts.2.up_proj.weight": None}
    folder = write_llama("lacking", config=CONFIG, tensors=lacking)
    with pytest.raises(IntegrityError, match=r"experts\.\*\.up_proj.*none for the experts \[2\]"):
        quantize_checkpoint(folder, tmp_path / "out", SETTINGS)


def test_other_layouts_of_experts_are_refused(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_llama("odd", config=CONFIG, tensors=fused(experts(), transposed=True))
    with pytest.raises(UnsupportedModelError, match=r"expected experts one by one.*gate_up_proj"):
        quantize_checkpoint(folder, tmp_path / "out", SETTINGS)


def test_experts_that_cannot_all_be_packed_are_refused(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = experts()
    for name, tensor in tensors.items():
        if tensor is not None and "experts" in name:
            tensors[name] = tensor[:24] if tensor.shape[0] == INTERMEDIATE else tensor[:, :24].contiguous()
    folder = write_llama("short", config=CONFIG, tensors=tensors)
    with pytest.raises(UsageError, match=r"expected rows of experts.*down_proj: rows of 24"):
        quantize_checkpoint(folder, tmp_path / "out", SETTINGS)


def test_inspect_shows_a_layers_experts_in_a_line(
    write_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_llama("apart", config=CONFIG, tensors=experts())
    quantize_checkpoint(folder, tmp_path / "out", SETTINGS)
    assert main(["inspect", str(tmp_path / "out"), "--layers"]) == 0
    table = capsys.readouterr().out
    assert "model.layers.0.mlp.experts.*.gate_proj  4×32×64" in " ".join(table.split("\n")).replace(
        "   ", "  "
    )
    assert "experts.3" not in table
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    row = modules["model.layers.1.mlp.experts.*.down_proj"]
    assert (row["experts"], row["shape"]) == (EXPERTS, [HIDDEN, INTERMEDIATE])
    assert row["bytes_before"] == EXPERTS * HIDDEN * INTERMEDIATE * 2
    assert "experts" not in modules["model.layers.1.self_attn.q_proj"]
