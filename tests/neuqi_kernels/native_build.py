"""Builds an executable of the C++ kernels and native_driver.cpp, with the flags that setup.py uses and others."""

from __future__ import annotations

import os
import runpy
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CSRC = ROOT / "kernels/neuqi_kernels/csrc"


def run(arguments: Sequence[str | Path], timeout: float) -> str:
    """Run a program and return its standard output; what it says when it fails is the error's text."""
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{arguments[0]} left with {done.returncode}:\n{done.stderr[-6000:]}"
    return done.stdout


def build(
    compiler: str,
    architecture: str,
    folder: Path,
    flags: Sequence[str] = (),
    common_flags: Sequence[str] = (),
    link: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Path:
    """Compile the files of the product for an architecture, with the driver, and link.

    `flags` come behind the usual ones, `common_flags` too in what is not for one instruction set. `without`: sources
    of instruction sets to leave out.
    """
    setup = runpy.run_path(str(ROOT / "setup.py"))
    usual = [*setup["FLAGS"], *flags]
    variants = [
        variant
        for variant in setup["VARIANTS"][architecture]
        if variant[1].startswith("gemm_")
        and variant[1] not in without
        and setup["compiles"]([compiler], setup["PROBE"], variant[2])
    ]
    macros = [f"-D{macro}" for macro, _, _ in variants]
    # The longest first.
    jobs = [(CSRC / source, own) for _, source, own in variants]
    jobs += [(CSRC / source, [*macros, *common_flags]) for source in reversed(setup["COMMON"])]
    jobs += [(CSRC / "gated.cpp", [*setup["EXACT"], *common_flags])]
    jobs += [(FOLDER / "native_driver.cpp", ["-ffp-contract=off", f"-I{CSRC}", *common_flags])]

    def compile_file(job: tuple[Path, list[str]]) -> Path:
        source, own = job
        output = folder / source.with_suffix(".o").name
        run([compiler, *usual, *own, "-c", source, "-o", output], 900)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_file, jobs))
    program = folder / "native_driver"
    run([compiler, *flags, *common_flags, *link, *objects, "-o", program, "-ldl", "-lpthread"], 300)
    return program


def compared(output: str) -> dict[str, int]:
    """Cases that the driver compared, by instruction set."""
    lines = [line.rsplit(maxsplit=1) for line in output.splitlines()]
    return {name: int(count) for name, count in lines}
