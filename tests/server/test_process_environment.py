"""vLLM's environment variables: chosen purely, and never over the user's."""

from __future__ import annotations

import os

import pytest

from neuqi_serve.server.machine import Machine
from neuqi_serve.server.process_environment import (
    SPIN_COUNT,
    adopt_environment,
    apply_environment,
    explain_environment,
    inherited_environment,
    vllm_environment,
)


def _machine(cores: int, pinnable: int, on_cpu: bool = True) -> Machine:
    return Machine(cores, pinnable, 1 << 34, 1 << 33, on_cpu)


def test_all_installed_plugins_are_named_ours_among_them() -> None:
    plugins = vllm_environment(_machine(2, 2), offline=True)["VLLM_PLUGINS"].split(",")
    assert "neuqi" in plugins
    assert plugins == sorted(set(plugins))


def test_two_cores_are_not_bound() -> None:
    chosen = vllm_environment(_machine(2, 2), offline=False)
    assert chosen["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert chosen["OMP_NUM_THREADS"] == "2"


def test_a_quota_counts_instead_of_the_mask() -> None:
    chosen = vllm_environment(_machine(6, 64), offline=False)
    assert chosen["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert chosen["OMP_NUM_THREADS"] == "6"


def test_many_free_cores_are_left_to_vllm() -> None:
    chosen = vllm_environment(_machine(16, 16), offline=False)
    assert not {"VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"} & set(chosen)


def test_waiting_threads_spin_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert vllm_environment(_machine(2, 2), offline=False)["GOMP_SPINCOUNT"] == str(SPIN_COUNT)
    # A count would override the policy that the user set.
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in vllm_environment(_machine(2, 2), offline=False)


def test_what_decides_about_the_cores_is_explained() -> None:
    chosen = vllm_environment(_machine(2, 2), offline=False)
    lines = explain_environment(chosen)
    assert any(line.startswith("OMP_NUM_THREADS=2 ") for line in lines)
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)
    # What the user had set is not ours to explain.
    assert explain_environment({}) == []


def test_an_accelerator_gets_none_of_the_settings_for_cpus() -> None:
    chosen = vllm_environment(_machine(2, 2, on_cpu=False), offline=False)
    assert not [name for name in chosen if "OMP" in name or "AOT" in name or "BLAS" in name]
    assert int(chosen["VLLM_ENGINE_READY_TIMEOUT_S"]) > 600


def test_offline_only_when_nothing_can_be_missing() -> None:
    assert vllm_environment(_machine(2, 2), offline=True)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in vllm_environment(_machine(2, 2), offline=False)


def test_usage_statistics_are_off() -> None:
    chosen = vllm_environment(_machine(2, 2), offline=False)
    assert chosen["VLLM_NO_USAGE_STATS"] == chosen["DO_NOT_TRACK"] == "1"


def test_the_users_value_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUQI_TEST_GIVEN", "theirs")
    monkeypatch.setenv("NEUQI_TEST_MISSING", "")
    monkeypatch.delenv("NEUQI_TEST_MISSING")
    applied = apply_environment({"NEUQI_TEST_GIVEN": "ours", "NEUQI_TEST_MISSING": "ours"})
    assert applied == {"NEUQI_TEST_MISSING": "ours"}
    assert os.environ["NEUQI_TEST_GIVEN"] == "theirs"
    assert os.environ.pop("NEUQI_TEST_MISSING") == "ours"


def test_a_child_adopts_the_parents_environment_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = inherited_environment()
    monkeypatch.setenv("NEUQI_TEST_EXTRA", "1")
    adopt_environment(parent)
    assert dict(os.environ) == parent
