"""What a quantization did, as a value, as JSON and as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuqi_serve.format.manifest import Manifest, PackedModule
from neuqi_serve.format.safetensors_file import TensorSpec

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind (last name component, of experts the last two) and spec; ``parameters`` counts weights."""

    kind: str
    bits: int
    group_size: int
    layers: int
    parameters: int
    source_bytes: int
    packed_bytes: int
    relative_error: float | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero-points included."""
        return 8 * self.packed_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class CheckpointSummary:
    """Totals of a packed checkpoint; ``kept_bytes``: tensors that stayed as they were."""

    groups: tuple[LayerGroup, ...]
    kept_tensors: int
    kept_bytes: int
    unfit: Mapping[str, str]
    seconds: float | None = None

    @property
    def total(self) -> LayerGroup:
        """All packed layers together; bits and group size are those of the first group."""
        if not self.groups:
            return LayerGroup("all", 0, 0, 0, 0, 0, 0, None)
        first = self.groups[0]
        return _merge("all", first.bits, first.group_size, [(g, g.layers) for g in self.groups])

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors before."""
        return self.total.source_bytes + self.kept_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors now."""
        return self.total.packed_bytes + self.kept_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object; sizes in bytes; ``seconds`` and ``unfit`` only for a quantization just made."""
        total = self.total
        made = {} if self.seconds is None else {"seconds": round(self.seconds, 3), "unfit": dict(self.unfit)}
        return {
            "layers": total.layers,
            "bits_per_weight": round(total.bits_per_weight, 4),
            "mean_relative_error": total.relative_error,
            "bytes_before": self.source_bytes,
            "bytes_after": self.packed_bytes,
            "kept_tensors": self.kept_tensors,
            "kept_bytes": self.kept_bytes,
            **made,
            "groups": [_group_to_dict(group) for group in self.groups],
        }

    def to_table(self) -> str:
        """Return the summary as aligned text."""
        head = (
            "layers",
            "count",
            "bits",
            "group",
            "bits/weight",
            "MiB before",
            "MiB after",
            "mean rel. error",
        )
        kept, total = _mebibytes(self.kept_bytes), self.total
        sizes = (_mebibytes(self.source_bytes), _mebibytes(self.packed_bytes))
        rows = [
            head,
            *(_row(group) for group in self.groups),
            ("kept as they were", str(self.kept_tensors), "", "", "", kept, kept, ""),
            ("total", "", "", "", f"{total.bits_per_weight:.3f}", *sizes, _error(total.relative_error)),
        ]
        lines = [_aligned(rows)]
        kinds = Counter((name.rpartition(".")[2], reason) for name, reason in self.unfit.items())
        lines += [f"left unquantized: {count} × {kind}: {reason}" for (kind, reason), count in kinds.items()]
        if self.seconds is not None:
            lines.append(f"{self.seconds:.1f} s")
        return "\n".join(lines)


def summarize(
    manifest: Manifest, unfit: Mapping[str, str] | None = None, seconds: float | None = None
) -> CheckpointSummary:
    """Group the modules of a manifest by kind and spec."""
    by_kind: dict[tuple[str, int, int], list[PackedModule]] = {}
    for name, module in manifest.modules.items():
        key = (_kind(name), module.spec.bits, module.spec.group_size)
        by_kind.setdefault(key, []).append(module)
    packed = {f"{name}.{part}" for name, module in manifest.modules.items() for part in module.tensors}
    kept: list[TensorSpec] = [record.spec for name, record in manifest.tensors.items() if name not in packed]
    groups = tuple(
        _merge(kind, bits, group_size, [(_single(kind, module), 1) for module in modules])
        for (kind, bits, group_size), modules in by_kind.items()
    )
    return CheckpointSummary(groups, len(kept), sum(spec.nbytes for spec in kept), dict(unfit or {}), seconds)


def describe_layers(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return spec, shape and sizes of every packed module as a JSON object; a layer's experts together.

    ``….experts.*.gate_proj`` has the number of ``experts``, the shape of one and the sizes of all.
    """
    described = {}
    for name, shape, group in _rows(manifest):
        entry = _group_to_dict(group)
        count = entry.pop("layers")
        del entry["kind"]
        many = {"experts": count} if "*" in name else {}
        described[name] = {"shape": list(shape), **many, **entry}
    return described


def layer_table(manifest: Manifest) -> str:
    """Return one aligned line per packed module, or per projection of a layer's experts."""
    head = ("layer", "shape", "bits", "group", "bits/weight", "MiB before", "MiB after", "rel. error")
    rows: list[tuple[str, ...]] = [head]
    for name, shape, group in _rows(manifest):
        sizes = (*((group.layers,) if group.layers > 1 else ()), *shape)
        rows.append((name, "×".join(map(str, sizes)), *_row(group)[2:]))
    return _aligned(rows) + "\n"


def _rows(manifest: Manifest) -> list[tuple[str, tuple[int, int], LayerGroup]]:
    """Name, shape and sizes of every module, those of a layer's experts under one name if they are alike."""
    alike: dict[tuple[str, tuple[int, int], int, int], list[LayerGroup]] = {}
    for name, module in manifest.modules.items():
        row = (_EXPERT.sub(".experts.*.", name), module.shape, module.spec.bits, module.spec.group_size)
        alike.setdefault(row, []).append(_single(name, module))
    names = Counter(name for name, *_ in alike)
    rows = []
    for (name, shape, bits, group_size), groups in alike.items():
        # Experts of several widths are told apart.
        told = f"{name} ({bits} bits, group {group_size})" if names[name] > 1 else name
        rows.append((told, shape, _merge(told, bits, group_size, [(group, 1) for group in groups])))
    return rows


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return f"experts.{last}" if _EXPERT.search(name) else last


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )


def _single(kind: str, module: PackedModule) -> LayerGroup:
    out_features, in_features = module.shape
    return LayerGroup(
        kind,
        module.spec.bits,
        module.spec.group_size,
        1,
        out_features * in_features,
        module.source_bytes,
        module.packed_bytes,
        module.relative_error,
    )


def _merge(kind: str, bits: int, group_size: int, parts: list[tuple[LayerGroup, int]]) -> LayerGroup:
    groups = [group for group, _ in parts]
    known = [(group.relative_error, count) for group, count in parts if group.relative_error is not None]
    mean = sum(error * count for error, count in known) / sum(count for _, count in known) if known else None
    return LayerGroup(
        kind,
        bits,
        group_size,
        sum(group.layers for group in groups),
        sum(group.parameters for group in groups),
        sum(group.source_bytes for group in groups),
        sum(group.packed_bytes for group in groups),
        mean,
    )


def _group_to_dict(group: LayerGroup) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "layers": group.layers,
        "bits": group.bits,
        "group_size": group.group_size,
        "bits_per_weight": round(group.bits_per_weight, 4),
        "bytes_before": group.source_bytes,
        "bytes_after": group.packed_bytes,
        "mean_relative_error": group.relative_error,
    }


def _row(group: LayerGroup) -> tuple[str, ...]:
    return (
        group.kind,
        str(group.layers),
        str(group.bits),
        "row" if group.group_size == -1 else str(group.group_size),
        f"{group.bits_per_weight:.3f}",
        _mebibytes(group.source_bytes),
        _mebibytes(group.packed_bytes),
        _error(group.relative_error),
    )


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
