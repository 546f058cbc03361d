"""Run vLLM's two Triton kernels in Triton's interpreter on weights that gpu_peers prepared; print the rel-L2 of each.

A process of its own: the interpreter is chosen before Triton is imported, and vLLM turns Triton off where it sees no
GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
import triton
import triton.language as tl
import vllm.triton_utils
import vllm.utils.torch_utils
from gpu_peers import awq_triton, triton_w4a16
from gpu_peers.layer import Case, Layer
from vllm.model_executor.kernels.linear.mixed_precision import triton_w4a16 as w4a16_kernel
from vllm.model_executor.layers.quantization import awq_triton as awq_kernel

# On a machine without a GPU vLLM's modules see placeholders: give them the real Triton and load the kernels again.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
# The first loading registered the operator already.
vllm.utils.torch_utils.direct_register_custom_op = lambda **_: None
importlib.reload(w4a16_kernel)
importlib.reload(awq_kernel)

TOKENS = 3


def main() -> None:
    case = Case(64, 128, 4, 64)
    layer = Layer.random(case, "cpu").with_integer_zeros()
    # float16: the interpreter's bf16 is wrong.
    x = torch.randn(TOKENS, case.k, generator=torch.Generator().manual_seed(0)).half()
    words, scales, zeros = triton_w4a16.prepare(layer)
    y = w4a16_kernel._triton_w4a16_gemm_impl(x, words, scales.half(), zeros, layer.group, 0)
    print("w4a16", layer.error(y, x))
    y = awq_kernel.awq_gemm_triton(x, *awq_triton.prepare(layer), 1)
    print("awq", layer.error(y, x))


if __name__ == "__main__":
    main()
