"""All the checks, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from neuqi_serve.doctor.finding import Finding
from neuqi_serve.doctor.hardware import check_gpus, check_memory, check_processor, check_shared_memory
from neuqi_serve.doctor.kernels import check_kernels
from neuqi_serve.doctor.packages import check_imports, check_packages, check_python, check_vllm
from neuqi_serve.doctor.state import check_address, check_cache, check_hub
from neuqi_serve.env import read_environment
from neuqi_serve.server.machine import detect_machine

_Check = Callable[[], "Finding | Iterable[Finding]"]


def examine(host: str, port: int) -> Iterator[Finding]:
    """Look at everything; a check that fails itself is a finding, and the others still run."""
    machine = detect_machine()
    environment = read_environment()
    checks: dict[str, _Check] = {
        "python": check_python,
        "vllm": check_vllm,
        "packages": check_packages,
        "imports": check_imports,
        "processor": lambda: check_processor(machine),
        "memory": lambda: check_memory(machine),
        "shared memory": check_shared_memory,
        "gpu": lambda: check_gpus(machine.runs_on_cpu),
        "kernels": lambda: check_kernels("cpu" if machine.runs_on_cpu else "cuda"),
        "cache": lambda: check_cache(environment.cache_dir, environment.cache_max_bytes),
        "address": lambda: check_address(host, port),
        "hub": lambda: check_hub(environment.hub_offline, environment.hub_token),
    }
    for subject, check in checks.items():
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else list(found)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            yield Finding(subject, "error", f"could not be looked at ({reason})", "Report this.")
