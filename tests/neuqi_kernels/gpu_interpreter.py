"""A process that runs the GPU kernels in Triton's interpreter: a case per line in, its result per line out, both JSON.

The interpreter replaces ``triton.jit`` for the whole process when Triton is first imported, so it cannot share the
process of the other tests. Three things that the interpreter lacks are added here: bf16 constants and rounding to bf16
(it fails or truncates), bf16 products (it multiplies the bit patterns), and inline PTX (it refuses), for which the few
instructions of the kernels are evaluated from their own text.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def as_float64(handle: Any) -> np.ndarray:
    """The values of a 16-bit float tensor in float64."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


def to_bfloat16(values: np.ndarray) -> Any:
    """Round to nearest even, as every GPU does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return Handle(rounded.astype(np.uint16), tl.bfloat16)


def install() -> None:
    """Replace the functions of the builder."""
    original_cast = Builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return to_bfloat16(source.data)
        return original_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        # Sums of a few products of 16-bit floats are exact in float64, so that the order of adding does not show: a
        # column comes out the same whatever stands beside it, as in the matrix units. The sum is rounded to float32.
        total = as_float64(a) @ as_float64(b) + acc.data
        return Handle(total.astype(np.float32), acc.dtype.scalar)

    def arithmetic_refused(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16 and operation in (np.add, np.subtract, np.multiply, np.divide):
            raise NotImplementedError("bf16 arithmetic: the interpreter would compute with bit patterns")
        return original_binary(self, left, right, operation)

    def inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        words = np.ascontiguousarray(values[0].data).view(np.uint16)
        assert len(values) == 1
        assert pack == 2
        pairs = words.reshape(-1, 2).astype(np.uint32)
        result = run_ptx(text, pairs[:, 0] | pairs[:, 1] << np.uint32(16))
        halves = np.stack((result & np.uint32(0xFFFF), result >> np.uint32(16)), axis=1).astype(np.uint16)
        kind = types[0].scalar
        handle = Handle(halves.reshape(words.shape).view(interpreter._get_np_dtype(kind)), kind)
        return SimpleNamespace(get_result=lambda index: handle)

    original_binary = Builder.binary_op
    # The lambdas of the builder look these up on the class at each call.
    Builder.cast_impl = cast
    Builder.binary_op = arithmetic_refused
    Builder.create_dot = dot
    Builder.get_bf16 = lambda self, value: to_bfloat16(np.array([value]))
    Builder.create_inline_asm = inline_asm


def run_ptx(text: str, source: np.ndarray) -> np.ndarray:
    """Evaluate a block of ``mov``, ``shr`` and ``lop3`` on 32-bit registers, ``$1`` in, ``$0`` out."""
    registers: dict[str, Any] = {"$1": source}

    def operand(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in text.strip("{} ").split(";"):
        match = re.match(r"\s*(\S+)\s+(.*)", statement)
        if match is None or match[1] == ".reg":
            continue
        target, *names = (name.strip() for name in match[2].split(","))
        if match[1] == "lop3.b32":
            a, b, c = (operand(name) for name in names[:3])
            registers[target] = lop3(a, b, c, int(names[3], 0))
        elif match[1] == "shr.u32":
            registers[target] = operand(names[0]) >> operand(names[1])
        elif match[1] == "mov.b32":
            registers[target] = operand(names[0])
        else:
            raise NotImplementedError(f"PTX instruction {match[1]!r} in {text!r}")
    return registers["$0"]


def lop3(a: Any, b: Any, c: Any, table: int) -> np.ndarray:
    """The three-input logic operation: bit ``4a + 2b + c`` of the table, for every bit."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def poison_empty() -> None:
    """Fill what ``torch.empty`` returns with NaN, so that nothing that is not written can pass for a result."""
    allocate = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    torch.empty = poisoned


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for: its ``task`` is a function of this module, a product without one."""
    return globals()[request.pop("task", "product")](request)


def product(request: dict[str, Any]) -> dict[str, Any]:
    """Run a case; the result says how far off it is and whether it left its counters at zero."""
    import gpu_cases as cases

    from neuqi_kernels.gpu import launch
    from neuqi_kernels.gpu.plan import target_of

    request_again = request.pop("repeat", False)
    launch._PARTIAL_ELEMENTS = request.pop("partial_elements", 1 << 25)
    case = cases.Case(**request)
    target = replace(target_of(torch.device("cpu")), inline_asm=case.asm)
    layer = cases.make_layer(case)
    x = cases.make_tokens(case)
    y, counters = cases.multiply(case, layer, x, target)
    result = {
        "kernel": cases.chosen_plan(case, target).kernel,
        "error": cases.relative_error(y, cases.exact(layer, x)),
        "counters_zero": not counters.any().item(),
    }
    if request_again:
        again, _ = cases.multiply(case, layer, x, target)
        few, _ = cases.multiply(replace(case, m=5), layer, x[:5], target)
        result["same_bits_again"] = torch.equal(y.view(torch.int16), again.view(torch.int16))
        result["same_bits_among_few"] = torch.equal(y[:5].view(torch.int16), few.view(torch.int16))
    return result


def experts(request: dict[str, Any]) -> dict[str, Any]:
    """Run a case of experts."""
    import gpu_cases as cases

    y, expected = cases.moe_multiply(cases.MoeCase(**request))
    return {"error": cases.relative_error(y, expected)}


def layer_of_experts(request: dict[str, Any]) -> dict[str, Any]:
    """Run whole layers of experts, warm up for one; return how far off they are, and the plans that were warmed up."""
    from neuqi_kernels import experts_reference, layout, moe_reference
    from neuqi_kernels.experts import ExpertsSpec
    from neuqi_kernels.gpu import grouped_experts, moe_launch, moe_warm_up
    from neuqi_kernels.gpu.moe_backend import TRITON_MOE
    from neuqi_kernels.spec import GemmSpec

    count, hidden, intermediate, bits, group = (
        request[name] for name in ("experts", "hidden", "intermediate", "bits", "group_size")
    )
    specs = [
        GemmSpec(n, k, width, group, "cpu", torch.bfloat16)
        for (n, k), width in zip(((2 * intermediate, hidden), (hidden, intermediate)), bits, strict=True)
    ]
    spec = ExpertsSpec(count, specs[0], specs[1], "silu")
    torch.manual_seed(0)
    canonical, prepared = [], []
    for one in specs:
        codes = torch.randint(0, 1 << one.bits, (count * one.n, one.k), dtype=torch.uint8)
        scale = ((torch.rand(count, one.n, one.groups) + 0.5) * 0.3 / (1 << one.bits)).half()
        zero = (torch.rand(count, one.n, one.groups) * (1 << one.bits)).half()
        canonical.append((layout.pack(codes, one.bits).view(count, one.n, -1), scale, zero))
        prepared.append(TRITON_MOE.prepare(*canonical[-1], one))

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, elsewhere: Any = None) -> torch.Tensor:
        def align(topk_ids: torch.Tensor, block: int) -> Any:
            return moe_reference.align_routes(topk_ids, count, block, elsewhere)

        def activate(into: torch.Tensor, pairs: torch.Tensor) -> None:
            into.copy_(experts_reference.ACTIVATIONS["silu"](pairs.float()))

        return grouped_experts.run(TRITON_MOE, spec, x, *prepared, weights, ids, align, activate)

    def error(tokens: int, top_k: int, absent: int | None) -> float:
        x = torch.randn(tokens, hidden).bfloat16()
        weights, ids = torch.rand(tokens, count).topk(top_k)
        mapped = torch.arange(count)
        if absent is not None:
            mapped[absent] = -1
        y = run(x, weights, ids.to(torch.int32), mapped)
        options = (bits[0], group, bits[1], group, "silu")
        expected = experts_reference.experts(x, *canonical, None, None, weights, mapped[ids], *options)
        return float((y.double() - expected.double()).abs().max() / expected.double().abs().max())

    ran: list[str] = []
    launch = moe_launch.moe_gemm

    def noting(chosen: Any, *tensors: Any) -> torch.Tensor:
        ran.append(f"{chosen.kernel} {chosen.block_m}")
        return launch(chosen, *tensors)

    errors = [error(**case) for case in request["cases"]]
    moe_launch.moe_gemm = noting
    moe_warm_up.MOST_TOKENS = request["most_tokens"]
    try:
        for _ in range(2):
            moe_warm_up.warm_up_experts(run, spec, 2, torch.device("cpu"))
    finally:
        moe_launch.moe_gemm = launch
    return {"errors": errors, "warmed": ran}


def repack(request: dict[str, Any]) -> dict[str, Any]:
    """Repack random words, of several experts where ``experts`` is above 0, with the kernel and with its slow twin."""
    from neuqi_kernels import layout
    from neuqi_kernels.gpu import launch, planar

    n, k, bits, count = (request[name] for name in ("n", "k", "bits", "experts"))
    shape = (count, n) if count else (n,)
    codes = torch.randint(0, 1 << bits, (max(1, count) * n, k), dtype=torch.uint8)
    qweight = layout.pack(codes, bits).view(*shape, -1)
    words = launch.to_planar(qweight, bits)
    return {"equal": torch.equal(words, planar.to_planar(qweight, bits)), "shape": list(words.shape)}


def tune(request: dict[str, Any]) -> dict[str, Any]:
    """Tune a layer with a timer that prefers many stages, then few parts of K; return the table and what was said.

    ``broken``: plans of four stages, the fastest, give a product that is off.
    """
    import tempfile

    from neuqi_kernels.gpu import launch, tuning_table
    from neuqi_kernels.gpu import tune as tuner

    multiply = launch.gemm

    def off(chosen: Any, *tensors: Any) -> torch.Tensor:
        y = multiply(chosen, *tensors)
        return y * 1.01 if chosen.stages == 4 else y

    def timer(contenders: Any) -> dict[Any, float]:
        return {
            plan: (10.0 - plan.stages + 0.1 * plan.split_k if plan.kernel != "dequant" else 100.0)
            for plan in contenders
        }

    log: list[str] = []
    shape = tuner.Shape(*(request[name] for name in ("bits", "group_size", "n", "k")))
    device = torch.device("cpu")
    launch.gemm = off if request["broken"] else multiply
    try:
        entries = tuner.tune([shape], request["tokens"], timer, device, rotated_bytes=1, report=log.append)
    finally:
        launch.gemm = multiply
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interpreter.json"
        tuning_table.write(path, "interpreter", tuner.provenance(device, entries))
        return {"table": json.loads(path.read_text()), "log": log}


def warm_up(request: dict[str, Any]) -> dict[str, Any]:
    """Warm up layers one after the other; return the kernels and tokens that ran for each."""
    import gpu_cases as cases

    from neuqi_kernels.gpu import launch
    from neuqi_kernels.gpu.backend import TRITON

    multiply = launch.gemm
    ran: list[Any] = []

    def noting(chosen: Any, target: Any, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
        ran.append([chosen.kernel, chosen.block_m, x.shape[0], tensors[3] is not None])
        return multiply(chosen, target, x, *tensors)

    launch.gemm = noting
    try:
        steps = []
        for fields in request["layers"]:
            layer = cases.make_layer(cases.Case(m=1, **fields))
            prepared = TRITON.prepare(layer.qweight, layer.scale, layer.zero, layer.spec)
            TRITON.warm_up(prepared, layer.spec, layer.bias is not None)
            steps.append(list(ran))
            ran.clear()
    finally:
        launch.gemm = multiply
    return {"steps": steps}


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    poison_empty()
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception:
            result = {"exception": traceback.format_exc()[-3000:]}
        print(json.dumps(result), flush=True)
