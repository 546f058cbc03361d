"""The loop of the status process: HTTP on one socket, messages on another, and an eye on the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from dataclasses import dataclass

from neuqi_serve.server.status.state import ServerState

READ_SECONDS = 5.0
MAX_REQUEST_BYTES = 8 << 10
POLL_SECONDS = 0.5
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Channels:
    """``listener``: the status port; ``messages``: where ``load_status`` sends to; ``server``: the process told of."""

    listener: socket.socket
    messages: socket.socket
    server: int


def answer_until_the_end(channels: Channels) -> int:
    """Answer probes until the server has ended; return 0 when it said so, 1 when it just died."""
    return asyncio.run(_run(channels))


async def _run(channels: Channels) -> int:
    state, loop = ServerState(), asyncio.get_running_loop()
    gone = asyncio.Event()
    channels.messages.setblocking(False)

    def receive() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                _take(state, channels.messages.recv(64 << 10))
                if state.ended:
                    gone.set()

    loop.add_reader(channels.messages.fileno(), receive)
    watch = _watch(channels.server, gone)
    http = await asyncio.start_server(
        lambda reader, writer: _serve(state, reader, writer), sock=channels.listener, limit=MAX_REQUEST_BYTES
    )
    async with http:
        await gone.wait()
    receive()
    if watch is not None:
        os.close(watch)
    if not state.ended:
        print(f"neuqi: the server process has died without a word, in phase {state.phase!r}", file=sys.stderr)
    return 0 if state.ended else 1


def _watch(server: int, gone: asyncio.Event) -> int | None:
    """Set ``gone`` when the process ends; return the descriptor to close afterwards."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(server)
    except (AttributeError, OSError):
        # Not Linux, or an old kernel: the parent of an orphan is another process.
        def look() -> None:
            if os.getppid() != server:
                gone.set()
            else:
                loop.call_later(POLL_SECONDS, look)

        look()
        return None
    loop.add_reader(descriptor, gone.set)
    if os.getppid() != server:
        gone.set()
    return descriptor


def _take(state: ServerState, datagram: bytes) -> None:
    with contextlib.suppress(ValueError):
        message = json.loads(datagram)
        if isinstance(message, dict):
            state.update(message)


async def _serve(state: ServerState, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(READ_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(response(state, head))
            await writer.drain()
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        # Whoever sends no request gets no answer.
        pass
    finally:
        with contextlib.suppress(OSError):
            writer.close()


def response(state: ServerState, head: bytes) -> bytes:
    """Return the whole HTTP response to the request that ``head`` begins."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/"):
        return _response(400, "application/json", '{"error": "expected an HTTP request"}')
    method, path = words[0], words[1].split(b"?", 1)[0]
    if method not in (b"GET", b"HEAD"):
        return _response(405, "application/json", '{"error": "expected GET or HEAD"}')
    if path == b"/metrics":
        answer = _response(200, "text/plain; version=0.0.4; charset=utf-8", state.metrics())
    elif path in (b"/livez", b"/readyz", b"/startupz"):
        found = getattr(state, path[1:].decode())()
        answer = _response(found.code, "application/json", json.dumps(found.body))
    else:
        known = '{"error": "expected /livez, /startupz, /readyz or /metrics"}'
        answer = _response(404, "application/json", known)
    return answer.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n" if method == b"HEAD" else answer


def _response(code: int, kind: str, body: str) -> bytes:
    content = body.encode() + b"\n" * (kind == "application/json")
    head = (
        f"HTTP/1.1 {code} {_REASONS[code]}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
