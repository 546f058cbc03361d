"""The Arm kernel, compiled by a cross compiler and run by an emulator: the same bits as the portable one."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

NATIVE = runpy.run_path(str(Path(__file__).with_name("native_build.py")))
build, compared, run = NATIVE["build"], NATIVE["compared"], NATIVE["run"]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Every case of native_driver.cpp.
CASES = 4 * 6 * 3 * 10

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"no {COMPILER} or no {EMULATOR}: `make emulation` installs both on Debian",
)


@pytest.mark.timeout(1800)
def test_neon_gives_the_bits_of_portable_and_agrees_with_float64(tmp_path: Path) -> None:
    # The kernel is optimized as in the library; at that level the portable one alone would take a minute.
    program = build(COMPILER, "aarch64", tmp_path, common_flags=["-O1"], link=["-static"])
    output = compared(run([EMULATOR, "-cpu", "max", program], 900))
    assert output == {"portable": CASES, "neon": CASES, "shared team": 0}
    # The first generation without the byte dot product must not be offered it.
    old = compared(run([EMULATOR, "-cpu", "cortex-a53", program, "30"], 900))
    assert old == {"portable": CASES // 30, "shared team": 0}
