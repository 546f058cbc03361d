"""Which backend the measured tables prefer for a layer.

The tables are those of the measured plans: ``tuning/*.json`` and what ``NEUQI_GPU_TUNING`` names. An entry says with
``"backend"`` who was the fastest for its number of tokens; without it that is Triton::

    {"architecture": "sm_90", "runs": [{"entries": [
        {"bits": 3, "group": 128, "n": 6144, "k": 4096, "tokens": 1, "backend": "humming"}]}]}

``group`` 0 is the whole row. Later entries replace earlier ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from neuqi_kernels.env import tuning_path
from neuqi_kernels.spec import GemmSpec

DEFAULT = "triton"
_FOLDER = Path(__file__).resolve().parent / "tuning"
# Bits, group, N, K.
_Layer = tuple[int, int, int, int]


def preferred_backend(spec: GemmSpec) -> str | None:
    """Return the backend that the tables of the GPU at hand prefer for the layer, or None where none was measured.

    A layer has one layout for all numbers of tokens: where its entries disagree, none is preferred.

    Raises:
        ValueError: a table cannot be read.
    """
    if spec.device_type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    group = 0 if spec.groups == 1 else spec.group
    fastest = _fastest(_FOLDER, tuning_path(), f"sm_{major}{minor}").get(
        (spec.bits, group, spec.n, spec.k), {}
    )
    named = set(fastest.values())
    return named.pop() if len(named) == 1 else None


@functools.cache
def _fastest(folder: Path, extra: str | None, architecture: str) -> dict[_Layer, dict[int, str]]:
    """By layer and number of tokens."""
    fastest: dict[_Layer, dict[int, str]] = {}
    for path in _files(folder, extra):
        try:
            body = json.loads(path.read_text())
            if body["architecture"] != architecture:
                continue
            entries = [entry for run in body["runs"] for entry in run["entries"]]
            for entry in entries:
                layer = (int(entry["bits"]), int(entry["group"]), int(entry["n"]), int(entry["k"]))
                fastest.setdefault(layer, {})[int(entry["tokens"])] = str(entry.get("backend", DEFAULT))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected a table of measured GPU plans in {path}, got {type(error).__name__}: {error}. "
                "Write it again, or remove it."
            ) from error
    return fastest


def _files(folder: Path, extra: str | None) -> Iterator[Path]:
    yield from sorted(folder.glob("*.json"))
    if extra is not None:
        path = Path(extra)
        yield from sorted(path.glob("*.json")) if path.is_dir() else (path,)
