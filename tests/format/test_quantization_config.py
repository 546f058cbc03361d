from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from neuqi_serve.config import DEFAULT_SKIP, VocabularyBits, WeightSpec
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe, is_name_of


def valid(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "neuqi",
        "format_version": 1,
        "bits": 3,
        "group_size": 128,
        "scale_dtype": "bfloat16",
        "modules": {"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": -1}},
        "modules_to_not_convert": ["lm_head"],
        **changes,
    }


def test_recipe_survives_json() -> None:
    recipe = QuantizationRecipe.from_dict(json.loads(json.dumps(valid())))
    assert recipe.to_dict() == valid()
    assert recipe.spec == WeightSpec(3, 128, "bfloat16")
    assert recipe.modules["model.layers.0.mlp.down_proj"] == WeightSpec(4, -1, "bfloat16")


def test_recipe_survives_pickle_because_vllm_pickles_its_configuration() -> None:
    recipe = QuantizationRecipe.from_dict(valid())
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format_version": 2}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": True}, "format_version"),
        ({"bits": 5}, "bits"),
        ({"bits": 3.0}, "bits"),
        ({"bits": True}, "bits"),
        ({"group_size": 48}, "group size"),
        ({"group_size": "128"}, "group_size"),
        ({"scale_dtype": "float8"}, "scale dtype"),
        ({"modules": []}, "modules"),
        ({"modules": {"a": {"bits": 4}}}, "group_size"),
        ({"modules": {"a": {"bits": 4, "group_size": 32, "scale_dtype": "float32"}}}, "scale_dtype"),
        ({"modules": {"a": 4}}, "a"),
        ({"modules": {"a": {"bits": 6, "group_size": 32}}}, "bits"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [""]}, "modules_to_not_convert"),
        ({"desc_act": False}, "desc_act"),
    ],
)
def test_packed_recipe_rejects(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(IntegrityError, match=part):
        QuantizationRecipe.from_dict(valid(**changes))


@pytest.mark.parametrize("key", ["bits", "group_size", "scale_dtype", "modules", "modules_to_not_convert"])
def test_packed_recipe_rejects_a_missing_key(key: str) -> None:
    config = valid()
    del config[key]
    with pytest.raises(IntegrityError, match=key):
        QuantizationRecipe.from_dict(config)


@pytest.mark.parametrize("method", ["gptq", None, 1])
def test_packed_recipe_rejects_another_method(method: object) -> None:
    with pytest.raises(UnsupportedModelError, match="quant_method"):
        QuantizationRecipe.from_dict(valid(quant_method=method))


def test_online_recipe_fills_in_defaults() -> None:
    recipe = QuantizationRecipe.for_online({"bits": 2, "modules": {"o_proj": {"bits": 4}}})
    assert recipe.spec == WeightSpec(2, 128)
    eight = WeightSpec(8, 128)
    assert recipe.modules == {"o_proj": WeightSpec(4, 128), "lm_head": eight, "embed_tokens": eight}
    assert recipe.modules_to_not_convert == DEFAULT_SKIP


@pytest.mark.parametrize(
    ("settings", "head", "embedding"),
    [
        ({}, 8, 8),
        ({"lm_head_bits": 4}, 4, 8),
        ({"embedding_bits": 4, "lm_head_bits": 16}, 16, 4),
        ({"modules_to_not_convert": ["lm_head"]}, 16, 8),
        ({"modules": {"lm_head": {"bits": 2}}, "embedding_bits": 16}, 2, 16),
        ({"modules_to_not_convert": ["lm_head"], "lm_head_bits": 8}, 8, 8),
    ],
)
def test_online_settings_give_the_vocabulary_its_widths(
    settings: dict[str, Any], head: int, embedding: int
) -> None:
    recipe = QuantizationRecipe.for_online(settings)
    for name, bits in (("lm_head", head), ("model.embed_tokens", embedding)):
        spec = recipe.vocabulary_spec(name)
        assert (16 if spec is None else spec.bits) == bits
    assert recipe.vocabulary_spec("wte") is None


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 8),
        ({"lm_head_bits": 4}, 4),
        ({"embedding_bits": 16}, 16),
        ({"modules": {"embed_tokens": {"bits": 2}}}, 2),
        ({"modules_to_not_convert": ["lm_head"]}, 16),
    ],
)
def test_tied_head_and_embedding_have_one_width(settings: dict[str, Any], bits: int) -> None:
    recipe = QuantizationRecipe.for_online(settings, tied=True)
    specs = {recipe.vocabulary_spec(name) for name in ("lm_head", "model.embed_tokens")}
    assert specs == {None if bits == 16 else WeightSpec(bits, 128)}


def test_two_widths_for_one_tensor_are_refused() -> None:
    with pytest.raises(UsageError, match=r"one width .* got 4 and 8"):
        QuantizationRecipe().with_vocabulary(VocabularyBits(4, 8), tied=True)
    with pytest.raises(UsageError, match="lm_head bits must be one of"):
        VocabularyBits(lm_head=3)


def test_a_packed_recipe_quantizes_a_head_only_when_it_is_named() -> None:
    assert QuantizationRecipe.from_dict(valid(modules_to_not_convert=[])).vocabulary_spec("lm_head") is None


def test_online_recipe_takes_a_serialised_recipe_with_changes() -> None:
    recipe = QuantizationRecipe.from_dict(valid())
    assert QuantizationRecipe.for_online({**recipe.to_dict(), "bits": 2}).spec.bits == 2


