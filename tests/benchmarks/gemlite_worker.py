"""Let gemlite pack a layer without a GPU, take its tensors apart again, print the largest deviation from the layer.

A process of its own: gemlite asks for the GPU while it is imported, and gets the answers of an H100 here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
import triton
from gpu_peers import gemlite
from gpu_peers.layer import Case, Layer

from neuqi_kernels import layout

TARGET = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
PROPERTIES = SimpleNamespace(name="NVIDIA H100", multi_processor_count=132, major=9, minor=0)


def main() -> None:
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGET))
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for bits in (2, 4):
        layer = Layer.random(Case(96, 256, bits, 64), "cpu")
        packed = gemlite.packed(layer)
        codes = layout.unpack(packed.W_q.data.t().contiguous(), bits).float()
        scale = packed.scales.float().t().repeat_interleave(layer.group, 1)
        shift = packed.zeros.float().t().repeat_interleave(layer.group, 1)
        deviation = (codes * scale + shift - layer.weight(dtype=torch.float32)).abs().max()
        print(bits, float(deviation / layer.weight().abs().max()))


if __name__ == "__main__":
    main()
