"""The Triton kernels for a mixture of experts behind the dispatch contract."""

from __future__ import annotations

import torch

from neuqi_kernels.backend import Prepared
from neuqi_kernels.env import batch_invariant
from neuqi_kernels.gpu import planar
from neuqi_kernels.gpu.backend import TRITON, pack_words
from neuqi_kernels.gpu.plan import FEW_ROUTES, moe_block_size, moe_plan, target_of
from neuqi_kernels.spec import GemmSpec


class TritonMoe:
    """All experts of a layer in one launch; the slow twin is ``moe_reference.moe_gemm``."""

    name = "triton"

    def refuse(self, spec: GemmSpec) -> str | None:
        """Return why this backend cannot run such experts, or None when it can."""
        return TRITON.refuse(spec)

    def prepare(
        self, qweight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: GemmSpec
    ) -> Prepared:
        """Return planar words, fused scale and zero-point pairs, and nothing: no part of K needs a counter.

        Words ``int16 [E, row tiles, K tiles, runs, 64, 32]``, pairs ``[E, G, N, 2]`` filled up to whole tiles.

        Raises:
            ValueError: the experts are not such as the kernels take.
        """
        TRITON.check_layer(scale, zero, spec)
        words = pack_words(qweight, spec.bits)
        pairs = planar.fuse_scale_zero(scale, zero, spec.bits, spec.group, spec.groups)
        return words, pairs, qweight.new_empty(0)

    def block_size(self, spec: GemmSpec, experts: int, tokens: int, top_k: int) -> int:
        """Return the block size for which the routes of ``tokens`` tokens must be sorted."""
        target = target_of(_device(spec))
        return moe_block_size(target, spec.bits, tokens * top_k, experts, batch_invariant())

    def moe_gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bias: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        sorted_token_ids: torch.Tensor,
        expert_ids: torch.Tensor,
        num_tokens_post_padded: torch.Tensor,
        n: int,
        top_k: int,
        block_size: int,
        bits: int,
        group_size: int,
    ) -> torch.Tensor:
        """Return ``y [tokens·top_k, n]``; ``qweight, scale, zero`` are the three tensors of ``prepare``.

        Raises:
            ValueError: a block size that the kernels do not have.
        """
        from neuqi_kernels.gpu import moe_launch

        k = x.shape[-1]
        if x.shape[0] == 0:
            return x.new_empty(0, n)
        target = target_of(x.device)
        group = 0 if group_size in (-1, k) else group_size
        few = batch_invariant() or x.shape[0] * top_k <= FEW_ROUTES * qweight.shape[0]
        return moe_launch.moe_gemm(
            moe_plan(target, bits, group, block_size, few),
            target,
            x.contiguous(),
            qweight,
            scale,
            bias,
            topk_weights,
            sorted_token_ids,
            expert_ids,
            num_tokens_post_padded,
            n,
            top_k,
            block_size,
            bits,
            group,
        )


def _device(spec: GemmSpec) -> torch.device:
    if spec.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(spec.device_type)


TRITON_MOE = TritonMoe()
