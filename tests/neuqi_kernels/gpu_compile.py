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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neuqi_kernels.gpu import launch
from neuqi_kernels.gpu.decode import decode_mm
from neuqi_kernels.gpu.plan import Target, plan
from neuqi_kernels.gpu.planar import RUNS, tile_features
from neuqi_kernels.gpu.prefill import dequant, prefill_mm

KERNELS = {"decode_mm": decode_mm, "prefill_mm": prefill_mm, "dequant": dequant}
POINTERS = {"words_ptr": "*i16", "pair_ptr": "*i32", "partial_ptr": "*fp32", "counter_ptr": "*i32"}
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
    "gfx942": Target(0, 304, 64 * KIB, inline_asm=False),
}
TABLE = Path(__file__).resolve().with_name("gpu_instructions.json")


def compile_case(
    arch: str,
    bits: int,
    group: int = 128,
    m: int = 1,
    dtype: str = "bfloat16",
    k: int = 4096,
    kernel: str = "",
) -> dict[str, Any]:
    """Compile what the plan says for a layer of 4096 output features, and describe the result."""
    target = TARGETS[arch]
    chosen = plan(target, bits, group, 4096, k, m)
    name = kernel or chosen.kernel
    function = KERNELS[name]
    options = launch.constants(chosen, target, bits, group, k, torch.float16, True)
    constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
    assert constants <= options.keys() | {"BLOCK_N"}
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
            if argument in ("n", "k"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={constant: options[constant] for constant in constants},
        attrs=attributes,
    )
    compiler = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    compiled = triton.compile(source, target=compiler, options={"num_warps": options["num_warps"]})
    result = {"kernel": name, "shared": compiled.metadata.shared, "shared_limit": target.shared_bytes}
    if compiler.backend == "hip":
        text = compiled.asm["amdgcn"]
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        return result | {
            "matrix": text.count("v_mfma"),
            "spills": sum(map(int, spills)),
            "trap": "s_trap" in text,
        }
    weights = chosen.block_n * tile_features(bits)
    if name == "prefill_mm":
        weights //= RUNS[bits]
    return result | describe(compiled, weights / (32 * chosen.warps))


def describe(compiled: Any, weights: float) -> dict[str, Any]:
    """Count the instructions of the longest loop, which is the one over K; ``weights``: of a thread in a pass of it."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(folder / "nvdisasm"), "-c", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append((instruction[1], instruction[2]))
    loop: list[tuple[str, str]] = []
    for index, (operation, operands) in enumerate(instructions):
        jump = re.search(r"\.L_x_\d+", operands) if operation.startswith("BRA") else None
        if jump and labels.get(jump[0], index + 1) <= index and index - labels[jump[0]] >= len(loop):
            loop = instructions[labels[jump[0]] : index + 1]
    counts = Counter(operation.split(".")[0] for operation, _ in loop or instructions)
    return {
        "trap": re.search(r"^\s*trap;", compiled.asm["ptx"], re.MULTILINE) is not None,
        "matrix": counts["HMMA"] + counts["HGMMA"] + counts["UTCHMMA"],
        "tensor_memory": counts["UTCHMMA"],
        "spills": counts["STL"] + counts["LDL"],
        "synchronous_loads": counts["LDG"] + counts["STS"] if loop else 0,
        "instructions_per_weight": round(len(loop) / weights, 3),
    }


def measure_table() -> dict[str, dict[str, float]]:
    """Instructions per weight of ``decode_mm`` for one token, bf16, groups of 128: architecture, bits."""
    return {
        arch: {str(bits): compile_case(arch, bits)["instructions_per_weight"] for bits in (2, 3, 4, 8)}
        for arch in TARGETS
        if arch.startswith("sm_")
    }


def write_table() -> None:
    """Replace the installed Triton's entry of the table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = measure_table()
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
