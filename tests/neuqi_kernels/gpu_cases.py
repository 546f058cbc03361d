"""Cases of the GPU kernels, their data and their float64 reference, for the interpreter and for a real GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from neuqi_kernels import layout, moe_reference
from neuqi_kernels.gpu import launch
from neuqi_kernels.gpu.backend import TRITON
from neuqi_kernels.gpu.moe_backend import TRITON_MOE
from neuqi_kernels.gpu.plan import Plan, Target, plan
from neuqi_kernels.spec import GemmSpec

# rel-L2 against float64 of the same stored numbers. A 16-bit result is off by up to half a unit in the last place,
# 2^-11 (fp16) or 2^-8 (bf16), 2^-11/√3 = 2.8e-4 and 2.3e-3 root mean square at worst; prefill also rounds each weight
# once: together at most √2 of that, 4e-4 and 3.2e-3. A quarter to a half as much again for the accumulation in float32.
TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3}


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
    invariant: bool = False
    seed: int = 0


@dataclass(frozen=True)
class MoeCase:
    """The products of a mixture of experts.

    ``absent``: an expert that lives on another rank, ``idle``: one to which the router sends nothing.
    """

    bits: int
    group_size: int
    tokens: int
    n: int
    k: int
    dtype: str = "float16"
    experts: int = 4
    top_k: int = 2
    block_size: int = 16
    bias: bool = False
    weighted: bool = False
    absent: int = -1
    idle: int = 1
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
    group = max(case.group_size, 0)
    chosen = plan(target, case.bits, group, case.n, case.k, case.m, batch_invariant=case.invariant)
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


def moe_experts(case: MoeCase) -> list[Layer]:
    """The experts, each a random layer of its own."""
    one = Case(case.bits, case.group_size, 1, case.n, case.k, case.dtype, bias=case.bias)
    return [make_layer(replace(one, seed=case.seed + 100 * expert)) for expert in range(case.experts)]


def moe_routes(case: MoeCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for every token, never the idle one, and the router's weights: ``[tokens, top_k]`` each."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    likes = torch.rand(case.tokens, case.experts, generator=generator)
    if 0 <= case.idle < case.experts:
        likes[:, case.idle] = -1.0
    return likes.topk(case.top_k).indices.to(torch.int32), torch.rand(
        case.tokens, case.top_k, generator=generator
    )


def moe_multiply(case: MoeCase, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Run the case through the backend; return the product and the exact one in float64."""
    layers = moe_experts(case)
    topk_ids, topk_weights = moe_routes(case)
    x = make_tokens(Case(case.bits, case.group_size, case.tokens, case.n, case.k, case.dtype, seed=case.seed))
    expert_map = torch.arange(case.experts)
    expert_map[case.absent if case.absent >= 0 else slice(0)] = -1
    aligned = moe_reference.align_routes(topk_ids, case.experts, case.block_size, expert_map)
    # Beyond what counts, vLLM's buffers hold whatever was there before.
    aligned = (
        torch.cat((aligned[0], torch.full((case.block_size,), 12345, dtype=torch.int32))),
        torch.cat((aligned[1], torch.tensor([99], dtype=torch.int32))),
        aligned[2],
    )
    tensors = [
        torch.stack([getattr(layer, name) for layer in layers]).to(device)
        for name in ("qweight", "scale", "zero")
    ]
    bias = torch.stack([layer.bias for layer in layers]).to(device) if case.bias else None
    y = TRITON_MOE.moe_gemm(
        x.to(device),
        *TRITON_MOE.prepare(*tensors, layers[0].spec),
        bias,
        topk_weights.flatten().to(device) if case.weighted else None,
        *(tensor.to(device) for tensor in aligned),
        case.n,
        case.top_k,
        case.block_size,
        case.bits,
        case.group_size,
    )
    expected = torch.stack(
        [
            exact(layers[expert], x[token : token + 1])[0] * float(expert_map[expert] >= 0)
            for token in range(case.tokens)
            for expert in topk_ids[token].tolist()
        ]
    )
    if case.weighted:
        expected = expected * topk_weights.double().view(-1, 1)
    return y, expected
