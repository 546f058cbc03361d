"""Layers that must have one width and group size, and those that they can have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neuqi_serve.config import (
    LM_HEAD,
    UNQUANTIZED_BITS,
    VOCABULARY_BITS,
    WHOLE_ROW,
    VocabularyBits,
    WeightSpec,
)
from neuqi_serve.errors import UsageError
from neuqi_serve.format.manifest import PackedModule
from neuqi_serve.format.quantization_config import is_name_of
from neuqi_serve.format.source import SourceCheckpoint
from neuqi_serve.pipeline.selection import Selection, natural_order

LINEAR_BITS = (2, 3, 4, 8)
# vLLM runs these as one layer, which has one width.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class Choice:
    """``spec``: None leaves the weights as they are. ``nbytes``: stored, of all layers of the group.

    ``loss``: what the choice costs in quality, in units that are those of all groups.
    """

    spec: WeightSpec | None
    nbytes: int
    loss: float = 0.0

    @property
    def bits(self) -> int:
        """Bits per code; 16 for weights that stay."""
        return UNQUANTIZED_BITS if self.spec is None else self.spec.bits

    def __str__(self) -> str:
        if self.spec is None:
            return "as it is"
        size = "row" if self.spec.group_size == WHOLE_ROW else f"g{self.spec.group_size}"
        return f"{self.spec.bits} bits {size}"


@dataclass(frozen=True)
class WidthGroup:
    """``modules``: names of linear layers, or of a part of the vocabulary. ``choices``: by growing size."""

    name: str
    modules: tuple[str, ...]
    choices: tuple[Choice, ...]
    vocabulary: bool = False


def width_groups(
    source: SourceCheckpoint, selection: Selection, asked: VocabularyBits, group_sizes: Sequence[int]
) -> tuple[WidthGroup, ...]:
    """Gather the modules of a selection, in the order of the blocks; losses are still zero.

    Linear layers choose among 2, 3, 4 and 8 bits, output head and embedding among 16, 8 and 4 unless their width was
    ``asked`` for; all of them among those of ``group_sizes`` that divide their rows. Layers that vLLM fuses are one
    group, and so are the experts of a layer.
    """
    linear: dict[str, list[str]] = {}
    vocabulary: dict[str, int | None] = {}
    for module in sorted(selection.modules, key=natural_order):
        if selection.recipe.vocabulary_spec(module) is None:
            linear.setdefault(group_name(module), []).append(module)
        else:
            vocabulary[module] = asked.lm_head if is_name_of(LM_HEAD, module) else asked.embedding
    if selection.tied:
        given = asked.embedding if asked.lm_head is None else asked.lm_head
        vocabulary = dict.fromkeys(vocabulary, given)
    groups = [
        WidthGroup(name, tuple(modules), _choices(source, selection, modules, LINEAR_BITS, group_sizes))
        for name, modules in linear.items()
    ]
    for module, fixed in vocabulary.items():
        widths = sorted(VOCABULARY_BITS) if fixed is None else [fixed]
        choices = _choices(source, selection, [module], widths, group_sizes)
        groups.append(WidthGroup(module, (module,), choices, vocabulary=True))
    return tuple(groups)


def group_name(module: str) -> str:
    """Return the name that the layers which share a width have in common."""
    expert = _EXPERT.match(module)
    if expert:
        return expert.group(1)
    head, dot, last = module.rpartition(".")
    fused = next((names for names in _FUSED if last in names), None)
    return module if fused is None else f"{head}{dot}{'+'.join(fused)}"


def kept_bytes(source: SourceCheckpoint, selection: Selection) -> int:
    """Bytes of all tensors that no group can change."""
    chosen = {f"{module}.weight" for module in selection.modules}
    return sum(stored.spec.nbytes for name, stored in source.tensors.items() if name not in chosen)


def bytes_at(source: SourceCheckpoint, selection: Selection, bits: float) -> int:
    """Bytes of the whole model with ``bits`` in every linear layer, a fraction too, and the vocabulary as selected.

    Raises:
        UsageError: fewer bits than the smallest width, or more than the largest.
    """
    if not LINEAR_BITS[0] <= bits <= LINEAR_BITS[-1]:
        raise UsageError(f"expected from {LINEAR_BITS[0]} to {LINEAR_BITS[-1]} bits, got {bits:g}. Try 2.5.")
    total = float(kept_bytes(source, selection))
    for module, (rows, columns) in selection.modules.items():
        packed = float(_packed(source, selection, module, selection.recipe.spec_of(module)).packed_bytes)
        if selection.recipe.vocabulary_spec(module) is None:
            packed += rows * columns * (bits - selection.recipe.spec.bits) / 8
        total += packed
    return int(total)


def with_losses(group: WidthGroup, losses: Mapping[WeightSpec | None, float]) -> WidthGroup:
    """Return the group with the loss of each choice, by its spec."""
    choices = tuple(Choice(choice.spec, choice.nbytes, losses[choice.spec]) for choice in group.choices)
    return WidthGroup(group.name, group.modules, choices, group.vocabulary)


def _choices(
    source: SourceCheckpoint,
    selection: Selection,
    modules: Sequence[str],
    widths: Sequence[int],
    group_sizes: Sequence[int],
) -> tuple[Choice, ...]:
    """Every width with every group size, by growing size; one that stores the same as another is left out."""
    choices: dict[int, Choice] = {}
    scale_dtype = selection.recipe.spec.scale_dtype
    columns = {selection.modules[module][1] for module in modules}
    if UNQUANTIZED_BITS in widths:
        nbytes = sum(source.tensors[f"{module}.weight"].spec.nbytes for module in modules)
        choices[nbytes] = Choice(None, nbytes)
    for bits in widths:
        for size in group_sizes if bits != UNQUANTIZED_BITS else ():
            if size == WHOLE_ROW or not any(length % size for length in columns):
                spec = WeightSpec(bits, size, scale_dtype)
                nbytes = sum(_packed(source, selection, module, spec).packed_bytes for module in modules)
                choices.setdefault(nbytes, Choice(spec, nbytes))
    return tuple(choices[nbytes] for nbytes in sorted(choices))


def _packed(source: SourceCheckpoint, selection: Selection, module: str, spec: WeightSpec) -> PackedModule:
    return PackedModule(spec, selection.modules[module], source.tensors[f"{module}.weight"].spec.dtype)
