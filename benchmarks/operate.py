"""What operating the server costs, and what it keeps: the gate per request, the status port, stopping, a dead engine.

    python benchmarks/operate.py [--model demo] [--repeats 3] [--streams 32]

The gate is timed around an application that does nothing, against that application alone and against vLLM's own check
of a key. Starts are timed from the command on: until the status port answers, and until the API does, with the
status port and the check of the kernels and without. Then one server is told to stop and another loses its engine, each
with all streams running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import Record, report, time_alternating

NEUQI = Path(sys.executable).with_name("neuqi")
READY_SECONDS = 300
REQUESTS, CHUNKS = 2000, 20
KEYS = 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The gate


def gate_records(repeats: int) -> list[Record]:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from neuqi_serve.server.admission.gate import Gate
    from neuqi_serve.server.admission.keys import make_key
    from neuqi_serve.server.admission.settings import ATTRIBUTE, AdmissionSettings

    keys = tuple(make_key(f"user{i}", f"sk-{i}") for i in range(KEYS))
    settings = AdmissionSettings(
        keys, requests_per_minute=1e9, tokens_per_minute=1e9, max_request_bytes=1 << 20
    )
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**{ATTRIBUTE: settings})))
    contenders = {
        "gate": _requests(Gate(_nothing), app),
        "vllm": _requests(AuthenticationMiddleware(_nothing, [f"sk-{i}" for i in range(KEYS)]), app),
        "nothing": _requests(_nothing, app),
    }
    timings = time_alternating(contenders, repeats=max(5, repeats))
    case: dict[str, Any] = {"part": "gate", "keys": KEYS, "chunks": CHUNKS}
    alone = timings["nothing"].median_seconds
    return [
        Record(
            case | {"middleware": name},
            "added to a request",
            (timings[name].median_seconds - alone) / REQUESTS * 1e6,
            "µs",
        )
        for name in ("gate", "vllm")
    ]


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": b"x", "more_body": True})


def _requests(application: Any, app: Any) -> Callable[[], None]:
    headers = [(b"host", b"x"), (b"content-length", b"100"), (b"authorization", b"Bearer sk-7")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "app": app}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 100, "more_body": False}

    async def send(message: Any) -> None:
        pass

    async def run() -> None:
        for _ in range(REQUESTS):
            await application(dict(scope), receive, send)

    return lambda: asyncio.run(run())


# Starts


class Server:
    """A ``neuqi serve`` process, timed from its command on."""

    def __init__(self, model: str, options: Sequence[str]) -> None:
        self.port, self.status = free_port(), free_port()
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        status = [] if "--status-port" in options else ["--status-port", str(self.status)]
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [NEUQI, "serve", model, "--no-cache", "--port", str(self.port), *status, *options],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self, port: int, path: str) -> float:
        """Seconds from the command until ``path`` is answered with 200."""
        while time.perf_counter() - self.began < READY_SECONDS and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                    return time.perf_counter() - self.began
            except OSError:
                time.sleep(0.005)
        raise RuntimeError(f"the server did not start:\n{Path(self.log.name).read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def start_records(model: str, repeats: int) -> list[Record]:
    plain = ("--status-port", "0", "--sanity-check", "off")
    opened: list[float] = []
    ready: dict[str, list[float]] = {"all": [], "plain": []}
    for number in range(2 * repeats):
        name = ("all", "plain", "plain", "all")[number % 4]
        server = Server(model, () if name == "all" else plain)
        if name == "all":
            opened.append(server.wait(server.status, "/livez"))
        ready[name].append(server.wait(server.port, "/health"))
        server.stop()
    medians = {name: statistics.median(values) for name, values in ready.items()}
    case: dict[str, Any] = {"part": "start", "model": model, "starts": repeats}
    ratio = medians["all"] / medians["plain"]
    without = "without status port and check of the kernels"
    return [
        Record(case, "status port answers", max(opened), "s (worst)"),
        Record(case, "API answers", medians["all"], "s", without, ratio),
        Record(case, f"API answers, {without}", medians["plain"], "s"),
    ]


def sanity_record() -> Record:
    """Seconds of the check on the layers of the demo model, as its first load does it."""
    import torch

    from neuqi_kernels import dispatch
    from neuqi_kernels.spec import GemmSpec
    from neuqi_serve.config import EMBEDDING, WeightSpec
    from neuqi_serve.quant.quantize import quantize_packed
    from neuqi_serve.vllm_plugin.sanity import SanityCheck

    shapes = {
        "qkv": (512, 256),
        "o": (256, 256),
        "gate_up": (1536, 256),
        "down": (256, 768),
        EMBEDDING: (1536, 256),
    }
    check, seconds = SanityCheck("refuse"), 0.0
    for role, (n, k) in shapes.items():
        bits = 8 if role == EMBEDDING else 4
        packed = quantize_packed(torch.randn(n, k).bfloat16(), WeightSpec(bits, 128), preset="minmax")
        canonical = packed.qweight, packed.scale, packed.zero
        spec = GemmSpec(n, k, bits, 128, "cpu", torch.bfloat16)
        backend = dispatch.choose(spec)
        prepared = backend.prepare(*canonical, spec)
        began = time.perf_counter()
        check.check(role, role, backend, prepared, canonical, spec)
        seconds += time.perf_counter() - began
    return Record({"part": "sanity check", "model": "demo"}, "seconds of a load", seconds, "s")


# Ends


class Streams:
    """Streams that all run at once: how each ended, and when."""

    def __init__(self, server: Server, model: str, count: int, tokens: int) -> None:
        self.ends: list[tuple[str, float]] = []
        self._url = f"http://127.0.0.1:{server.port}/v1/completions"
        body = {"model": model, "prompt": "tell me a story", "max_tokens": tokens, "stream": True}
        self._body = json.dumps(body | {"ignore_eos": True}).encode()
        self._running = threading.Barrier(count + 1)
        self._readers = [threading.Thread(target=self._read) for _ in range(count)]
        for reader in self._readers:
            reader.start()
        self._running.wait(120)

    def _read(self) -> None:
        end = "cut off"
        request = urllib.request.Request(self._url, self._body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                for number, line in enumerate(answer):
                    if number == 0:
                        self._running.wait(120)
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        choices = event.get("choices") or [{}]
                        end = "error" if "error" in event else choices[0].get("finish_reason") or end
        except OSError:
            end = "error"
        self.ends.append((end, time.perf_counter()))

    def join(self) -> None:
        for reader in self._readers:
            reader.join()


def stop_records(model: str, streams: int) -> list[Record]:
    server = Server(model, ("--max-num-seqs", str(streams), "--drain-timeout", "120"))
    server.wait(server.port, "/health")
    running = Streams(server, model, streams, tokens=100)
    server.process.terminate()
    stopped = time.perf_counter()
    running.join()
    code = server.process.wait(60)
    case: dict[str, Any] = {"part": "SIGTERM", "streams": streams, "exit code": code}
    return [
        Record(case, "streams lost", sum(end != "length" for end, _ in running.ends), "streams"),
        Record(case, "last stream", max(ended for _, ended in running.ends) - stopped, "s"),
    ]


def death_records(model: str, streams: int) -> list[Record]:
    server = Server(model, ("--max-num-seqs", str(streams)))
    server.wait(server.port, "/health")
    running = Streams(server, model, streams, tokens=400)
    engine = set(re.findall(r"\(EngineCore pid=(\d+)\)", Path(server.log.name).read_text())).pop()
    os.kill(int(engine), signal.SIGKILL)
    killed = time.perf_counter()
    running.join()
    code = server.process.wait(60)
    ended = time.perf_counter()
    case: dict[str, Any] = {"part": "engine killed", "streams": streams, "exit code": code}
    return [
        Record(case, "streams told of the error", sum(end == "error" for end, _ in running.ends), "streams"),
        Record(case, "last error", max(when for _, when in running.ends) - killed, "s"),
        Record(case, "server ended", ended - killed, "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    args = parser.parse_args()
    records = [*gate_records(args.repeats), sanity_record(), *start_records(args.model, args.repeats)]
    records += [*stop_records(args.model, args.streams), *death_records(args.model, args.streams)]
    report("operate", records)


if __name__ == "__main__":
    main()
