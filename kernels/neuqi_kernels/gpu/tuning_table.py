"""Plans that were measured on a GPU: the JSON files in ``tuning/`` and those that ``NEUQI_GPU_TUNING`` names.

The key is architecture, bits, group, N, K and a bucket of token counts. ``tuning/README.md`` shows the format.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from neuqi_kernels.env import tuning_path
from neuqi_kernels.gpu.plan import Plan
from neuqi_kernels.gpu.planar import TILE_ROWS

FOLDER = Path(__file__).resolve().parent / "tuning"
VERSION = 1
# Upper bounds; the last bucket has no end.
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
_KERNELS = ("decode_mm", "mid_mm", "prefill_mm", "dequant")

Key = tuple[str, int, int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """The fastest plan of a layer for up to ``tokens`` tokens; ``ratio``: the rule's time divided by its time.

    ``backend``: another backend of the dispatch where it was measured to be faster still, see ``preference.py``.
    """

    bits: int
    group: int
    n: int
    k: int
    tokens: int
    plan: Plan
    microseconds: float
    ratio: float
    backend: str = "triton"


@dataclass(frozen=True)
class Run:
    """Entries measured together, and on what: device, versions, commit and date as strings."""

    device: str
    multiprocessors: int
    versions: dict[str, str]
    commit: str | None
    date: str
    entries: tuple[Entry, ...]


def bucket(m: int) -> int:
    """Return the upper bound of the bucket of ``m`` tokens."""
    return TOKEN_BUCKETS[min(bisect.bisect_left(TOKEN_BUCKETS, m), len(TOKEN_BUCKETS) - 1)]


def find(architecture: str, bits: int, group: int, n: int, k: int, m: int) -> Plan | None:
    """Return the measured plan, or None where nothing was measured.

    Raises:
        ValueError: a file is not a table.
    """
    plans = _plans(tuning_path())
    return plans.get((architecture, bits, group, n, k, bucket(m))) if plans else None


def read(path: Path) -> tuple[str, list[Run]]:
    """Return the architecture and the runs of a file, the oldest first.

    Raises:
        ValueError: the file is not a table of this version.
    """
    try:
        body = json.loads(path.read_text())
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']}")
        return body["architecture"], [_run(run) for run in body["runs"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected a table of GPU plans, version {VERSION}, in {path}, got {error!r}. "
            "Write it again with `neuqi bench kernels --tune`, or remove it."
        ) from error


def check_writable(path: Path, architecture: str) -> list[Run]:
    """Return the runs that the file has already, so that hours of measuring do not end in an error.

    Raises:
        ValueError: the file that is there is no table, or one of another architecture.
        OSError: the folder cannot be written to.
    """
    known, runs = read(path) if path.exists() else (architecture, [])
    if known != architecture:
        raise ValueError(
            f"expected a table of {architecture} in {path}, it is one of {known}. Name another file."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        return runs


def write(path: Path, architecture: str, run: Run) -> None:
    """Add ``run`` to the file, in place of earlier entries for the same layers; all or nothing.

    Raises:
        ValueError: the file that is there is no table, or one of another architecture.
    """
    runs = check_writable(path, architecture)
    replaced = {_place(entry) for entry in run.entries}
    kept = []
    for old in runs:
        entries = tuple(entry for entry in old.entries if _place(entry) not in replaced)
        kept += [asdict(replace(old, entries=entries))] if entries else []
    body = {"version": VERSION, "architecture": architecture, "runs": [*kept, asdict(run)]}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as partial:
        try:
            json.dump(body, partial, indent=1)
            partial.write("\n")
            partial.close()
            os.chmod(partial.name, 0o644)
            os.replace(partial.name, path)
        except BaseException:
            os.unlink(partial.name)
            raise
    _plans.cache_clear()


@functools.cache
def _plans(extra: str | None) -> dict[Key, Plan]:
    plans: dict[Key, Plan] = {}
    for path in _files(extra):
        architecture, runs = read(path)
        for run in runs:
            plans.update({(architecture, *_place(entry)): entry.plan for entry in run.entries})
    return plans


def _files(extra: str | None) -> Iterator[Path]:
    yield from sorted(FOLDER.glob("*.json"))
    if extra is None:
        return
    path = Path(extra)
    if not path.exists():
        raise ValueError(
            f"expected a file or folder of GPU plans, NEUQI_GPU_TUNING names {extra!r}, which does not exist. "
            "Unset it or correct it."
        )
    yield from sorted(path.glob("*.json")) if path.is_dir() else (path,)


def _place(entry: Entry) -> tuple[int, int, int, int, int]:
    return entry.bits, entry.group, entry.n, entry.k, entry.tokens


def _run(body: dict[str, Any]) -> Run:
    return Run(**(body | {"entries": tuple(_entry(entry) for entry in body["entries"])}))


def _entry(body: dict[str, Any]) -> Entry:
    entry = Entry(**(body | {"plan": Plan(**body["plan"])}))
    if entry.tokens not in TOKEN_BUCKETS:
        raise ValueError(f"a bucket of {entry.tokens} tokens")
    numbers = {
        field.name: getattr(entry.plan, field.name) for field in fields(Plan) if field.name != "kernel"
    }
    legal = entry.plan.kernel in _KERNELS and all(isinstance(number, int) for number in numbers.values())
    if legal and entry.plan.kernel != "dequant":
        tiles = (TILE_ROWS,) if entry.plan.kernel == "decode_mm" else (TILE_ROWS, 2 * TILE_ROWS)
        legal = min(numbers.values()) > 0 and entry.plan.block_n in tiles
    if not legal:
        raise ValueError(f"the plan {entry.plan}")
    return entry
