"""Checkpoints that store all experts of a layer in one tensor, seen as one matrix per projection of each expert.

transformers keeps ``….experts.gate_up_proj [E, 2·I, H]`` and ``….experts.down_proj [E, H, I]`` in memory and writes
``….experts.3.gate_proj.weight [I, H]`` and so on; some checkpoints are written as they are in memory. Each matrix is a
contiguous part of the file either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from neuqi_serve.format.safetensors_file import StoredTensor, TensorSpec

# Last name component of a fused tensor → the matrices that lie in it, in order.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def unfuse_experts(tensors: Mapping[str, StoredTensor], hidden_size: int | None) -> dict[str, StoredTensor]:
    """Return the tensors with those of fused experts replaced by one per matrix, ``….experts.3.gate_proj.weight``.

    A layer whose tensors have another orientation (``[E, H, 2·I]``) stays as it is.
    """
    found: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        parts = _PARTS.get(last) if prefix.endswith(".experts") and len(stored.spec.shape) == 3 else None
        if parts is None or not _rows_first(tensors, prefix, hidden_size):
            found[name] = stored
            continue
        experts, rows, columns = stored.spec.shape
        each = TensorSpec(stored.spec.dtype, (rows // len(parts), columns))
        for expert in range(experts):
            for place, part in enumerate(parts):
                offset = stored.offset + (expert * len(parts) + place) * each.nbytes
                found[f"{prefix}.{expert}.{part}.weight"] = replace(stored, spec=each, offset=offset)
    return found


def _rows_first(tensors: Mapping[str, StoredTensor], prefix: str, hidden_size: int | None) -> bool:
    """Whether the matrices are ``[N, K]``, as both tensors together tell."""
    shapes = []
    for last in ("gate_up_proj", "down_proj"):
        stored = tensors.get(f"{prefix}.{last}") or tensors.get(f"{prefix}.{last}.weight")
        if stored is None or len(stored.spec.shape) != 3:
            return False
        shapes.append(stored.spec.shape)
    (experts, rows, columns), down = shapes
    return rows % 2 == 0 and down == (experts, columns, rows // 2) and columns == hidden_size
