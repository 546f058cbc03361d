"""Importance measured on a text, and what quantization makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from neuqi_serve.cli.main import main
from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.importance import read_importance, write_sidecar
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.importance import input_squares, measure_importance
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.quant.quantize import quantize_packed

SPEC = WeightSpec(2, 32)


class Two(nn.Module):
    """Two linear layers in a row, called as a language model is."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 5)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        assert not use_cache
        found: torch.Tensor = self.second(self.first(self.table(input_ids)))
        return found


def test_mean_squares_are_over_all_tokens_of_all_windows() -> None:
    model, done = Two(), []
    windows = [torch.tensor([1, 2, 3]), torch.tensor([4, 10])]
    means = input_squares(model, {"a": model.first, "b": model.second}, windows, done.append)
    with torch.no_grad():
        hidden = model.table(torch.cat(windows))
        expected = {"a": hidden.square().mean(0), "b": model.first(hidden).square().mean(0)}
    for name, values in expected.items():
        torch.testing.assert_close(means[name], values)
    assert done == [3, 2]
    assert not model.first._forward_pre_hooks


def test_a_packed_layer_is_the_weighted_one(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = write_llama()
    name = "model.layers.1.mlp.down_proj"
    h = torch.randn(96, generator=torch.Generator().manual_seed(3)).exp().square()
    write_sidecar(tmp_path / "h", {name: h}, {})
    quantize_checkpoint(model, tmp_path / "out", QuantizationSettings(SPEC, importance=tmp_path / "h"))
    packed = open_checkpoint(tmp_path / "out").read_module(name)
    weight = open_source(model).read(f"{name}.weight")
    expected, plain = quantize_packed(weight, SPEC, h), quantize_packed(weight, SPEC)
    assert torch.equal(packed.qweight, expected.qweight)
    assert torch.equal(packed.scale, expected.scale)
    assert not torch.equal(packed.qweight, plain.qweight)


def test_the_command_takes_both_layouts_and_counts_what_does_not_fit(
    write_llama: Callable[..., Path],
    write_legacy: Callable[..., Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    model = write_llama()
    values = [float(i % 7) + 0.5 for i in range(96)]
    name = "blk.0.ffn_down.weight"
    files = {
        "legacy": write_legacy(tmp_path / "m.dat", {name: (4, values), "blk.9.attn_q.weight": (1, [1.0])}),
        "gguf": write_gguf(tmp_path / "m.gguf", {name: ([4 * v for v in values], [4.0])}),
    }
    found = {}
    for layout, path in files.items():
        words = ["quantize", str(model), "-o", str(tmp_path / layout), "--bits", "2", "--group-size", "32"]
        assert main([*words, "--importance", str(path)]) == 0
        errors = capsys.readouterr().err
        assert "no importance for 13 layers" in errors
        assert ("1 entries belong to no layer" in errors) == (layout == "legacy")
        found[layout] = open_checkpoint(tmp_path / layout).read_module("model.layers.0.mlp.down_proj")
    assert torch.equal(found["legacy"].qweight, found["gguf"].qweight)


def test_an_importance_of_another_model_writes_nothing(
    write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    write_sidecar(tmp_path / "h", {"model.layers.0.mlp.down_proj": torch.ones(97)}, {})
    settings = QuantizationSettings(SPEC, importance=tmp_path / "h")
    with pytest.raises(UsageError, match=r"expected 96 values .*got \[97\]"):
        quantize_checkpoint(write_llama(), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_the_demo_model_is_measured_on_a_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from neuqi_serve.demo import model_path

    try:
        folder = model_path()
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    (tmp_path / "text").write_text("Once upon a time there was a fox who had a lamp. " * 20)
    count = measure_importance(Path(folder), tmp_path / "text", tmp_path / "h", tokens=100, window=32)
    assert count == 100
    found = read_importance(tmp_path / "h")
    assert len(found.entries) == 7 * 6
    q, k = (found.entries[f"model.layers.0.self_attn.{layer}_proj"] for layer in "qk")
    assert torch.equal(q, k)
    assert bool((q > 0).all())


@pytest.mark.parametrize(("tokens", "window"), [(1, 8), (8, 1)])
def test_numbers_that_measure_nothing(tmp_path: Path, tokens: int, window: int) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens"):
        measure_importance(tmp_path, tmp_path / "text", tmp_path / "h", tokens, window)
