"""What must not break a cache: processes killed at any moment, a full disk, several at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neuqi_serve.cache.prepare import prepare
from neuqi_serve.cache.store import Cache
from neuqi_serve.config import WeightSpec
from neuqi_serve.format.reader import open_checkpoint
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings

SETTINGS = QuantizationSettings(WeightSpec(3, 32))
# A process that prepares a model. FAULT is code that makes it fail at a certain place.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from neuqi_serve.cache.prepare import prepare
from neuqi_serve.cache.store import Cache
from neuqi_serve.config import WeightSpec
from neuqi_serve.format.writer import CheckpointWriter
from neuqi_serve.pipeline import quantize_checkpoint as packing

def before(owner, name, call, action):
    original, calls = getattr(owner, name), [0]
    def wrapped(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            action()
        return original(*arguments, **options)
    setattr(owner, name, wrapped)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

FAULT
settings = packing.QuantizationSettings(WeightSpec(3, 32))
told = []

def tell(text):
    told.append(text)
    print(text, file=sys.stderr, flush=True)

made = prepare(Path(sys.argv[1]), settings, Cache(Path(sys.argv[2])), tell)
print(json.dumps({"key": made.key, "found": made.found, "told": told}))
"""
FAULTS = {
    "at the first layer": "before(packing, 'quantize_packed', 1, die)",
    "half way through the layers": "before(packing, 'quantize_packed', 7, die)",
    "before the first bytes of a layer": "before(CheckpointWriter, 'write_module', 1, die)",
    "between the tensors of a layer": "before(CheckpointWriter, 'write', 8, die)",
    "before the manifest": "before(CheckpointWriter, 'finish', 1, die)",
    "before the entry gets its place": "before(Cache, 'publish', 1, die)",
    "while the damaged entry is replaced": "before(Cache, '_discard', 1, die)",
}


def _start(model: Path, root: Path, fault: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("FAULT", fault), str(model), str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("fault", [name for name in FAULTS if "damaged" not in name])
def test_a_process_killed_while_packing_leaves_no_entry_and_the_next_one_works(
    write_llama: Callable[..., Path], cache: Cache, fault: str
) -> None:
    model = write_llama()
    process = _start(model, cache.root, FAULTS[fault])
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert cache.entries() == []
    made = prepare(model, SETTINGS, cache, print)
    assert not made.found
    open_checkpoint(cache.entry_path(made.key)).verify()
    assert [path.name for path in (cache.root / "building").iterdir()] == []


def test_a_process_killed_while_it_replaces_a_damaged_entry(
    write_llama: Callable[..., Path], cache: Cache, flip_bit: Callable[[Path, int], None]
) -> None:
    model = write_llama()
    made = prepare(model, SETTINGS, cache, print)
    shard = cache.entry_path(made.key) / "model.safetensors"
    whole = shard.read_bytes()
    flip_bit(shard, len(whole) // 2)
    process = _start(model, cache.root, FAULTS["while the damaged entry is replaced"])
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not prepare(model, SETTINGS, cache, print).found
    assert shard.read_bytes() == whole


def test_of_two_processes_one_packs_and_both_get_the_entry(
    write_llama: Callable[..., Path], cache: Cache
) -> None:
    # The first waits inside, so that both want the entry before it is there.
    model = write_llama()
    slow = "before(packing, 'quantize_packed', 1, lambda: time.sleep(4))"
    processes = [_start(model, cache.root, slow) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert answers[0]["key"] == answers[1]["key"]
    assert sorted(answer["found"] for answer in answers) == [False, True]
    open_checkpoint(cache.entry_path(answers[0]["key"])).verify()


def test_when_the_packing_process_is_killed_the_waiting_one_takes_over(
    write_llama: Callable[..., Path], cache: Cache
) -> None:
    model = write_llama()
    first = _start(model, cache.root, "before(packing, 'quantize_packed', 3, lambda: time.sleep(300))")
    partial = cache.root / "building"
    while not (partial.is_dir() and any(partial.iterdir())):
        assert first.poll() is None
        time.sleep(0.05)
    second = _start(model, cache.root)
    assert second.stderr is not None
    assert any("waiting for it" in line for line in second.stderr)
    first.kill()
    answer = json.loads(second.communicate(timeout=120)[0])
    first.communicate()
    assert not answer["found"]
    assert answer["told"] == ["another process packs this model: waiting for it"]
    open_checkpoint(cache.entry_path(answer["key"])).verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("call", [1, 20])
def test_a_disk_that_fills_up_leaves_no_entry_and_room_again_is_enough(
    write_llama: Callable[..., Path], small_disk: Path, call: int
) -> None:
    model = write_llama()
    filler = small_disk / "filler"
    fill = (
        f"lambda: Path({str(filler)!r}).write_bytes(bytes(os.statvfs({str(small_disk)!r}).f_bavail * 4096))"
    )
    root = small_disk / "cache"
    process = _start(model, root, f"before(CheckpointWriter, 'write', {call}, {fill})")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert os.strerror(errno.ENOSPC) in errors
    cache = Cache(root, max_bytes=1 << 20)
    assert cache.entries() == []
    filler.unlink()
    made = prepare(model, SETTINGS, cache, print)
    open_checkpoint(cache.entry_path(made.key)).verify()
