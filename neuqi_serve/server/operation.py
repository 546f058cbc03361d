"""The options of ``neuqi serve`` for running it: keys, limits, the status port, stopping, the check of the kernels."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from neuqi_serve.env import SANITY_MODES
from neuqi_serve.errors import UsageError
from neuqi_serve.server.listen_address import ListenAddress

DEFAULT_MAX_REQUEST_BYTES = 16 << 20
STATUS_PORT_OFFSET = 1000


@dataclass(frozen=True)
class Operation:
    """These options; None where the user gave nothing."""

    api_key_file: Path | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    status_port: int | None = None
    status_host: str | None = None
    drain_timeout: int | None = None
    sanity_check: str | None = None

    @classmethod
    def from_namespace(cls, args: argparse.Namespace) -> Operation:
        """Take them from parsed arguments.

        Raises:
            UsageError: a value outside its range.
        """
        for option in ("requests_per_minute", "tokens_per_minute", "max_request_bytes"):
            value = getattr(args, option)
            if value is not None and not 0 < value < float("inf"):
                flag = option.replace("_", "-")
                raise UsageError(f"expected --{flag} above 0, got {value:g}. Leave it out for the default.")
        if args.drain_timeout is not None and args.drain_timeout < 0:
            raise UsageError(f"expected --drain-timeout of 0 s or more, got {args.drain_timeout}.")
        if args.status_port is not None and not 0 <= args.status_port <= 65535:
            raise UsageError(f"expected --status-port from 0 to 65535, got {args.status_port}.")
        return cls(
            args.api_key_file,
            args.requests_per_minute,
            args.tokens_per_minute,
            args.max_request_bytes,
            args.status_port,
            args.status_host,
            args.drain_timeout,
            args.sanity_check,
        )

    def status_address(self, main: ListenAddress) -> ListenAddress | None:
        """Return where the status port is, None when there is none: port 0, or a Unix socket and no port given."""
        if self.status_port == 0 or (self.status_port is None and main.unix_socket):
            return None
        port = self.status_port
        if port is None:
            port = main.port + STATUS_PORT_OFFSET
            if port > 65535:
                port = main.port - STATUS_PORT_OFFSET
        return ListenAddress(main.host if self.status_host is None else self.status_host, port)


def add_operation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to vLLM's parser or to our own."""
    group = parser.add_argument_group("operation", "Keys, limits, status and stopping.")
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="API keys, one 'name: key [admin] [requests-per-minute=N] [tokens-per-minute=N]' a line; read again when "
        "it changes. With any key, every route but /health and /ping needs one, /metrics and administration an "
        "admin's. NEUQI_API_KEYS and NEUQI_ADMIN_KEYS hold more, separated by commas",
    )
    group.add_argument(
        "--requests-per-minute",
        type=float,
        metavar="N",
        help="limit of each key, 429 above it (default: none)",
    )
    group.add_argument(
        "--tokens-per-minute",
        type=float,
        metavar="N",
        help="limit of prompt and generated tokens of each key, 429 above it (default: none)",
    )
    group.add_argument(
        "--max-request-bytes",
        type=int,
        default=DEFAULT_MAX_REQUEST_BYTES,
        metavar="N",
        help="size of a request body, 413 above it (default: %(default)s)",
    )
    group.add_argument(
        "--status-port",
        type=int,
        metavar="PORT",
        help="port of /livez, /startupz, /readyz and the load's /metrics, open from the first second; 0 for none "
        f"(default: --port + {STATUS_PORT_OFFSET})",
    )
    group.add_argument("--status-host", metavar="HOST", help="its address (default: --host)")
    group.add_argument(
        "--drain-timeout",
        type=int,
        metavar="SECONDS",
        help="time that running requests get to finish after SIGTERM; the same as --shutdown-timeout",
    )
    group.add_argument(
        "--sanity-check",
        choices=SANITY_MODES,
        help="what to do when a kernel computes something else than its definition (default: refuse to serve)",
    )
