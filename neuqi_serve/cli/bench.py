"""``neuqi bench kernels``: time the GPU kernels on the GPU at hand, and write a table of the fastest plans."""

from __future__ import annotations

import argparse
from pathlib import Path

from neuqi_serve.config import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES
from neuqi_serve.errors import NeuqiError, UsageError

# Output by input features: the fused products of Llama-3.1-8B.
SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
_DESCRIPTION = """Time the kernels that the server would run, in replays of a CUDA graph over rotating weights, each
checked against float64 first. --tune times every legal plan instead and writes the fastest of each layer and
number of tokens to a table, which the kernels read before their own rules. Needs a GPU; serving never tunes."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "bench", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=("kernels",), help="what to time")
    parser.add_argument("--tune", action="store_true", help="search for the fastest plans and write them")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="table to write or add to (default: the one of this GPU's architecture in the installed package)",
    )
    layers = parser.add_argument_group("layers")
    layers.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="NxK", help="features, default: %(default)s"
    )
    layers.add_argument("--bits", nargs="+", type=int, choices=SUPPORTED_BITS, default=(2, 3, 4))
    layers.add_argument("--group-sizes", nargs="+", type=int, choices=SUPPORTED_GROUP_SIZES, default=(128,))
    layers.add_argument("--tokens", nargs="+", type=int, metavar="M", help="default: every token bucket")
    layers.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")


def run(args: argparse.Namespace) -> int:
    """Time or tune, and say where the table is."""
    shapes = [_shape(text) for text in args.shapes]
    for group in args.group_sizes:
        if any(k % max(group, 32) for _, k in shapes):
            raise UsageError(
                f"expected input features that are a multiple of 32 and of the group size {group}, got {args.shapes}. "
                "Leave out the shapes that are not."
            )
    if args.out is not None and not args.tune:
        raise UsageError(
            "expected --tune beside --out: only tuning writes a table. Add it, or leave --out away."
        )
    device_index = _require_gpu()

    import torch

    from neuqi_kernels.gpu import graph_timer, tune, tuning_table
    from neuqi_kernels.gpu.plan import target_of

    device = torch.device("cuda", device_index)
    target = target_of(device)
    out = args.out or tuning_table.FOLDER / f"{target.architecture}.json"
    if args.tune:
        _check(args.tokens, out, target.architecture)
    layers = [
        tune.Shape(bits, group, n, k) for bits in args.bits for group in args.group_sizes for n, k in shapes
    ]
    with torch.inference_mode():
        entries = tune.tune(
            layers,
            args.tokens or tuning_table.TOKEN_BUCKETS,
            graph_timer.time_in_graphs,
            device,
            dtype=getattr(torch, args.dtype),
            rotated_bytes=graph_timer.rotated_bytes(device),
            search=args.tune,
        )
    if args.tune:
        tuning_table.write(out, target.architecture, tune.provenance(device, entries))
        print(f"wrote {len(entries)} plans for {target.architecture} to {out}")
    return 0


def _shape(text: str) -> tuple[int, int]:
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UsageError(
            f"expected a shape as NxK, output by input features, got {text!r}. Write 4096x14336."
        )
    return int(numbers[0]), int(numbers[1])


def _check(tokens: list[int] | None, out: Path, architecture: str) -> None:
    """Refuse before hours of measuring what could not be written after them."""
    from neuqi_kernels.gpu import tuning_table

    unknown = set(tokens or ()) - set(tuning_table.TOKEN_BUCKETS)
    if unknown:
        raise UsageError(
            f"expected numbers of tokens of {tuning_table.TOKEN_BUCKETS} to tune, got {sorted(unknown)}. "
            "A table has an entry for each of these."
        )
    try:
        tuning_table.check_writable(out, architecture)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _require_gpu() -> int:
    """Return the index of the GPU, or say why there is none to measure."""
    import torch

    from neuqi_kernels import dispatch
    from neuqi_kernels.spec import GemmSpec

    refusal = dispatch.refusal("triton", GemmSpec(128, 128, 4, 128, "cuda", torch.bfloat16))
    if refusal is not None:
        raise NeuqiError(
            f"expected a GPU that the Triton kernels run on, the backend refuses: {refusal}. "
            "Run this on a machine with one."
        )
    return torch.cuda.current_device()
