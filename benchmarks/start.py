"""How long a start takes: from the command to the first token, against stock vLLM on the same model and machine.

    python benchmarks/start.py [--model demo] [--bits 4] [--repeats 3] [--no-stock]

Each start is a fresh process on a free port. The phases come from the server's own metrics and log. Installation is
not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Record, report

READY_TIMEOUT_SECONDS = 300
STOCK_KV_BYTES = 256 << 20
NEUQI = Path(sys.executable).with_name("neuqi")


@dataclass(frozen=True)
class Start:
    """Seconds from the command until the API answers and until the first token, and what the metrics tell."""

    ready_seconds: float
    first_token_seconds: float
    phases: dict[str, float]
    resident_bytes: float


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_once(command: Sequence[str], environment: dict[str, str], model_name: str) -> Start:
    port = free_port()
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_ready(process, port, log)
            ready = time.perf_counter() - began
            first_token(port, model_name)
            answered = time.perf_counter() - began
            phases, resident = read_metrics(port)
            return Start(ready, answered, phases, resident or resident_bytes(process.pid))
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: object) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            sys.exit(f"the server ended with {process.returncode}:\n{log.read().decode()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit(f"the server was not ready after {READY_TIMEOUT_SECONDS} s")


def first_token(port: int, model_name: str) -> None:
    body = {
        "model": model_name,
        "messages": [{"role": "user", "content": "What is 7 plus 5?"}],
        "max_tokens": 8,
        "stream": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return
    sys.exit("the server answered without a token")


def read_metrics(port: int) -> tuple[dict[str, float], float]:
    """Load phases and the resident bytes of all processes, as `neuqi_*` metrics tell; empty for stock vLLM."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    phases = {}
    resident = 0.0
    for line in lines:
        if line.startswith("neuqi_load_phase_duration_seconds{"):
            phases[line.split('phase="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
        elif line.startswith("neuqi_process_resident_bytes{"):
            resident += float(line.rsplit(" ", 1)[1])
    return phases, resident


def resident_bytes(pid: int) -> float:
    """Resident bytes of a process and its descendants."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            total += int(resident_bytes(int(status.parent.name)))
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return float(total + pages * os.sysconf("SC_PAGE_SIZE"))


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def contenders(
    arguments: argparse.Namespace, folder: Path
) -> dict[str, tuple[list[str], dict[str, str], str]]:
    """Name → command, environment, model name in the API."""
    from neuqi_serve.demo import model_path

    model = str(model_path()) if arguments.model == "demo" else arguments.model
    bits = ["--bits", str(arguments.bits)]
    packed = folder / "packed"
    subprocess.run([NEUQI, "quantize", model, "-o", packed, *bits], check=True, stdout=subprocess.DEVNULL)
    name = ["--served-model-name", "m"]
    found = {
        "on the fly": ([str(NEUQI), "serve", model, *bits, "--no-cache", *name], {}, "m"),
        "packed": ([str(NEUQI), "serve", str(packed), *name], {}, "m"),
        "unquantized": ([str(NEUQI), "serve", model, "--no-quantize", *name], {}, "m"),
    }
    if not arguments.no_stock:
        stock = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model, *name]
        # Without this vLLM takes 92 % of the memory as KV cache and touches it, which is another matter.
        stock += ["--kv-cache-memory-bytes", str(STOCK_KV_BYTES), "--host", "127.0.0.1"]
        found["stock vLLM"] = (stock, {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, "m")
    return found


def records_of(starts: dict[str, list[Start]], bits: int) -> list[Record]:
    records = []
    reference = starts.get("stock vLLM")
    for name, runs in starts.items():
        case: dict[str, str | int | float | bool] = {"start": name, "bits": bits, "runs": len(runs)}
        for metric in ("ready_seconds", "first_token_seconds", "resident_bytes"):
            value = statistics.median(getattr(run, metric) for run in runs)
            ratio = None
            if reference is not None and name != "stock vLLM":
                ratio = value / statistics.median(getattr(run, metric) for run in reference)
            unit = "bytes" if metric.endswith("bytes") else "s"
            records.append(
                Record(case, metric, value, unit, "stock vLLM" if ratio is not None else None, ratio)
            )
        for phase in runs[0].phases:
            value = statistics.median(run.phases[phase] for run in runs)
            records.append(Record(case, f"{phase}_seconds", value, "s"))
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-stock", action="store_true", help="leave stock vLLM out")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        chosen = contenders(arguments, folder)
        starts: dict[str, list[Start]] = {name: [] for name in chosen}
        for _ in range(arguments.repeats):
            for name, (command, environment, model_name) in chosen.items():
                starts[name].append(start_once(command, environment, model_name))
                print(f"{name}: ready after {starts[name][-1].ready_seconds:.1f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    report("start", records_of(starts, arguments.bits))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
