"""Reading cores and memory, a container's limits included."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from neuqi_serve.server import machine
from neuqi_serve.server.machine import (
    Machine,
    cgroup_cores,
    cgroup_memory_limit,
    cgroup_memory_used,
    detect_machine,
)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("400000 100000", 4)]
)
def test_cores_of_a_version_2_quota_are_rounded_up(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cgroup_cores(tmp_path) == cores


def test_cores_of_a_version_1_quota(tmp_path: Path) -> None:
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "cpu.cfs_period_us").write_text("100000")
    (folder / "cpu.cfs_quota_us").write_text("300000")
    assert cgroup_cores(tmp_path) == 3
    (folder / "cpu.cfs_quota_us").write_text("-1")
    assert cgroup_cores(tmp_path) is None


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path) is None
    assert cgroup_memory_limit(tmp_path) is None
    assert cgroup_memory_used(tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "limit"), [("max", None), ("9223372036854771712", None), ("1073741824", 1 << 30)]
)
def test_memory_limit_reads_both_ways_to_say_unlimited(tmp_path: Path, text: str, limit: int | None) -> None:
    (tmp_path / "memory.max").write_text(text + "\n")
    assert cgroup_memory_limit(tmp_path) == limit


def test_memory_used_leaves_out_what_the_kernel_can_drop(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 600\n")
    assert cgroup_memory_used(tmp_path) == 400


def test_this_machine_is_described_within_its_bounds() -> None:
    found = detect_machine()
    assert 1 <= found.cores <= found.pinnable_cores == len(os.sched_getaffinity(0))
    assert 0 < found.available_bytes <= found.memory_bytes


def test_a_quota_below_the_mask_is_noticed() -> None:
    assert Machine(2, 64, 1 << 30, 1 << 30, True).has_core_quota
    assert not Machine(64, 64, 1 << 30, 1 << 30, True).has_core_quota


@pytest.mark.parametrize(
    ("installed", "on_cpu"), [("0.32.0", False), ("0.32.0+cu130", False), ("0.33.0+cpu", True)]
)
def test_vllms_build_decides_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, installed: str, on_cpu: bool
) -> None:
    monkeypatch.setattr(machine, "version", lambda name: installed)
    assert machine.is_cpu_build() == on_cpu


def test_the_wheel_for_cpus_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", version)
    assert machine.is_cpu_build()
