"""gemlite: Triton, 2 and 4 bits, real zero-points, which it stores as −scale·zero."""

from __future__ import annotations

from pathlib import Path

from gpu_peers.contender import Contender, Product, capability, copy_count, needs
from gpu_peers.layer import DTYPE, Case, Layer

BITS = (1, 2, 4, 8)
# bf16 keeps 8 bits of scale and of −scale·zero, and the kernel rounds each weight again.
TOLERANCE = 2e-2
# Tuned settings that the package ships, for GPUs whose name it does not recognise itself.
NEAREST_SETTINGS = {(9, 0): "h100.json", (8, 0): "a100.json", (8, 9): "4090.json", (12, 0): "5090.json"}


class Gemlite:
    name = "gemlite"

    def refuse(self, case: Case) -> str | None:
        if case.bits not in BITS:
            return f"has kernels for {BITS} bits, the layer has {case.bits}"
        return needs("gemlite")

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        load_nearest_settings()
        first = packed(layer)
        layer_bytes = first.W_q.nbytes + first.scales.nbytes + first.zeros.nbytes
        bound: list[Product] = [first]
        bound += [packed(layer) for _ in range(copy_count(layer_bytes, rotated_bytes) - 1)]
        return Contender(bound, layer_bytes, layer, TOLERANCE)


def packed(layer: Layer):
    """gemlite's linear layer: ``W_q`` int32 ``[K·bits/32, N]``, ``scales, zeros [G, N]`` in bf16."""
    from gemlite import DType, GemLiteLinearTriton

    n, k = layer.codes.shape
    linear = GemLiteLinearTriton(layer.bits, layer.group, k, n, DType.BF16, DType.BF16)
    linear.pack(layer.codes, layer.scale.to(DTYPE), layer.zero.to(DTYPE), None)
    return linear


def load_nearest_settings() -> None:
    """Load the settings of the nearest GPU where gemlite found none for this one; it would search for minutes."""
    import gemlite
    from gemlite import core

    name = NEAREST_SETTINGS.get(capability())
    if core.GEMLITE_TRITON_CONFIG_CACHE or name is None:
        return
    gemlite.load_config(str(Path(core.__file__).parent / "configs" / name))


GEMLITE = Gemlite()
