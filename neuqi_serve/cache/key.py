"""The key of a cache entry: a SHA-256 over everything that its bytes depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from neuqi_serve._version import VERSION
from neuqi_serve.cache.digests import FileState, digest_files
from neuqi_serve.config import ALGORITHM_VERSION
from neuqi_serve.format.manifest import hash_file
from neuqi_serve.format.quantization_config import FORMAT_VERSION
from neuqi_serve.format.source import CONFIG_NAME, INDEX_NAME, SourceCheckpoint
from neuqi_serve.pipeline.quantize_checkpoint import QuantizationSettings, other_files
from neuqi_serve.pipeline.selection import Selection


@dataclass(frozen=True)
class CacheKey:
    """``digest``: 64 hexadecimal digits, the name of the entry. ``files``: the state of every file that went in."""

    digest: str
    files: Mapping[Path, FileState]

    def is_current(self) -> bool:
        """Whether no file that went in has changed since."""
        try:
            return all(FileState.of(path) == state for path, state in self.files.items())
        except OSError:
            return False


def cache_key(
    source: SourceCheckpoint, selection: Selection, settings: QuantizationSettings, records: Path
) -> CacheKey:
    """Compute the key of packing ``source``; ``records``: folder of known file digests.

    What goes in: the content of every file that is read or copied, by name; bits, groups, exceptions and what stays;
    preset, device, importance and budget; the versions of the algorithm, of the format and of this package.
    """
    named = [path for path in (source.path / CONFIG_NAME, source.path / INDEX_NAME) if path.exists()]
    files = digest_files([*source.shards, *named, *other_files(source.path)], records)
    importance = None if settings.importance is None else hash_file(settings.importance).sha256
    parts = {
        "files": {path.name: digest for path, (digest, _) in files.items()},
        "recipe": selection.recipe.to_dict(),
        "preset": settings.preset,
        "device": torch.device(settings.device).type,
        "importance": importance,
        "shard_bytes": settings.shard_bytes,
        "versions": {"algorithm": ALGORITHM_VERSION, "format": FORMAT_VERSION, "package": VERSION},
    }
    if settings.budget is not None:
        # The recipe is then the one from which widths are chosen, not the one chosen.
        parts["budget"] = settings.budget
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return CacheKey(digest, {path: state for path, (_, state) in files.items()})
