"""Write into a table of measured plans where Humming beat our kernels: ``python benchmarks/gpu_prefer.py TABLE``.

Reads ``results/gpu_kernels.json``, which ``gpu_kernels.py`` wrote on a GPU of the table's architecture. Every entry of
the table for a layer and a number of tokens that the result holds both times of gets or loses ``"backend":
"humming"``; the others stay as they are. A layer goes to Humming only where all its entries say so
(``neuqi_kernels/gpu/preference.py``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_report import replace_file, rows_of
from harness import RESULTS

OURS, OTHER = "neuqi", "Humming"
BACKEND = "humming"
# Faster by more than a measurement repeats itself.
MIN_GAIN = 1.02
Place = tuple[int, int, int, int, int]


def speeds(result: dict[str, Any]) -> dict[Place, float]:
    """How many times faster Humming was, by bits, group (0: the whole row), N, K and tokens."""
    times: dict[Place, dict[str, float]] = {}
    for row in rows_of(result):
        group = 0 if row["group_size"] in (-1, row["k"]) else row["group_size"]
        place = (row["bits"], group, row["n"], row["k"], row["tokens"])
        times.setdefault(place, {})[row["contender"]] = row["time"]
    return {place: at[OURS] / at[OTHER] for place, at in times.items() if {OURS, OTHER} <= at.keys()}


def mark(table: dict[str, Any], result: dict[str, Any]) -> tuple[int, int]:
    """Mark the entries of the table; how many went to Humming, and how many the result knows.

    Raises:
        ValueError: the result was measured on another architecture.
    """
    architecture = result.get("notes", {}).get("architecture")
    if architecture != table["architecture"]:
        raise ValueError(
            f"expected a result of {table['architecture']}, it is one of {architecture}. Measure on the same GPU."
        )
    measured = speeds(result)
    marked = known = 0
    for entry in (entry for run in table["runs"] for entry in run["entries"]):
        speed = measured.get(tuple(entry[name] for name in ("bits", "group", "n", "k", "tokens")))
        if speed is None:
            continue
        known += 1
        entry.pop("backend", None)
        if speed >= MIN_GAIN:
            entry["backend"] = BACKEND
            marked += 1
    return marked, known


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="kernels/neuqi_kernels/gpu/tuning/sm_90.json, for example")
    parser.add_argument("--result", type=Path, default=RESULTS / "gpu_kernels.json")
    options = parser.parse_args(arguments)
    table = json.loads(options.table.read_text())
    try:
        marked, known = mark(table, json.loads(options.result.read_text()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    replace_file(options.table, (json.dumps(table, indent=1) + "\n").encode())
    print(f"{options.table}: {marked} of {known} measured entries are faster with Humming")


if __name__ == "__main__":
    main()
