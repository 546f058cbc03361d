"""What ``quality.py`` makes of its measurements: the printed rows, the records, the figure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Record

from neuqi_serve.evaluate.kl_divergence import Divergence, divergence_difference
from neuqi_serve.evaluate.paired_accuracy import compare_paired

ORIGINAL = "bf16"
BASELINE = "min-max"
Case = dict[str, str | int | float | bool]
STYLES = {
    "min-max integer": ("tab:gray", "^", "Min-Max, integer zero-point"),
    "min-max": ("tab:orange", "s", "Min-Max, real zero-point"),
    "neuqi": ("tab:blue", "o", "NeUQI"),
}


@dataclass(frozen=True)
class Outcome:
    """One setting: its size, its divergence from the original, and which tasks it answers (None for a text).

    ``unfit``: layers that the group size does not divide; they keep their weights and are not in the size.
    """

    method: str
    bits: int
    group_size: int
    bits_per_weight: float
    divergence: Divergence
    answered: list[bool] | None
    unfit: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, from 0 to 1."""
        return None if self.answered is None else sum(self.answered) / len(self.answered)


def baseline_of(outcome: Outcome, outcomes: Sequence[Outcome]) -> Outcome | None:
    """Min-Max at the same bits and group size; None for Min-Max itself and for the original."""
    if outcome.method == BASELINE:
        return None
    place = (BASELINE, outcome.bits, outcome.group_size)
    return next((o for o in outcomes if (o.method, o.bits, o.group_size) == place), None)


def header(with_accuracy: bool) -> str:
    """The line above those of :func:`line`."""
    text = f"{'setting':<12}{'bits/w':>7}  {'method':<16}{'KL nats/token':>20}{'vs min-max':>12}{'top-1':>8}{'ppl':>9}"
    return text + f"{'accuracy':>10}{'difference':>17}{'McNemar p':>11}" if with_accuracy else text


def line(outcome: Outcome, baseline: Outcome | None) -> str:
    """One row of the printed table; ± is one standard error, differences are in percentage points."""
    found = outcome.divergence
    setting = ORIGINAL if outcome.bits == 16 else f"{outcome.bits} bit g{outcome.group_size}"
    error = "" if found.standard_error_nats is None else f" ± {found.standard_error_nats:.2g}"
    ratio = "" if baseline is None else f"{found.mean_nats / baseline.divergence.mean_nats:.3f}"
    text = (
        f"{setting:<12}{outcome.bits_per_weight:>7.2f}  {outcome.method:<16}{f'{found.mean_nats:.5f}{error}':>20}"
        f"{ratio:>12}{found.top1_agreement:>8.2%}{found.quantized_perplexity:>9.4g}"
    )
    if outcome.unfit and baseline is None:
        text = f"{len(outcome.unfit)} layers stay unquantized, e.g. {outcome.unfit[0]}\n{text}"
    if outcome.accuracy is None:
        return text
    text += f"{outcome.accuracy:>10.2%}"
    if baseline is None or outcome.answered is None or baseline.answered is None:
        return text
    paired = compare_paired(outcome.answered, baseline.answered)
    difference = f"{100 * paired.difference:+.2f} ± {100 * paired.standard_error:.2f}"
    return f"{text}{difference:>17}{paired.p_value:>11.2g}"


def records(outcomes: Sequence[Outcome], common: Case) -> list[Record]:
    """Every outcome in the shared record format; each method is compared with Min-Max at the same spec."""
    found: list[Record] = []
    for outcome in outcomes:
        case = common | {"method": outcome.method, "bits": outcome.bits, "group_size": outcome.group_size}
        baseline = baseline_of(outcome, outcomes)
        found += _absolute(outcome, case)
        if baseline is not None:
            found += _against(outcome, baseline, case)
    return found


