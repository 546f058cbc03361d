"""Which layers a recipe names: unfused Hugging Face names against vLLM's fused modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.format.quantization_config import is_name_of


def shard_names(prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Checkpoint names behind the vLLM module ``prefix``: ``…qkv_proj`` → ``…q_proj, …k_proj, …v_proj``."""
    head, _, last = prefix.rpartition(".")
    parts = fused.get(last)
    if not parts:
        return [prefix]
    return [f"{head}.{part}" if head else part for part in parts]


def is_skipped(prefix: str, patterns: Iterable[str], fused: Mapping[str, Sequence[str]]) -> bool:
    """Whether the module stays unquantized.

    Raises:
        UnsupportedModelError: some but not all shards of a fused module are named.
    """
    patterns = list(patterns)
    if any(is_name_of(pattern, prefix) for pattern in patterns):
        return True
    names = shard_names(prefix, fused)
    hits = [name for name in names if any(is_name_of(pattern, name) for pattern in patterns)]
    if hits and len(hits) != len(names):
        raise UnsupportedModelError(
            f"expected all or none of {names} to be left unquantized, because vLLM fuses them into one layer; "
            f"the recipe names only {hits}. Name all of them, or none."
        )
    return bool(hits)
