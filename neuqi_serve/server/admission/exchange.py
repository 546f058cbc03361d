"""One admitted HTTP request: its body is bounded in size and time, its status is noted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from neuqi_serve.server.admission import refusal as refused
from neuqi_serve.server.admission.refusal import Refusal
from neuqi_serve.server.admission.routes import Access, access

BODY_SECONDS = 60.0
QUEUE_RETRY_SECONDS = b"2"


class Exchange:
    """``receive`` and ``send`` of one request. ``status`` is 0 until an answer begins."""

    __slots__ = (
        "_body_done",
        "_deadline",
        "_limit",
        "_receive",
        "_received",
        "_send",
        "path",
        "refusal",
        "status",
    )

    def __init__(
        self,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
        path: str,
        limit: int,
    ) -> None:
        self._receive, self._send, self.path, self._limit = receive, send, path, limit
        self._received = 0
        self._deadline = 0.0
        self._body_done = False
        self.status = 0
        self.refusal: Refusal | None = None

    @property
    def queue_was_full(self) -> bool:
        """Whether vLLM refused the request because too many wait; a probe's 503 means something else."""
        return self.status == 503 and self.refusal is None and access(self.path) is Access.USER

    def announces_too_much(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the request says itself that its body is above the limit."""
        for name, value in headers:
            if name == b"content-length":
                # The HTTP server has checked that it is a number.
                return int(value) > self._limit
        return False

    async def receive(self) -> Any:
        """Pass the next piece of the body on, or end the request when it is too much or too late."""
        if self._body_done:
            return await self._receive()
        try:
            message = await self._next_piece()
        except TimeoutError:
            return await self._end(refused.too_slow(BODY_SECONDS))
        if message["type"] != "http.request":
            self._body_done = True
            return message
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            return await self._end(refused.body_too_large(self._limit))
        self._body_done = not message.get("more_body", False)
        return message

    async def _next_piece(self) -> Any:
        loop = asyncio.get_running_loop()
        if not self._deadline:
            self._deadline = loop.time() + BODY_SECONDS
        async with asyncio.timeout_at(self._deadline):
            return await self._receive()

    async def _end(self, refusal: Refusal) -> Any:
        self._body_done = True
        if not self.status:
            self.refusal = refusal
            await refusal.answer(self.path, self.send_refusal)
        # The application sees a client that has gone, and stops.
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Pass the application's answer on, unless it was given already."""
        if self.refusal is not None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status == 503:
                message = _with_retry_after(message)
        await self._send(message)

    async def send_refusal(self, message: Any) -> None:
        """Send a part of the refusal's answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _with_retry_after(message: Any) -> Any:
    headers = list(message.get("headers", ()))
    if any(name.lower() == b"retry-after" for name, _ in headers):
        return message
    return {**message, "headers": [*headers, (b"retry-after", QUEUE_RETRY_SECONDS)]}
