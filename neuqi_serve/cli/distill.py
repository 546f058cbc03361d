"""``neuqi distill``: train the scales, zero-points and norms of a packed model towards its original."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DEMO = "demo"
_DESCRIPTION = """Train the scales, zero-points, norms and biases of a packed model until its hidden states on a text
are closer to those of the model that it was made from. The codes stay as they are, and so do size and speed. An
interrupted run goes on where it was when the command is given again. Needs transformers."""
_EPILOG = """example:
  neuqi quantize demo -o demo-2bit --bits 2 --group-size 64
  neuqi distill demo-2bit --teacher demo --text TEXT -o demo-2bit-distilled"""
_LOSSES = ("hidden", "logits", "blocks")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "distill",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packed", metavar="PACKED", type=Path, help="folder of `neuqi quantize`")
    parser.add_argument(
        "--teacher", required=True, metavar="BASE", help=f"the original's folder, or '{DEMO}'"
    )
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="text to learn from, UTF-8")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder to write")
    data = parser.add_argument_group("text")
    data.add_argument("--samples", type=int, default=272, help="most windows of text (default: %(default)s)")
    data.add_argument("--context", type=int, help="tokens of a window (default: the model's, at most 2048)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=0, help="default: one pass over the windows")
    training.add_argument("--batch-size", type=int, default=1, help="windows a step (default: %(default)s)")
    training.add_argument(
        "--learning-rate", type=float, help="its peak (default: the best of four, after short trials)"
    )
    training.add_argument(
        "--loss",
        choices=_LOSSES,
        default=_LOSSES[1],
        help="hidden: squared error behind the final norm; logits: KL divergence of the next token; blocks: squared "
        "error behind every block by itself (default: %(default)s)",
    )
    training.add_argument("--seed", type=int, default=0, help="order of the windows (default: %(default)s)")
    training.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    training.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the products")
    training.add_argument(
        "--checkpoint-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)"
    )
    training.add_argument("--restart", action="store_true", help="throw an interrupted run away")
    output = parser.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace the packed checkpoint at OUT")
    output.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train, write and say what came of it."""
    import torch

    from neuqi_serve.distill.distill_checkpoint import DistillationSettings, distill_checkpoint
    from neuqi_serve.distill.training import TrainingSettings

    teacher = Path(args.teacher)
    if args.teacher == DEMO:
        from neuqi_serve.demo import model_path

        teacher = Path(model_path())
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = DistillationSettings(
        TrainingSettings(args.steps, args.batch_size, args.learning_rate, args.seed, args.checkpoint_every),
        args.loss,
        args.samples,
        args.context,
        device,
        args.dtype,
        args.overwrite,
        args.restart,
    )
    done = distill_checkpoint(args.packed, teacher, args.text, args.output, settings, sys.stderr)
    if args.json:
        print(json.dumps({"output": str(args.output), **done.to_dict()}, indent=2))
        return 0
    result = done.result
    print(
        f"loss on held-out windows: {result.loss_before:.5g} before, {result.loss_after:.5g} after "
        f"{result.steps} steps ({result.tokens} tokens) at a learning rate of {result.learning_rate:g}; "
        f"{done.trained} parameters, {done.seconds:.1f} s\nwritten to {args.output}"
    )
    return 0
