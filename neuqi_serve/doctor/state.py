"""The cache, the addresses to listen on, and the way to the hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from neuqi_serve.doctor.finding import Finding
from neuqi_serve.errors import NeuqiError
from neuqi_serve.server.listen_address import ListenAddress


def check_cache(root: Path, max_bytes: int | None) -> Finding:
    """Whether packed weights can be kept, and what is kept."""
    # It imports torch, which the doctor must survive without.
    from neuqi_serve.cache.store import Cache

    cache = Cache(root, max_bytes)
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            "cache",
            "warning",
            f"{root} cannot be written",
            "Weights are then quantized at every start: give a folder in NEUQI_CACHE_DIR.",
        )
    entries = cache.entries()
    free = shutil.disk_usage(existing).free
    used = sum(entry.nbytes for entry in entries)
    found = (
        f"{root}: {len(entries)} models, {used / 2**30:.2f} of at most {cache.limit() / 2**30:.2f} GiB; "
        f"{free / 2**30:.1f} GiB free"
    )
    if free < 1 << 30:
        return Finding(
            "cache", "warning", found, "Little room: `neuqi cache rm`, or name another NEUQI_CACHE_DIR."
        )
    return Finding("cache", "ok", found)


def check_address(host: str, port: int) -> Finding:
    """Whether the server could listen there now."""
    subject = f"address {host}:{port}"
    try:
        ListenAddress(host, port).check_free()
    except NeuqiError as error:
        return Finding(subject, "warning", "taken or not usable", str(error))
    return Finding(subject, "ok", "free")


def check_hub(offline: bool, has_token: bool) -> Finding:
    """Whether names of models can be looked up, as far as the environment tells; nothing is sent."""
    if offline:
        return Finding(
            "hub", "note", "HF_HUB_OFFLINE is set", "Only folders and downloaded models can be served."
        )
    return Finding("hub", "ok", "a token is set" if has_token else "no HF_TOKEN: gated models are refused")