def _absolute(outcome: Outcome, case: Case) -> list[Record]:
    divergence = outcome.divergence
    found = [
        Record(case, "bits_per_weight", outcome.bits_per_weight, "bit"),
        Record(case, "top1_agreement", divergence.top1_agreement, "share"),
        Record(case, "perplexity", divergence.quantized_perplexity, "", ORIGINAL,
               divergence.quantized_perplexity / divergence.original_perplexity),
    ]  # fmt: skip
    if outcome.method in (ORIGINAL, BASELINE):
        found.append(Record(case, "kl_divergence", divergence.mean_nats, "nats/token"))
    if outcome.method in (ORIGINAL, BASELINE) and outcome.accuracy is not None:
        found.append(Record(case, "task_accuracy", outcome.accuracy, "share"))
    if divergence.standard_error_nats is not None:
        error = divergence.standard_error_nats
        found.append(Record(case, "kl_divergence_standard_error", error, "nats/token"))
    return found


def _against(outcome: Outcome, baseline: Outcome, case: Case) -> list[Record]:
    ours, theirs = outcome.divergence, baseline.divergence
    ratio = ours.mean_nats / theirs.mean_nats
    difference, error = divergence_difference(ours, theirs)
    found = [
        Record(case, "kl_divergence", ours.mean_nats, "nats/token", BASELINE, ratio),
        Record(case, "kl_divergence_difference", difference, "nats/token", BASELINE),
    ]
    if error is not None:
        found.append(Record(case, "kl_divergence_difference_standard_error", error, "nats/token", BASELINE))
    if outcome.answered is None or baseline.answered is None:
        return found
    paired = compare_paired(outcome.answered, baseline.answered)
    base = baseline.accuracy or 0.0
    accuracy = outcome.accuracy or 0.0
    return [
        *found,
        Record(case, "task_accuracy", accuracy, "share", BASELINE, accuracy / base if base else None),
        Record(case, "task_accuracy_difference", paired.difference, "share", BASELINE),
        Record(case, "task_accuracy_difference_standard_error", paired.standard_error, "share", BASELINE),
        Record(case, "mcnemar_p", paired.p_value, "probability", BASELINE),
    ]


def verdict(outcomes: Sequence[Outcome]) -> str:
    """At how many settings NeUQI is ahead of Min-Max."""
    pairs = [(o, baseline_of(o, outcomes)) for o in outcomes if o.method == "neuqi"]
    found = [(o, baseline_of(o, outcomes)) for o in outcomes if o.method == "neuqi"]
    pairs = [(ours, theirs) for ours, theirs in found if theirs is not None]
    closer = sum(a.divergence.mean_nats < b.divergence.mean_nats for a, b in pairs)
    text = f"NeUQI has the lower KL divergence at {closer} of {len(pairs)} settings"
    if all(a.accuracy is not None and b.accuracy is not None for a, b in pairs):
        ahead = sum((a.accuracy or 0.0) > (b.accuracy or 0.0) for a, b in pairs)
        text += f", the higher task accuracy at {ahead} of {len(pairs)}"
    return text + "."


def plot_divergence(path: Path, outcomes: Sequence[Outcome], model: str) -> None:
    """Write the figure as PNG under a temporary name and rename it; says so and writes none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: install matplotlib to get one")
        return
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, (colour, marker, label) in STYLES.items():
        points = sorted((o for o in outcomes if o.method == method), key=lambda o: o.bits_per_weight)
        if not points:
            continue
        sizes = [point.bits_per_weight for point in points]
        means = [point.divergence.mean_nats for point in points]
        errors = [2 * (point.divergence.standard_error_nats or 0.0) for point in points]
        axes.errorbar(sizes, means, errors, color=colour, marker=marker, capsize=3, label=label)
        if method == "neuqi":
            for point in points:
                text = f"{point.bits} bit\ng{point.group_size}"
                place = (point.bits_per_weight, point.divergence.mean_nats)
                axes.annotate(
                    text, place, (0, -8), textcoords="offset points", ha="center", va="top", fontsize=8
                )
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.16)
    axes.set_xlabel("stored bits per weight, scale and zero-point included")
    axes.set_ylabel("next-token KL divergence, nats per token")
    axes.set_title(f"{model}: quantized against original (bars: ± 2 standard errors)", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        figure.savefig(file, format="png", dpi=150)
    os.replace(file.name, path)
    path.chmod(0o644)
    print(f"figure written to {path}")
