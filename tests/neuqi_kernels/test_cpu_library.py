"""Loading the C++ library: what is missing or stale is a reason, the instruction set is chosen at run time."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from neuqi_kernels import dispatch
from neuqi_kernels.cpu import library, native
from neuqi_kernels.spec import GemmSpec

SPEC = GemmSpec(17, 64, 3, 32, "cpu", torch.bfloat16)
needs_library = pytest.mark.skipif(not library.PATH.exists(), reason="the C++ library is not built")


class Pretended:
    """A library and a CPU with given instruction sets."""

    def __init__(self, built: int, supported: int) -> None:
        self.neuqi_cpu_built = lambda: built
        self.neuqi_cpu_supported = lambda: supported


def test_a_missing_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = library.load(tmp_path / "libneuqi_cpu.so")
    assert isinstance(reason, str)
    assert reason.startswith("built without a C++ compiler; install")
    monkeypatch.setattr(native, "load", lambda: reason)
    backend = native.NativeBackend()
    assert backend.refuse(SPEC) == reason
    assert backend.detail == ""
    with pytest.raises(ValueError, match="it refuses: built without a C"):
        backend.prepare(torch.zeros(17, 6), torch.zeros(17, 2), torch.zeros(17, 2), SPEC)
    tiles, scale = torch.zeros(2, 128, dtype=torch.int32), torch.zeros(0, dtype=torch.float16)
    with pytest.raises(ValueError, match="cpu_native refuses: built without a C"):
        backend.gemm(torch.zeros(1, 64), tiles, scale, scale, None, 17, 3, 32)


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "libneuqi_cpu.so"
    path.write_bytes(b"not a library")
    reason = library.load(path)
    assert isinstance(reason, str)
    assert "does not load" in reason
    assert "install the package again" in reason


@needs_library
def test_a_library_of_another_version_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libneuqi_cpu.so"
    shutil.copy(library.PATH, path)
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    reason = library.load(path)
    assert isinstance(reason, str)
    assert f"ABI {library.ABI - 1}, expected {library.ABI}" in reason


def test_the_strongest_common_instruction_set_runs() -> None:
    def chosen(built: int, supported: int) -> int | str:
        return library.choose_instruction_set(Pretended(built, supported), None)

    assert chosen(0b011111, 0b011111) == library.INSTRUCTION_SETS.index("avx512_vnni")
    assert chosen(0b011111, 0b001111) == library.INSTRUCTION_SETS.index("avx512")
    assert chosen(0b000111, 0b011111) == library.INSTRUCTION_SETS.index("avx_vnni")
    assert chosen(0b000001, 0b011111) == library.INSTRUCTION_SETS.index("portable")
    assert chosen(0b100001, 0b100001) == library.INSTRUCTION_SETS.index("neon")


def test_a_forced_instruction_set_runs_or_is_a_reason() -> None:
    def forced(name: str) -> int | str:
        return library.choose_instruction_set(Pretended(0b00011, 0b01001), name)

    assert forced("portable") == 0
    assert forced("avx2") == "NEUQI_CPU_ISA forces avx2, which this CPU does not have"
    assert forced("avx512") == "NEUQI_CPU_ISA forces avx512, which this library does not have"
    with pytest.raises(ValueError, match=r"NEUQI_CPU_ISA to be one of .*'mmx'"):
        forced("mmx")


@needs_library
def test_explain_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUQI_KERNEL_BACKEND", raising=False)
    monkeypatch.setenv("NEUQI_CPU_ISA", "portable")
    forced = native.NativeBackend()
    find = dispatch.find
    monkeypatch.setattr(dispatch, "find", lambda name: forced if name == "cpu_native" else find(name))
    assert "cpu_native: runs (portable, torch's threads)" in dispatch.explain(SPEC)


@needs_library
def test_the_kernel_shares_the_threads_of_torch() -> None:
    loaded = library.load()
    assert isinstance(loaded, ctypes.CDLL)
    assert loaded.neuqi_cpu_team_is_shared() == 1


@needs_library
def test_read_adds_up_every_word() -> None:
    loaded = library.load()
    words = torch.randint(0, 1 << 60, (3 << 17,), generator=torch.Generator().manual_seed(0))
    assert loaded.neuqi_cpu_read(words.data_ptr(), words.nbytes, 2) == int(words.sum()) % (1 << 64)
