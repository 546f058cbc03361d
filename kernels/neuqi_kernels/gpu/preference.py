"""Which backend a measured table prefers for a layer.

The tables are ``tuning/*.json`` beside this file, written from measurements. What this module reads of one::

    {"capability": 90, "entries": [{"bits": 3, "group": 128, "n": 6144, "k": 4096, "backend": "humming"}, …]}

An entry may hold more (tiles, the range of tokens); without ``backend`` it is about Triton. ``group`` 0 is the whole
row.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from neuqi_kernels.spec import GemmSpec

DEFAULT = "triton"
_TABLES = Path(__file__).parent / "tuning"
_Layer = tuple[int, int, int, int]


def preferred_backend(spec: GemmSpec) -> str | None:
    """Return the backend that the table of the GPU at hand prefers for the layer, or None where none is measured.

    A layer has one layout for all numbers of tokens. So where the entries of a layer disagree, none is preferred.
    """
    if spec.device_type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    named = table(_TABLES, 10 * major + minor).get(_key(spec))
    return next(iter(named)) if named is not None and len(named) == 1 else None


@functools.cache
def table(folder: Path, capability: int) -> dict[_Layer, frozenset[str]]:
    """Return the backends that the tables of a compute capability (90 for sm_90) name, by (bits, group, n, k).

    Raises:
        ValueError: a table is no JSON object, or one of its entries lacks a field.
    """
    named: dict[_Layer, frozenset[str]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if content["capability"] != capability:
                continue
            for entry in content["entries"]:
                layer = (int(entry["bits"]), int(entry["group"]), int(entry["n"]), int(entry["k"]))
                backend = str(entry.get("backend", DEFAULT))
                named[layer] = named.get(layer, frozenset()) | {backend}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected {path} to be a table with a capability and entries of bits, group, n and k, got "
                f"{type(error).__name__}: {error}. Write it again, or remove it."
            ) from None
    return named


def _key(spec: GemmSpec) -> _Layer:
    return spec.bits, 0 if spec.groups == 1 else spec.group, spec.n, spec.k
