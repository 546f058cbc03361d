"""``neuqi cache``: the packed weights that starts of the server keep for the next one."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from neuqi_serve.env import read_environment
from neuqi_serve.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from neuqi_serve.cache.store import Cache, Entry

_DESCRIPTION = """Packed weights of models that `neuqi serve` has quantized, kept in $NEUQI_CACHE_DIR, else
$XDG_CACHE_HOME/neuqi, else ~/.cache/neuqi. Above the limit (NEUQI_CACHE_MAX_GIB; by default 50
GiB or a fifth of the disk, whichever is less) the entries used longest ago make room."""
_SHOWN_KEY = 12


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        "cache", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list the entries, the one used last first")
    remove = actions.add_parser("rm", help="remove entries that no server uses")
    remove.add_argument("keys", nargs="*", metavar="KEY", help="key of an entry, or its beginning")
    remove.add_argument("--all", action="store_true", help="remove every entry that is not in use")
    verify = actions.add_parser("verify", help="read entries in full and compare their checksums")
    verify.add_argument("keys", nargs="*", metavar="KEY", help="key or its beginning (default: all entries)")
    for action in (listing, remove, verify):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List, remove or verify."""
    from neuqi_serve.cache.store import Cache

    environment = read_environment()
    cache = Cache(environment.cache_dir, environment.cache_max_bytes)
    action = {"ls": _list, "rm": _remove, "verify": _verify}[args.action]
    return action(cache, args)


def _list(cache: Cache, args: argparse.Namespace) -> int:
    entries = cache.entries()
    described = [_described(entry) for entry in entries]
    total = sum(entry.nbytes for entry in entries)
    if args.json:
        body = {"path": str(cache.root), "bytes": total, "limit_bytes": cache.limit(), "entries": described}
        print(json.dumps(body, indent=2))
        return 0
    for one in described:
        used = datetime.fromtimestamp(one["last_used"], UTC).strftime("%Y-%m-%d %H:%M")
        bits = "damaged" if one["bits"] is None else f"{one['bits']} bits g{one['group_size']}"
        held = "in use" if one["in_use"] else ""
        print(
            f"{one['key'][:_SHOWN_KEY]}  {one['bytes'] / 2**20:>10.1f} MiB  {used}  {bits:<12} {one['model']}  {held}"
        )
    print(f"{len(entries)} entries, {total / 2**30:.2f} of {cache.limit() / 2**30:.2f} GiB in {cache.root}")
    return 0


def _remove(cache: Cache, args: argparse.Namespace) -> int:
    if bool(args.keys) == args.all:
        raise UsageError("expected keys of entries, or --all. `neuqi cache ls` lists them.")
    chosen = cache.entries() if args.all else [cache.find(prefix) for prefix in args.keys]
    removed = {entry.key: cache.remove(entry) for entry in chosen}
    kept = [key for key, gone in removed.items() if not gone]
    if args.json:
        print(json.dumps({"removed": [key for key in removed if key not in kept], "in_use": kept}, indent=2))
    else:
        for key, gone in removed.items():
            print(f"{key[:_SHOWN_KEY]}  {'removed' if gone else 'kept: a server uses it'}")
    if kept and not args.all:
        raise UsageError(
            f"expected entries that no server uses, got {kept[0][:_SHOWN_KEY]}. Stop the server first."
        )
    return 0


def _verify(cache: Cache, args: argparse.Namespace) -> int:
    entries = [cache.find(prefix) for prefix in args.keys] if args.keys else cache.entries()
    found: dict[str, str | None] = {}
    for entry in entries:
        try:
            found[entry.key] = cache.damage(entry.key)
        except FileNotFoundError:
            continue
        if not args.json:
            print(f"{entry.key[:_SHOWN_KEY]}  {found[entry.key] or 'whole'}", flush=True)
    damaged = [key for key, damage in found.items() if damage is not None]
    if args.json:
        print(json.dumps({"verified": len(found), "damaged": {key: found[key] for key in damaged}}, indent=2))
    if damaged:
        raise IntegrityError(
            f"expected whole entries, got {len(damaged)} damaged of {len(found)}. The next start makes them anew; "
            "`neuqi cache rm` removes them."
        )
    return 0


def _described(entry: Entry) -> dict[str, Any]:
    from neuqi_serve.cache.store import checkpoint_of

    checkpoint = checkpoint_of(entry)
    return {
        "key": entry.key,
        "model": "?" if checkpoint is None else checkpoint.manifest.source.get("name", "?"),
        "bits": None if checkpoint is None else checkpoint.recipe.spec.bits,
        "group_size": None if checkpoint is None else checkpoint.recipe.spec.group_size,
        "bytes": entry.nbytes,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
    }
