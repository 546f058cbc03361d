"""What a worker tells about the weights it holds: the numbers behind the ``neuqi_*`` metrics."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuqi_serve.config import WeightSpec


@dataclass
class LayerRecord:
    """One quantized layer: where its weights came from, their bytes and the seconds spent.

    ``role``: ``linear``, ``experts`` (of which a layer has two records, one for each of its products), ``lm_head`` or
    ``embed_tokens`` (which a tied head shares).
    ``original_bytes`` are those of the same slice in the model's dtype. ``created_at`` and ``finished_at`` are
    readings of ``time.perf_counter``.
    """

    source: str
    spec: WeightSpec
    original_bytes: int
    created_at: float
    finished_at: float = 0.0
    packed_bytes: int = 0
    scale_zero_bytes: int = 0
    quantize_seconds: float = 0.0
    repack_seconds: float = 0.0
    backend: str = ""
    role: str = "linear"


def load_report(model: torch.nn.Module, rank: int = 0) -> dict[str, Any]:
    """Return the weight bytes by kind, the kernels, the load phases and the memory of this worker.

    ``weight_bytes["unquantized"]`` counts every other parameter once, in the dtype of the model, whatever a
    kernel has made of it since. ``phases["read"]`` is the wall time between the first layer made and the last
    layer finished that was neither quantizing nor repacking. Bytes are of this rank's slice.
    """
    records = _records(model)
    packed = sum(r.packed_bytes for r in records)
    scale_zero = sum(r.scale_zero_bytes for r in records)
    quantized_original = sum(r.original_bytes for r in records)
    unquantized = sum(_unquantized_bytes(model))
    weights = sum(r.packed_bytes * 8 // r.spec.bits for r in records)
    # Width and group size of a model are those of its linear layers.
    first = min(records, key=lambda record: record.role != "linear", default=None)
    return {
        "pid": os.getpid(),
        "rank": rank,
        "source": first.source if first else "none",
        "bits": first.spec.bits if first else None,
        "group_size": first.spec.group_size if first else None,
        "scale_dtype": first.spec.scale_dtype if first else None,
        "bits_per_weight": 8 * (packed + scale_zero) / weights if weights else None,
        "weight_bytes": {
            "packed": packed,
            "scale_zero": scale_zero,
            "unquantized": unquantized,
            "original": quantized_original + unquantized,
        },
        "layers": len(records),
        "kernels": [
            {"backend": backend, "bits": bits, "layers": layers}
            for (backend, bits), layers in Counter((r.backend, r.spec.bits) for r in records).items()
        ],
        "phases": _phases(records),
        **_memory(),
        "reported_at": time.time(),
    }


def device_report(runner: Any) -> dict[str, Any]:
    """Return ``kv_cache_bytes``, the ``host``'s name, and on an accelerator its memory ``used`` and ``total`` in bytes.

    ``runner`` is a worker's model runner; a layer's cache may be a tensor or several.
    """
    storages: dict[int, int] = {}
    pending = list(getattr(runner, "kv_caches", None) or ())
    while pending:
        found = pending.pop()
        if isinstance(found, list | tuple):
            pending.extend(found)
        elif isinstance(found, torch.Tensor):
            # Layers may share one tensor.
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    report: dict[str, Any] = {"kv_cache_bytes": sum(storages.values()), "host": platform.node()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        report["accelerator_memory"] = {"used": total - free, "total": total}
    return report


def _records(model: torch.nn.Module) -> list[LayerRecord]:
    found: list[LayerRecord] = []
    for module in model.modules():
        held = getattr(module, "neuqi_record", ())
        found += held if isinstance(held, tuple) else (held,)
    return found


def _phases(records: list[LayerRecord]) -> dict[str, float]:
    if not records:
        return {}
    quantize = sum(r.quantize_seconds for r in records)
    repack = sum(r.repack_seconds for r in records)
    wall = max(r.finished_at for r in records) - min(r.created_at for r in records)
    return {"read": max(0.0, wall - quantize - repack), "quantize": quantize, "repack": repack}


def _unquantized_bytes(model: torch.nn.Module) -> Iterator[int]:
    seen: set[int] = set()
    for module in model.modules():
        if hasattr(module, "neuqi_record"):
            # Only a bias is left of the layer as the checkpoint had it.
            named = [p for name, p in module.named_parameters(recurse=False) if name == "bias"]
        else:
            named = list(module.parameters(recurse=False))
        for parameter in named:
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield parameter.nbytes or _emptied_bytes(module, parameter)


def _emptied_bytes(module: torch.nn.Module, parameter: torch.nn.Parameter) -> int:
    """Bytes of a weight that vLLM has handed to a CPU kernel and emptied: its size is left in the module."""
    # A replicated layer, such as a router, has whole sizes only.
    sizes = (
        ("output_size_per_partition", "num_embeddings_per_partition", "output_size"),
        ("input_size_per_partition", "embedding_dim", "input_size"),
    )
    n, k = (
        next((getattr(module, name) for name in names if getattr(module, name, None)), 0) for names in sizes
    )
    return int(n) * int(k) * parameter.element_size()


def _memory() -> dict[str, int]:
    """Resident and peak resident bytes of this process."""
    # ru_maxrss is in kibibytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    resident = peak
    if statm.exists():
        resident = int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"rss_bytes": resident, "peak_rss_bytes": max(peak, resident)}
