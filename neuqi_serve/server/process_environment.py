"""The environment variables of vLLM and its libraries: set here, in one place, before vllm is imported.

vLLM reads most of them while it is imported, and its child processes inherit them. A value that the user has set
always wins.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from neuqi_serve.server.machine import Machine

PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
    "vllm.endpoint_plugins",
    "vllm.logits_processors",
)
# Quantizing while loading counts into this deadline; vLLM's own 600 s end the start of a large model.
ENGINE_READY_TIMEOUT_SECONDS = 3600
SMALL_MACHINE_CORES = 2
# Rounds of a waiting thread's loop, about half a millisecond: longer than a step's gaps between parallel regions,
# shorter than the time between two steps.
SPIN_COUNT = 20000

# Why the variables are set that decide how the cores are used; they are printed at the start.
_REASONS = {
    "GOMP_SPINCOUNT": "waiting threads stay awake within a step and sleep between two steps",
    "VLLM_CPU_OMP_THREADS_BIND": "vLLM would keep a core for the API process, which hardly needs one",
    "OMP_NUM_THREADS": "threads of the engine, one per core",
}


def vllm_environment(machine: Machine, offline: bool) -> dict[str, str]:
    """Choose the variables for this machine; ``offline``: nothing has to be fetched from the Hugging Face hub."""
    # Endpoint plugins load only when named, and the list holds for all groups: name every plugin there is.
    plugins = sorted({point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)})
    chosen = {
        "VLLM_PLUGINS": ",".join(plugins),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(ENGINE_READY_TIMEOUT_SECONDS),
    }
    if offline:
        chosen |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if machine.runs_on_cpu:
        # vLLM 0.32 writes the ahead-of-time artifact on CPUs but cannot load it again.
        chosen["VLLM_USE_AOT_COMPILE"] = "0"
        # BLAS threads serve nothing here, and without them the process has one thread when the engine is forked.
        chosen["OPENBLAS_NUM_THREADS"] = "1"
        # GNU OpenMP's threads otherwise spin for ever or sleep at once at every barrier. For ever, they starve the
        # API process; at once, waking them costs as much as a small layer. This long, they stay awake within a step.
        if "OMP_WAIT_POLICY" not in os.environ:
            chosen["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        if machine.cores <= SMALL_MACHINE_CORES or machine.has_core_quota:
            # "auto" keeps a core for the API process and counts cores that a quota does not grant.
            chosen["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            chosen["OMP_NUM_THREADS"] = str(machine.cores)
    return chosen


def apply_environment(chosen: dict[str, str]) -> dict[str, str]:
    """Set the variables that are not set yet and return those that were."""
    applied = {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(applied)
    return applied


def explain_environment(applied: dict[str, str]) -> list[str]:
    """Return a line with the reason for each variable set here that decides how the cores are used."""
    return [
        f"{f'{name}={applied[name]}':<42} {reason}" for name, reason in _REASONS.items() if name in applied
    ]


def inherited_environment() -> dict[str, str]:
    """Return a copy of this process's environment, for a child that was forked before it was complete."""
    return dict(os.environ)


def adopt_environment(environment: dict[str, str]) -> None:
    """Replace this process's environment by its parent's."""
    os.environ.clear()
    os.environ.update(environment)
