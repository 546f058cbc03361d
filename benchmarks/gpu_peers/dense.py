"""torch's dense product in bf16, which is cuBLAS: what a quantized kernel replaces."""

from __future__ import annotations

import torch

from gpu_peers.contender import Contender, copies_of
from gpu_peers.layer import DTYPE, Case, Layer

NAME = "torch bf16"
# Half a unit in the last place of the result, and of each weight.
TOLERANCE = 4.8e-3


class Dense:
    name = NAME

    def refuse(self, case: Case) -> str | None:
        return None

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        weight = layer.weight(dtype=torch.float32).to(DTYPE)
        return copies_of(layer, [weight], torch.nn.functional.linear, rotated_bytes, TOLERANCE)


DENSE = Dense()
