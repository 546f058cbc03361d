"""A whole model on the CPU: tokens per second against llama.cpp, and against vLLM's own bf16 and int4.

``python benchmarks/cpu_decode.py`` makes a random Llama of 1.1B parameters (22 layers, hidden size 2048) in every
format, and measures one request at a time: decoding ``--tokens`` tokens and a prompt of 128, each engine in a process
of its own, in alternating rounds, medians over the rounds. Of vLLM it also tells the time of the matrix products
alone, so that what the engine adds to a step stands apart.

``--parts`` measures some contenders only and leaves the other records of the result file; ``--models`` keeps the model
files (about 10 GB) for the next run; ``--quick`` takes a tiny model. llama.cpp needs ``requirements/peers.txt``:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-deps -r requirements/peers.txt
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode_engine import Engine
from harness import RESULTS, Record, merged, report
from random_llama import (
    LLAMA_1B,
    LLAMA_TINY,
    Shape,
    free_bytes,
    quantize_gguf,
    weight_bytes,
    write_bf16,
    write_gguf,
    write_gptq,
    write_packed,
)

from neuqi_serve.config import WeightSpec

PREFILL_TOKENS = 128
NAME = "cpu_decode"
# File types of about the same bits, the one that the comparison is named after first. Others of 2 bits need calibration
# data.
LLAMA_FORMATS = {2: ("Q2_K",), 3: ("Q3_K_S", "Q3_K_M"), 4: ("Q4_0", "Q4_K_S")}
# Bytes on disk per parameter: the GGUF in float16 and everything made of it, bf16, int4, packed.
DISK_BYTES_PER_PARAMETER = 10


@dataclass(frozen=True)
class Contender:
    """``part``: with what it is measured. ``make``: writes its model to a path."""

    name: str
    part: str
    engine: str
    make: Callable[[Path], Path]
    bits: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    eager: bool = True


def contenders(shape: Shape, folder: Path, threads: int) -> list[Contender]:
    group = 128

    def packed(bits: int, head: int, embedding: int = 8) -> Contender:
        name = f"neuqi W{bits} g{group}, head {head}"
        spec = WeightSpec(bits, group)
        make = lambda path: write_packed(shape, path, spec, head, embedding)  # noqa: E731
        return Contender(name, f"w{bits}", "vllm", make, bits)

    def gguf(bits: int, kind: str) -> Contender:
        source = folder / "f16.gguf"

        def make(path: Path) -> Path:
            if not source.exists():
                write_gguf(shape, source)
            return quantize_gguf(source, path, kind, threads)

        return Contender(f"llama.cpp {kind}", f"w{bits}", "llama.cpp", make, bits)

    found = [packed(bits, 8) for bits in LLAMA_FORMATS]
    found += [gguf(bits, kind) for bits, kinds in LLAMA_FORMATS.items() for kind in kinds]
    found += [packed(2, 4), packed(2, 16, 16)]
    found.append(Contender("vLLM bf16", "bf16", "vllm", lambda path: write_bf16(shape, path)))
    found.append(Contender("vLLM int4 (GPTQ)", "int4", "vllm", lambda path: write_gptq(shape, path), 4))
    return found


def measure(
    chosen: Sequence[Contender], shape: Shape, folder: Path, arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Load all of one part, then measure them in turn; the order is reversed in every second round."""
    engines: dict[str, Engine] = {}
    runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in chosen}
    try:
        for one in chosen:
            path = model_path(one, folder)
            settings = {
                "engine": one.engine,
                "model": str(path),
                "threads": arguments.threads,
                "tokens": arguments.tokens,
                "prefill": PREFILL_TOKENS,
                "context": 512,
                "vocab": shape.vocab,
                "eager": one.eager,
                "options": one.options,
                "log": str(folder / "engine.log"),
            }
            engines[one.name] = Engine(settings)
        for number in range(arguments.rounds):
            order = [one.name for one in chosen]
            for name in order if number % 2 == 0 else reversed(order):
                runs[name].append(engines[name].measure())
    finally:
        for engine in engines.values():
            engine.close()
    return runs


def model_path(one: Contender, folder: Path) -> Path:
    """Where the contender's model is, or will be."""
    name = "".join(letter if letter.isalnum() else "-" for letter in one.name)
    return folder / (f"{name}.gguf" if one.engine == "llama.cpp" else name)


