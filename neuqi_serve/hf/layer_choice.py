"""Which modules of a transformers model are packed, by the rules of ``neuqi quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from neuqi_serve.config import EMBEDDING, LM_HEAD, UNQUANTIZED_BITS, WHOLE_ROW, WeightSpec
from neuqi_serve.errors import UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import REGEX_PREFIX, QuantizationRecipe
from neuqi_serve.hf.experts import is_experts, matrices, matrix_names
from neuqi_serve.hf.layers import PackedMatrix
from neuqi_serve.pipeline.families import Family, family_of

_VOCABULARY_OPTIONS = ("lm_head_bits", "embedding_bits")


def checkpoint_name(model: Any, module: str) -> str:
    """Name in a checkpoint of a module of ``model``, which may be the base model of a language model."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    whole = not prefix or hasattr(model, prefix) or module.startswith(f"{prefix}.")
    name = module if whole else f"{prefix}.{module}"
    return name.replace(".mlp.", ".block_sparse_moe.") if model.config.model_type == "mixtral" else name


def is_tied(model: Any) -> bool:
    """Whether the configuration calls output head and embedding one tensor."""
    return bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))


def online_recipe(model: Any, settings: Mapping[str, Any]) -> QuantizationRecipe:
    """Complete the settings for ``model``: vocabulary where vLLM can run it packed, and what stays by its name.

    The result is the recipe of the packed folder that ``save_pretrained`` writes.

    Raises:
        UnsupportedModelError: an architecture that cannot be packed, or experts in stacked tensors.
        UsageError: a value outside the supported set, or a group size that does not divide the rows of a layer.
    """
    family = _family(model)
    _check_stacked(model)
    recipe = QuantizationRecipe.for_online(_with_vocabulary(settings, family), "NeuqiConfig", is_tied(model))
    kept = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        full = checkpoint_name(model, name)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or recipe.keeps(full):
            continue
        in_block = isinstance(module, nn.Linear) and family.block_number(f"{full}.weight") is not None
        spec = recipe.spec_of(full) if in_block else _vocabulary_spec(recipe, module, full)
        if spec is None or weight.shape[1] % 32:
            kept.append(full)
        else:
            _check_group(spec, weight.shape[1], full)
    for name, module in model.named_modules():
        for matrix, (_, columns) in matrices(module, matrix_names(model)) if is_experts(module) else ():
            full = checkpoint_name(model, f"{name}.{matrix}")
            if columns % 32:
                raise UsageError(
                    f"expected rows of experts that are a multiple of 32 weights long, got {columns} in {full}. This "
                    "model cannot be packed."
                )
            _check_group(recipe.spec_of(full), columns, full)
    return _without_expressions(
        replace(recipe, modules_to_not_convert=(*recipe.modules_to_not_convert, *kept)), model
    )


def _without_expressions(recipe: QuantizationRecipe, model: Any) -> QuantizationRecipe:
    """Put the names of modules in the place of regular expressions, which a packed checkpoint may not have."""
    if not any(name.startswith(REGEX_PREFIX) for name in (*recipe.modules, *recipe.modules_to_not_convert)):
        return recipe
    names = [
        checkpoint_name(model, name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    for name, module in model.named_modules():
        if is_experts(module):
            names += [
                checkpoint_name(model, f"{name}.{one}") for one, _ in matrices(module, matrix_names(model))
            ]
    kept = [name for name in recipe.modules_to_not_convert if not name.startswith(REGEX_PREFIX)]
    plain = {name: spec for name, spec in recipe.modules.items() if not name.startswith(REGEX_PREFIX)}
    without = replace(recipe, modules=plain, modules_to_not_convert=tuple(kept))
    kept += [name for name in names if recipe.keeps(name) and not without.keeps(name)]
    found = {name: recipe.exception_of(name) for name in names if not recipe.keeps(name)}
    # Full names come first in a recipe, as the first expression that matched did.
    exact = {
        name: spec for name, spec in found.items() if spec is not None and spec != without.exception_of(name)
    }
    return replace(recipe, modules={**exact, **plain}, modules_to_not_convert=tuple(kept))


def packed_layers(model: Any, recipe: QuantizationRecipe) -> dict[str, WeightSpec]:
    """Module name → spec of what ``recipe`` packs in ``model``; a tied head is not among them.

    Experts have the names that they have in a checkpoint, ``….experts.3.gate_proj``.

    Raises:
        UnsupportedModelError: stacked tensors of another kind than experts.
    """
    _check_stacked(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    chosen: dict[str, WeightSpec] = {}
    for name, module in model.named_modules():
        full = checkpoint_name(model, name)
        if is_experts(module):
            for matrix, _ in matrices(module, matrix_names(model)):
                chosen[f"{name}.{matrix}"] = recipe.spec_of(f"{full}.{matrix}")
        if not isinstance(module, nn.Linear | nn.Embedding) or recipe.keeps(full):
            continue
        if module is head and is_tied(model):
            continue
        if module is head or module is embedding or isinstance(module, nn.Embedding):
            spec = _vocabulary_spec(recipe, module, full)
        else:
            spec = recipe.spec_of(full)
        if spec is not None:
            chosen[name] = spec
    return chosen


def packed_modules(model: Any) -> dict[str, PackedMatrix]:
    """Packed modules of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}


def _vocabulary_spec(recipe: QuantizationRecipe, module: nn.Module, full: str) -> WeightSpec | None:
    is_vocabulary = isinstance(module, nn.Linear | nn.Embedding)
    return recipe.vocabulary_spec(full) if is_vocabulary else None


def _family(model: Any) -> Family:
    body = model.config.to_dict()
    body.pop("quantization_config", None)
    names = body.get("architectures") or [type(model).__name__]
    return family_of(str(names[0]), body)


def _with_vocabulary(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if family.packs_vocabulary:
        return dict(settings)
    for key, name in zip(_VOCABULARY_OPTIONS, (LM_HEAD, EMBEDDING), strict=True):
        if settings.get(key, UNQUANTIZED_BITS) != UNQUANTIZED_BITS:
            raise UsageError(
                f"expected 16 bits for {name} of this model, whose class in vLLM takes no packed vocabulary, got "
                f"{settings[key]}. Leave {key} out."
            )
    return {**settings, **dict.fromkeys(_VOCABULARY_OPTIONS, UNQUANTIZED_BITS)}


def _check_group(spec: WeightSpec, columns: int, name: str) -> None:
    if spec.group_size != WHOLE_ROW and columns % spec.group_size:
        raise UsageError(
            f"expected a group size that divides the rows of every layer, got {spec.group_size} and rows of "
            f"{columns} weights in {name}. Choose another group_size (-1 is the whole row)."
        )


def _check_stacked(model: Any) -> None:
    known = {id(value) for module in model.modules() if is_experts(module) for value in module.parameters()}
    stacked = [name for name, value in model.named_parameters() if value.ndim > 2 and id(value) not in known]
    if stacked:
        raise UnsupportedModelError(
            f"expected linear layers, and experts as gate_up_proj [E, 2·I, H] and down_proj [E, H, I], got stacked "
            f"weights such as {stacked[0]}. Choose another model."
        )