def test_the_preset_is_a_setting_for_quantizing_while_loading_only() -> None:
    recipe = QuantizationRecipe.for_online({"preset": "fast"})
    assert recipe.preset == "fast"
    assert recipe.renamed(list, dict).preset == "fast"
    assert QuantizationRecipe.for_online({}).preset == "balanced"
    assert "preset" not in recipe.to_dict()
    with pytest.raises(IntegrityError, match="preset"):
        QuantizationRecipe.from_dict(valid(preset="fast"))


@pytest.mark.parametrize(
    "settings",
    [{"bits": 7}, {"group": 64}, {"quant_method": "awq"}, {"group_size": None}, {"preset": "best"}],
)
def test_online_recipe_rejects(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"expected|must be"):
        QuantizationRecipe.for_online(settings)


def test_name_is_whole_components() -> None:
    assert is_name_of("gate", "model.layers.0.mlp.gate")
    assert is_name_of("mlp.gate", "model.layers.0.mlp.gate")
    assert is_name_of("lm_head", "lm_head")
    assert not is_name_of("gate", "model.layers.0.mlp.gate_proj")
    assert not is_name_of("proj", "model.layers.0.mlp.gate_proj")
    assert not is_name_of("model.layers.0", "model.layers.0.mlp")


def test_spec_of_prefers_the_full_name_then_the_first_match() -> None:
    modules = {"down_proj": WeightSpec(4), "mlp.down_proj": WeightSpec(8), "a.mlp.down_proj": WeightSpec(2)}
    recipe = QuantizationRecipe(WeightSpec(3), modules)
    assert recipe.spec_of("a.mlp.down_proj").bits == 2
    assert recipe.spec_of("b.mlp.down_proj").bits == 4
    assert recipe.spec_of("b.mlp.up_proj").bits == 3


def test_renamed_maps_every_name() -> None:
    recipe = QuantizationRecipe(WeightSpec(3), {"a.x": WeightSpec(4)}, ("a.y",))
    mapped = recipe.renamed(
        lambda names: [name.replace("a.", "b.") for name in names],
        lambda entries: {name.replace("a.", "b."): value for name, value in entries.items()},
    )
    assert mapped == QuantizationRecipe(WeightSpec(3), {"b.x": WeightSpec(4)}, ("b.y",))


def test_expressions_name_modules_in_settings_only() -> None:
    assert is_name_of(r"re:layers\.[0-3]\..*proj", "model.layers.2.self_attn.q_proj")
    assert not is_name_of(r"re:^layers\.2", "model.layers.2.self_attn.q_proj")
    recipe = QuantizationRecipe.for_online(
        {"modules": {r"re:layers\.[01]\.": {"bits": 2}, "q_proj": {"bits": 3}}}, tied=False
    )
    # The first match holds.
    assert [recipe.spec_of(f"model.layers.{n}.q_proj").bits for n in (0, 1, 2)] == [2, 2, 3]
    with pytest.raises(UsageError, match=r"expected a regular expression after 're:', got 're:\('"):
        QuantizationRecipe.for_online({"modules_to_not_convert": ["re:("]})
    with pytest.raises(IntegrityError, match="expected names of modules, got the expression"):
        QuantizationRecipe.from_dict(valid(modules_to_not_convert=["re:lm_head"]))


def test_expressions_keep_their_place_when_names_are_mapped() -> None:
    settings = {
        "modules": {"re:a": {"bits": 2}, "b.c": {"bits": 3}},
        "modules_to_not_convert": ["b.d", "re:e"],
    }
    recipe = QuantizationRecipe.for_online(settings)
    renamed = recipe.renamed(
        lambda names: [f"model.{name}" for name in names],
        lambda named: {f"model.{name}": value for name, value in named.items()},
    )
    assert list(renamed.modules)[:2] == ["re:a", "model.b.c"]
    assert renamed.modules_to_not_convert == ("model.b.d", "re:e")


def test_some_architectures_keep_their_vocabulary() -> None:
    recipe = QuantizationRecipe.for_online({}, architecture="GPTNeoXForCausalLM")
    assert recipe.vocabulary_spec("lm_head") is None
    with pytest.raises(UsageError, match="expected 16 bits for lm_head of GPTNeoXForCausalLM"):
        QuantizationRecipe.for_online({"lm_head_bits": 8}, architecture="GPTNeoXForCausalLM")


def test_of_several_names_of_a_module_the_first_holds_and_the_full_one_before_all() -> None:
    modules = {
        "re:layers[.]1[.].*down": {"bits": 3, "group_size": 32},
        "experts.7.down_proj": {"bits": 2, "group_size": 32},
        "down_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.experts.9.down_proj": {"bits": 4, "group_size": 32},
    }
    recipe = QuantizationRecipe.for_online({"modules": modules})
    experts = "model.layers.{}.mlp.experts.{}.down_proj"
    found = [recipe.exception_of(experts.format(*place)) for place in ((1, 7), (1, 9), (0, 7), (0, 8))]
    assert [spec.bits for spec in found if spec is not None] == [3, 4, 2, 8]
    assert recipe.exception_of("model.layers.0.mlp.experts.7.up_proj") is None
    assert recipe.exception_of("model.layers.0.mlp.my_down_proj") is None
