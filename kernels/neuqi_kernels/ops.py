"""The torch operators ``neuqi::gemm`` and ``neuqi::embedding``: opaque to torch.compile, one kernel call each."""

from __future__ import annotations

import torch

from neuqi_kernels import dispatch
from neuqi_kernels.backend import Backend

_SCHEMA = (
    "gemm(Tensor x, Tensor qweight, Tensor scale, Tensor zero, Tensor? bias, "
    "int n, int bits, int group_size, str backend) -> Tensor"
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
    """Define both operators for CPU, CUDA and tracing; safe to call any number of times.

    ``torch.ops.neuqi.gemm``: ``x [..., K]`` → ``[..., n]`` in the dtype of ``x``. ``torch.ops.neuqi.embedding``: rows
    ``ids [...]`` → ``[..., k]`` in ``dtype``. ``qweight, scale, zero`` are as the backend called ``backend`` prepared
    them. ``Library.impl`` with a plain function costs about 2 µs a call, the ``custom_op`` decorator 130.
    """
    global _LIBRARY
    if _LIBRARY is not None:
        return
    library = torch.library.Library("neuqi", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(_SCHEMA)  # type: ignore[no-untyped-call]
    library.define(_EMBEDDING_SCHEMA)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        library.impl("gemm", _gemm, key)  # type: ignore[no-untyped-call]
        library.impl("embedding", _embedding, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake("neuqi::gemm", _gemm_fake, lib=library)
    torch.library.register_fake("neuqi::embedding", _embedding_fake, lib=library)
    _LIBRARY = library
