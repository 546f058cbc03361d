"""A process that compiles the GPU quantizer for GPUs that are not there, as gpu_compile.py does for the products.

A case per line in, a result per line out, both JSON: registers that spill, shared memory, traps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import gpu_compile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neuqi_kernels.gpu.quantize import quantize_groups
from neuqi_kernels.gpu.quantize_launch import constants
from neuqi_serve.quant.presets import search_plan

TYPES = {
    "weight_ptr": "*bf16",
    "mass_ptr": "*fp32",
    "qweight_ptr": "*i32",
    "scale_ptr": "*fp16",
    "zero_ptr": "*fp16",
    "unusable_ptr": "*i32",
    "tiny": "fp32",
    "largest": "fp32",
}


def compile_case(
    arch: str, bits: int, group: int, preset: str = "balanced", weighted: bool = False
) -> dict[str, Any]:
    """Compile the kernel as it would be started for bf16 weights, and describe the result."""
    target = gpu_compile.TARGETS[arch]
    options = constants(bits, group, weighted, search_plan(preset, bits, weighted))
    names = {parameter.name for parameter in quantize_groups.params if parameter.is_constexpr}
    assert names == options.keys() - {"num_warps"}
    signature = {
        name: "constexpr" if name in names else TYPES.get(name, "i32") for name in quantize_groups.arg_names
    }
    pointers = [
        (index,) for index, name in enumerate(quantize_groups.arg_names) if signature[name].startswith("*")
    ]
    source = ASTSource(
        fn=quantize_groups,
        signature=signature,
        constexprs={name: options[name] for name in names},
        attrs={index: [["tt.divisibility", 16]] for index in pointers},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", int(arch[3:]), 32), options={"num_warps": options["num_warps"]}
    )
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(folder / "cuobjdump"), "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "trap": "trap;" in compiled.asm["ptx"],
        "shared": compiled.metadata.shared,
        "shared_limit": target.shared_bytes,
        "usage": usage,
        "fused": compiled.asm["ptx"].count("fma.rn.f32"),
    }


if __name__ == "__main__":
    for request in sys.stdin:
        try:
            answer = compile_case(**json.loads(request))
        except Exception:
            answer = {"exception": traceback.format_exc()[-3000:]}
        print(json.dumps(answer), flush=True)
