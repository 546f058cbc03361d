"""Our Triton kernels, called as vLLM calls them: through the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_peers.contender import Contender, copies_of
from gpu_peers.layer import Case, Layer
from neuqi_kernels import dispatch, layout, ops

NAME = "neuqi"
# Half a unit in the last place of the result, and of each weight in the products that round them.
TOLERANCE = 4.8e-3


class Neuqi:
    name = NAME

    def refuse(self, case: Case) -> str | None:
        return dispatch.refusal("triton", case.spec)

    def build(self, case: Case, layer: Layer, rotated_bytes: int) -> Contender:
        ops.register()
        backend = dispatch.choose(case.spec, only="triton")
        prepared = backend.prepare(layout.pack(layer.codes, case.bits), layer.scale, layer.zero, case.spec)

        def product(x: Tensor, *tensors: Tensor) -> Tensor:
            return torch.ops.neuqi.gemm(x, *tensors, None, case.n, case.bits, case.group_size, backend.name)

        return copies_of(layer, prepared, product, rotated_bytes, TOLERANCE)


NEUQI = Neuqi()
