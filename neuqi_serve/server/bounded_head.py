"""The head of an HTTP request, bounded in size and time, before there is a request that the gate could refuse.

uvicorn's fast parser reads a head of any length, for as long as the client likes; vLLM's options for it
(``--h11-max-…``) hold for the slow parser only.
"""

from __future__ import annotations

from asyncio import TimerHandle
from typing import Any

MAX_HEAD_BYTES = 128 << 10
HEAD_SECONDS = 30.0
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bounded(protocol: type) -> type:
    """Return uvicorn's ``protocol`` with a bound on heads; the class itself when it has one (h11)."""
    if not hasattr(protocol, "on_headers_complete"):
        return protocol
    return type(f"Bounded{protocol.__name__}", (_Bounded, protocol), {})


class _Bounded:
    """Mixed into ``HttpToolsProtocol``: what is received counts while a head is incomplete before and after it."""

    transport: Any
    loop: Any
    _head_bytes = 0
    _heads = 0
    _in_body = False
    _deadline: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Expect a head from now on."""
        super().connection_made(transport)  # type: ignore[misc]
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        """Expect nothing any more."""
        self._head_is_there()
        super().connection_lost(error)  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        """Note the end of a head."""
        self._head_is_there()
        self._heads += 1
        self._in_body = True
        super().on_headers_complete()  # type: ignore[misc]

    def on_message_complete(self) -> None:
        """Note that what follows is the next head."""
        super().on_message_complete()  # type: ignore[misc]
        self._in_body = False
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse, and end the connection when its head has become too long."""
        heads, in_body = self._heads, self._in_body
        super().data_received(data)  # type: ignore[misc]
        if in_body or self._heads != heads:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._end(_TOO_LARGE)
        elif self._deadline is None:
            self._expect_head()

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._end, _TOO_SLOW)

    def _head_is_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self, answer: bytes) -> None:
        self._head_is_there()
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
