"""The Markdown table and the plot, from records that are made up here and stay here."""

from __future__ import annotations

import json
from typing import Any

import pytest

CONTENDERS = {"torch bf16": 1.0, "neuqi": 3.1, "gemlite": 1.7, "Marlin": 2.6}


def record(
    case: dict[str, Any], metric: str, value: float, unit: str, ratio: float | None = None
) -> dict[str, Any]:
    reference = None if ratio is None else "a reference"
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "reference": reference,
        "ratio": ratio,
    }


def result() -> dict[str, Any]:
    """Three layers at 2 and 4 bits; Marlin takes part at 4 bits and 1 token of the first layer only."""
    records = []
    for bits in (4, 2):
        for n, k in ((28672, 4096), (4096, 14336), (6144, 4096)):
            for tokens in (16, 1, 512):
                for name, speed in CONTENDERS.items():
                    if name == "Marlin" and (bits, n, tokens) != (4, 28672, 1):
                        continue
                    case = {
                        "contender": name,
                        "n": n,
                        "k": k,
                        "bits": bits,
                        "group_size": 128,
                        "tokens": tokens,
                    }
                    case["zeros"] = "integer" if name == "Marlin" else "real"
                    ratio = 1 + (speed - 1) / tokens
                    micros = 50.0 * tokens**0.2 / ratio
                    records.append(record(case, "time", micros, "us", ratio))
                    records.append(record(case, "time_p10", 0.98 * micros, "us"))
                    records.append(record(case, "time_p90", 1.05 * micros, "us"))
                    records.append(record(case, "packed_bandwidth", 2000.0, "GB/s", 0.2 * ratio))
                    records.append(record(case, "error", 0.0021, "rel-L2"))
    for clock in (1700.0, 1980.0):
        gpu = {"contender": "GPU", "n": 1, "k": 1, "bits": 4, "group_size": 128, "tokens": 0}
        records.append(record(gpu, "sm_clock", clock, "MHz"))
    notes = {
        "absent": {"gemlite": {"has no kernel": ["1x1, 3 bits", "2x2, 3 bits", "3x3, 3 bits"]}},
        "left out for lack of time": ["57344x8192, 4 bits, group 128: 12 s expected, 3 s left"],
    }
    where = {
        "device": "A made-up GPU",
        "versions": {"torch": "0.0"},
        "commit": "0000000",
        "date": "2000-01-01",
    }
    return {**where, "notes": notes, "records": records}


def test_every_row_of_the_table(load):
    text = load("gpu_report").markdown(result())
    assert "A made-up GPU; torch 0.0; commit 0000000; 2000-01-01." in text
    four, two = text.split("## 4 bits, group 128")[1].split("## 2 bits, group 128")
    assert "| N×K | tokens | torch bf16 | neuqi | gemlite | Marlin* |" in four
    assert "Marlin" not in two
    first = next(line for line in four.splitlines() if line.startswith("| 28672×4096 | 1 |"))
    assert first.split("|")[3].strip() == "50.0 (49.0–52.5), 20 %"
    assert first.split("|")[4].strip() == "16.1 (15.8–16.9), 3.10×, 62 %"
    assert next(line for line in four.splitlines() if "| 4096×14336 | 16 |" in line).endswith("| – |")
    tokens = [line.split("|")[2].strip() for line in two.splitlines() if line.startswith("| 6144×4096")]
    assert tokens == ["1", "16", "512"]


def test_the_table_says_what_was_left_out_and_the_clocks(load):
    text = load("gpu_report").markdown(result())
    assert "While measuring: sm clock 1700–1980 MHz." in text
    assert "- gemlite, 1x1, 3 bits and 2 more: has no kernel" in text
    assert "- 57344x8192, 4 bits, group 128: 12 s expected, 3 s left" in text
    bare = result() | {"notes": {}}
    bare["records"] = [entry for entry in bare["records"] if entry["case"]["contender"] != "GPU"]
    text = load("gpu_report").markdown(bare)
    assert "Left out" not in text
    assert "nvidia-smi did not answer" in text


def test_long_lists_are_shortened(load):
    report = load("gpu_report")
    lines = [str(number) for number in range(25)]
    assert report.shortened(lines) == [*lines[:20], "and 5 more for lack of time"]
    assert report.shortened(lines[:20]) == lines[:20]


def test_render_writes_both_files(load, tmp_path):
    report = load("gpu_report")
    path = tmp_path / "gpu_kernels.json"
    path.write_text(json.dumps(result()))
    report.render(path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "gpu_kernels.json",
        "gpu_kernels.md",
        "gpu_kernels.png",
    }
    assert (tmp_path / "gpu_kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_panels_hold_the_records(load):
    report = load("gpu_report")
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = report.matching(report.rows_of(result()), bits=4)
    figure, (bars, lines) = plt.subplots(1, 2)
    report.bandwidth_panel(bars, rows, "bars")
    heights = [[round(bar.get_height()) for bar in container] for container in bars.containers]
    assert heights == [[20, 20, 20], [62, 62, 62], [34, 34, 34], [52, 0, 0]]
    report.speed_panel(lines, report.matching(rows, n=28672), "lines")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in lines.get_lines()[1:]}
    assert set(drawn) == {"neuqi", "gemlite", "Marlin"}
    assert drawn["neuqi"] == [[1, 3.1], [16, 1 + 2.1 / 16], [512, 1 + 2.1 / 512]]
    assert (lines.get_xscale(), lines.get_yscale()) == ("log", "log")
    plt.close(figure)
