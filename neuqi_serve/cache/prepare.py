"""Find the cache entry of a model, or make it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from neuqi_serve.budget.budget import Budget
from neuqi_serve.budget.plan import (
    DEFAULT_SENSITIVITY,
    budget_bytes,
    budget_options,
    fitting_selection,
    plan_budget,
)
from neuqi_serve.cache.key import CacheKey, cache_key
from neuqi_serve.cache.store import Cache
from neuqi_serve.config import SUPPORTED_GROUP_SIZES
from neuqi_serve.errors import IntegrityError
from neuqi_serve.format.source import open_source
from neuqi_serve.pipeline.quantize_checkpoint import (
    QuantizationSettings,
    other_files,
    plan_tensors,
    quantize_checkpoint,
)
from neuqi_serve.pipeline.selection import select_modules


@dataclass(frozen=True)
class WantedWidths:
    """A budget, and the group sizes among which layers may choose."""

    budget: Budget
    group_sizes: tuple[int, ...] = SUPPORTED_GROUP_SIZES


@dataclass(frozen=True)
class Prepared:
    """``key`` of the entry, whether it was ``found`` or made, and the ``seconds`` that took."""

    key: str
    found: bool
    seconds: float


def prepare(
    folder: Path,
    settings: QuantizationSettings,
    cache: Cache,
    tell: Callable[[str], None],
    stream: TextIO | None = None,
    wanted: WantedWidths | None = None,
) -> Prepared:
    """Return the entry of an unquantized model, read and found to be whole, or packed just now.

    Of several processes that ask for the same entry at once, one makes it and the others wait. ``tell`` receives what
    a user should know, ``stream`` the progress of packing. ``wanted``: widths are chosen under a budget.

    Raises:
        UnsupportedModelError: a model that cannot be packed.
        UsageError: settings that do not fit the model.
        IntegrityError: the model is damaged, or changed while it was packed.
        DoesNotFitError: no room on the disk or within the cache's limit.
        OSError: the disk is full or cannot be written.
    """
    started = time.monotonic()
    source = open_source(folder)
    if wanted is None:
        selection = select_modules(source, settings.spec, settings.vocabulary)
        nbytes = sum(spec.nbytes for spec in plan_tensors(source, selection).values())
    else:
        selection = fitting_selection(source, settings, wanted.group_sizes)
        nbytes = budget_bytes(source, selection, wanted.budget)
        options = budget_options(wanted.budget, DEFAULT_SENSITIVITY, wanted.group_sizes)
        settings = replace(settings, budget=options)
    key = cache_key(source, selection, settings, cache.digests)
    if _is_whole(cache, key, tell):
        return Prepared(key.digest, True, time.monotonic() - started)
    with cache.lock_build(key.digest, lambda: tell("another process packs this model: waiting for it")):
        found = _is_whole(cache, key, lambda _: None)
        if not found:
            cache.make_room(nbytes + sum(path.stat().st_size for path in other_files(source.path)))
            if wanted is not None:
                plan = plan_budget(
                    folder, settings, wanted.budget, stream=stream, group_sizes=wanted.group_sizes
                )
                tell("; ".join(plan.lines()))
                settings = plan.settings
            _pack(folder, key, settings, cache, stream)
    return Prepared(key.digest, found, time.monotonic() - started)


def _is_whole(cache: Cache, key: CacheKey, tell: Callable[[str], None]) -> bool:
    try:
        damage = cache.damage(key.digest)
    except FileNotFoundError:
        return False
    if damage is not None:
        tell(f"the cache entry is damaged and is made anew: {damage}")
    return damage is None


def _pack(
    folder: Path, key: CacheKey, settings: QuantizationSettings, cache: Cache, stream: TextIO | None
) -> None:
    destination = cache.building_path(key.digest)
    # What a process left that was killed between writing and publishing; nobody has looked at it since.
    quantize_checkpoint(folder, destination, replace(settings, overwrite=True), stream)
    if not key.is_current():
        raise IntegrityError(
            f"expected the files of {folder} to stay as they were while they were packed, got changed ones. "
            "Start again."
        )
    cache.publish(key.digest)
