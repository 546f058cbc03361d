"""A process that runs the GPU quantizer in Triton's interpreter, as gpu_interpreter.py does for the products.

A case per line in, its result per line out, both JSON: how the losses compare with the torch twin's, and whether the
codes are those of the stored parameters.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import gpu_interpreter
import torch

from neuqi_kernels import layout
from neuqi_serve.config import WeightSpec
from neuqi_serve.quant.affine import AffineParams, QuantizedWeight, dequantize, quantize
from neuqi_serve.quant.presets import search_plan
from neuqi_serve.quant.quantize import quantize_in_torch
from neuqi_serve.quant.storage import normalized_importance, storage_dtype


def make_weight(request: dict[str, Any]) -> torch.Tensor:
    """Heavy-tailed rows, or one of the special kinds."""
    generator = torch.Generator().manual_seed(request.get("seed", 0))
    shape = (request["rows"], request["columns"])
    chi = torch.randn((4, *shape), generator=generator).square().sum(0)
    weight = torch.randn(shape, generator=generator) * (4.0 / chi).sqrt()
    kind = request.get("kind", "")
    if kind == "far":
        weight = 5 + 0.001 * weight
    elif kind == "constant":
        weight = torch.tensor([3.0, -0.02, 0.0, 1e-3]).repeat(shape[0])[: shape[0], None].repeat(1, shape[1])
    elif kind == "broken":
        weight[1, 5] = float("nan")
    return weight.to(getattr(torch, request.get("dtype", "float32")))


def losses(weight: torch.Tensor, found: QuantizedWeight, mass: torch.Tensor | None) -> torch.Tensor:
    error = (dequantize(found).double() - weight.double()).square()
    error *= 1.0 if mass is None else mass.double()
    return error.view(*found.scale.shape, -1).sum(-1)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize as the request says, by the kernel and by its twin."""
    from neuqi_kernels.gpu import quantize_launch

    weight = make_weight(request)
    spec = WeightSpec(request["bits"], request["group_size"], request.get("storage", "float16"))
    columns = weight.shape[1]
    count, mass = spec.groups(columns), None
    if request.get("weighted"):
        importance = torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 8
        mass = normalized_importance(importance.view(count, -1), -1).view(-1)
    preset = request.get("preset", "fast")
    plan = search_plan(preset, spec.bits, mass is not None)
    storage = storage_dtype(spec)
    assert quantize_launch.refuse(weight, spec.bits, columns // count, storage) is None
    packed = quantize_launch.quantize(weight, mass, spec.bits, columns // count, storage, plan)
    qweight, scale, zero, unusable = packed
    if unusable.item():
        return {"unusable": True}
    found = QuantizedWeight(layout.unpack(qweight, spec.bits), scale, zero)
    stored = quantize(weight, AffineParams(scale, zero), spec.bits)
    twin = quantize_in_torch(weight, spec, mass, preset)
    theirs = QuantizedWeight(layout.unpack(twin.qweight, spec.bits), twin.scale, twin.zero)
    ours, others = losses(weight, found, mass), losses(weight, theirs, mass)
    minmax = quantize_in_torch(weight, spec, mass, "minmax")
    plain = QuantizedWeight(layout.unpack(minmax.qweight, spec.bits), minmax.scale, minmax.zero)
    return {
        "unusable": False,
        "codes_are_of_the_stored_parameters": torch.equal(found.codes, stored),
        "mean_ratio": (ours / others).nan_to_num(1.0).mean().item(),
        "worse_than_minmax": int((ours > losses(weight, plain, mass) * (1 + 1e-5) + 1e-30).sum()),
        "exact": bool((ours == 0).all()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gpu_interpreter.install()
    gpu_interpreter.poison_empty()
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception:
            result = {"exception": traceback.format_exc()[-3000:]}
        print(json.dumps(result), flush=True)
