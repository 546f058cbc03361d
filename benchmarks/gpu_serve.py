"""vLLM with this plugin on a random 8B model: bf16 against 4, 3 and 2 bits made while it loads.

    python benchmarks/gpu_serve.py                              # on a GPU; Llama-3.1-8B's sizes, 16 GB of disk
    python benchmarks/gpu_serve.py --shape tiny --device cpu    # a minute, to see that everything works

Every configuration is a process of its own: its memory and its load time are its own, and one that fails is a row that
says why. Metrics, ratios against bf16: ``decode_rate`` and ``prefill_rate`` in tokens a second of all requests of a
batch together; ``weight_bytes``; ``load_peak_bytes`` and ``peak_bytes``, the most in use until vLLM was ready and over
all (on a GPU, the KV cache included, which is the same for all; on a processor the resident set); ``engine_seconds``
until vLLM was ready, and of these what reading, quantizing and repacking took.

The locked CUDA requirements bring a vLLM with the torch that it was built for. On a machine that has to keep torch 2.11
(and Triton 3.6), vLLM 0.26.0 is the one that fits: ``pip install vllm==0.26.0``; 0.27 and later replace torch. It is
older than the versions that the plugin is tested with. Its own compiled parts need a driver for CUDA 13.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, Record, report
from random_checkpoint import SHAPES, write_checkpoint

ONCE = Path(__file__).with_name("serve_once.py")
UNQUANTIZED_BITS = 16
NAME = "gpu_serve"
# Tokens of a prompt and of its answer.
LENGTHS = {"8b": (512, 128), "tiny": (24, 9)}
SHOWN_LOG_LINES = 30
# The largest block of vLLM's KV cache: every request fills whole ones.
BLOCK_TOKENS = 128
# vLLM on a processor with few cores: see neuqi_serve/server/process_environment.py.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True)
class Configuration:
    """How the model is loaded: 16 bits are the weights as they are."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return "bf16" if self.bits == UNQUANTIZED_BITS else f"{self.bits} bits, group {self.group_size}"


def run_one(configuration: Configuration, model: Path, options: argparse.Namespace) -> dict[str, Any] | str:
    """What the process of a configuration measured, or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = command_of(configuration, model, options, result)
        environment = os.environ | (CPU_ENVIRONMENT if options.device == "cpu" else {})
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=60 * options.minutes,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"was not done after {options.minutes:g} minutes"
        if done.returncode != 0 or not result.exists():
            lines = done.stdout.strip().splitlines()[-SHOWN_LOG_LINES:]
            print(*lines, sep="\n", file=sys.stderr)
            errors = [line.strip() for line in lines if "Error" in line or "error:" in line]
            return f"ended with {done.returncode}: {(errors or lines or ['without a word'])[-1]}"
        return json.loads(result.read_text())


def command_of(
    configuration: Configuration, model: Path, options: argparse.Namespace, result: Path
) -> list[str]:
    prompt_tokens, new_tokens = LENGTHS[options.shape]
    request_tokens = -(-(prompt_tokens + new_tokens + 1) // BLOCK_TOKENS) * BLOCK_TOKENS
    tokens = max(options.batches) * request_tokens + BLOCK_TOKENS
    command = [sys.executable, str(ONCE), "--model", str(model), "--device", options.device]
    command += ["--bits", str(configuration.bits), "--group-size", str(configuration.group_size)]
    command += ["--batches", *map(str, options.batches), "--repeats", str(options.repeats)]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    command += ["--cache-bytes", str(SHAPES[options.shape].cache_bytes(tokens)), "--result", str(result)]
    return [*command, "--eager"] if options.eager or options.device == "cpu" else command


def records_of(
    configuration: Configuration, measured: dict[str, Any], dense: dict[str, Any] | None, shape: str
) -> list[Record]:
    """``dense``: what bf16 measured, where it did."""
    case: dict[str, str | int | float | bool] = {"shape": shape, "bits": configuration.bits}
    if configuration.bits != UNQUANTIZED_BITS:
        case["group_size"] = configuration.group_size
    compared = dense if configuration.bits != UNQUANTIZED_BITS else None
    records = []

    def add(
        fields: dict[str, str | int | float | bool], metric: str, unit: str, value: float, base: float | None
    ) -> None:
        ratio = value / base if base else None
        records.append(Record(case | fields, metric, value, unit, "bf16" if base else None, ratio))

    for batch, rates in measured["rates"].items():
        for metric in ("decode_rate", "prefill_rate"):
            base = compared["rates"][batch][metric] if compared else None
            add({"batch": int(batch)}, metric, "tokens/s", rates[metric], base)
    for metric in ("weight_bytes", "load_peak_bytes", "peak_bytes"):
        add({}, metric, "bytes", measured[metric], compared[metric] if compared else None)
    add(
        {},
        "engine_seconds",
        "s",
        measured["engine_seconds"],
        compared["engine_seconds"] if compared else None,
    )
    for phase, seconds in measured["phases"].items():
        add({}, f"{phase}_seconds", "s", seconds, None)
    return records


def run_all(model: Path, options: argparse.Namespace) -> tuple[list[Record], dict[str, Any]]:
    """The records, and notes: who failed and why, and which kernels ran."""
    widths = [UNQUANTIZED_BITS, *options.bits]
    records: list[Record] = []
    failed: dict[str, str] = {}
    kernels: dict[str, Any] = {}
    dense: dict[str, Any] | None = None
    for bits in widths:
        configuration = Configuration(bits, options.group_size)
        print(f"{configuration}: loading", flush=True)
        measured = run_one(configuration, model, options)
        if isinstance(measured, str):
            failed[str(configuration)] = measured
            print(f"{configuration}: {measured}", file=sys.stderr)
            continue
        if bits == UNQUANTIZED_BITS:
            dense = measured
        kernels[str(configuration)] = measured["kernels"]
        records += records_of(configuration, measured, dense, options.shape)
    return records, {"failed": failed, "kernels": kernels}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], help="beside bf16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    parser.add_argument("--minutes", type=float, default=20.0, help="for one configuration")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made (default: the system's for temporary files)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: expected a CUDA GPU, torch sees none. Run this on a machine with one, or give --device cpu."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    require_device(options.device)
    with tempfile.TemporaryDirectory(prefix="neuqi-gpu-serve-", dir=options.folder) as folder:
        print(
            f"writing a random checkpoint of {SHAPES[options.shape].bytes / 1e9:.2f} GB to {folder}",
            flush=True,
        )
        records, notes = run_all(write_checkpoint(SHAPES[options.shape], Path(folder)), options)
    if records:
        # A run that is no measurement of a GPU has a name of its own.
        report(NAME if options.device == "cuda" else f"{NAME}_{options.device}", records, options.out, notes)
    for name, reason in notes["failed"].items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if notes["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
