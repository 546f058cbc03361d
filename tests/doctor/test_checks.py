from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from neuqi_serve.doctor import examine as examine_module
from neuqi_serve.doctor.examine import examine
from neuqi_serve.doctor.hardware import check_gpus, check_memory, check_processor, check_shared_memory
from neuqi_serve.doctor.kernels import check_kernels
from neuqi_serve.doctor.state import check_address, check_cache, check_hub
from neuqi_serve.server.machine import Machine


def machine(available: int = 8 << 30, runs_on_cpu: bool = True) -> Machine:
    return Machine(2, 4, 16 << 30, available, runs_on_cpu)


def test_processor_shows_quota_and_instruction_sets() -> None:
    finding = check_processor(machine(), "processor: 0\nflags : fpu avx2 avx512f avx512_bf16\n")
    assert finding.level == "ok"
    assert finding.found.startswith("4 cores, 2 by quota, ")
    assert finding.found.endswith("avx2 avx512f avx512_bf16")


def test_a_processor_without_vectors_is_slow() -> None:
    assert check_processor(machine(), "flags : fpu sse2\n").level == "warning"
    assert check_processor(machine(runs_on_cpu=False), "flags : fpu sse2\n").level == "ok"


def test_little_memory_is_a_warning() -> None:
    assert check_memory(machine()).level == "ok"
    assert check_memory(machine(1 << 30)).level == "warning"


@pytest.mark.parametrize(("total", "level"), [(1 << 30, "ok"), (64 << 20, "note")])
def test_shared_memory_of_a_container_is_small(
    total: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=total))
    finding = check_shared_memory(tmp_path)
    assert finding.level == level
    assert f"{total / 2**30:.2f} GiB" in finding.found
    assert check_shared_memory(tmp_path / "absent").level == "note"


def test_a_gpu_beside_a_build_for_cpus_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: x)'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (finding,) = check_gpus(runs_on_cpu=True)
    assert finding.level == "warning"
    monkeypatch.setenv("PATH", "/nonexistent")
    (finding,) = check_gpus(runs_on_cpu=True)
    assert finding.level == "ok"


def test_a_build_for_gpus_without_one_cannot_run() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    (finding,) = check_gpus(runs_on_cpu=False)
    assert finding.level == "error"


def test_every_width_has_a_kernel() -> None:
    findings = list(check_kernels("cpu"))
    assert [finding.subject for finding in findings] == [f"kernel, {bits} bits" for bits in (2, 3, 4, 8)]
    assert {finding.level for finding in findings} <= {"ok", "warning"}


def test_a_slow_kernel_says_why_the_fast_one_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "reference")
    assert {finding.level for finding in check_kernels("cpu")} == {"warning"}
    monkeypatch.setenv("NEUQI_KERNEL_BACKEND", "no-such")
    assert {finding.level for finding in check_kernels("cpu")} == {"error"}


def test_the_cache(tmp_path: Path) -> None:
    assert check_cache(tmp_path / "not" / "yet", None).level == "ok"
    (tmp_path / "file").write_text("")
    assert check_cache(tmp_path / "file", None).level == "warning"


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = check_address("127.0.0.1", port)
    assert finding.level == "warning"
    assert f"--port {port + 1}" in finding.remedy
    assert check_address("127.0.0.1", port).level == "ok"


@pytest.mark.parametrize(("offline", "token", "level"), [(True, False, "note"), (False, True, "ok")])
def test_the_hub(offline: bool, token: bool, level: str) -> None:
    assert check_hub(offline, token).level == level


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such file")

    monkeypatch.setattr(examine_module, "check_shared_memory", broken)
    monkeypatch.setattr(examine_module, "check_imports", list)
    found = {finding.subject: finding for finding in examine("127.0.0.1", 0)}
    assert found["shared memory"].level == "error"
    assert "no such file" in found["shared memory"].found
    assert "hub" in found
