"""What processes and threads cost a served token: ``neuqi serve`` as it chooses, and with one choice undone.

Two random models of 22 layers: ``narrow``, whose weights cost nothing, so that what is left is the engine's and the
server's own time, and ``1.1B`` at 4 bits. Every layout is a fresh server, started, measured over HTTP with one
streaming request at a time, and stopped, in alternating rounds; medians over the rounds. ``in one process`` is vLLM
without a server, the least that is possible.

    python benchmarks/process_layout.py [--model narrow] [--layouts chosen "threads asleep"] [--rounds 3]

``--layouts`` measures some only and leaves the other records of the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from decode_engine import ENVIRONMENT, PROMPT_TOKENS, Engine
from harness import RESULTS, Record, merged, report
from random_llama import LLAMA_1B, LLAMA_NARROW, LLAMA_TINY, Shape, write_packed
from start import NEUQI, free_port, resident_bytes, stop, wait_until_ready

from neuqi_serve.config import WeightSpec

NAME = "process_layout"
CHOSEN, IN_PROCESS = "chosen", "in one process"
SHAPES = {"narrow": LLAMA_NARROW, "1.1B": LLAMA_1B, "tiny": LLAMA_TINY}
WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Layout:
    """What differs from the choice of ``neuqi serve``; an empty variable is given as unset."""

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = {
    CHOSEN: Layout(),
    "threads asleep": Layout(environment={"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}),
    "threads spin 30 times longer": Layout(environment={"GOMP_SPINCOUNT": "600000"}),
    "threads spin always": Layout(environment={"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "infinity"}),
    "one thread": Layout(environment={"OMP_NUM_THREADS": "1"}),
    "vLLM's binding": Layout(environment={"VLLM_CPU_OMP_THREADS_BIND": "auto"}),
    "a process for the worker": Layout(("--distributed-executor-backend", "mp")),
    "vLLM's norms": Layout(
        ("--ir-op-priority", '{"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}')
    ),
    "compiled": Layout(("--no-enforce-eager",)),
    "tokens sent in fours": Layout(("--stream-interval", "4")),
}


@dataclass(frozen=True)
class Served:
    """Milliseconds per token after the first, seconds until ready, resident bytes of all processes."""

    token_ms: float
    ready_seconds: float
    resident: float


def serve_once(model: Path, layout: Layout, tokens: int) -> Served:
    """Start a server, warm it up, stream one answer, stop it."""
    port = free_port()
    command = [str(NEUQI), "serve", str(model), "--port", str(port), "--served-model-name", "m"]
    environment = os.environ | dict(layout.environment)
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, *layout.arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until_ready(process, port, log)
            ready = time.perf_counter() - began
            stream(port, WARMUP_TOKENS)
            return Served(stream(port, tokens), ready, resident_bytes(process.pid))
        finally:
            stop(process)


def stream(port: int, tokens: int) -> float:
    """Milliseconds per token of a streamed completion, from its first event to its last."""
    body = {
        "model": "m",
        "prompt": " ".join(f"w{3 + i}" for i in range(PROMPT_TOKENS)),
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        arrivals = [time.perf_counter() for line in answer if line.startswith(b"data: {")]
    # Events may carry several tokens; the first one carries one.
    return 1000 * (arrivals[-1] - arrivals[0]) / (tokens - 1)


def in_process(model: Path, shape: Shape, tokens: int, folder: Path) -> Served:
    """The same steps without a server: one process, the threads waiting as `neuqi serve` lets them."""
    began = time.perf_counter()
    settings = {
        "engine": "vllm",
        "model": str(model),
        "threads": len(os.sched_getaffinity(0)),
        "tokens": tokens,
        "prefill": PROMPT_TOKENS,
        "context": 512,
        "vocab": shape.vocab,
        "environment": ENVIRONMENT,
        "log": str(folder / "engine.log"),
    }
    engine = Engine(settings)
    try:
        ready = time.perf_counter() - began
        run = engine.measure()
    finally:
        engine.close()
    return Served(1000 * run["decode_seconds"] / run["steps"], ready, float(run["resident"]))


def records_of(model: str, runs: Mapping[str, Sequence[Served]], cores: int) -> list[Record]:
    found = []
    middle = {name: statistics.median(run.token_ms for run in served) for name, served in runs.items()}
    for name, served in runs.items():
        case: dict[str, str | int | float | bool] = {"model": model, "layout": name, "cores": cores}
        other = name != CHOSEN and CHOSEN in middle
        ratio = middle[name] / middle[CHOSEN] if other else None
        found.append(Record(case, "token", middle[name], "ms", CHOSEN if other else None, ratio))
        ready = statistics.median(run.ready_seconds for run in served)
        found.append(Record(case, "ready", ready, "s"))
        found.append(Record(case, "resident", statistics.median(run.resident for run in served), "bytes"))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="narrow")
    parser.add_argument(
        "--layouts", nargs="+", choices=[*LAYOUTS, IN_PROCESS], default=[*LAYOUTS, IN_PROCESS]
    )
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two layouts, one round")
    parser.add_argument("--models", type=Path, help="folder that keeps the model for the next run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.model, arguments.layouts = "tiny", [CHOSEN, IN_PROCESS]
        arguments.tokens, arguments.rounds = 8, 1
    return arguments


def main() -> int:
    arguments = parse()
    shape = SHAPES[arguments.model]
    runs: dict[str, list[Served]] = {name: [] for name in arguments.layouts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / f"layout-{arguments.model}"
        if not model.exists():
            write_packed(shape, model, WeightSpec(4, 64), 8, 8)
        for number in range(arguments.rounds):
            order = list(arguments.layouts)
            for name in order if number % 2 == 0 else reversed(order):
                if name == IN_PROCESS:
                    served = in_process(model, shape, arguments.tokens, Path(temporary))
                else:
                    served = serve_once(model, LAYOUTS[name], arguments.tokens)
                runs[name].append(served)
                print(
                    f"{name}: {served.token_ms:.2f} ms a token, ready after {served.ready_seconds:.1f} s",
                    flush=True,
                )
    fresh = records_of(arguments.model, runs, len(os.sched_getaffinity(0)))
    report(NAME, merged(fresh, arguments.output / f"{NAME}.json"), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
