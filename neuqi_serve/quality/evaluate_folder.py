"""`neuqi eval` without its command line: folders and texts in, a report out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from neuqi_serve.errors import UsageError
from neuqi_serve.pipeline.progress import Progress
from neuqi_serve.quality.evaluated_model import open_model
from neuqi_serve.quality.measure import measure
from neuqi_serve.quality.report import QualityReport, quality_report
from neuqi_serve.quality.tasks import TaskScores, require_lm_eval, run_tasks
from neuqi_serve.quality.text import read_windows

DEFAULT_CONTEXT = 2048
DEFAULT_TOKENS = 65536


@dataclass(frozen=True)
class EvaluationSettings:
    """``context``: tokens of a window, None for the model's own and at most 2048. ``tokens``: most tokens in all.

    ``noise_floor``: also run the base in bfloat16. ``tasks``, ``limit``: as ``quality.tasks.run_tasks`` takes them.
    """

    context: int | None = None
    tokens: int = DEFAULT_TOKENS
    noise_floor: bool = True
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    device: str = "cpu"


def evaluate_folder(
    model_path: Path,
    base_path: Path,
    files: Sequence[Path],
    settings: EvaluationSettings,
    stream: TextIO | None = None,
) -> QualityReport:
    """Measure the model in a folder against the one that it was made from, on texts and tasks.

    Both models are in memory at once, the base in float32; with the noise floor also in bfloat16.

    Raises:
        UsageError: a text or task that is not there, models of different vocabularies, a context that the model does
            not have.
        UnsupportedModelError, IntegrityError: a folder without a model, or with a damaged one.
    """
    if settings.tasks:
        require_lm_eval()
    folder, base_folder = open_model(model_path), open_model(base_path)
    if base_folder.packed:
        raise UsageError(
            f"expected the original model for --against, got a packed one: {base_path}. Name the original."
        )
    tokenizer = base_folder.tokenizer()
    base = base_folder.load(torch.float32, settings.device)
    context = _context(base, settings.context)
    sequences = read_windows(files, tokenizer, context, settings.tokens)
    model = folder.load("auto", settings.device)
    noisy = base_folder.load(torch.bfloat16, settings.device) if settings.noise_floor else None
    total = sum(len(sequence.tokens) for sequence in sequences)
    progress = Progress(total, "tokens", stream) if stream is not None else None
    try:
        done = None if progress is None else lambda count: progress.advance(count, "compared")
        measurement = measure(base, model, sequences, noisy, done)
    finally:
        if progress is not None:
            progress.close()
    dtype = str(model.dtype).removeprefix("torch.")
    scores: dict[str, TaskScores] = {}
    if settings.tasks:
        del noisy
        gc.collect()
        of_model, of_base = run_tasks((model, base), tokenizer, settings.tasks, settings.limit)
        scores = {"model": of_model, "base": of_base}
    return quality_report(folder, base_folder, dtype, files, context, measurement, scores)


def _context(base: Any, asked: int | None) -> int:
    longest = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 1 else sys.maxsize
    if asked is not None and asked > longest:
        raise UsageError(f"expected a context of at most {longest} tokens, which the model has, got {asked}.")
    return asked if asked is not None else min(DEFAULT_CONTEXT, longest)
