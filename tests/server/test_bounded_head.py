"""Heads of requests that are too long or too slow, on uvicorn's own protocol and a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from neuqi_serve.server import bounded_head as module
from neuqi_serve.server.bounded_head import MAX_HEAD_BYTES, bounded

uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, which comes with vLLM")
pytest.importorskip("httptools", reason="needs httptools, which comes with vLLM")

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
BODY = 300_000
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % BODY


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_SECONDS", 0.5)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more and scope["path"] != "/early":
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _run(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]) -> Any:
    """Serve the application on a socket, and talk to it on one connection."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.server import ServerState

    async def run() -> Any:
        config = uvicorn.Config(_app, log_level="critical", lifespan="off")
        config.load()
        protocol, state = bounded(HttpToolsProtocol), ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            try:
                async with asyncio.timeout(20):
                    return await talk(reader, writer)
            finally:
                writer.close()

    return asyncio.run(run())


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(size)


def test_requests_pass_as_before_also_after_long_bodies() -> None:
    async def talk(reader: Any, writer: Any) -> list[tuple[int, bytes]]:
        found = []
        for _ in range(3):
            writer.write(POST)
            for _ in range(3):
                writer.write(b"x" * (BODY // 3))
                await writer.drain()
                await asyncio.sleep(0.02)
            found.append(await _answer(reader))
            writer.write(GET + b"\r\n")
            found.append(await _answer(reader))
        return found

    assert _run(talk) == [(200, str(BODY).encode()), (200, b"0")] * 3


def test_what_follows_an_early_answer_is_no_head() -> None:
    async def talk(reader: Any, writer: Any) -> list[tuple[int, bytes]]:
        writer.write(POST.replace(b"POST / ", b"POST /early "))
        found = [await _answer(reader)]
        writer.write(b"x" * BODY)
        await writer.drain()
        writer.write(GET + b"\r\n")
        return [*found, await _answer(reader)]

    assert _run(talk) == [(200, b"0"), (200, b"0")]


@pytest.mark.parametrize("piece", [b"x-a: " + b"a" * 1000 + b"\r\n", b"a" * 1000])
def test_an_endless_head_is_ended(piece: bytes) -> None:
    async def talk(reader: Any, writer: Any) -> int:
        writer.write(GET + b"x-first: ")
        sent = 0
        while not reader.at_eof() and sent < 100 * MAX_HEAD_BYTES:
            writer.write(piece)
            sent += len(piece)
            await asyncio.sleep(0)
            if reader._buffer:  # type: ignore[attr-defined]
                break
            await writer.drain()
        assert sent < 4 * MAX_HEAD_BYTES
        return (await _answer(reader))[0]

    assert _run(talk) == 431


@pytest.mark.parametrize("start", [b"", b"GET / HT", GET])
def test_a_head_that_does_not_come_is_not_waited_for(start: bytes) -> None:
    async def talk(reader: Any, writer: Any) -> int:
        writer.write(start)
        return (await _answer(reader))[0]

    assert _run(talk) == 408


def test_a_second_head_has_its_time_too() -> None:
    async def talk(reader: Any, writer: Any) -> list[int]:
        writer.write(GET + b"\r\n")
        first = (await _answer(reader))[0]
        # Between requests the connection may rest.
        await asyncio.sleep(0.7)
        writer.write(GET)
        return [first, (await _answer(reader))[0]]

    assert _run(talk) == [200, 408]


def test_the_slow_parser_has_bounds_of_its_own() -> None:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    assert bounded(H11Protocol) is H11Protocol
