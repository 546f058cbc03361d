"""``neuqi serve``: an OpenAI-compatible API for a model, quantized while it loads."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb; all its words go on to the server's own parsers, which know every flag of ``vllm serve``."""
    # No word starts with this character: nothing is read as an option here, and order and spelling survive.
    parser = subparsers.add_parser("serve", add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from neuqi_serve.server.launch import serve

    return serve(args.arguments)
