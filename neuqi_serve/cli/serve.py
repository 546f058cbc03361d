"""``neuqi serve``: an OpenAI-compatible API for a model, quantized while it loads."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb; all its words go on to the server's own parsers, which know every flag of ``vllm serve``."""
    # No word starts with this character: nothing is read as an option here, and order and spelling survive.
    parser = subparsers.add_parser("serve", add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from neuqi_serve.cli.errors_to_exit import run_to_exit_code
    from neuqi_serve.server.launch import serve
    from neuqi_serve.server.process_end import end_process

    imported_before = "vllm" in sys.modules
    try:
        code = run_to_exit_code(lambda: serve(args.arguments))
    except SystemExit as request:  # vLLM's own parser
        code = int(request.code or 0)
    if "vllm" in sys.modules and not imported_before:
        end_process(code)
    return code
