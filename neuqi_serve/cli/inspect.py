"""``neuqi inspect``: bits, bytes and integrity of a packed checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

_DESCRIPTION = """Show bits and bytes of a packed checkpoint. Headers, sizes and shapes are always checked;
--verify also reads every file and compares its checksum."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "inspect", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="OUT", type=Path, help="packed checkpoint folder")
    parser.add_argument(
        "--verify", action="store_true", help="check the SHA-256 of every file and all scales"
    )
    parser.add_argument("--layers", action="store_true", help="one line per layer")
    parser.add_argument("--json", action="store_true", help="print JSON, every layer included")


def run(args: argparse.Namespace) -> int:
    """Check the checkpoint and print what it holds."""
    from neuqi_serve.format.reader import open_checkpoint
    from neuqi_serve.pipeline.progress import Progress
    from neuqi_serve.pipeline.summary import describe_layers, layer_table, summarize

    checkpoint = open_checkpoint(args.checkpoint)
    if args.verify:
        total = sum(record.nbytes for record in checkpoint.manifest.files.values())
        progress = Progress(total, "B", sys.stderr)
        try:
            checkpoint.verify(lambda nbytes: progress.advance(nbytes, "verified"))
        finally:
            progress.close()
    else:
        checkpoint.validate()
    summary = summarize(checkpoint.manifest)
    integrity = "verified" if args.verify else "headers valid"
    if args.json:
        body = {
            "path": str(args.checkpoint),
            "integrity": integrity,
            "quantization_config": checkpoint.recipe.to_dict(),
            "source": dict(checkpoint.manifest.source),
            **summary.to_dict(),
            "modules": describe_layers(checkpoint.manifest),
        }
        print(json.dumps(body, indent=2))
        return 0
    if args.layers:
        print(layer_table(checkpoint.manifest))
    print(summary.to_table())
    print(f"integrity: {integrity}" + ("" if args.verify else " (checksums: --verify)"))
    return 0
