"""Measured plans: the candidates, the table on disk, the choice, and the tuner from end to end in the interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuqi_kernels.gpu import tune, tuning_table
from neuqi_kernels.gpu.candidates import candidates
from neuqi_kernels.gpu.plan import Plan, Target, plan, rule, stage_bytes
from neuqi_kernels.gpu.tuning_table import TOKEN_BUCKETS, Entry, Run

H100 = Target(90, 132, 227 * 1024)
RTX_4090 = Target(89, 128, 99 * 1024)
MI300 = Target(0, 304, 64 * 1024, inline_asm=False, name="gfx942")
TUNED = Plan("decode_mm", 8, 64, 4, 4, 2)
ENTRY = Entry(4, 128, 4096, 4096, 8, TUNED, 12.5, 1.25)
RUN = Run("NVIDIA H100", 132, {"torch": "2"}, "abc", "2026-01-01T00:00:00+00:00", (ENTRY,))


@pytest.mark.parametrize("target", [H100, RTX_4090, MI300], ids=lambda target: target.architecture)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_candidates_are_legal_and_start_with_the_rule(target: Target, bits: int) -> None:
    for m in TOKEN_BUCKETS:
        found = candidates(target, bits, 128, 4096, 4096, m)
        assert found[0] == rule(target, bits, 128, 4096, 4096, m)
        assert len(set(found)) == len(found)
        for chosen in found[1:]:
            if chosen.kernel == "decode_mm":
                assert chosen.block_n == 64
                assert chosen.block_m >= (8 if target.capability else 16)
            elif chosen.kernel != "dequant":
                used = chosen.stages * stage_bytes(bits, chosen.block_m, chosen.block_n)
                assert used <= target.shared_bytes


def test_candidates_try_every_kernel_that_may_win() -> None:
    kernels = {m: {found.kernel for found in candidates(H100, 4, 128, 4096, 4096, m)} for m in TOKEN_BUCKETS}
    assert kernels[1] == {"decode_mm"}
    assert kernels[32] == {"decode_mm", "mid_mm"}
    assert kernels[64] == {"decode_mm", "mid_mm", "dequant"}
    assert kernels[512] == {"prefill_mm", "dequant"}
    splits = {found.split_k for found in candidates(H100, 4, 128, 4096, 4096, 1)}
    assert splits == {1, 2, 4, 8, 16}
    assert {found.split_k for found in candidates(H100, 4, 128, 64, 128, 1)} == {1}


def test_a_table_comes_back_and_replaces_only_what_was_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    other = replace(ENTRY, tokens=16)
    tuning_table.write(path, "sm_90", replace(RUN, entries=(ENTRY, other)))
    faster = replace(ENTRY, plan=replace(TUNED, stages=3), ratio=1.5)
    tuning_table.write(path, "sm_90", replace(RUN, date="2026-02-01T00:00:00+00:00", entries=(faster,)))
    architecture, runs = tuning_table.read(path)
    assert architecture == "sm_90"
    assert [run.entries for run in runs] == [(other,), (faster,)]
    assert [run.date[:7] for run in runs] == ["2026-01", "2026-02"]
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]


def test_a_failed_write_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    tuning_table.write(path, "sm_90", RUN)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        tuning_table.write(path, "sm_90", replace(RUN, device=object()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one of sm_90\. Name another file"):
        tuning_table.write(path, "sm_80", RUN)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        '{"version": 2, "architecture": "sm_90", "runs": []}',
        '{"version": 1, "architecture": "sm_90", "runs": [{}]}',
    ],
)
def test_a_file_that_is_no_table_is_an_error_with_its_name(tmp_path: Path, body: str) -> None:
    path = tmp_path / "plans.json"
    path.write_text(body)
    with pytest.raises(ValueError, match=r"expected a table of GPU plans, version 1, in .*plans\.json"):
        tuning_table.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": replace(TUNED, kernel="gemv")},
        {"plan": replace(TUNED, block_n=128)},
        {"plan": replace(TUNED, split_k=0)},
        {"plan": replace(TUNED, warps="2")},
        {"tokens": 3},
    ],
    ids=str,
)
def test_an_illegal_plan_in_a_table_is_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "plans.json"
    tuning_table.write(path, "sm_90", replace(RUN, entries=(replace(ENTRY, **changes),)))
    with pytest.raises(ValueError, match="expected a table of GPU plans"):
        tuning_table.read(path)


def test_the_plan_comes_from_the_table_and_else_from_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_table, "FOLDER", tmp_path / "none")
    tuning_table.write(tmp_path / "sm_90.json", "sm_90", RUN)
    monkeypatch.setenv("NEUQI_GPU_TUNING", str(tmp_path))
    assert plan(H100, 4, 128, 4096, 4096, 8) == TUNED
    assert plan(H100, 4, 128, 4096, 4096, 5) == TUNED
    for other in (
        (H100, 4, 128, 4096, 4096, 9),
        (H100, 4, 64, 4096, 4096, 8),
        (RTX_4090, 4, 128, 4096, 4096, 8),
    ):
        assert plan(*other) == rule(*other)
    # What does not depend on the batch must not depend on its bucket either.
    assert plan(H100, 4, 128, 4096, 4096, 8, batch_invariant=True) != TUNED
    monkeypatch.setenv("NEUQI_GPU_TUNING", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"NEUQI_GPU_TUNING names .*absent"):
        plan(H100, 4, 128, 4096, 4096, 8)


def test_every_shipped_table_can_be_read_and_says_where_it_comes_from() -> None:
    for path in tuning_table.FOLDER.glob("*.json"):
        architecture, runs = tuning_table.read(path)
        assert path.stem == architecture
        assert all(run.device and run.versions and run.date and run.commit for run in runs)


def test_the_buckets_cover_every_number_of_tokens() -> None:
    assert [tuning_table.bucket(m) for m in (1, 2, 3, 33, 2049, 8192, 100_000)] == [
        1,
        2,
        4,
        64,
        8192,
        8192,
        8192,
    ]


def test_only_a_clear_gain_replaces_the_rule() -> None:
    ruled, other = Plan("decode_mm", 8), Plan("decode_mm", 16)
    assert tune.select({ruled: 1.0, other: 0.5}, ruled) == (other, 2.0)
    assert tune.select({ruled: 1.0, other: 0.99}, ruled) == (ruled, 1.0)
    assert tune.select({ruled: 1.0, other: 1.5}, ruled) == (ruled, 1.0)
    with pytest.raises(ValueError, match="without"):
        tune.select({other: 1.0}, ruled)


def test_provenance_names_device_versions_and_commit() -> None:
    run = tune.provenance(torch.device("cpu"), [ENTRY])
    assert run.entries == (ENTRY,)
    assert run.device == "interpreter"
    assert run.versions["torch"] == torch.__version__
    assert run.date.endswith("+00:00")


@pytest.mark.parametrize(
    "case",
    [
        {
            "task": "tune",
            "bits": bits,
            "group_size": group,
            "n": 70,
            "k": k,
            "tokens": tokens,
            "broken": broken,
        }
        for bits, group, k, tokens, broken in (
            (4, 32, 160, [1, 64], False),
            (4, 32, 160, [64], True),
            (3, -1, 544, [64], True),
        )
    ],
    ids=str,
)
def test_the_tuner_keeps_the_fastest_plan_that_is_right(
    interpreter: Any, case: dict[str, Any], tmp_path: Path
) -> None:
    result = interpreter.run(case)
    table = tmp_path / "interpreter.json"
    table.write_text(json.dumps(result["table"]))
    architecture, runs = tuning_table.read(table)
    assert architecture == "interpreter"
    entries = runs[0].entries
    assert [entry.tokens for entry in entries] == case["tokens"]
    # The worker's timer prefers many stages, then few parts of K; a broken plan is left out, however fast.
    for entry in entries:
        assert entry.plan.stages == (3 if case["broken"] else 4)
        assert entry.plan.split_k == 1
        assert entry.ratio > 1
    assert any("rel-L2" in line for line in result["log"]) == case["broken"]
