"""Humming: CUDA, 2, 3 and 4 bits, real zero-points in the dtype of the activations."""

from __future__ import annotations

from torch import Tensor

from gpu_peers.contender import Contender, copies_of, needs
from gpu_peers.layer import Case, Layer
from neuqi_kernels import layout
from neuqi_kernels.gpu.humming import HUMMING as BACKEND

# bf16 keeps 8 bits of scale and zero-point, and the kernel rounds each weight twice.
TOLERANCE = 2e-2


class Humming:
    name = "Humming"

    def refuse(self, case: Case) -> str | None:
        return BACKEND.refuse_to_run(case.spec) or needs("humming.forward")

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        from humming.tune import get_heuristics_config

        qweight = layout.pack(layer.codes, case.bits)
        prepared = BACKEND.prepare(qweight, layer.scale, layer.zero, case.spec)
        config = BACKEND.config(case.spec, layer.codes.device)
        tunings: dict[int, dict[str, object]] = {}

        def product(x: Tensor, *tensors: Tensor) -> Tensor:
            # Left to itself the package compiles the kernels for all numbers of tokens before the first product.
            if len(x) not in tunings:
                tunings[len(x)] = get_heuristics_config(config, shape_m=len(x), device=x.device)
            return BACKEND.product(config, x, *tensors, tuning=tunings[len(x)])

        return copies_of(layer, prepared, product, rotated_bytes, TOLERANCE)


HUMMING = Humming()
