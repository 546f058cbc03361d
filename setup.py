"""Builds the C++ kernel library beside the Python packages; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so it needs neither Python nor torch headers, and one
build serves every Python. Each instruction set is a file of its own, compiled with that set's flags; which one runs is
decided at run time. Without a C++ compiler, or with ``NEUQI_BUILD_CPU=0``, the package installs without the library
(and as a pure wheel), and the backend ``cpu_native`` refuses with that reason.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = Path("kernels/neuqi_kernels/csrc")
# The relative order of operations is part of the result; contraction to fused multiply-adds is wanted.
FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-threadsafe-statics",
    ),
    *("-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"),
    # GCC 12 warns of its own intrinsics.
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512", *AVX2]
# The quantizer writes every fused multiply-add as such, so that all instruction sets give the same bits.
EXACT = ["-ffp-contract=off"]
# For each architecture: the macro that says that a file is built, its source, its flags.
VARIANTS: dict[str, tuple[tuple[str, str, list[str]], ...]] = {
    "x86_64": (
        ("NEUQI_HAS_AVX2", "gemm_avx2.cpp", AVX2),
        ("NEUQI_HAS_AVX_VNNI", "gemm_avx_vnni.cpp", [*AVX2, "-mavxvnni"]),
        ("NEUQI_HAS_AVX512", "gemm_avx512.cpp", AVX512),
        ("NEUQI_HAS_AVX512_VNNI", "gemm_avx512_vnni.cpp", [*AVX512, "-mavx512vnni"]),
        ("NEUQI_HAS_AVX2", "quantize_avx2.cpp", ["-mavx2", "-mfma", *EXACT]),
        ("NEUQI_HAS_AVX512", "quantize_avx512.cpp", [*AVX512, *EXACT]),
    ),
    "aarch64": (("NEUQI_HAS_NEON", "gemm_neon.cpp", ["-march=armv8.2-a+dotprod"]),),
}
# Other names of the same architectures.
ARCHITECTURES = {"AMD64": "x86_64", "arm64": "aarch64"}
COMMON = ("entry.cpp", "gather.cpp", "repack.cpp", "team.cpp", "gemm_portable.cpp")
COMMON_EXACT = ("gated.cpp", "quantize_entry.cpp", "quantize_portable.cpp")
# Vector types and conversions between them: GCC 9, Clang 10.
PROBE = """
typedef int I __attribute__((vector_size(16)));
typedef float F __attribute__((vector_size(16)));
F convert(I i) { return __builtin_convertvector(i, F); }
"""


def architecture() -> str:
    """The name of this machine's architecture in VARIANTS, where it has one."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def compiler() -> list[str] | None:
    """The C++ compiler's command, or None when there is none that can build the library."""
    if os.environ.get("NEUQI_BUILD_CPU") == "0" or sys.platform == "win32":
        return None
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[name] for name in ("g++", "clang++", "c++")]
    return next((c for c in candidates if shutil.which(c[0]) and compiles(c, PROBE, [])), None)


def compiles(command: list[str], code: str, flags: list[str]) -> bool:
    """Whether the compiler takes the code with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(code)
        arguments = [*command, *FLAGS, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(arguments, capture_output=True).returncode == 0


class BuildLibrary(build_ext):
    """Compiles each file with its own flags and links one shared library without a Python suffix."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return ``neuqi_kernels/cpu/libneuqi_cpu.so``."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, unless the library is newer than everything it is made of."""
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(target), "newer"):
            return
        command = compiler()
        if command is None:
            raise RuntimeError(
                "expected the C++ compiler that was there a moment ago, it is gone. Try again."
            )
        jobs, macros = [], []
        for macro, source, flags in VARIANTS.get(architecture(), ()):
            if compiles(command, PROBE, flags):
                macros.append(f"-D{macro}")
                jobs.append((source, flags))
        jobs += [(source, macros) for source in COMMON]
        jobs += [(source, [*macros, *EXACT]) for source in COMMON_EXACT]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def build(job: tuple[str, list[str]]) -> str:
            source, flags = job
            output = folder / Path(source).with_suffix(".o")
            run([*command, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(output)])
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, jobs))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        link = ["-shared", "-static-libgcc"] + (["-Wl,--as-needed"] if sys.platform == "linux" else [])
        run([*command, *link, *objects, "-o", str(partial), "-ldl", "-lpthread"])
        os.replace(partial, target)


def run(arguments: list[str]) -> None:
    """Run a compiler and show what it says when it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"expected {shlex.join(arguments)} to succeed, got:\n{done.stderr[-4000:]}\n"
            "Set NEUQI_BUILD_CPU=0 to install without the C++ kernel."
        )


class TagWheel(bdist_wheel):
    """A wheel with the library is for one platform but for every Python; one without it is for all."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's python, ABI and platform tags."""
        _, _, plat = super().get_tag()
        return ("py3", "none", plat)


# The tests take the flags from here.
if __name__ == "__main__":
    library = Extension(
        "neuqi_kernels.cpu.libneuqi_cpu",
        sources=[
            *(str(SOURCES / name) for name in (*COMMON, *COMMON_EXACT)),
            *(str(SOURCES / source) for each in VARIANTS.values() for _, source, _ in each),
        ],
        depends=[*map(str, sorted(SOURCES.glob("*.h"))), "setup.py"],
    )
    setup(
        ext_modules=[library] if compiler() else [],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
    )