def medians(runs: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, tuple[float, str]]:
    def middle(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(of(run) for run in runs)

    figures = {
        "decode": (middle(lambda run: run["steps"] / run["decode_seconds"]), "token/s"),
        "decode_step": (1000 * middle(lambda run: run["median_step"]), "ms"),
        "prefill": (middle(lambda run: PREFILL_TOKENS / run["prefill_seconds"]), "token/s"),
        "resident": (float(runs[-1]["resident"]), "bytes"),
    }
    if "kernel_step" in runs[0]:
        figures |= {
            "kernel_step": (1000 * middle(lambda run: run["kernel_step"]), "ms"),
            "engine_overhead": (1000 * middle(lambda run: run["median_step"] - run["kernel_step"]), "ms"),
            "kernel_prefill": (middle(lambda run: PREFILL_TOKENS / run["kernel_prefill"]), "token/s"),
        }
    return figures


def records_of(
    chosen: Sequence[Contender],
    runs: dict[str, list[dict[str, Any]]],
    folder: Path,
    arguments: argparse.Namespace,
) -> list[Record]:
    found = []
    figures = {one.name: medians(runs[one.name], arguments) for one in chosen}
    for one in chosen:
        case = case_of(one, arguments)
        found += [Record(case, metric, value, unit) for metric, (value, unit) in figures[one.name].items()]
        found.append(Record(case, "weights", float(weight_bytes(model_path(one, folder))), "bytes"))
    peers = [one for one in chosen if one.engine == "llama.cpp"]
    for one in chosen if peers else ():
        if one.engine == "vllm":
            found += ratios(one, peers, figures, case_of(one, arguments))
    return found


def case_of(one: Contender, arguments: argparse.Namespace) -> dict[str, str | int | float | bool]:
    return {"model": arguments.shape, "part": one.part, "contender": one.name, "threads": arguments.threads}


def ratios(
    one: Contender,
    peers: Sequence[Contender],
    figures: dict[str, dict[str, tuple[float, str]]],
    case: dict[str, str | int | float | bool],
) -> list[Record]:
    """Against the named file type of these bits, and against the best one of the same run."""
    found = []
    for metric in ("decode", "prefill"):
        ours = figures[one.name][metric][0]
        best = max(peers, key=lambda peer: figures[peer.name][metric][0])
        named = [peers[0], *([best] if best is not peers[0] else [])]
        for peer in named:
            ratio = ours / figures[peer.name][metric][0]
            found.append(Record(case, f"{metric}_ratio_llamacpp", ours, "token/s", peer.name, ratio))
    return found


def prefill_verdicts(records: Sequence[Record]) -> list[Record]:
    """Prefill of ours against the fastest llama.cpp file type of all parts."""
    prefill = {str(record.case["contender"]): record for record in records if record.metric == "prefill"}
    peers = {name: record for name, record in prefill.items() if name.startswith("llama.cpp")}
    if not peers:
        return []
    best = max(peers, key=lambda name: peers[name].value)
    return [
        Record(
            record.case,
            "prefill_ratio_llamacpp_best",
            record.value,
            "token/s",
            best,
            record.value / peers[best].value,
        )
        for name, record in prefill.items()
        if name.startswith("neuqi")
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=[], help="w2 w3 w4 bf16 int4; all by default")
    parser.add_argument("--models", type=Path, help="folder that keeps the model files")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    parser.add_argument("--prepare", action="store_true", help="write the model files and stop")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.shape = "random 1.1B Llama"
    if arguments.quick:
        arguments.tokens, arguments.rounds, arguments.shape = 8, 1, "random tiny Llama"
    return arguments


def main() -> int:
    arguments = parse()
    shape = LLAMA_TINY if arguments.quick else LLAMA_1B
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [
            one
            for one in contenders(shape, folder, arguments.threads)
            if not arguments.parts or one.part in arguments.parts
        ]
        if importlib.util.find_spec("llama_cpp") is None:
            print("llama.cpp is left out: llama-cpp-python is not installed (requirements/peers.txt)")
            chosen = [one for one in chosen if one.engine != "llama.cpp"]
        parameters = sum(n * k for _, (n, k) in shape.modules())
        missing = [one for one in chosen if not model_path(one, folder).exists()]
        if missing and free_bytes(folder) < parameters * DISK_BYTES_PER_PARAMETER:
            sys.exit(f"expected {parameters * DISK_BYTES_PER_PARAMETER >> 30} GiB free in {folder}.")
        for one in missing:
            one.make(model_path(one, folder))
        if arguments.prepare:
            return 0
        fresh: list[Record] = []
        for part in dict.fromkeys(one.part for one in chosen):
            group = [one for one in chosen if one.part == part]
            fresh += records_of(group, measure(group, shape, folder, arguments), folder, arguments)
    records = merged(fresh, arguments.output / f"{NAME}.json")
    records = [record for record in records if record.metric != "prefill_ratio_llamacpp_best"]
    report(NAME, records + prefill_verdicts(records), arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
