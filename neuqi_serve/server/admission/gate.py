"""The outermost ASGI middleware: lets a request in or refuses it, before anything else has looked at it.

Without keys every route is open to this machine; from elsewhere the routes that change the server are closed. With
keys every route but the probes needs one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from neuqi_serve.errors import UsageError
from neuqi_serve.server.admission import refusal as refused
from neuqi_serve.server.admission.exchange import Exchange
from neuqi_serve.server.admission.keys import ApiKey, KeyFile, KeyRing
from neuqi_serve.server.admission.rate_limit import RateLimits
from neuqi_serve.server.admission.refusal import Refusal
from neuqi_serve.server.admission.routes import Access, access, exists, is_monitoring, route_path
from neuqi_serve.server.admission.settings import ATTRIBUTE, AdmissionSettings
from neuqi_serve.server.admission.shared_levels import SharedLevels
from neuqi_serve.server.admission.usage import charged
from neuqi_serve.server.http_metrics import HttpMetrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_HEADER_BYTES = 64 << 10


class Gate:
    """One API process's gate. ``draining`` and ``dead`` close it; ``running`` counts the requests inside."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._settings: AdmissionSettings | None = None
        self._keys = KeyRing()
        self._limits = RateLimits(None, None)
        self._refuse: App = _answer
        self._metrics = HttpMetrics()
        self.running = 0
        self.draining = False
        self.dead = False

    @property
    def has_keys(self) -> bool:
        """Whether requests need one."""
        return bool(self._keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope of ASGI."""
        if self._settings is None:
            self._set_up(scope["app"])
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _set_up(self, app: Any) -> None:
        settings = getattr(app.state.args, ATTRIBUTE, None)
        if not isinstance(settings, AdmissionSettings):
            raise UsageError(f"expected the settings of `neuqi serve` for {type(self).__name__}, got none.")
        self._settings = settings
        file = KeyFile(settings.key_file) if settings.key_file is not None else None
        self._keys = KeyRing(settings.fixed, file)
        levels = SharedLevels(settings.shared_levels) if settings.shared_levels is not None else None
        self._limits = RateLimits(settings.requests_per_minute, settings.tokens_per_minute, levels)
        if settings.cross_origin:
            self._refuse = _with_cors(app.state.args)
        app.state.neuqi_gate = self

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        needs = access(path)
        exchange = Exchange(receive, send, path, self._settings.max_request_bytes)  # type: ignore[union-attr]
        answer = self._refusal(scope, path, needs)
        if answer is None and exchange.announces_too_much(scope["headers"]):
            answer = refused.body_too_large(self._settings.max_request_bytes)  # type: ignore[union-attr]
        if answer is None and needs is Access.USER:
            answer = self._over_limit(scope)
        if answer is not None:
            exchange.refusal = answer
            scope["neuqi_refusal"] = path, answer
            try:
                await self._refuse(scope, receive, exchange.send_refusal)
            finally:
                self._metrics.count(scope, exchange)
            return
        # A scrape or a probe is not what a server that stops should wait for.
        works = needs is Access.USER
        self.running += works
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            # A request that was ended here looks to the application like a client that has gone.
            if exchange.refusal is None:
                raise
        finally:
            self.running -= works
            self._metrics.count(scope, exchange)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        answer = self._refusal(scope, path, access(path)) or self._over_limit(scope)
        if answer is not None:
            self._metrics.reject(answer.reason)
            # Before it is accepted this is an HTTP 403, the only refusal that every ASGI server knows.
            await send({"type": "websocket.close", "code": 1008, "reason": answer.message[:120]})
            return
        self.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.running -= 1

    def _refusal(self, scope: Scope, path: str, needs: Access) -> Refusal | None:
        """Return why the request may not pass; note its key in the scope when it may."""
        # The last scrape still wants its numbers.
        if (self.dead or self.draining) and not is_monitoring(path):
            return refused.engine_dead() if self.dead else refused.draining()
        if needs is Access.OPEN or self._is_preflight(scope):
            return None
        headers = scope["headers"]
        if sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEADER_BYTES:
            return refused.headers_too_large(MAX_HEADER_BYTES)
        if not self._keys:
            closed = needs is Access.ADMIN and not self._settings.private  # type: ignore[union-attr]
            if closed and not is_monitoring(path) and exists(scope):
                return refused.no_admin()
            return None
        secret = _secret(headers)
        if secret is None:
            return refused.no_key()
        key = self._keys.find(secret)
        if key is None:
            return refused.wrong_key()
        scope["neuqi_key"] = key
        # What does not exist is answered with 404, so that a client sees the mistake in its address.
        if needs is Access.ADMIN and not key.admin and exists(scope):
            return refused.no_admin()
        return None

    def _over_limit(self, scope: Scope) -> Refusal | None:
        key: ApiKey | None = scope.get("neuqi_key")
        if key is not None and key.admin:
            # Whoever looks after the server must not be locked out of it.
            charged.set(None)
            return None
        limits = self._limits.of(key)
        charged.set(limits.tokens if limits is not None else None)
        exceeded = limits.exceeded() if limits is not None else None
        return None if exceeded is None else refused.too_many(*exceeded)

    def _is_preflight(self, scope: Scope) -> bool:
        """Whether vLLM's CORS middleware answers the request by itself: browsers send no key with it."""
        if not self._settings.cross_origin or scope.get("method") != "OPTIONS":  # type: ignore[union-attr]
            return False
        names = {name for name, _ in scope["headers"]}
        return b"origin" in names and b"access-control-request-method" in names


def _secret(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key of a request: a bearer token, or the header of Anthropic's clients."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() == b"bearer" and token.strip():
                return token.strip()
        elif name == b"x-api-key" and value:
            return value
    return None


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    path, answer = scope["neuqi_refusal"]
    await answer.answer(path, send)


def _with_cors(args: Any) -> App:
    """Give refusals the headers without which a browser hides them from the page."""
    from starlette.middleware.cors import CORSMiddleware

    cors: App = CORSMiddleware(
        _answer,
        allow_origins=args.allowed_origins,
        allow_credentials=args.allow_credentials,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
    )
    return cors
