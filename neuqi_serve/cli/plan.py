"""``neuqi plan``: what a model will need, and whether it fits."""

from __future__ import annotations

import argparse
import json
import re

from neuqi_serve.config import (
    SUPPORTED_BITS,
    SUPPORTED_GROUP_SIZES,
    VOCABULARY_BITS,
    VocabularyBits,
    WeightSpec,
)
from neuqi_serve.errors import DoesNotFitError, UsageError

_DESCRIPTION = """Say what a model will need: bytes of its weights at 4, 3 and 2 bits, of its KV
cache, of all of it together; whether that fits; the speed that the memory
allows; and the command to run. Only config.json is read: MODEL is a folder, a
config.json, or a name on the hub. The exit code is 3 if nothing fits."""
_EPILOG = """examples:
  neuqi plan meta-llama/Llama-3.1-8B-Instruct --device rtx-3060 --context 16384
  neuqi plan ./model --fit 8GiB --bits 3 --concurrency 4
  neuqi plan ./config.json --device h100-sxm --tensor-parallel 2 --json"""
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "plan",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a config.json, or a name on the hub")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--bits", type=int, metavar="B", help="only this width: 2, 3 or 4")
    weights.add_argument(
        "--group-size", type=int, metavar="G", help="only this group size: 32, 64, 128 or -1"
    )
    choices = ", ".join(map(str, VOCABULARY_BITS))
    weights.add_argument("--lm-head-bits", type=int, metavar="B", help=f"of the output head: {choices}")
    weights.add_argument("--embedding-bits", type=int, metavar="B", help=f"of the embedding: {choices}")
    load = parser.add_argument_group("what is asked of it")
    load.add_argument(
        "--context", type=int, metavar="N", help="tokens of a request (default: the model's, at most 8192)"
    )
    load.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    load.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="auto is 16 bits (default)"
    )
    device = parser.add_argument_group("the device")
    device.add_argument(
        "--device", metavar="NAME", help="cpu, or a GPU such as rtx-4090 (default: what is here)"
    )
    device.add_argument(
        "--fit", metavar="SIZE", help="memory that everything has to fit into, e.g. 8GiB, per device"
    )
    device.add_argument("--bandwidth", type=float, metavar="GB/S", help="read bandwidth of its memory")
    device.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="devices (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan; raise if nothing fits."""
    specs = specs_of(args.bits, args.group_size)
    vocabulary = VocabularyBits(args.lm_head_bits, args.embedding_bits)
    for option, value in (
        ("--concurrency", args.concurrency),
        ("--tensor-parallel", args.tensor_parallel),
        ("--context", args.context),
    ):
        if value is not None and value < 1:
            raise UsageError(f"expected {option} of at least 1, got {value}. Correct it.")
    if args.bandwidth is not None and not args.bandwidth > 0:
        raise UsageError(f"expected --bandwidth above 0, got {args.bandwidth}. Correct it.")
    memory = None if args.fit is None else parse_size(args.fit)
    # These import torch and transformers, so not before the cheap checks have passed.
    from neuqi_serve.plan.device import find_device
    from neuqi_serve.plan.plan import make_plan
    from neuqi_serve.plan.report import does_not_fit, to_json, to_text

    plan = make_plan(
        args.model,
        find_device(args.device, memory, args.bandwidth),
        args.context,
        args.concurrency,
        args.tensor_parallel,
        specs,
        vocabulary,
        1 if args.kv_cache_dtype == "fp8" else 2,
    )
    print(json.dumps(to_json(plan), indent=2) if args.json else to_text(plan))
    if plan.chosen is None:
        raise DoesNotFitError(does_not_fit(plan))
    return 0


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``8GiB``, ``8G`` (both 2^33) or ``500MB`` (5·10^8).

    Raises:
        UsageError: something else, or nothing.
    """
    match = _SIZE.fullmatch(text)
    number = float(match.group(1)) if match else 0.0
    if match is None or number <= 0:
        raise UsageError(f"expected a size such as 8GiB or 500MB, got {text!r}. Correct it.")
    unit = (match.group(2) or "").lower()
    decimal = len(unit) == 1 and text.strip().lower().endswith("b")
    return int(number * (1000 if decimal else 1024) ** _POWERS.get(unit[:1], 0))


def specs_of(bits: int | None, group_size: int | None) -> list[WeightSpec] | None:
    """Return the ways to store weights that these options leave; None for all of them.

    Raises:
        UsageError: a value outside the supported set.
    """
    if bits is None and group_size is None:
        return None
    widths = (bits,) if bits is not None else tuple(b for b in SUPPORTED_BITS if b < 8)
    sizes = (group_size,) if group_size is not None else (128,)
    specs = [WeightSpec(width, size) for width in widths for size in sizes]
    if bits is not None and group_size is None:
        specs = [WeightSpec(bits, size) for size in SUPPORTED_GROUP_SIZES]
    return specs
