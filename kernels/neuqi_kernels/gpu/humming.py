"""Humming's CUDA kernels behind the dispatch contract: an optional second kernel for NVIDIA GPUs.

Humming (https://github.com/vllm-project/humming, the package ``humming-kernels``) compiles a kernel per layer shape
with NVRTC and knows real zero-points. Its checkpoint layout is the canonical one: the same dense stream of codes, and
``(q − zero)·scale``. What it multiplies with is that layout reordered by its own functions, with scale and
zero-point in the dtype of the activations.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from neuqi_kernels.backend import Prepared
from neuqi_kernels.env import batch_invariant, forced_backend
from neuqi_kernels.gpu.preference import preferred_backend
from neuqi_kernels.spec import GemmSpec

PACKAGE = "humming-kernels"
_BITS = (2, 3, 4)
_HALF_DTYPES = (torch.float16, torch.bfloat16)
_MIN_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}
# Rows and columns are filled up with zeros to what every tile of its tables divides, as vLLM does; the filling itself
# has to be a multiple of eight.
_PAD_N, _PAD_K = 256, 128
_ALIGNMENT = 8
# Programs that share a sum wait for each other at these counters, which are zero between calls.
_LOCKS = 2048
# Rows of the identity that are multiplied at a time to read the weights back.
_IDENTITY_ROWS = 1024


class HummingBackend:
    """The kernels of ``humming-kernels``, where a measured table prefers them or the environment forces them.

    The slow twin is ``reference.gemm``, with scale and zero-point rounded to the dtype of the activations.
    """

    name = "humming"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Return why this backend does not run the layer, or None when it does."""
        return self.refuse_to_run(spec) or _refuse_choice(spec) or _refuse_package()

    def refuse_to_run(self, spec: GemmSpec) -> str | None:
        """Return why this backend cannot run the layer, whatever any table prefers, or None when it can."""
        if spec.device_type != "cuda":
            return f"runs on CUDA GPUs, the weights are on {spec.device_type}"
        return _refuse_layer(spec) or _refuse_machine(spec.dtype)

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return Humming's words, scale and zero-point, and its counters.

        Words int32 ``[K/16, N·bits/2]``, scale and zero-point ``[2, G, N]`` in ``spec.dtype``, counters int32 zeros;
        N and K filled up. The counters belong to one product at a time: a layer may not run in two streams at once.

        Raises:
            ValueError: the layer is not one that Humming's kernels take.
        """
        reason = _refuse_layer(spec)
        if reason:
            raise ValueError(
                f"expected a layer that the humming backend takes, got {spec}: {reason}. Choose with dispatch.choose."
            )
        from humming.transform import transform_humming_tensors

        tensors = {
            "weight": qweight.contiguous(),
            "weight_scale": scale.to(spec.dtype),
            "zero_point": zero.to(spec.dtype),
        }
        moved = transform_humming_tensors(self.config(spec, qweight.device), tensors)
        pair = torch.stack((moved["weight_scale"], moved["zero_point"]))
        locks = torch.zeros(_LOCKS, dtype=torch.int32, device=qweight.device)
        return moved["weight"], pair, locks

    def gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``x·Ŵᵀ + bias``; ``qweight, scale, zero`` are the words, pairs and counters of ``prepare``."""
        k = x.shape[-1]
        tokens = x.reshape(-1, k).contiguous()
        if tokens.shape[0] == 0:
            return x.new_empty(*x.shape[:-1], n)
        config = layer_config(n, k, bits, _group(group_size, k), x.dtype, _capability(x.device))
        y = self.product(config, tokens, qweight, scale, zero)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], n)

    def config(self, spec: GemmSpec, device: torch.device) -> Any:
        """Return Humming's ``LayerConfig`` of the layer on the GPU behind ``device``."""
        group = _group(spec.group_size, spec.k)
        return layer_config(spec.n, spec.k, spec.bits, group, spec.dtype, _capability(device))

    def product(
        self,
        config: Any,
        x: torch.Tensor,
        words: torch.Tensor,
        pair: torch.Tensor,
        locks: torch.Tensor,
        tuning: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Return ``x [M, K]·Ŵᵀ`` as ``[M, N]``; without ``tuning`` by Humming's own table for all M."""
        from humming.forward import humming_forward

        y: torch.Tensor = humming_forward(
            config,
            x,
            words,
            weight_scale=pair[0],
            zero_point=pair[1],
            locks=locks,
            compute_config={"use_batch_invariant": batch_invariant()},
            tuning_config=tuning,
        )
        return y

    def warm_up(self, prepared: Prepared, spec: GemmSpec, has_bias: bool) -> None:
        """Compile the kernels of the layer: at its first product Humming makes those for all numbers of tokens.

        That takes long, once per shape: the next start finds them on the disk.
        """
        x = torch.zeros(1, spec.k, dtype=spec.dtype, device=prepared[0].device)
        self.gemm(x, *prepared, None, spec.n, spec.bits, spec.group_size)

    def dequantize(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> torch.Tensor:
        """Return ``Ŵ [N, K]`` in float32, read back as the product with the identity: rounded to ``spec.dtype``."""
        weight = torch.empty(spec.n, spec.k, dtype=torch.float32, device=qweight.device)
        for start in range(0, spec.k, _IDENTITY_ROWS):
            rows = min(_IDENTITY_ROWS, spec.k - start)
            x = torch.zeros(rows, spec.k, dtype=spec.dtype, device=qweight.device)
            x[torch.arange(rows), torch.arange(start, start + rows)] = 1
            product = self.gemm(x, qweight, scale, zero, None, spec.n, spec.bits, spec.group_size)
            weight[:, start : start + rows] = product.t()
        return weight


@functools.cache
def layer_config(n: int, k: int, bits: int, group: int, dtype: torch.dtype, capability: int) -> Any:
    """Return Humming's description of a layer on a GPU of ``capability`` (90: sm_90); ``group`` 0 is the whole row."""
    from humming import dtypes
    from humming.config import LayerConfig

    half = dtypes.DataType.from_torch_dtype(dtype)
    pad_n, pad_k = -n % _PAD_N, -k % _PAD_K
    return LayerConfig(
        sm_version=capability,
        shape_n=n + pad_n,
        shape_k=k + pad_k,
        pad_shape_n=pad_n,
        pad_shape_k=pad_k,
        a_dtype=half,
        b_dtype=dtypes.DataType.from_str(f"uint{bits}"),
        c_dtype=half,
        bs_dtype=half,
        weight_scale_group_size=group,
        has_zero_point=True,
        is_fp_zero_point=True,
    )


def _group(group_size: int, k: int) -> int:
    return 0 if group_size in (-1, k) else group_size


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _refuse_layer(spec: GemmSpec) -> str | None:
    if spec.dtype not in _HALF_DTYPES:
        return f"computes in float16 or bfloat16, the activations are {spec.dtype}"
    if spec.bits not in _BITS:
        return f"is used for {_BITS} bits, the layer has {spec.bits}"
    if spec.n % _ALIGNMENT or spec.k % 32:
        return f"needs output features in eights and rows in blocks of 32, the layer is {spec.n} by {spec.k}"
    group = _group(spec.group_size, spec.k)
    if group and (group < 32 or group & (group - 1)):
        return f"needs groups of a power of two from 32 on, the group size is {group}"
    return None


def _refuse_machine(dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("humming") is None:
        return f"needs {PACKAGE}, which is not installed: pip install {PACKAGE}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "needs an NVIDIA GPU, torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY[dtype]:
        least = ".".join(map(str, _MIN_CAPABILITY[dtype]))
        return f"needs compute capability {least} for {dtype}, the GPU has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _refuse_package() -> str | None:
    """Why the package does not work. Asked last: importing it starts a compiler in the background."""
    try:
        importlib.import_module("humming.forward")
    except (ImportError, OSError, RuntimeError) as error:
        return f"needs {PACKAGE}, which does not import: {type(error).__name__}: {error}"
    return None


def _refuse_choice(spec: GemmSpec) -> str | None:
    """Why the layer goes to another backend although Humming could run it."""
    if forced_backend() == HUMMING.name:
        return None
    if preferred_backend(spec) != HUMMING.name:
        return "no measured table prefers it here; NEUQI_KERNEL_BACKEND=humming takes it"
    if spec.scale_dtype != spec.dtype:
        # Speed is no reason to change the weights: that is for the user to say.
        return (
            f"stores scale and zero-point as {spec.dtype}, the layer has them as {spec.scale_dtype}; "
            "NEUQI_KERNEL_BACKEND=humming accepts the rounding"
        )
    return None


HUMMING = HummingBackend()
