import importlib.util
import json
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("harness", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module
    spec.loader.exec_module(module)
    return module


def records(harness):
    return [
        harness.Record({"bits": 3, "kind": "gaussian"}, "loss", 1.25, "", "reference", 1.001),
        harness.Record({"bits": 12}, "time", 7.0, "ns"),
    ]


def test_write_keeps_the_record_format(harness, tmp_path):
    path = harness.write("case", records(harness), tmp_path)
    assert path == tmp_path / "case.json"
    document = json.loads(path.read_text())
    assert set(document) == {"device", "cores", "versions", "commit", "date", "records"}
    assert set(document["records"][0]) == {"case", "metric", "value", "unit", "reference", "ratio"}
    assert document["records"][0]["case"] == {"bits": 3, "kind": "gaussian"}
    assert document["records"][1]["ratio"] is None
    assert document["cores"] >= 1
    assert "torch" in document["versions"]


def test_write_replaces_the_old_file_and_leaves_no_temporary_one(harness, tmp_path):
    harness.write("case", records(harness), tmp_path)
    harness.write("case", records(harness)[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["case.json"]
    assert len(json.loads((tmp_path / "case.json").read_text())["records"]) == 1


@pytest.mark.parametrize("bad", [{"value": float("nan")}, {"value": 1.0, "ratio": float("inf")}])
def test_write_refuses_figures_that_are_not_finite(harness, tmp_path, bad):
    with pytest.raises(ValueError, match="finite figures"):
        harness.write("case", [harness.Record(case={}, metric="m", unit="", **bad)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_table_is_aligned_and_complete(harness):
    lines = harness.table(records(harness)).splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["bits", "kind", "metric", "value", "unit", "ratio", "reference"]
    column = lines[0].index("metric")
    assert [line[column:].split()[0] for line in lines] == ["metric", "loss", "time"]


def test_time_alternating_runs_in_turn_and_reverses_every_second_round(harness):
    calls = []
    timings = harness.time_alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(timings["a"].runs) == 3
    assert timings["a"].low_seconds <= timings["a"].median_seconds <= timings["a"].high_seconds


def test_time_alternating_synchronizes_around_each_run(harness):
    calls = []
    harness.time_alternating({"a": lambda: calls.append("run")}, 2, 0, lambda: calls.append("wait"))
    assert calls == ["wait", "run", "wait"] * 2


def test_ratio_is_the_median_of_paired_rounds(harness):
    ours = harness.Timing(1.0, 1.0, 2.0, (1.0, 2.0, 1.0))
    theirs = harness.Timing(3.0, 3.0, 8.0, (3.0, 8.0, 3.0))
    assert ours.ratio_to(theirs) == 3.0


@pytest.mark.parametrize(("contenders", "repeats"), [({}, 3), ({"a": print}, 0)])
def test_time_alternating_refuses_nothing_to_time(harness, contenders, repeats):
    with pytest.raises(ValueError, match="at least one contender"):
        harness.time_alternating(contenders, repeats)


def test_merged_keeps_what_was_not_measured_again(harness, tmp_path):
    earlier = records(harness)
    path = harness.write("case", earlier, tmp_path)
    fresh = [harness.Record({"bits": 12}, "time", 6.0, "ns")]
    assert harness.merged(fresh, path) == [earlier[0], *fresh]
    assert harness.merged(fresh, tmp_path / "none.json") == fresh
