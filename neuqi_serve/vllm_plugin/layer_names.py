"""Which layers a recipe names: unfused Hugging Face names against vLLM's fused modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vllm.logger import init_logger

from neuqi_serve.config import DEFAULT_SKIP, EMBEDDING, LM_HEAD
from neuqi_serve.errors import UnsupportedModelError
from neuqi_serve.format.quantization_config import REGEX_PREFIX, is_name_of, trailing_names

logger = init_logger("vllm.neuqi")


class UnusedNames:
    """Notices names in the user's settings that no layer of the model has: a slip that would change nothing.

    ``expect`` the names, ``see`` every layer while the model is built, ``warn`` when it is complete.
    """

    def __init__(self) -> None:
        self._unused: set[str] = set()

    def expect(self, names: Iterable[str]) -> None:
        """Take the names of a recipe; those that stand in every recipe say nothing about this model."""
        self._unused = set(names) - {*DEFAULT_SKIP, LM_HEAD, EMBEDDING}

    def silence(self) -> None:
        """Expect nothing."""
        self._unused = set()

    def see(self, prefix: str, shards: Iterable[str]) -> None:
        """Strike out the names of a layer and of the shards fused into it."""
        if self._unused:
            seen = (prefix, *shards)
            self._unused.difference_update(*map(trailing_names, seen))
            expressions = {name for name in self._unused if name.startswith(REGEX_PREFIX)}
            self._unused -= {n for n in expressions if any(is_name_of(n, module) for module in seen)}

    def warn(self) -> None:
        """Say once which names no layer has."""
        if self._unused:
            logger.warning(
                "neuqi: the settings name %s, but no layer of this model is called so: nothing changes by it",
                ", ".join(sorted(self._unused)),
            )
            self.silence()


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
