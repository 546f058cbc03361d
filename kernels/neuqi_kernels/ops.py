"""The torch operators ``neuqi::gemm`` and ``neuqi::moe_gemm``: opaque to torch.compile, one kernel call behind each."""

from __future__ import annotations

import torch

from neuqi_kernels import dispatch, moe

_GEMM_SCHEMA = (
    "gemm(Tensor x, Tensor qweight, Tensor scale, Tensor zero, Tensor? bias, "
    "int n, int bits, int group_size, str backend) -> Tensor"
)
_MOE_SCHEMA = (
    "moe_gemm(Tensor x, Tensor qweight, Tensor scale, Tensor zero, Tensor? bias, Tensor? topk_weights, "
    "Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, "
    "int n, int top_k, int block_size, int bits, int group_size, str backend) -> Tensor"
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
    found = dispatch.find(backend)
    if isinstance(found, str):
        raise ValueError(
            f"expected a usable backend, got {backend!r}, which is {found}. Choose with dispatch.choose."
        )
    return found.gemm(x, qweight, scale, zero, bias, n, bits, group_size)


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


def gemm(
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
    """Return what ``torch.ops.neuqi.gemm`` returns, without the way through torch's dispatcher where nothing traces.

    That way costs about 3 µs a call, which a decode step pays for every layer.
    """
    if type(x) is torch.Tensor and not torch.compiler.is_compiling():
        return _gemm(x, qweight, scale, zero, bias, n, bits, group_size, backend)
    return torch.ops.neuqi.gemm(x, qweight, scale, zero, bias, n, bits, group_size, backend)


def register() -> None:
    """Define ``torch.ops.neuqi.gemm`` and ``.moe_gemm`` for CPU, CUDA and tracing; safe to call any number of times.

    ``gemm``: ``x [..., K]`` → ``[..., n]`` in the dtype of ``x``; ``qweight, scale, zero`` as the backend called
    ``backend`` of ``dispatch`` prepared them. ``moe_gemm``: ``x [tokens, K]`` → ``[tokens·top_k, n]``, see
    ``moe_reference.moe_gemm``; ``backend`` is one of ``moe``. ``Library.impl`` with a plain function costs about 2 µs a
    call, the ``custom_op`` decorator 130.
    """
    global _LIBRARY
    if _LIBRARY is not None:
        return
    library = torch.library.Library("neuqi", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema, function, fake in (
        ("gemm", _GEMM_SCHEMA, _gemm, _gemm_fake),
        ("moe_gemm", _MOE_SCHEMA, _moe_gemm, _moe_gemm_fake),
    ):
        library.define(schema)  # type: ignore[no-untyped-call]
        library.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
        library.impl(name, function, "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"neuqi::{name}", fake, lib=library)
    _LIBRARY = library
