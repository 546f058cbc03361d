"""The options of ``neuqi quantize --calibrate``, and what they start."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuqi_serve.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from neuqi_serve.pipeline.calibrate import CalibrationRun
    from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings

BUILTIN = "builtin"
DEFAULT_SAMPLES, DEFAULT_CONTEXT = 128, 2048
# Conversations of the built-in text are some tens of tokens long.
_SHORTEST_CONVERSATION = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add a group of options."""
    group = parser.add_argument_group(
        "calibration", "Round each layer for what it reads while the model runs over a text, block by block."
    )
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        help=f"text in UTF-8 of any size, like what the model will read; '{BUILTIN}' is a small text of ours, made for "
        "trying it out: a text of your own is better",
    )
    group.add_argument(
        "--samples", type=int, default=DEFAULT_SAMPLES, help="windows of the text (default: %(default)s)"
    )
    group.add_argument(
        "--context",
        type=int,
        help=f"tokens of a window (default: {DEFAULT_CONTEXT}, or the model's context if that is shorter)",
    )
    group.add_argument(
        "--rounding",
        choices=("ldlq", "rtn"),
        default="ldlq",
        help="with feedback of each column's error to later ones, or to nearest (default: %(default)s)",
    )
    group.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="improve codes, scales and zero-points in turn after rounding (default: yes)",
    )
    group.add_argument(
        "--magr", type=float, nargs="?", const=0.05, default=0.0, metavar="STRENGTH",
        help="reduce the weights' range first, where outputs hardly change (without a number: %(const)s)",
    )  # fmt: skip
    group.add_argument(
        "--rotate",
        action="store_true",
        help="fold random Hadamard rotations into the weights first (Llama-like models; a tied head becomes its own)",
    )
    group.add_argument(
        "--restart",
        action="store_true",
        help="discard what an interrupted run has finished; the default is to resume behind its last block",
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before any work.

    Raises:
        UsageError: an importance beside a text, or options of calibration without one.
    """
    if args.calibrate is not None and args.importance is not None:
        raise UsageError(
            "expected --calibrate or --importance, got both: a calibration measures importance itself. Leave one out."
        )
    given = {
        "--samples": args.samples != DEFAULT_SAMPLES,
        "--context": args.context is not None,
        "--rounding": args.rounding != "ldlq",
        "--no-refit": not args.refit,
        "--magr": args.magr != 0,
        "--rotate": args.rotate,
        "--restart": args.restart,
    }
    if args.calibrate is None and any(given.values()):
        option = next(name for name, is_given in given.items() if is_given)
        raise UsageError(
            f"expected a text for {option}, got no --calibrate. Add --calibrate FILE or --calibrate {BUILTIN}."
        )


def run_calibrated(args: argparse.Namespace, folder: Path, settings: QuantizationSettings) -> CalibrationRun:
    """Quantize as ``settings`` say with the text of ``--calibrate``.

    Raises:
        UsageError: a text that is none, and as ``quantize_with_text``.
    """
    from neuqi_serve.pipeline.calibrate import CalibrationRecipe, quantize_with_text, rounding_recipe

    recipe = CalibrationRecipe(
        settings.spec,
        rounding_recipe(settings.preset, args.rounding, args.refit, args.magr),
        rotate=args.rotate,
        vocabulary=settings.vocabulary,
        exceptions=settings.exceptions,
        budget=settings.budget,
    )
    return quantize_with_text(
        folder,
        args.output,
        recipe,
        calibration_tokens(args, folder),
        device=settings.device,
        overwrite=settings.overwrite,
        restart=args.restart,
        progress_stream=sys.stderr,
    )


def calibration_tokens(args: argparse.Namespace, folder: Path) -> list[Tensor]:
    """Sequences of token ids ``[T]`` of the text asked for."""
    from neuqi_serve.format.source import open_source
    from neuqi_serve.pipeline.calibration_text import windows_of_file

    # Errors of the folder itself come before those of its tokenizer.
    config = open_source(folder).config
    tokenizer = _tokenizer(folder)
    limit = config.get("max_position_embeddings")
    context = args.context
    if context is None:
        context = min(DEFAULT_CONTEXT, limit) if isinstance(limit, int) else DEFAULT_CONTEXT
    if args.calibrate == BUILTIN:
        return _builtin(tokenizer, args.samples * context, context)
    return list(windows_of_file(Path(args.calibrate), tokenizer, args.samples, context))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers package raises plain Exception for a file that it cannot read
        raise UnsupportedModelError(
            f"expected a tokenizer that transformers can load in {folder}, got none ({error}). Copy the tokenizer's "
            "files there."
        ) from error
    # A text longer than the context is cut into windows: no warning is due.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _builtin(tokenizer: Any, most_tokens: int, context: int) -> list[Tensor]:
    """Conversations of the demo model's curriculum, each a sequence of its own."""
    import torch

    from neuqi_serve.demo.tasks import training_tasks

    sequences: list[Tensor] = []
    taken = 0
    # Each has at least some tokens: the number of conversations is bounded as well.
    for task in islice(training_tasks(seed="calibration"), max(1, most_tokens // _SHORTEST_CONVERSATION)):
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
        else:
            ids = tokenizer.encode(f"{task.prompt}\n{task.answer}\n")
        ids = list(ids)[:context]
        if len(ids) > 1:
            sequences.append(torch.tensor(ids))
            taken += len(ids)
        if taken >= most_tokens:
            break
    return sequences
