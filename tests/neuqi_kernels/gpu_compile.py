"""A process that compiles the GPU kernels for GPUs that are not there, and counts what the compiler made of them.

A request per line in, a result per line out, both JSON. Triton brings the assembler and the disassembler.
``python gpu_compile.py --write`` measures the table of instructions per weight again, for the Triton that is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_gate import gate_cases, table_key
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neuqi_kernels.gpu import launch
from neuqi_kernels.gpu.decode import decode_mm
from neuqi_kernels.gpu.moe import moe_decode_mm, moe_prefill_mm
from neuqi_kernels.gpu.plan import Plan, Target, moe_plan, rule
from neuqi_kernels.gpu.planar import RUNS, tile_features
from neuqi_kernels.gpu.prefill import dequant, prefill_mm
from neuqi_kernels.gpu.repack import repack

KERNELS = {
    "decode_mm": decode_mm,
    "mid_mm": prefill_mm,
    "prefill_mm": prefill_mm,
    "dequant": dequant,
    "repack": repack,
    "moe_decode_mm": moe_decode_mm,
    "moe_prefill_mm": moe_prefill_mm,
}
POINTERS = {
    "words_ptr": "*i16",
    "pair_ptr": "*i32",
    "partial_ptr": "*fp32",
    "counter_ptr": "*i32",
    "stream_ptr": "*i32",
    "route_weight_ptr": "*fp32",
    "sorted_ids_ptr": "*i32",
    "expert_ids_ptr": "*i32",
    "padded_routes_ptr": "*i32",
}
ALIGNED = ("n", "k", "stream_words")
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
KIB = 1024
# What a program may use of the shared memory, and one GPU of each architecture: A100, RTX 3090, RTX 4090, H100,
# B200, RTX 5090, and AMD's MI300X.
TARGETS = {
    "sm_80": Target(80, 108, 163 * KIB),
    "sm_86": Target(86, 82, 99 * KIB),
    "sm_89": Target(89, 128, 99 * KIB),
    "sm_90": Target(90, 132, 227 * KIB),
    "sm_100": Target(100, 148, 227 * KIB),
    "sm_120": Target(120, 170, 99 * KIB),
    "gfx942": Target(0, 304, 64 * KIB, inline_asm=False, name="gfx942"),
}
TABLE = Path(__file__).resolve().with_name("gpu_instructions.json")


def planned(target: Target, bits: int, group: int, k: int, m: int, kernel: str) -> Plan:
    """The plan for ``m`` tokens, or for blocks of ``m`` tokens of one expert."""
    if kernel.startswith("moe_"):
        # Slabs of 8 in blocks of 16 are asked for by their own width.
        return moe_plan(target, bits, group, max(m, 16), few=m == 8)
    if kernel in ("dequant", "repack"):
        return Plan(kernel, warps=launch.REPACK_WARPS if kernel == "repack" else 4)
    chosen = rule(target, bits, group, 4096, k, m)
    assert kernel in ("", chosen.kernel)
    return chosen


def source_of(function: Any, options: dict[str, Any], dtype: str) -> ASTSource:
    """What Triton compiles for a call whose sizes and addresses are multiples of 16."""
    constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
    assert constants <= options.keys(), constants - options.keys()
    signature = {}
    attributes = {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, f"*{DTYPES[dtype]}")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            if argument in ALIGNED and argument not in function.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    values = {constant: options[constant] for constant in constants}
    return ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)


def compile_case(
    arch: str,
    bits: int,
    group: int = 128,
    m: int = 1,
    dtype: str = "bfloat16",
    k: int = 4096,
    kernel: str = "",
    tiles: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Compile what the plan says for a layer of 4096 output features, and describe the result."""
    target = TARGETS[arch]
    chosen = replace(planned(target, bits, group, k, m, kernel), **(tiles or {}))
    function = KERNELS[chosen.kernel]
    options = launch.constants(chosen, target, bits, group, k, torch.float16, True) | {
        "WEIGHTED": True,
        "BLOCK_SIZE": 16,
    }
    compiler = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    compiled = triton.compile(
        source_of(function, options, dtype), target=compiler, options={"num_warps": options["num_warps"]}
    )
    # A pass of the loop over K takes a whole tile apart, or one run of words; the kernels without a loop a tile.
    weights = chosen.block_n * tile_features(bits)
    if chosen.kernel.endswith(("mid_mm", "prefill_mm")):
        weights //= RUNS[bits]
    weights_per_thread = weights / (compiler.warp_size * chosen.warps)
    result = {
        "kernel": chosen.kernel,
        "shared": compiled.metadata.shared,
        "shared_limit": target.shared_bytes,
    }
    describe = describe_amd if compiler.backend == "hip" else describe_nvidia
    return result | describe(compiled, weights_per_thread)


