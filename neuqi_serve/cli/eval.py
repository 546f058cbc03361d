"""``neuqi eval``: what quantization did to a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from neuqi_serve.errors import UsageError

DEMO = "demo"
_DESCRIPTION = """Measure a model against the one that it was made from: KL divergence of the next-token distribution,
agreement and perplexity on texts, with error bars and the noise floor of bfloat16; tasks of lm-eval. MODEL is a packed
folder or any model folder that transformers loads. A packed folder gets a quality card: neuqi_quality.json and a
section of its README.md. Without MODEL, --plot draws earlier results."""
_EPILOG = """examples:
  neuqi eval demo-3bit --against demo --text held_out.txt --json 3bit.json
  neuqi eval --plot quality.png --results 2bit.json 3bit.json 4bit.json"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "eval", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of the model to evaluate")
    parser.add_argument("--against", metavar="BASE", help=f"folder of the original model, or '{DEMO}'")
    text = parser.add_argument_group("texts")
    text.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="UTF-8 text files")
    text.add_argument(
        "--context", type=int, help="tokens of a window (default: the model's own, at most 2048)"
    )
    text.add_argument(
        "--tokens",
        type=int,
        default=65536,
        help="most tokens, evenly spaced over the texts (default: %(default)s)",
    )
    text.add_argument(
        "--no-noise-floor", action="store_true", help="do not run the original in bfloat16 as well"
    )
    tasks = parser.add_argument_group("tasks (package lm-eval)")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-eval, YAML files, or local data: lambada:FILE.jsonl, piqa:FOLDER",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", type=Path, metavar="OUT", help="write the results; - prints them instead of the table"
    )
    output.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw KL divergence against bits and bytes"
    )
    output.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="JSON",
        help="earlier results that --plot draws too",
    )
    output.add_argument(
        "--no-card", action="store_true", help="do not write the quality card into a packed folder"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the models run"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    from neuqi_serve.format.replaced_file import replace_text
    from neuqi_serve.quality.report import read_report, to_table

    bodies = [read_report(path) for path in args.results]
    if args.model is None:
        if args.plot is None or not bodies:
            raise UsageError(
                "expected a MODEL to evaluate, or --plot with --results, got neither. See --help."
            )
        _plot(bodies, args.plot)
        return 0
    body = _evaluate(args)
    if args.json == Path("-"):
        print(json.dumps(body, indent=1, ensure_ascii=False))
    else:
        print(to_table(body))
    if args.json is not None and args.json != Path("-"):
        replace_text(args.json, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwritten to {args.json}", file=sys.stderr)
    if not args.no_card and body["model"]["packed"]:
        from neuqi_serve.quality.card import write_card

        files = write_card(_folder(args.model), body)
        print(f"quality card written to {' and '.join(map(str, files))}", file=sys.stderr)
    if args.plot is not None:
        _plot([*bodies, body], args.plot)
    return 0


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    if args.against is None or not args.text:
        raise UsageError(
            "expected --against BASE and --text FILE beside MODEL, got one or none of them. Add them."
        )
    if args.json is not None and args.json != Path("-") and not args.json.resolve().parent.is_dir():
        raise UsageError(
            f"expected a file name in an existing folder for --json, got {args.json}. Name another."
        )
    import torch

    from neuqi_serve.quality.evaluate_folder import EvaluationSettings, evaluate_folder

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = EvaluationSettings(
        args.context, args.tokens, not args.no_noise_floor, tuple(args.tasks), args.limit, device
    )
    report = evaluate_folder(_folder(args.model), _folder(args.against), args.text, settings, sys.stderr)
    return report.to_dict()


def _plot(bodies: list[dict[str, Any]], destination: Path) -> None:
    from neuqi_serve.quality.plot import write_plot

    write_plot(bodies, destination)
    print(f"plot written to {destination}", file=sys.stderr)


def _folder(model: str) -> Path:
    if model == DEMO:
        from neuqi_serve.demo import model_path

        return Path(model_path())
    return Path(model)
