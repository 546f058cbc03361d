"""The torch operators of this package: opaque to torch.compile, one kernel call behind each."""

from __future__ import annotations

import torch

from neuqi_kernels import dispatch, experts, moe
from neuqi_kernels.backend import Backend

_GEMM_SCHEMA = (
    "gemm(Tensor x, Tensor qweight, Tensor scale, Tensor zero, Tensor? bias, "
    "int n, int bits, int group_size, str backend) -> Tensor"
)
_MOE_SCHEMA = (
    "moe_gemm(Tensor x, Tensor qweight, Tensor scale, Tensor zero, Tensor? bias, Tensor? topk_weights, "
    "Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, "
    "int n, int top_k, int block_size, int bits, int group_size, str backend) -> Tensor"
)
_EXPERTS_SCHEMA = (
    "experts(Tensor x, Tensor w13_qweight, Tensor w13_scale, Tensor w13_zero, Tensor w2_qweight, Tensor w2_scale, "
    "Tensor w2_zero, Tensor? w13_bias, Tensor? w2_bias, Tensor topk_weights, Tensor topk_ids, int intermediate, "
    "int w13_bits, int w13_group_size, int w2_bits, int w2_group_size, str activation, str backend) -> Tensor"
)
_EMBEDDING_SCHEMA = (
    "embedding(Tensor ids, Tensor qweight, Tensor scale, Tensor zero, "
    "int n, int k, int bits, int group_size, ScalarType dtype, str backend) -> Tensor"
)
# The operators exist as long as this object does.
_LIBRARY: torch.library.Library | None = None


def _gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    backend: str,
) -> torch.Tensor:
    return _usable(backend).gemm(x, qweight, scale, zero, bias, n, bits, group_size)


def _gemm_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    backend: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _moe_gemm(
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
    backend: str,
) -> torch.Tensor:
    found = moe.find(backend)
    if isinstance(found, str):
        raise ValueError(
            f"expected a usable backend, got {backend!r}, which is {found}. Choose with moe.choose."
        )
    return found.moe_gemm(
        x,
        qweight,
        scale,
        zero,
        bias,
        topk_weights,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        n,
        top_k,
        block_size,
        bits,
        group_size,
    )


def _moe_gemm_fake(
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
    backend: str,
) -> torch.Tensor:
    return x.new_empty((x.shape[0] * top_k, n))


def _experts(
    x: torch.Tensor,
    w13_qweight: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_zero: torch.Tensor,
    w2_qweight: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_zero: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    intermediate: int,
    w13_bits: int,
    w13_group_size: int,
    w2_bits: int,
    w2_group_size: int,
    activation: str,
    backend: str,
) -> torch.Tensor:
    found = experts.find(backend)
    if isinstance(found, str):
        raise ValueError(
            f"expected a usable backend, got {backend!r}, which is {found}. Choose with experts.choose."
        )
    return found.run(
        x,
        (w13_qweight, w13_scale, w13_zero),
        (w2_qweight, w2_scale, w2_zero),
        w13_bias,
        w2_bias,
        topk_weights,
        topk_ids,
        intermediate,
        w13_bits,
        w13_group_size,
        w2_bits,
        w2_group_size,
        activation,
    )


def _experts_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _embedding(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return _usable(backend).embedding(ids, qweight, scale, zero, n, k, bits, group_size, dtype)


def _embedding_fake(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


def _usable(backend: str) -> Backend:
    found = dispatch.find(backend)
    if isinstance(found, str):
        raise ValueError(
            f"expected a usable backend, got {backend!r}, which is {found}. Choose with dispatch.choose."
        )
    return found


def register() -> None:
    """Define the operators of ``torch.ops.neuqi`` for CPU, CUDA and tracing; safe to call any number of times.

    ``gemm``: ``x [..., K]`` → ``[..., n]`` in the dtype of ``x``. ``embedding``: rows ``ids [...]`` → ``[..., k]`` in
    ``dtype``. ``qweight, scale, zero`` are as the backend called ``backend`` of ``dispatch`` prepared them.
    ``moe_gemm``: ``x [tokens, K]`` → ``[tokens·top_k, n]``, see ``moe_reference.moe_gemm``; ``backend`` is one of
    ``moe``. ``experts``: ``x [tokens, H]`` → the same shape, a whole layer of experts, see
    ``experts_reference.experts``; ``backend`` is one of ``experts``.

    ``Library.impl`` with a plain function costs about 2 µs a call, the ``custom_op`` decorator 130.
    """
    global _LIBRARY
    if _LIBRARY is not None:
        return
    library = torch.library.Library("neuqi", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema, function, fake in (
        ("gemm", _GEMM_SCHEMA, _gemm, _gemm_fake),
        ("embedding", _EMBEDDING_SCHEMA, _embedding, _embedding_fake),
        ("experts", _EXPERTS_SCHEMA, _experts, _experts_fake),
        ("moe_gemm", _MOE_SCHEMA, _moe_gemm, _moe_gemm_fake),
    ):
        library.define(schema)  # type: ignore[no-untyped-call]
        library.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
        library.impl(name, function, "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"neuqi::{name}", fake, lib=library)
    _LIBRARY = library
