"""``neuqi importance``: measure how much each input of a model's linear layers matters, on a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DEMO = "demo"
_DESCRIPTION = """Run a model over a text and write the mean square of every input of its linear layers to FILE, for
--importance of `neuqi quantize` and `neuqi serve`. Needs transformers."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "importance", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help=f"unquantized model folder, or '{DEMO}'")
    parser.add_argument("--text", required=True, type=Path, metavar="TEXT", help="text to run the model over")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--tokens", type=int, default=65536, help="most tokens (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=512, help="tokens that run together (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    from neuqi_serve.pipeline.importance import measure_importance

    if args.model_dir == DEMO:
        from neuqi_serve.demo import model_path

        folder = Path(model_path())
    else:
        folder = Path(args.model_dir)
    count = measure_importance(folder, args.text, args.output, args.tokens, args.window, sys.stderr)
    print(f"importance over {count} tokens of {args.text} written to {args.output}")
    return 0
