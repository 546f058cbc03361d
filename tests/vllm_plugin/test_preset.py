"""The preset of the search reaches the quantizer, from whichever of vLLM's settings it comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from neuqi_serve.errors import UsageError
from neuqi_serve.vllm_plugin import config as config_module
from neuqi_serve.vllm_plugin import linear
from neuqi_serve.vllm_plugin.config import NeuqiConfig


def preset_used(config: NeuqiConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """Load a small layer as vLLM would, and say with which preset it was quantized."""
    used: list[str] = []
    quantize = linear.quantize_packed

    def noting(*args: Any, preset: str) -> Any:
        used.append(preset)
        return quantize(*args, preset=preset)

    monkeypatch.setattr(linear, "quantize_packed", noting)
    method = linear.NeuqiOnlineLinearMethod(config, config.recipe.spec)
    layer = torch.nn.Module()
    method._begin(layer, 128, [32], torch.bfloat16)
    layer.weight = torch.nn.Parameter(torch.randn(32, 128).to(torch.bfloat16), requires_grad=False)
    method.loaded_shards = {"weight": {None}}
    method.process_weights_after_loading(layer)
    return used[0]


def test_the_preset_of_the_overrides_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = NeuqiConfig.from_config({"quant_method": "neuqi", "online": True, "preset": "fast"})
    assert preset_used(config, monkeypatch) == "fast"


def test_balanced_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preset_used(NeuqiConfig(), monkeypatch) == "balanced"


@pytest.mark.parametrize(
    ("overrides", "additional", "expected"),
    [({"preset": "fast"}, {"bits": 3}, "fast"), ({"bits": 3}, {"preset": "minmax"}, "minmax")],
)
def test_additional_config_completes_the_overrides(
    overrides: dict[str, Any], additional: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    current = SimpleNamespace(
        additional_config={"neuqi": additional}, model_config=None, parallel_config=parallel
    )
    monkeypatch.setattr(config_module, "get_current_vllm_config_or_none", lambda: current)
    config = NeuqiConfig.from_config({"quant_method": "neuqi", "online": True} | overrides)
    config._complete_recipe()
    assert preset_used(config, monkeypatch) == expected


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a preset among"):
        NeuqiConfig.from_config({"quant_method": "neuqi", "online": True, "preset": "best"})
