"""The bytes of a plan against folders that were really packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from neuqi_serve.config import VocabularyBits, WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint
from neuqi_serve.plan.outline import outline
from neuqi_serve.plan.plan import read_model
from neuqi_serve.plan.weights import Weights, weights_of


def saved(config: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(config), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def planned(config: dict[str, Any], spec: WeightSpec, **more: Any) -> Weights:
    return weights_of(outline(config, Path("config.json")), spec, **more)


def test_config_alone_gives_the_bytes_of_the_packed_folder(
    architecture: str, config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    spec = WeightSpec(3, 32)
    described = config(architecture)
    model = saved(described, tmp_path / "model")
    quantize_checkpoint(model, tmp_path / "packed", QuantizationSettings(spec, preset="minmax"))
    tensors = open_checkpoint(tmp_path / "packed").manifest.tensors.values()
    packed = sum(record.spec.nbytes for record in tensors)

    from_config = planned(described, spec)

    assert from_config.total == packed
    assert from_config == weights_of(read_model(str(model)), spec)
    assert 3.9 < from_config.bits_per_weight < 4.1


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_widths_of_head_and_embedding_count(
    bits: int, config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    vocabulary = VocabularyBits(bits, bits)
    model = saved(config(), tmp_path / "model")
    settings = QuantizationSettings(WeightSpec(2, 64), preset="minmax", vocabulary=vocabulary)
    quantize_checkpoint(model, tmp_path / "packed", settings)
    tensors = open_checkpoint(tmp_path / "packed").manifest.tensors.values()

    weights = planned(config(), WeightSpec(2, 64), vocabulary=vocabulary)

    assert weights.total == sum(record.spec.nbytes for record in tensors)


def test_a_step_reads_the_head_but_not_the_embedding(config: Callable[..., dict[str, Any]]) -> None:
    untied, tied = (planned(config(tie_word_embeddings=tie), WeightSpec(4, 32)) for tie in (False, True))
    assert untied.embedding > 0
    assert untied.read_per_token == untied.total - untied.embedding
    assert tied.embedding == 0
    assert tied.read_per_token == tied.total


def test_an_unpacked_embedding_is_read_only_if_it_is_the_head(config: Callable[..., dict[str, Any]]) -> None:
    gemma = planned(config("GemmaForCausalLM", tie_word_embeddings=True), WeightSpec(4, 32))
    assert gemma.read_per_token == gemma.total
    phi = planned(config("PhiForCausalLM"), WeightSpec(4, 32))
    assert phi.read_per_token == phi.total - 160 * 64 * 2


def test_a_step_reads_the_chosen_experts_only(config: Callable[..., dict[str, Any]]) -> None:
    two, four, more = (
        planned(config("MixtralForCausalLM", num_experts_per_tok=chosen), WeightSpec(4, 32)).read_per_token
        for chosen in (2, 4, 8)
    )
    experts = 2 * 4 * 3 * 128 * 64 * 5 // 8  # layers, experts, matrices, weights, at five bits a weight
    assert four - two == experts // 2
    assert more == four


def test_two_ranks_share_the_layers_and_both_hold_the_norms(config: Callable[..., dict[str, Any]]) -> None:
    one, half = (planned(config(), WeightSpec(4, 32), ranks=ranks) for ranks in (1, 2))
    assert half.codes * 2 == one.codes
    assert half.scales * 2 == one.scales
    # 160 tokens are padded to 192.
    assert half.head * 2 == one.head * 192 // 160
    assert half.kept == one.kept


def test_more_ranks_than_key_value_heads_repeat_them(config: Callable[..., dict[str, Any]]) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64}
    one, half = (planned(config(**sizes), WeightSpec(4, 32), ranks=ranks) for ranks in (1, 2))
    keys = 2 * 2 * 32 * 64 // 2  # two layers, keys and values, at half a byte
    assert half.codes == (one.codes - keys) // 2 + keys


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "4 attention heads"),
        ({}, 8, "4 attention heads"),
        ({"intermediate_size": 96}, 2, "rows of 96 weights in groups of 32"),
    ],
)
def test_ranks_that_do_not_share_out_are_refused_with_those_that_do(
    changes: dict[str, Any], ranks: int, message: str, config: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        planned(config(**changes), WeightSpec(4, 32), ranks=ranks)
    assert "Sizes that do: [1" in str(caught.value)


def test_an_unknown_architecture_is_refused(config: Callable[..., dict[str, Any]]) -> None:
    described = {**config(), "architectures": ["BloomForCausalLM"], "model_type": "bloom"}
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        outline(described, Path("config.json"))
