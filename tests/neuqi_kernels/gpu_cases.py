"""Cases of the GPU kernels, their data and their float64 reference, for the interpreter and for a real GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from neuqi_kernels import layout
from neuqi_kernels.gpu import launch
from neuqi_kernels.gpu.backend import TRITON
from neuqi_kernels.gpu.plan import Plan, Target, plan
from neuqi_kernels.spec import GemmSpec

# rel-L2 against float64 of the same stored numbers. A 16-bit result is off by up to half a unit in the last place,
# 2^-11 (fp16) or 2^-8 (bf16), 2^-11/√3 = 2.8e-4 and 2.3e-3 root mean square at worst; prefill also rounds each weight
# once: together at most √2 of that, 4e-4 and 3.2e-3. Half as much again for the accumulation in float32.
TOLERANCE = {"float16": 6e-4, "bfloat16": 4.8e-3}


@dataclass(frozen=True)
class Case:
    """One product; ``kernel`` and ``split_k`` replace what the plan says, ``asm`` runs the PTX instead of its twin."""

    bits: int
    group_size: int
    m: int
    n: int
    k: int
    dtype: str = "float16"
    scale_dtype: str = "float16"
    bias: bool = True
    asm: bool = False
    kernel: str = ""
    split_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Layer:
    """The canonical tensors of a layer and its exact weights in float64."""

    spec: GemmSpec
    qweight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor


def make_layer(case: Case, device: str = "cpu") -> Layer:
    """Random codes and scales; zero-points are real and partly lie outside the code range."""
    generator = torch.Generator().manual_seed(case.seed)
    levels = 1 << case.bits
    spec = GemmSpec(
        case.n,
        case.k,
        case.bits,
        case.group_size,
        device,
        getattr(torch, case.dtype),
        getattr(torch, case.scale_dtype),
    )
    codes = torch.randint(0, levels, (case.n, case.k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(case.n, spec.groups, generator=generator) * 0.02 + 0.002).to(spec.scale_dtype)
    zero = ((torch.rand(case.n, spec.groups, generator=generator) * 1.4 - 0.2) * (levels - 1)).to(
        spec.scale_dtype
    )
    scale[0] = 0.0
    grouped = codes.double().view(case.n, spec.groups, spec.group)
    weight = ((grouped - zero.double().unsqueeze(-1)) * scale.double().unsqueeze(-1)).view(case.n, case.k)
    bias = torch.randn(case.n, generator=generator).to(spec.dtype) if case.bias else None
    qweight = layout.pack(codes, case.bits)
    return Layer(spec, qweight, scale, zero, bias, weight)


def make_tokens(case: Case) -> torch.Tensor:
    """Random activations ``[m, k]`` in the dtype of the case; up to 64 tokens the first are the same for every m."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(max(case.m, 64), case.k, generator=generator)
    return x[: case.m].to(getattr(torch, case.dtype))


def chosen_plan(case: Case, target: Target) -> Plan:
    """The plan of the case's shape, with what the case replaces."""
    chosen = plan(target, case.bits, max(case.group_size, 0), case.n, case.k, case.m)
    if case.kernel and case.kernel != chosen.kernel:
        tiles = {"prefill_mm": (64, 128, 4), "decode_mm": (8, 64, 2), "dequant": (0, 64, 4)}[case.kernel]
        chosen = Plan(case.kernel, *tiles, stages=2)
    return replace(chosen, split_k=case.split_k) if case.split_k else chosen


def multiply(case: Case, layer: Layer, x: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the case's kernel; return the product and the counters that it must have set back to zero."""
    device = x.device
    words, pairs, counters = TRITON.prepare(
        layer.qweight.to(device), layer.scale.to(device), layer.zero.to(device), layer.spec
    )
    bias = None if layer.bias is None else layer.bias.to(device)
    group = 0 if layer.spec.groups == 1 else case.group_size
    y = launch.gemm(
        chosen_plan(case, target), target, x, words, pairs, counters, bias, case.n, case.bits, group
    )
    return y, counters


def exact(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    y = x.cpu().double() @ layer.weight.t()
    return y if layer.bias is None else y + layer.bias.double()


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """``‖y − reference‖ / ‖reference‖``, NaN where a single element is."""
    return float((y.cpu().double() - reference).norm() / reference.norm())
