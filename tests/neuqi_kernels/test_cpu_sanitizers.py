"""The C++ kernels under the sanitizers for addresses and undefined behaviour, on the instruction sets that are here."""

from __future__ import annotations

import platform
import runpy
import shutil
from pathlib import Path

import pytest

from neuqi_kernels.cpu import library

NATIVE = runpy.run_path(str(Path(__file__).with_name("native_build.py")))
build, compared, run = NATIVE["build"], NATIVE["compared"], NATIVE["run"]
COMPILER = "g++"
# Checks as calls, and those for undefined behaviour only in the portable kernel, which has all of the code that is not
# operations of a vector unit: the compiler otherwise takes minutes.
ADDRESS = ("-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0", "-g1", "-O1")
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
# These differ from others in one operation on registers, and take half of the time.
LEFT_OUT = ("avx_vnni", "avx512")
# Every case of native_driver.cpp.
CASES = 4 * 6 * 3 * 10


def reason_to_skip() -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"this machine is {platform.machine()}; the sanitizers run on x86-64"
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    return None


pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))


@pytest.mark.timeout(1800)
def test_no_sanitizer_objects_to_any_kernel(tmp_path: Path) -> None:
    without = [f"gemm_{name}.cpp" for name in LEFT_OUT]
    program = build(COMPILER, "x86_64", tmp_path, ADDRESS, UNDEFINED, without=without)
    output = compared(run([program], 900))
    # No runtime of OpenMP is in the program: the threads are the kernels' own.
    assert output.pop("shared team") == 0
    assert "portable" in output
    assert set(output.values()) == {CASES}
    loaded = library.load()
    if not isinstance(loaded, str):
        usable = loaded.neuqi_cpu_built() & loaded.neuqi_cpu_supported()
        here = {name for number, name in enumerate(library.INSTRUCTION_SETS) if usable >> number & 1}
        assert set(output) == here - set(LEFT_OUT)
