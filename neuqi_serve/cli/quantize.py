"""``neuqi quantize``: pack a model folder ahead of time."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from neuqi_serve.budget.budget import budget_of, parse_bits
from neuqi_serve.cli import calibration_options
from neuqi_serve.config import (
    DEFAULT_EMBEDDING_BITS,
    DEFAULT_LM_HEAD_BITS,
    DEFAULT_PRESET,
    PRESETS,
    SCALE_DTYPES,
    SUPPORTED_GROUP_SIZES,
    VOCABULARY_BITS,
    VocabularyBits,
    WeightSpec,
)

if TYPE_CHECKING:
    from neuqi_serve.pipeline.calibrate import CalibrationRun
    from neuqi_serve.pipeline.summary import CheckpointSummary

DEMO = "demo"
_DESCRIPTION = """Pack the linear layers of a model's decoder blocks, its output head and its embedding; norms and
routers stay as they are. Needs no data; with --importance, inputs that matter more get the smaller
errors; with --calibrate, answers are a good deal better, and quantizing takes longer. Nothing appears
at OUT before all of it is written; an interrupted run leaves OUT as it was."""
_EPILOG = """example:
  neuqi quantize demo -o demo-3bit --bits 3 --group-size 64 && neuqi serve demo-3bit"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "quantize",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        help=f"unquantized Hugging Face model folder, or '{DEMO}' for the bundled model",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", type=Path, help="folder to write")
    default = WeightSpec()
    precision = parser.add_argument_group("precision")
    precision.add_argument(
        "--bits",
        type=parse_bits,
        help=f"bits per code; a decimal number, e.g. 2.5, chooses the best widths of the same size (default: "
        f"{default.bits})",
    )
    precision.add_argument(
        "--fit",
        metavar="SIZE",
        help="the most that all weights may take, e.g. 8GiB: chooses the best widths that fit, in place of --bits",
    )
    precision.add_argument(
        "--group-size",
        type=int,
        choices=SUPPORTED_GROUP_SIZES,
        help="weights that share a scale and a zero-point, -1 for the whole row (default: "
        f"{default.group_size}; under a budget the best of all sizes for each layer)",
    )
    precision.add_argument(
        "--scale-dtype",
        choices=SCALE_DTYPES,
        default=default.scale_dtype,
        help="storage of scales and zero-points (default: %(default)s)",
    )
    precision.add_argument(
        "--lm-head-bits",
        type=int,
        choices=VOCABULARY_BITS,
        help=f"bits of the output head, 16 leaves it as it is (default: {DEFAULT_LM_HEAD_BITS})",
    )
    precision.add_argument(
        "--embedding-bits",
        type=int,
        choices=VOCABULARY_BITS,
        help=f"bits of the embedding; a tied one has those of the head (default: {DEFAULT_EMBEDDING_BITS})",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="balanced: as good as the search of the paper, hundreds of times faster; fast: a little worse, some times "
        "faster still; reference: the search of the paper; minmax: the baseline (default: %(default)s)",
    )
    search.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the search runs; auto is the GPU if there is one (default: %(default)s)",
    )
    search.add_argument(
        "--importance",
        type=Path,
        metavar="FILE",
        help="mean squares of the layers' inputs: an importance matrix of llama.cpp, or what `neuqi importance` wrote",
    )
    search.add_argument(
        "--sensitivity",
        choices=("divergence", "weights"),
        default="divergence",
        help="what widths are chosen by: how far the model's answers move, on text that it writes itself; or only the "
        "weights' own errors, one weight in memory at a time (default: %(default)s)",
    )
    calibration_options.add_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace the packed checkpoint at OUT")
    output.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantize and print the summary."""
    calibration_options.check_options(args)
    budget = budget_of(args.bits, args.fit)
    default = WeightSpec()
    bits = args.bits if isinstance(args.bits, int) else default.bits
    spec = WeightSpec(bits, args.group_size or default.group_size, args.scale_dtype)
    # A container runtime stops with SIGTERM: leave through the same clean-up as an interrupt.
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        import torch

        from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

        device = args.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = QuantizationSettings(
            spec,
            args.preset,
            device,
            args.overwrite,
            importance=args.importance,
            vocabulary=VocabularyBits(args.lm_head_bits, args.embedding_bits),
        )
        if budget is not None:
            from neuqi_serve.budget.plan import plan_budget

            sizes = SUPPORTED_GROUP_SIZES if args.group_size is None else (args.group_size,)
            plan = plan_budget(
                _source_path(args.model_dir), settings, budget, args.sensitivity, sys.stderr, sizes
            )
            settings = plan.settings
            print("\n".join(plan.lines()), file=sys.stderr)
        model = _source_path(args.model_dir)
        summary: CheckpointSummary | CalibrationRun
        if args.calibrate is None:
            summary = quantize_checkpoint(model, args.output, settings, sys.stderr)
        else:
            summary = calibration_options.run_calibrated(args, model, settings)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if args.json:
        result: dict[str, Any] = {"output": str(args.output), **summary.to_dict()}
        print(json.dumps(result, indent=2))
    else:
        print(f"{summary.to_table()}\nwritten to {args.output}")
    return 0


def _source_path(model: str) -> Path:
    if model == DEMO:
        from neuqi_serve.demo import model_path

        return Path(model_path())
    return Path(model)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
