"""llama.cpp's K-quants, by its own quantizer (``ggml_quantize_chunk`` of the library in ``llama-cpp-python``).

A K-quant divides a row into super-blocks of 256 weights. ``llama-quantize`` gives a row that is no multiple
of 256 another type; here such a matrix is quantized over 256 consecutive weights of its row-major order instead, the
same arithmetic on a super-block that reaches into the next row. Every layer gets the named type, without the mixture
of types of the files of this name, so that bytes compare.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUPER_BLOCK = 256
# Name → bits of our codes that it is compared at.
K_QUANTS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4}


def refusal() -> str | None:
    """Why it cannot run here, None if it can."""
    try:
        import gguf  # noqa: F401

        _library()
    except (ImportError, OSError) as error:
        return (
            f"llama-cpp-python or gguf is missing ({error}): pip install --no-deps -r requirements/peers.txt"
        )
    return None


def bits_per_weight(kind: str) -> float:
    """Stored bits per weight, scales and minima included."""
    import gguf

    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * nbytes / weights


def quantized(kind: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """De-quantized float32 ``[N, K]`` of a weight ``[N, K]``; ``importance`` ``[K]`` is llama.cpp's importance matrix.

    Raises:
        ValueError: the matrix is no whole number of super-blocks.
    """
    import gguf

    if weight.numel() % SUPER_BLOCK:
        raise ValueError(f"expected a multiple of {SUPER_BLOCK} weights, got {list(weight.shape)}.")
    values = np.ascontiguousarray(weight.float().numpy().reshape(-1, SUPER_BLOCK))
    type_ = gguf.GGMLQuantizationType[kind]
    _, nbytes = gguf.GGML_QUANT_SIZES[type_]
    packed = np.empty((len(values), nbytes), dtype=np.uint8)
    rows = None if importance is None else importance.float().expand(weight.shape).reshape(-1, SUPER_BLOCK)
    for start in range(0, len(values), len(values) if rows is None else 1):
        # With an importance a row of the library's must be 256 weights long, since rows of ours differ within it.
        count = len(values) if rows is None else 1
        mass = None if rows is None else np.ascontiguousarray(rows[start].numpy())
        _library().ggml_quantize_chunk(
            int(type_), _floats(values[start:]), packed[start:].ctypes.data_as(ctypes.c_void_p), 0, count,
            SUPER_BLOCK, None if mass is None else _floats(mass),
        )  # fmt: skip
    found = gguf.quants.dequantize(packed, type_)
    return torch.from_numpy(np.array(found, dtype=np.float32)).view(weight.shape)


def _library() -> ctypes.CDLL:
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]  # fmt: skip
    return library


def _floats(values: np.ndarray) -> ctypes.c_void_p:
    return values.ctypes.data_as(ctypes.c_void_p)
