"""What `neuqi eval` found: as a value, as JSON and as a table."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neuqi_serve._version import VERSION
from neuqi_serve.errors import IntegrityError, UsageError
from neuqi_serve.evaluate.block_bootstrap import RESAMPLES
from neuqi_serve.quality.evaluated_model import EvaluatedModel
from neuqi_serve.quality.measure import Measured, Measurement
from neuqi_serve.quality.tasks import TaskScores

REPORT_FORMAT, REPORT_VERSION = "neuqi-eval", 1
METHOD = {
    "reference": "the base model in float32",
    "noise_floor": "the base model in bfloat16 against the base model in float32",
    "errors": f"block bootstrap, {RESAMPLES} resamples of whole windows: standard error, 95 % percentile interval",
    "unit": "nats per token",
}
_PACKAGES = ("torch", "transformers", "lm_eval")
_ROWS = (
    ("kld_mean", "KL divergence, mean"),
    ("kld_median", "KL divergence, median"),
    ("kld_99", "KL divergence, 99 %"),
    ("top1_agreement", "same most likely token"),
    ("perplexity", "perplexity"),
    ("perplexity_ratio", "perplexity / base"),
)


@dataclass(frozen=True)
class QualityReport:
    """A measurement with everything that it depends on. ``text``: files with SHA-256, context, tokens, windows."""

    model: dict[str, Any]
    base: dict[str, Any]
    text: dict[str, Any]
    measurement: Measurement
    tasks: dict[str, TaskScores] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; divergences in nats per token."""
        found = self.measurement
        return {
            "format": REPORT_FORMAT,
            "format_version": REPORT_VERSION,
            "model": self.model,
            "base": self.base,
            "text": self.text,
            "metrics": _estimates(found.model),
            "noise_floor": None if found.noise is None else _estimates(found.noise),
            "base_perplexity": asdict(found.base_perplexity),
            "tasks": self.tasks,
            "method": METHOD,
            "versions": self.versions,
        }


def quality_report(
    model: EvaluatedModel,
    base: EvaluatedModel,
    dtype: str,
    files: Sequence[Path],
    context: int,
    measurement: Measurement,
    tasks: dict[str, TaskScores],
) -> QualityReport:
    """Put a measurement together with what was measured."""
    text = {
        "files": [
            {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files
        ],
        "context": context,
        "windows": measurement.sequences,
        "tokens": measurement.tokens,
    }
    versions = {"neuqi-serve": VERSION}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    described = {**_described(model), "dtype": dtype, "settings": model.settings}
    return QualityReport(described, _described(base), text, measurement, tasks, versions)


def read_report(path: Path) -> dict[str, Any]:
    """Read the JSON object of a report.

    Raises:
        UsageError: no such file. IntegrityError: it holds something else.
    """
    if not path.is_file():
        raise UsageError(
            f"expected a result of `neuqi eval --json`, got no such file: {path}. Check the path."
        )
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{path}: expected JSON, got something else ({error}). Run neuqi eval again."
        ) from None
    identity = (REPORT_FORMAT, REPORT_VERSION)
    if not isinstance(body, dict) or (body.get("format"), body.get("format_version")) != identity:
        raise IntegrityError(
            f"{path}: expected a result of `neuqi eval --json`, got other JSON. Name such a file."
        )
    return body


def to_table(body: dict[str, Any]) -> str:
    """Return a report's JSON object as text of at most 80 columns."""
    model, text, noise = body["model"], body["text"], body["noise_floor"]
    lines = [
        f"{model['name']} against {body['base']['name']}",
        f"{model['bytes'] / 2**20:.2f} MiB, {model['bits_per_weight']:.3f} bits per weight "
        f"({model['average_bits']:.3f} over the whole model)",
        f"{text['tokens']} tokens in {text['windows']} windows of {text['context']}; ± is one standard error",
        "",
    ]
    head = ("", body_dtype(model), "95 %", "bf16 noise")
    rows = [head]
    for key, title in _ROWS:
        estimate = body["metrics"][key]
        floor = "" if noise is None else _number(key, noise[key]["value"])
        rows.append((title, _with_error(key, estimate), _interval(key, estimate), floor))
    base = body["base_perplexity"]
    rows.append(
        ("perplexity of the base", _with_error("perplexity", base), _interval("perplexity", base), "")
    )
    lines += _aligned(rows)
    for task in body["tasks"].get("model", {}):
        lines += ["", *_aligned(_task_rows(task, body["tasks"]))]
    return "\n".join(lines)


def body_dtype(model: dict[str, Any]) -> str:
    """Return the heading of the model's column."""
    return f"model ({model['dtype']})"


def _task_rows(task: str, tasks: dict[str, TaskScores]) -> list[tuple[str, ...]]:
    ours, theirs = tasks["model"][task], tasks.get("base", {}).get(task, {})
    rows: list[tuple[str, ...]] = [(task, "model", "base")]
    for metric in ours:
        if not metric.endswith("_stderr"):
            cells = [
                ""
                if metric not in found
                else f"{found[metric]:.4g} ± {found.get(f'{metric}_stderr', 0.0):.2g}"
                for found in (ours, theirs)
            ]
            rows.append((f"  {metric}", *cells))
    return rows


def _described(model: EvaluatedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "packed": model.packed,
        "bytes": model.nbytes,
        "bits_per_weight": round(model.bits_per_weight, 4),
        "average_bits": round(model.average_bits, 4),
    }


def _estimates(measured: Measured) -> dict[str, Any]:
    return {name: asdict(getattr(measured, name)) for name in measured.__dataclass_fields__}


def _number(key: str, value: float) -> str:
    if key == "top1_agreement":
        return f"{100 * value:.2f} %"
    return f"{value:.3g}" if key.startswith("kld") and value < 1e-3 else f"{value:.4f}"


def _with_error(key: str, estimate: dict[str, Any]) -> str:
    text, error = _number(key, estimate["value"]), estimate["standard_error"]
    if error is None:
        return text
    return f"{text} ± {100 * error:.2f}" if key == "top1_agreement" else f"{text} ± {error:.2g}"


def _interval(key: str, estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return "one window"
    return f"{_number(key, estimate['low'])} to {_number(key, estimate['high'])}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
