"""Humming: CUDA, 2, 3 and 4 bits, real zero-points in the dtype of the activations; through our own backend."""

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
        qweight = layout.pack(layer.codes, case.bits)
        prepared = BACKEND.prepare(qweight, layer.scale, layer.zero, case.spec)

        def product(x: Tensor, *tensors: Tensor) -> Tensor:
            return BACKEND.gemm(x, *tensors, None, case.n, case.bits, case.group_size)

        return copies_of(layer, prepared, product, rotated_bytes, TOLERANCE)


HUMMING = Humming()
