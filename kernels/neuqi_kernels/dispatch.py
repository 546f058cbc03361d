"""The ordered table of backends: the first that does not refuse a layer runs it."""

from __future__ import annotations

from neuqi_kernels.backend import REFERENCE, Backend
from neuqi_kernels.backend_table import BackendTable
from neuqi_kernels.env import forced_backend
from neuqi_kernels.spec import GemmSpec

_TABLE: BackendTable[Backend] = BackendTable(
    (
        ("humming", "neuqi_kernels.gpu.humming", "HUMMING"),
        ("triton", "neuqi_kernels.gpu.backend", "TRITON"),
        ("cpu_native", "neuqi_kernels.cpu.native", "NATIVE"),
        ("cpu_blocks", "neuqi_kernels.cpu.blocks", "BLOCKS"),
    ),
    REFERENCE,
)


def backend_names() -> tuple[str, ...]:
    """Names of all backends, in the order in which they are asked."""
    return _TABLE.names


def find(name: str) -> Backend | str:
    """Return the backend called ``name``, or the reason why its module does not import.

    Raises:
        ValueError: no backend has this name.
    """
    return _TABLE.find(name)


def refusal(name: str, spec: GemmSpec) -> str | None:
    """Return why the backend called ``name`` cannot run the layer, or None when it can."""
    backend = find(name)
    return backend if isinstance(backend, str) else backend.refuse(spec)


def choose(spec: GemmSpec, only: str | None = None) -> Backend:
    """Return the first backend that takes the layer, or the one that ``only`` or ``NEUQI_KERNEL_BACKEND`` names.

    Raises:
        ValueError: the named backend does not exist or refuses the layer.
    """
    wanted = only or forced_backend()
    for name in (wanted,) if wanted else backend_names():
        backend = find(name)
        reason = backend if isinstance(backend, str) else backend.refuse(spec)
        if not isinstance(backend, str) and reason is None:
            return backend
        if wanted:
            raise ValueError(
                f"expected the backend {wanted!r} to run {spec}, it refuses: {reason}. "
                "Unset NEUQI_KERNEL_BACKEND to let the first suitable one run."
            )
    raise AssertionError("the reference backend takes every layer")


def explain(spec: GemmSpec) -> str:
    """Return one line per backend: who runs the layer, who refuses it and why."""
    lines = [
        f"{spec.bits} bits, group {spec.group_size}, N={spec.n}, K={spec.k}, {spec.dtype}, {spec.device_type}:"
    ]
    chosen = choose(spec).name
    for name in backend_names():
        reason = refusal(name, spec)
        if name == chosen:
            detail = getattr(find(name), "detail", "")
            verdict = f"runs ({detail})" if detail else "runs"
        elif reason is not None:
            verdict = f"refuses: {reason}"
        else:
            verdict = "could run, comes later" if not forced_backend() else "could run, another is forced"
        lines.append(f"  {name}: {verdict}")
    return "\n".join(lines)
