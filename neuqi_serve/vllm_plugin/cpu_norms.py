"""RMSNorm on CPUs by vLLM's own compiled kernels, which vLLM itself uses on accelerators only.

In eager mode vLLM's definition of the operation is a dozen torch calls per layer, whatever its size; on a decode step
of a small model they are a sixth of the time. vLLM offers its operations for such implementations under a name, which
``--ir-op-priority`` asks for.
"""
# vLLM reads the annotations of the functions as objects: no postponed evaluation here.

from typing import Any

import torch

PROVIDER = "neuqi_cpu"
OPERATIONS = ("rms_norm", "fused_add_rms_norm")


def register_cpu_norms() -> None:
    """Offer both operations to vLLM, once per process; without effect in a vLLM that takes no implementations."""
    try:
        from vllm import ir
        from vllm.platforms import current_platform

        operations: Any = ir.ops
        known = operations.rms_norm.impls, operations.fused_add_rms_norm.impls
    except (ImportError, AttributeError):
        return
    if any(PROVIDER in impls for impls in known):
        return
    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        current_platform.import_kernels()
    supported = on_cpu and all(hasattr(torch.ops._C, name) for name in OPERATIONS)
    register = operations.rms_norm.register_impl
    register(PROVIDER, supported=supported, supports_args=_takes_norm)(_rms_norm)
    register = operations.fused_add_rms_norm.register_impl
    register(PROVIDER, supported=supported, supports_args=_takes_fused, inplace=True)(_fused_add_rms_norm)


def _takes_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    # The kernels read rows that follow each other without gaps, and a weight of the input's type.
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def _takes_fused(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return (
        _takes_norm(x, weight, epsilon, variance_size)
        and x_residual.dtype == x.dtype
        and x_residual.is_contiguous()
    )


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, weight, epsilon)
    return y


def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
