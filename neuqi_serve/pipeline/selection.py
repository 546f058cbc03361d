"""Which tensors of a checkpoint are quantized.

The rule: a tensor is packed if it is a two-dimensional floating-point ``<module>.weight`` inside a decoder block, its
module is not a router or gate (``config.DEFAULT_SKIP``), and its rows are a multiple of 32 weights long. The output
head and the embedding are packed at widths of their own, where vLLM can run them so; tied, they are one tensor.
Everything else keeps its bytes: norms, biases, rotary tables. A group size that does not divide the rows of one of
these layers is an error, as it is when the model is quantized while vLLM loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from neuqi_serve.config import (
    LM_HEAD,
    SUPPORTED_GROUP_SIZES,
    WHOLE_ROW,
    VocabularyBits,
    WeightSpec,
)
from neuqi_serve.errors import IntegrityError, UnsupportedModelError, UsageError
from neuqi_serve.format.quantization_config import QuantizationRecipe, is_name_of
from neuqi_serve.format.safetensors_file import FLOAT_CODES, TensorSpec
from neuqi_serve.format.source import SourceCheckpoint
from neuqi_serve.pipeline.families import Family, expert_count, family_of, ties_vocabulary

# A matrix of an expert: its layer up to `.experts.`, the expert's number, the rest.
_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<expert>\d+)\.(?P<matrix>.*)")


@dataclass(frozen=True)
class Selection:
    """``modules``: name → ``[N, K]`` of what is packed. ``unfit``: name → reason, of layers that cannot be.

    ``recipe``: what ``config.json`` of the packed checkpoint will say. ``tied``: output head and embedding are one
    tensor of the checkpoint.
    """

    modules: Mapping[str, tuple[int, int]]
    unfit: Mapping[str, str]
    recipe: QuantizationRecipe
    tied: bool = False


def select_modules(
    source: SourceCheckpoint,
    spec: WeightSpec,
    vocabulary: VocabularyBits | None = None,
    exceptions: Mapping[str, WeightSpec] | None = None,
) -> Selection:
    """Choose the modules to pack and check that they fit the configuration.

    ``exceptions``: full name → spec, of what has another spec than ``spec``: linear layers, output head, embedding.

    Raises:
        UnsupportedModelError: an architecture that cannot be packed, or one without linear layers in its blocks.
        IntegrityError: a decoder block is missing, or a weight's shape contradicts ``config.json``.
        UsageError: the group size does not divide the rows of some layer, no layer can be packed, or two widths for
            one tensor.
    """
    family = family_of(source.architecture, source.config)
    _check_blocks(source, family)
    _check_experts(source)
    default = QuantizationRecipe(spec, dict(exceptions or {}))
    modules: dict[str, tuple[int, int]] = {}
    unfit: dict[str, str] = {}
    matrices = []
    for name in sorted(source.tensors, key=natural_order):
        stored = source.tensors[name].spec
        if not name.endswith(".weight") or len(stored.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        matrices.append(module)
        if family.block_number(name) is None or default.keeps(module):
            continue
        _check_shape(module, stored, source, family)
        out_features, in_features = stored.shape
        if in_features % 32:
            unfit[module] = f"rows of {in_features} weights are no multiple of 32"
            continue
        modules[module] = (out_features, in_features)
    _check_fit(modules, unfit, source, default)
    tied = is_tied(source)
    widths = (vocabulary or VocabularyBits()).supported_by(source.architecture)
    recipe = default.with_vocabulary(widths, tied)
    for module in matrices:
        if module in modules or module in unfit or recipe.vocabulary_spec(module) is None:
            continue
        rows, length = source.tensors[f"{module}.weight"].spec.shape
        if length % 32:
            unfit[module] = f"rows of {length} weights are no multiple of 32"
        else:
            modules[module] = (rows, length)
    kept = [m for m in matrices if m not in modules and not recipe.keeps(m)]
    recipe = QuantizationRecipe(spec, recipe.modules, (*recipe.modules_to_not_convert, *kept))
    return Selection(modules, unfit, recipe, tied)


def is_tied(source: SourceCheckpoint) -> bool:
    """Whether output head and embedding are one tensor: ``config.json`` says so, and the checkpoint has no head."""
    has_head = any(is_name_of(LM_HEAD, name.removesuffix(".weight")) for name in source.tensors)
    return ties_vocabulary(source.config) and not has_head


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _check_blocks(source: SourceCheckpoint, family: Family) -> None:
    present = {family.block_number(name) for name in source.tensors} - {None}
    if not present:
        raise UnsupportedModelError(
            f"expected decoder blocks like {family.blocks!r} in a {source.architecture}, got "
            f"tensors like {min(source.tensors)} in {source.path}. Convert the checkpoint to the Hugging Face layout."
        )
    expected = source.config.get("num_hidden_layers")
    if isinstance(expected, int) and present != set(range(expected)):
        missing = sorted(set(range(expected)) - present)
        received = f"without the blocks {missing[:5]}" if missing else f"{len(present)} of them"
        raise IntegrityError(
            f"expected {expected} decoder blocks as config.json says, got {received} in {source.path}. "
            "Download the model again."
        )


def _check_experts(source: SourceCheckpoint) -> None:
    """Check that every layer with experts has all of them."""
    found: dict[str, set[int]] = {}
    for name, stored in source.tensors.items():
        match = _EXPERT.match(name)
        if match is not None:
            found.setdefault(match["layer"] + match["matrix"], set()).add(int(match["expert"]))
        elif ".experts." in name and len(stored.spec.shape) == 3:
            raise UnsupportedModelError(
                f"expected experts one by one, or gate_up_proj [E, 2I, H] and down_proj [E, H, I], got {name} "
                f"{list(stored.spec.shape)} in {source.path}. Write the checkpoint again with transformers' "
                "save_pretrained."
            )
    experts = expert_count(source.config)
    for layer, numbers in found.items():
        if experts is not None and numbers != set(range(experts)):
            missing = sorted(set(range(experts)) - numbers)
            received = f"none for the experts {missing[:5]}" if missing else f"{len(numbers)} of them"
            raise IntegrityError(
                f"expected {layer.replace('.experts.', '.experts.*.')} for {experts} experts as config.json says, got "
                f"{received} in {source.path}. Download the model again."
            )


def _check_shape(module: str, stored: TensorSpec, source: SourceCheckpoint, family: Family) -> None:
    hidden_size = source.config.get("hidden_size")
    last = module.rpartition(".")[2]
    if stored.dtype not in FLOAT_CODES:
        raise UnsupportedModelError(
            f"expected {module}.weight in one of {list(FLOAT_CODES)}, got {stored}. Start from the original weights."
        )
    if not isinstance(hidden_size, int):
        return
    for names, axis, letter in ((family.reads, 1, "K"), (family.writes, 0, "N")):
        if last in names and stored.shape[axis] != hidden_size:
            raise IntegrityError(
                f"expected {module}.weight [N, K] with {letter} = {hidden_size} (hidden_size in config.json), got "
                f"{list(stored.shape)}. Download the model again, or correct config.json."
            )


def _check_fit(
    modules: Mapping[str, tuple[int, int]],
    unfit: Mapping[str, str],
    source: SourceCheckpoint,
    recipe: QuantizationRecipe,
) -> None:
    if not modules and not unfit:
        raise UnsupportedModelError(
            f"expected linear layers in the decoder blocks of {source.path}, got none. Check the checkpoint."
        )
    if not modules:
        lengths = sorted({source.tensors[f"{module}.weight"].spec.shape[1] for module in unfit})
        raise UsageError(
            f"expected rows that are a multiple of 32 weights long, got {lengths}. This model cannot be packed."
        )
    expert = next((name for name in unfit if _EXPERT.match(name)), None)
    if expert is not None:
        raise UsageError(
            f"expected rows of experts that are a multiple of 32 weights long, as all matrices of experts are packed "
            f"or none, got {expert}: {unfit[expert]}. This model cannot be packed."
        )
    sizes = {name: recipe.spec_of(name).group_size for name in modules}
    odd = [name for name, (_, length) in modules.items() if sizes[name] != WHOLE_ROW and length % sizes[name]]
    if odd:
        lengths = sorted({in_features for _, in_features in modules.values()})
        fits = [g for g in SUPPORTED_GROUP_SIZES if g == WHOLE_ROW or not any(n % g for n in lengths)]
        found = sorted({modules[name][1] for name in odd})
        raise UsageError(
            f"expected a group size that divides the rows of every layer, got group size {sizes[odd[0]]} and rows of "
            f"{found} weights, e.g. {odd[0]}. Sizes that divide all: {fits} (-1 is the whole row)."
        )
