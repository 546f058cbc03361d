"""Answers to requests that are not admitted: the OpenAI API's error body, and Anthropic's for its own routes."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]

# The reasons are the label of ``neuqi_requests_rejected_total``.
QUEUE_FULL = "queue_full"
_ANTHROPIC_PREFIX = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True)
class Refusal:
    """Why a request is not admitted: HTTP ``status``, ``reason`` (a metric's label), ``message`` for the client.

    ``kind`` and ``code`` are the OpenAI API's error type and code; ``retry_after`` is in seconds.
    """

    status: int
    reason: str
    message: str
    kind: str
    code: str
    retry_after: float | None = None

    def body(self, path: str) -> bytes:
        """Return the JSON that clients of the API at ``path`` understand."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.kind,
            "param": None,
            "code": self.code,
        }
        if path.startswith(_ANTHROPIC_PREFIX):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            return json.dumps({"type": "error", "error": error | {"type": kind}}).encode()
        return json.dumps({"error": error}).encode()

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Return the headers of the answer."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.retry_after is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        if self.status in (408, 413, 431, 503):
            # The rest of the body is not wanted, or the server is about to go.
            headers.append((b"connection", b"close"))
        return headers

    async def answer(self, path: str, send: Send) -> None:
        """Send the answer."""
        body = self.body(path)
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers(body)})
        await send({"type": "http.response.body", "body": body})


def no_key() -> Refusal:
    """No key where one is needed."""
    return Refusal(
        401,
        "no_key",
        "expected an API key, got none. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        "invalid_request_error",
        "missing_api_key",
    )


def wrong_key() -> Refusal:
    """A key that nobody has."""
    return Refusal(
        401,
        "wrong_key",
        "expected a valid API key, got one that this server does not know.",
        "invalid_request_error",
        "invalid_api_key",
    )


def no_admin() -> Refusal:
    """A user's key where an administrator's is needed."""
    return Refusal(
        403,
        "no_admin",
        "expected an administrator's API key for this route, got another or none.",
        "invalid_request_error",
        "insufficient_permissions",
    )


def too_many(what: str, per_minute: float, seconds: float) -> Refusal:
    """A rate limit is reached; ``what``: requests or tokens."""
    return Refusal(
        429,
        f"{what}_per_minute",
        f"expected at most {per_minute:g} {what} per minute, got more. Try again in {max(1, math.ceil(seconds))} s.",
        what,
        "rate_limit_exceeded",
        seconds,
    )


def body_too_large(limit: int) -> Refusal:
    """A request body above the limit."""
    return Refusal(
        413,
        "body_too_large",
        f"expected a request body of at most {limit} bytes, got a larger one.",
        "invalid_request_error",
        "request_too_large",
    )


def headers_too_large(limit: int) -> Refusal:
    """Headers above the limit."""
    return Refusal(
        431,
        "headers_too_large",
        f"expected headers of at most {limit} bytes, got larger ones.",
        "invalid_request_error",
        "headers_too_large",
    )


def too_slow(seconds: float) -> Refusal:
    """A body that does not arrive."""
    return Refusal(
        408,
        "slow_body",
        f"expected the whole request body within {seconds:g} s, got a part of it.",
        "invalid_request_error",
        "request_timeout",
    )


def draining() -> Refusal:
    """The server is about to stop."""
    return Refusal(
        503,
        "draining",
        "the server is stopping and takes no new requests. Try again, or another instance.",
        "service_unavailable",
        "server_draining",
        5.0,
    )


def engine_dead() -> Refusal:
    """The engine has died, and the server is about to end."""
    return Refusal(
        503,
        "engine_dead",
        "the engine has stopped working and the server is about to restart. Try again, or another instance.",
        "service_unavailable",
        "engine_dead",
        30.0,
    )
