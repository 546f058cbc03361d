"""What the gate of every API process needs to know; travels in vLLM's parsed arguments, without any key itself."""

from __future__ import annotations

import ipaddress
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuqi_serve import env
from neuqi_serve.errors import UsageError
from neuqi_serve.server.admission.keys import ApiKey, KeyFile, make_key, parse_keys
from neuqi_serve.server.admission.shared_levels import create_levels
from neuqi_serve.server.operation import Operation

# The attribute of vLLM's arguments.
ATTRIBUTE = "neuqi_admission"
GATE = "neuqi_serve.server.admission.gate.Gate"
_VLLM_KEY = "VLLM_API_KEY"


@dataclass(frozen=True)
class AdmissionSettings:
    """``fixed`` keys and the ``key_file``; default limits per minute; ``private``: only this machine can connect.

    ``shared_levels``: the file in which several API processes keep what is left of the limits.
    """

    fixed: tuple[ApiKey, ...] = ()
    key_file: Path | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_request_bytes: int = 0
    private: bool = True
    shared_levels: Path | None = None
    cross_origin: bool = False


def collect_keys(given: Sequence[str] | None) -> tuple[ApiKey, ...]:
    """Return the keys of ``--api-key`` (else of ``VLLM_API_KEY``), ``NEUQI_API_KEYS`` and ``NEUQI_ADMIN_KEYS``.

    Raises:
        UsageError: a key that cannot be one.
    """
    plain = [key for key in given or [os.environ.get(_VLLM_KEY, "")] if key]
    source = "--api-key" if given else _VLLM_KEY
    keys = [make_key(source if len(plain) == 1 else f"{source} {i}", key) for i, key in enumerate(plain, 1)]
    users, admins = (text.replace(",", "\n") for text in env.api_keys())
    keys += parse_keys(users, "NEUQI_API_KEYS")
    keys += parse_keys(admins, "NEUQI_ADMIN_KEYS", admin=True)
    return tuple(keys)


def admit(args: Namespace, operation: Operation) -> list[str]:
    """Put the gate in front of vLLM's application; return what the user should know about it.

    Takes vLLM's own keys over: its middleware, which guards some routes only, would refuse all others.

    Raises:
        UsageError: a key that cannot be one, or keys for a front end that has no gate.
    """
    fixed = collect_keys(args.api_key)
    file = KeyFile(operation.api_key_file) if operation.api_key_file is not None else None
    keys = (*fixed, *(file.keys if file is not None else ()))
    other = _other_front_end(args)
    if keys and other is not None:
        raise UsageError(f"expected no API keys with {other}, which checks none. Leave it out, or the keys.")
    private = is_private(args.host, args.uds)
    settings = AdmissionSettings(
        fixed,
        operation.api_key_file,
        operation.requests_per_minute,
        operation.tokens_per_minute,
        operation.max_request_bytes,
        private,
        create_levels() if _processes(args) > 1 else None,
        bool(args.allowed_origins),
    )
    setattr(args, ATTRIBUTE, settings)
    args.api_key = None
    os.environ.pop(_VLLM_KEY, None)
    # vLLM adds the last one outermost.
    args.middleware = [*args.middleware, GATE]
    return _explain(keys, file, private)


def _other_front_end(args: Namespace) -> str | None:
    """Return the name of a server that vLLM would run instead of the one that has a gate."""
    from vllm import envs

    if args.grpc or args.grpc_port is not None:
        return "gRPC"
    return "vLLM's Rust front end" if envs.VLLM_USE_RUST_FRONTEND else None


def _processes(args: Namespace) -> int:
    # vLLM starts one per data-parallel rank unless it is told a number.
    return int(args.api_server_count or args.data_parallel_size or 1)


def is_private(host: str | None, unix_socket: str | None) -> bool:
    """Whether only processes of this machine can connect."""
    if unix_socket or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _explain(keys: Sequence[ApiKey], file: KeyFile | None, private: bool) -> list[str]:
    if not keys:
        if private:
            return ["no API keys: anybody on this machine may ask (--api-key-file sets some)"]
        return [
            "WARNING: no API keys: whoever reaches this address may ask. Set --api-key-file, or let a gateway check."
        ]
    admins = sum(key.admin for key in keys)
    line = f"API keys: {len(keys)}, {admins} of them for administration"
    lines = [line if admins else f"{line}: /metrics is closed (NEUQI_ADMIN_KEYS sets one)"]
    exposure = file.exposure() if file is not None else None
    return [*lines, f"WARNING: {exposure}"] if exposure else lines
