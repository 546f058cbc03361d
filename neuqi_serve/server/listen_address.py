"""The address to listen on, checked before the model is loaded."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from neuqi_serve.errors import PortInUseError, UsageError


@dataclass(frozen=True)
class ListenAddress:
    """``host`` and ``port``, or the path of a Unix socket; ``tls``: clients must speak https."""

    host: str
    port: int
    unix_socket: str | None = None
    tls: bool = False

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server, e.g. ``http://127.0.0.1:8000``."""
        if self.unix_socket:
            return f"unix:{self.unix_socket}"
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(self.host)
        if host is None:
            host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"

    def check_free(self) -> None:
        """Bind the address and let it go again.

        Raises:
            PortInUseError: another process listens there.
            UsageError: this machine has no such address, or the port may not be used.
        """
        if self.unix_socket:
            if Path(self.unix_socket).exists():
                raise PortInUseError(
                    f"expected no file at {self.unix_socket}, got one. Stop the server there, or remove it."
                )
            return
        self.listen().close()

    def listen(self) -> socket.socket:
        """Return a socket that listens on ``host`` and ``port``.

        Raises:
            PortInUseError: another process listens there.
            UsageError: this machine has no such address, or the port may not be used.
        """
        try:
            found = socket.getaddrinfo(
                self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise UsageError(
                f"expected an address of this machine as --host, got {self.host!r} ({error}). Try 127.0.0.1 or 0.0.0.0."
            ) from None
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        # As vLLM does: a connection of a stopped server may still be winding down.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise self._refused(error) from None
        return listener

    def _refused(self, error: OSError) -> PortInUseError | UsageError:
        import errno

        if error.errno == errno.EADDRINUSE:
            return PortInUseError(
                f"expected port {self.port} of {self.host or 'all addresses'} to be free, got one in use. Stop the "
                f"process that listens there, or choose another: --port {self.port + 1}."
            )
        return UsageError(
            f"expected an address to listen on, got {self.host}:{self.port} ({error.strerror}). "
            "Try --host 127.0.0.1 and a port above 1023."
        )