def nvidia_loop(listing: str) -> tuple[Counter[str], Counter[str]]:
    """Operations of the longest loop, which is the one over K (all where there is no loop), and of the whole."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append((instruction[1].split(".")[0], instruction[2]))
    longest = slice(0)
    for index, (operation, operands) in enumerate(instructions):
        jump = re.search(r"\.L_x_\d+", operands) if operation == "BRA" else None
        start = labels.get(jump[0], index) if jump else index
        # A jump to itself is the end of the kernel.
        if start < index and index + 1 - start > longest.stop - (longest.start or 0):
            longest = slice(start, index + 1)
    operations = [operation for operation, _ in instructions]
    return Counter(operations[longest] or operations), Counter(operations)


def amd_loop(listing: str) -> Counter[str]:
    """The same of LLVM's assembly, whose comments say which loop a block belongs to, wherever it lies."""
    everything: Counter[str] = Counter()
    loops: dict[str, Counter[str]] = {}
    header = ""
    for line in listing.splitlines():
        block = re.match(r"(?:\.L|; %)([Bb]{2}\w*[_.]\d+):", line)
        instruction = re.match(r"\s+([vsdgb][a-z]*_[a-z0-9_]+)", line)
        if block:
            header = block[1] if "Loop Header: Depth=1" in line else ""
        if inside := re.search(r"in Loop: Header=(BB\w+)", line):
            header = inside[1]
        if instruction:
            everything[instruction[1]] += 1
            if header:
                loops.setdefault(header, Counter())[instruction[1]] += 1
    return max(loops.values(), key=Counter.total, default=everything)


def describe_nvidia(compiled: Any, weights: float) -> dict[str, Any]:
    """Count the instructions of the loop over K; ``weights``: of a thread in a pass of it."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(folder / "nvdisasm"), "-c", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loop, everywhere = nvidia_loop(listing)
    return {
        "trap": re.search(r"^\s*trap;", compiled.asm["ptx"], re.MULTILINE) is not None,
        "matrix": sorted(set(loop) & {"HMMA", "HGMMA", "UTCHMMA"}),
        "spills": everywhere["STL"] + everywhere["LDL"],
        "synchronous_loads": loop["LDG"] + loop["STS"],
        "instructions_per_weight": round(loop.total() / weights, 3),
    }


def describe_amd(compiled: Any, weights: float) -> dict[str, Any]:
    """The same of an AMD GPU's assembly."""
    text = compiled.asm["amdgcn"]
    loop = amd_loop(text)
    spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
    return {
        "trap": "s_trap" in text,
        "matrix": ["MFMA"] if any(operation.startswith("v_mfma") for operation in loop) else [],
        "spills": sum(map(int, spills)),
        "synchronous_loads": 0,
        "instructions_per_weight": round(loop.total() / weights, 3),
    }


def write_table() -> None:
    """Replace the installed Triton's entry of the table: a line for every case of the gate."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    lines: dict[str, dict[str, float]] = {}
    cases = gate_cases()
    with ProcessPoolExecutor() as pool:
        results = [pool.submit(compile_case, **case) for case in cases]
    for case, future in zip(cases, results, strict=True):
        result = future.result()
        lines.setdefault(case["arch"], {})[table_key(case)] = result["instructions_per_weight"]
        print(case, result, flush=True)
    table[triton.__version__] = lines
    partial = TABLE.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    os.replace(partial, TABLE)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_table()
        sys.exit()
    for request in sys.stdin:
        try:
            answer = compile_case(**json.loads(request)) | {"triton": triton.__version__}
        except Exception:
            answer = {"exception": traceback.format_exc()[-3000:]}
        print(json.dumps(answer), flush=True)
