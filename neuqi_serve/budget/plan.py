"""From a budget to a recipe: what each layer loses at each width, and the best widths that fit."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from neuqi_serve.budget.allocate import Allocation, allocate
from neuqi_serve.budget.budget import Budget
from neuqi_serve.budget.byte_count import format_bytes
from neuqi_serve.budget.divergence_loss import divergence_losses, own_samples, reference_spec
from neuqi_serve.budget.weight_loss import WeightLoss, weight_loss
from neuqi_serve.budget.width_group import WidthGroup, bytes_at, kept_bytes, width_groups, with_losses
from neuqi_serve.config import (
    EMBEDDING,
    LM_HEAD,
    SUPPORTED_GROUP_SIZES,
    UNQUANTIZED_BITS,
    VocabularyBits,
    WeightSpec,
)
from neuqi_serve.errors import DoesNotFitError, UsageError
from neuqi_serve.format.importance import read_importance, resolve
from neuqi_serve.format.quantization_config import is_name_of
from neuqi_serve.format.source import SourceCheckpoint, open_source
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings
from neuqi_serve.pipeline.selection import Selection, select_modules

# The first is the default: benchmarks/mixed_bits.py finds it ahead.
SENSITIVITIES = ("divergence", "weights")
DEFAULT_SENSITIVITY = SENSITIVITIES[0]
# Sensitivities need no more than this search, some times faster than the default.
_PRESET = "fast"


@dataclass(frozen=True)
class BudgetPlan:
    """``nbytes``: of the whole model, of at most ``limit``. ``mean_bits``: of the codes of the linear layers."""

    allocation: Allocation
    groups: tuple[WidthGroup, ...]
    settings: QuantizationSettings
    nbytes: int
    limit: int
    mean_bits: float

    def lines(self) -> list[str]:
        """Return what a user should know, a line each."""
        counts: Counter[tuple[str, str]] = Counter()
        for group in self.groups:
            kind = group.name.rpartition(".")[2]
            counts[kind, str(self.allocation.chosen[group.name])] += 1
        kinds: dict[str, list[str]] = {}
        for (kind, choice), count in sorted(counts.items()):
            kinds.setdefault(kind, []).append(f"{count} × {choice}")
        lines = [f"{kind}: {', '.join(choices)}" for kind, choices in kinds.items()]
        proof = (
            "proven best" if self.allocation.gap < 1e-6 else f"within {self.allocation.gap:.2g} of the best"
        )
        return [
            f"{format_bytes(self.nbytes)} of {format_bytes(self.limit)}, {self.mean_bits:.3f} bits a code in linear "
            f"layers, {proof} for the losses measured",
            *lines,
        ]


def plan_budget(
    source_path: Path,
    settings: QuantizationSettings,
    budget: Budget,
    sensitivity: str = DEFAULT_SENSITIVITY,
    stream: TextIO | None = None,
    group_sizes: Sequence[int] = SUPPORTED_GROUP_SIZES,
) -> BudgetPlan:
    """Choose width and group size of every layer; ``settings`` of the result pack them so.

    A budget of bits is that of the group size of ``settings``, or of the largest that divides all rows.

    ``sensitivity``: ``weights`` measures the share of its energy that a layer's weight loses, one weight in memory at a
    time; ``divergence`` also runs the model, on texts drawn from itself.

    Raises:
        DoesNotFitError: even the smallest widths take more; it says how much they take.
        UsageError: a budget or setting outside what is possible.
        UnsupportedModelError, IntegrityError: no model there, or one that cannot be packed or is damaged.
    """
    if sensitivity not in SENSITIVITIES:
        raise UsageError(f"expected a sensitivity among {SENSITIVITIES}, got {sensitivity!r}.")
    source = open_source(source_path)
    asked = settings.vocabulary or VocabularyBits()
    selection = fitting_selection(source, settings, group_sizes)
    groups = width_groups(source, selection, asked, group_sizes)
    limit = budget_bytes(source, selection, budget)
    kept = kept_bytes(source, selection)
    _check_feasible(groups, kept, limit)
    measured = _measured(source, selection, groups, settings, sensitivity, stream, limit - kept)
    allocation = allocate(measured, limit - kept)
    return BudgetPlan(
        allocation=allocation,
        groups=measured,
        settings=replace(
            _settings(settings, selection, measured, allocation),
            budget=budget_options(budget, sensitivity, group_sizes),
        ),
        nbytes=kept + allocation.nbytes,
        limit=limit,
        mean_bits=_mean_bits(selection, measured, allocation),
    )


def budget_bytes(source: SourceCheckpoint, selection: Selection, budget: Budget) -> int:
    """Return the most that all tensors may take together."""
    if budget.bits is not None:
        return bytes_at(source, selection, budget.bits)
    assert budget.nbytes is not None
    return budget.nbytes


def budget_options(budget: Budget, sensitivity: str, group_sizes: Sequence[int]) -> str:
    """Return the options of `neuqi quantize` that say the same, defaults left out."""
    words = [budget.option()]
    if len(group_sizes) == 1:
        words.append(f"--group-size {group_sizes[0]}")
    if sensitivity != DEFAULT_SENSITIVITY:
        words.append(f"--sensitivity {sensitivity}")
    return " ".join(words)


def fitting_selection(
    source: SourceCheckpoint, settings: QuantizationSettings, group_sizes: Sequence[int]
) -> Selection:
    """Select with the group size of the settings, or the largest one that divides all rows.

    Raises:
        UsageError: only one size is allowed, and it does not divide all rows.
    """
    spec, sizes = settings.spec, sorted(group_sizes, reverse=True)
    for size in (spec.group_size, *(one for one in sizes if one != spec.group_size)):
        try:
            fitting = WeightSpec(spec.bits, size, spec.scale_dtype)
            return select_modules(source, fitting, settings.vocabulary)
        except UsageError:
            if size == sizes[-1]:
                raise
    raise AssertionError("the whole row divides every row")


def _check_feasible(groups: Sequence[WidthGroup], kept: int, limit: int) -> None:
    smallest = kept + sum(min(choice.nbytes for choice in group.choices) for group in groups)
    if smallest > limit:
        raise DoesNotFitError(
            f"expected a budget of at least {smallest} bytes ({format_bytes(smallest)}), the model at its smallest "
            f"widths, got {limit}. Raise it."
        )


def _measured(
    source: SourceCheckpoint,
    selection: Selection,
    groups: Sequence[WidthGroup],
    settings: QuantizationSettings,
    sensitivity: str,
    stream: TextIO | None,
    limit: int,
) -> tuple[WidthGroup, ...]:
    importance = _importance(settings, groups, selection)
    weights = _weight_losses(source, selection, groups, settings, importance, stream)
    # Losses are in proportion only as long as they are alike: each is measured about where it will be.
    share = limit / sum(min(choice.nbytes for choice in group.choices) for group in groups)
    references = {group.name: reference_spec(group, share) for group in groups}
    at_reference = {name: weights[name].sensitivity(spec) for name, spec in references.items() if spec}
    if sensitivity == "divergence":
        found = _run_divergence(source.path, groups, references, settings, importance, stream)
        # The geometric mean: the divergence knows what matters, but of one small text; on another the mean does better.
        at_reference = {name: (found[name] * guess) ** 0.5 for name, guess in at_reference.items()}
    measured = []
    for group in groups:
        lost, spec = weights[group.name], references[group.name]
        unit = lost.relative(spec) if spec is not None else 0.0
        losses = {
            choice.spec: at_reference[group.name] * lost.relative(choice.spec) / unit if unit else 0.0
            for choice in group.choices
        }
        measured.append(with_losses(group, losses))
    return tuple(measured)


def _weight_losses(
    source: SourceCheckpoint,
    selection: Selection,
    groups: Sequence[WidthGroup],
    settings: QuantizationSettings,
    importance: Mapping[str, Tensor],
    stream: TextIO | None,
) -> dict[str, WeightLoss]:
    sizes = {module: source.tensors[f"{module}.weight"].spec.nbytes for module in selection.modules}
    progress = Progress(sum(sizes.values()), "B", stream, steps=len(sizes)) if stream is not None else None
    losses: dict[str, WeightLoss] = {}
    try:
        for group in groups:
            for module in group.modules:
                weight = source.read(f"{module}.weight").to(settings.device)
                specs = [choice.spec for choice in group.choices]
                found = weight_loss(weight, specs, importance.get(module), _PRESET)
                losses[group.name] = losses[group.name] + found if group.name in losses else found
                if progress is not None:
                    progress.advance(sizes[module], f"weighing {module}")
    finally:
        if progress is not None:
            progress.close()
    return losses


def _run_divergence(
    path: Path,
    groups: Sequence[WidthGroup],
    references: Mapping[str, WeightSpec | None],
    settings: QuantizationSettings,
    importance: Mapping[str, Tensor],
    stream: TextIO | None,
) -> dict[str, float]:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UsageError(
            "expected transformers for --sensitivity divergence, it is not installed. Install it, or use "
            "--sensitivity weights."
        ) from None
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(settings.device).eval()
    progress = Progress(len(groups), "groups", stream) if stream is not None else None
    try:
        tokens = own_samples(model)
        done = None if progress is None else lambda name: progress.advance(1, f"running without {name}")
        return divergence_losses(model, groups, references, tokens, importance, _PRESET, done)
    finally:
        if progress is not None:
            progress.close()
        del model
        gc.collect()


def _importance(
    settings: QuantizationSettings, groups: Sequence[WidthGroup], selection: Selection
) -> Mapping[str, Tensor]:
    if settings.importance is None:
        return {}
    inputs = {
        module: selection.modules[module][1]
        for group in groups
        if not group.vocabulary
        for module in group.modules
    }
    return resolve(read_importance(settings.importance), inputs).values


def _settings(
    settings: QuantizationSettings,
    selection: Selection,
    groups: Sequence[WidthGroup],
    allocation: Allocation,
) -> QuantizationSettings:
    """The settings with the specs chosen; the default is the one that most layers have."""
    linear: dict[str, WeightSpec] = {}
    vocabulary: dict[str, WeightSpec | None] = {}
    for group in groups:
        spec = allocation.chosen[group.name].spec
        if group.vocabulary:
            vocabulary[LM_HEAD if is_name_of(LM_HEAD, group.name) else EMBEDDING] = spec
        elif spec is not None:
            linear |= dict.fromkeys(group.modules, spec)
    if selection.tied and vocabulary:
        vocabulary = dict.fromkeys((LM_HEAD, EMBEDDING), vocabulary[EMBEDDING])
    common = Counter(linear.values()).most_common()
    # The first by name of equally many, so that the same allocation gives the same recipe.
    most = min((one for one, count in common if count == common[0][1]), key=str)
    exceptions = {name: one for name, one in linear.items() if one != most}
    exceptions |= {name: one for name, one in vocabulary.items() if one is not None}
    # What is named among the exceptions is given by them, what is not stays as it is.
    bits = VocabularyBits(
        *(None if exceptions.get(name) else UNQUANTIZED_BITS for name in (LM_HEAD, EMBEDDING))
    )
    return replace(settings, spec=most, vocabulary=bits, exceptions=exceptions)


def _mean_bits(selection: Selection, groups: Sequence[WidthGroup], allocation: Allocation) -> float:
    bits = weights = 0
    for group in groups:
        if not group.vocabulary:
            count = sum(rows * columns for rows, columns in (selection.modules[m] for m in group.modules))
            bits += allocation.chosen[group.name].bits * count
            weights += count
    return bits / weights
