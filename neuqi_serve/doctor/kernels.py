"""Which kernel runs at each width, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator

from neuqi_serve.config import SUPPORTED_BITS
from neuqi_serve.doctor.finding import Finding

# A layer of ordinary size; backends choose by bits, group and dtype.
_N, _K, _GROUP = 4096, 4096, 128
_SLOW = ("cpu_blocks", "reference")


def check_kernels(device_type: str) -> Iterator[Finding]:
    """The backend that runs a layer of each width on ``device_type`` (``cpu`` or ``cuda``)."""
    import torch

    from neuqi_kernels.dispatch import backend_names, choose, find, refusal
    from neuqi_kernels.spec import GemmSpec

    for bits in SUPPORTED_BITS:
        spec = GemmSpec(_N, _K, bits, _GROUP, device_type, torch.bfloat16)
        subject = f"kernel, {bits} bits"
        try:
            chosen = choose(spec)
        except ValueError as error:
            yield Finding(
                subject, "error", str(error), "Unset NEUQI_KERNEL_BACKEND and NEUQI_CPU_ISA, or correct them."
            )
            continue
        detail = getattr(find(chosen.name), "detail", "")
        found = f"{chosen.name} ({detail})" if detail else chosen.name
        if chosen.name in _SLOW:
            fast = "triton" if device_type == "cuda" else "cpu_native"
            reason = refusal(fast, spec) if fast in backend_names() else None
            yield Finding(
                subject, "warning", f"{found}; {fast} refuses: {reason}", "It is slow: see the reason."
            )
        else:
            yield Finding(subject, "ok", found)
