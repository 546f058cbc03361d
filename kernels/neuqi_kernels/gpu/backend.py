"""The Triton kernels behind the dispatch contract."""

from __future__ import annotations

import importlib.util

import torch

from neuqi_kernels import reference
from neuqi_kernels.backend import Prepared
from neuqi_kernels.env import batch_invariant
from neuqi_kernels.gpu import planar
from neuqi_kernels.gpu.plan import SPLIT_TOKEN_BLOCKS, plan, target_of
from neuqi_kernels.spec import GemmSpec

_MIN_CAPABILITY = (8, 0)
_HALF_DTYPES = (torch.float16, torch.bfloat16)


class TritonBackend:
    """Fused de-quantization and product on CUDA GPUs from sm_80 on; the slow twin is ``reference.gemm``."""

    name = "triton"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Return why this backend cannot run the layer, or None when it can."""
        if spec.device_type != "cuda":
            return f"runs on CUDA GPUs, the weights are on {spec.device_type}"
        return _refuse_layer(spec) or _refuse_machine()

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return planar words, fused scale and zero-point pairs, and the counters of split products.

        Words ``int16 [row tiles, K tiles, runs, 64, 32]``, pairs ``[G, N, 2]`` filled up to whole tiles in the scale's
        dtype, counters ``int32`` zeros. The counters belong to one product at a time: a layer may not run in two
        streams at once.

        Raises:
            ValueError: the layer is not one that the kernels take.
        """
        self.check_layer(scale, zero, spec)
        words = pack_words(qweight, spec.bits)
        pairs = planar.fuse_scale_zero(scale, zero, spec.bits, spec.group, spec.groups)
        counters = torch.zeros(SPLIT_TOKEN_BLOCKS * words.shape[0], dtype=torch.int32, device=qweight.device)
        return words, pairs, counters

    def check_layer(self, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec) -> None:
        """Raise where the kernels do not take the layer, or its scales are not of the dtype that ``spec`` says."""
        reason = _refuse_layer(spec)
        if reason or scale.dtype != spec.scale_dtype or zero.dtype != spec.scale_dtype:
            raise ValueError(
                f"expected a layer that the triton backend takes, got {spec} with scale {scale.dtype} and zero "
                f"{zero.dtype}: {reason or 'the dtypes differ from the specification'}. Choose with dispatch.choose."
            )

    def warm_up(self, prepared: Prepared, spec: GemmSpec, has_bias: bool) -> None:
        """Compile every kernel that ``gemm`` can plan for such a layer, by running each once; see ``gpu.warm_up``."""
        from neuqi_kernels.gpu.warm_up import warm_up

        warm_up(self.gemm, prepared, spec, has_bias)

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
        from neuqi_kernels.gpu import launch

        k = x.shape[-1]
        tokens = x.reshape(-1, k).contiguous()
        m = tokens.shape[0]
        if m == 0:
            return x.new_empty(*x.shape[:-1], n)
        target = target_of(x.device)
        group = 0 if group_size in (-1, k) else group_size
        chosen = plan(target, bits, group, n, k, m, batch_invariant())
        y = launch.gemm(chosen, target, tokens, qweight, scale, zero, bias, n, bits, group)
        return y.view(*x.shape[:-1], n)

    def embedding(
        self,
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        n: int,
        k: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the rows ``ids [...]`` of ``Ŵ`` as ``[..., k]``: a gather in torch, then the reference."""
        rows = ids.reshape(-1)
        codes = planar.rows_from_planar(qweight, rows, k, bits)
        group = k if group_size == -1 else group_size
        pairs = scale[: k // group, rows].permute(2, 1, 0)
        weight = reference.dequantize(codes, pairs[0], pairs[1], bits, group_size, dtype)
        return weight.view(*ids.shape, k)

    def dequantize(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> torch.Tensor:
        """Return ``Ŵ [N, K]`` in float32, from prepared tensors."""
        canonical = planar.from_planar(qweight, spec.n, spec.k, spec.bits)
        pair = planar.split_scale_zero(scale, spec.n, spec.groups)
        return reference.dequantize(canonical, *pair, spec.bits, spec.group_size)


def pack_words(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Repack canonical ``qweight [(E,) N, K·bits/32]``: on a GPU in one pass, elsewhere with torch."""
    if not qweight.is_cuda:
        return planar.to_planar(qweight, bits)
    from neuqi_kernels.gpu import launch

    return launch.to_planar(qweight, bits)


def _refuse_layer(spec: GemmSpec) -> str | None:
    if spec.dtype not in _HALF_DTYPES:
        return f"computes in float16 or bfloat16, the activations are {spec.dtype}"
    if spec.scale_dtype not in _HALF_DTYPES:
        return f"stores scale and zero-point in 16 bits, they are {spec.scale_dtype}"
    if spec.bits not in planar.PLANES:
        return f"has kernels for {sorted(planar.PLANES)} bits, the layer has {spec.bits}"
    if spec.k % planar.RUN:
        return f"reads runs of {planar.RUN} codes, the row has {spec.k}"
    tile = planar.tile_features(spec.bits)
    fits_tile = spec.group % planar.RUN == 0 and (tile % spec.group == 0 or spec.group % tile == 0)
    if spec.groups > 1 and not fits_tile:
        return (
            f"needs groups that divide or fill its tile of {tile} codes, the group size is {spec.group_size}"
        )
    return None


def _refuse_machine() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return (
            "needs Triton, which is not installed: install triton, or the CUDA build of torch that brings it"
        )
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _MIN_CAPABILITY:
        return f"needs compute capability 8.0 or newer, the GPU has {capability[0]}.{capability[1]}"
    return None


TRITON = TritonBackend()
