"""``neuqi``: reads the verb, imports its module only, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from neuqi_serve._version import VERSION
from neuqi_serve.cli.errors_to_exit import run_to_exit_code

# verb → module with add_parser(subparsers) and run(args) -> int, and the line of the overview. Modules are imported
# when their verb is named: the overview must not wait for torch or vLLM.
VERBS = {
    "serve": ("neuqi_serve.cli.serve", "serve a model over an OpenAI-compatible API"),
    "quantize": ("neuqi_serve.cli.quantize", "pack a model's weights to 2, 3, 4 or 8 bits ahead of time"),
    "importance": (
        "neuqi_serve.cli.importance",
        "measure how much each input of a model's layers matters, on a text",
    ),
    "distill": (
        "neuqi_serve.cli.distill",
        "train scales, zero-points and norms of a packed model towards its original",
    ),
    "plan": ("neuqi_serve.cli.plan", "say what a model will need, and whether it fits, from its config.json"),
    "k8s": ("neuqi_serve.cli.k8s", "write Kubernetes manifests for one model"),
    "eval": ("neuqi_serve.cli.eval", "measure a quantized model against the original"),
    "doctor": ("neuqi_serve.cli.doctor", "say what keeps the server from running well here"),
    "cache": ("neuqi_serve.cli.cache", "list, remove or verify what starts of the server have packed"),
    "inspect": (
        "neuqi_serve.cli.inspect",
        "show bits and bytes of a packed checkpoint and check its integrity",
    ),
    "bench": ("neuqi_serve.cli.bench", "time the GPU kernels, and tune them for the GPU at hand"),
}
_EPILOG = """exit codes: 0 ok, 1 other error, 2 usage, 3 does not fit, 4 unsupported model, 5 integrity, 6 port in use,
7 wrong kernel

NEUQI_TRACEBACK=1 shows where an error comes from."""


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``neuqi`` in which ``verb`` has its options and the other verbs only their help line."""
    parser = argparse.ArgumentParser(
        prog="neuqi",
        description="Quantize language models with NeUQI to 2, 3 or 4 bits and serve them with vLLM.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"neuqi {VERSION}")
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, (module, line) in VERBS.items():
        if name == verb:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``neuqi`` with these arguments (the process's own by default) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    verb = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = build_parser(verb).parse_args(arguments)
    except SystemExit as request:  # argparse: 0 after --help and --version, 2 after a usage error
        return int(request.code or 0)
    code: int = importlib.import_module(VERBS[args.verb][0]).run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
