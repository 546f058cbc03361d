"""Memory of packing: one tensor at a time, whatever the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The other tests' Llama, with longer layers.
LAYERS, HIDDEN, FFN = 6, 512, 16384
LARGEST = 2 * HIDDEN * FFN
# Thread pools, work arrays of the search, file buffers, imports made late.
CONSTANT = 64 << 20
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from neuqi_serve.config import WeightSpec
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, quantize_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

peak, ended = [0], threading.Event()
def sample():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
thread = threading.Thread(target=sample)
thread.start()
try:
    quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), QuantizationSettings(WeightSpec(4, 128)))
finally:
    ended.set()
    thread.join()
print(json.dumps(peak[0] - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
def test_packing_takes_two_tensors_at_most(write_llama: Callable[..., Path], tmp_path: Path) -> None:
    tensors = {
        name: torch.randn(48, HIDDEN).to(torch.bfloat16)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for layer in range(LAYERS):
        for name, shape in (
            ("up_proj", (FFN, HIDDEN)),
            ("down_proj", (HIDDEN, FFN)),
            ("gate_proj", (FFN, HIDDEN)),
        ):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = torch.randn(shape).to(torch.bfloat16)
        for name, rows in (("q_proj", HIDDEN), ("k_proj", HIDDEN), ("v_proj", HIDDEN), ("o_proj", HIDDEN)):
            weight = torch.randn(rows, HIDDEN).to(torch.bfloat16)
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = weight
    model = write_llama(
        layers=LAYERS, config={"hidden_size": HIDDEN, "intermediate_size": FFN}, tensors=tensors
    )
    # What would be held if weights were not released.
    assert sum(tensor.nbytes for tensor in tensors.values()) > 2 * (2 * LARGEST + CONSTANT)
    tensors.clear()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert json.loads(done.stdout) <= 2 * LARGEST + CONSTANT
